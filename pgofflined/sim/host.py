"""State of a simulated host that all its ports share, and the building and ending of domains."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from errno import ENOMEM, ESRCH
from itertools import pairwise
from typing import TYPE_CHECKING
from uuid import UUID

import numpy as np

from pgofflined.core.domains import GuestKind, ShutdownReason
from pgofflined.core.errors import DomainGone, XenError
from pgofflined.core.frames import DOM0, DOMID_IO, DOMID_XEN, Domid, Mfn, Pfn
from pgofflined.core.suspending import SuspendSupport
from pgofflined.core.xenversion import XenVersion
from pgofflined.ports import Clock
from pgofflined.sim.clock import ManualClock
from pgofflined.sim.errors import Refused, SimulationError
from pgofflined.sim.frames import Frames, FrameType
from pgofflined.sim.guests import Grant, Hold, SimulatedDomain
from pgofflined.sim.layout import PvSpec, plan_layout
from pgofflined.sim.linux import LinuxBuilder
from pgofflined.sim.pagetables import PageFault
from pgofflined.sim.pvguest import PvGuest
from pgofflined.sim.references import References

if TYPE_CHECKING:
    from pgofflined.ports import FrameArray

_MISSING = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
# XEN_DOMCTL_createdomain leaves room for libxl's LIBXL_MAXMEM_CONSTANT (1 MiB).
_HEADROOM = 256
# The first release with the buddy fix.
_FIXED_VERSION = XenVersion(4, 20, 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostSpec:
    """What a simulated host is to have; counts are frames.

    The host's frames are, from 0 on: the hypervisor's image, its heap, I/O and holes, dom0's,
    and what is left for guests.  ``scrub_seconds`` is how long freed frames stay dirty;
    ``reuses_first`` gives out first what was freed last.
    """

    frames: int = 8192
    image: int = 16
    heap: int = 32
    io: int = 16
    dom0: int = 256
    pcpus: int = 2
    version: XenVersion = _FIXED_VERSION
    l1tf: bool = False
    seed: int = 1
    scrub_seconds: float = 3.0
    reuses_first: bool = False


class HostState:
    """Frames, domains and time of one simulated host."""

    def __init__(self, spec: HostSpec | None = None, *, clock: Clock | None = None) -> None:
        self.spec = spec or HostSpec()
        self.clock: Clock = clock or ManualClock()
        self.rng = np.random.default_rng(self.spec.seed)
        self.lock = threading.RLock()
        self.frames = Frames(
            self.spec.frames,
            self.rng,
            splits_safely=self.spec.version.offlines_free_frames_safely,
            reuses_first=self.spec.reuses_first,
        )
        self.references = References(self.frames, l1tf=self.spec.l1tf, crash=self.crash)
        self.by_domid: dict[Domid, SimulatedDomain] = {}
        self.crashes: dict[Domid, str] = {}
        self.lasting_holds: list[Hold] = []
        self.told_of_ends: list[Callable[[], None]] = []
        self._next_domid = 1
        self._dirty_since: float | None = None
        self._lay_out()

    # What tests and the demo look at.

    @property
    def corrupted(self) -> str | None:
        """Why the heap's free lists are corrupt; None while they are sound."""
        return self.frames.corrupted

    @property
    def idle_scrub_spinning(self) -> bool:
        """Whether an idle CPU looks for ever for a dirty page that has left the heap."""
        return self.frames.dirty_taken_out > 0

    def simulated(self, domid: Domid) -> SimulatedDomain:
        """The simulated domain itself.  Raises DomainGone."""
        try:
            return self.by_domid[domid]
        except KeyError:
            raise DomainGone(domid) from None

    def pv(self, domid: Domid) -> PvGuest:
        """The kernel of a PV guest.  Raises ValueError for other domains."""
        guest = self.simulated(domid).pv
        if guest is None:
            raise ValueError(f"d{domid} is no PV guest")
        return guest

    def frame_of(self, domid: Domid, pfn: int) -> Mfn:
        """The host frame behind a guest frame now, whatever kind of guest."""
        domain = self.simulated(domid)
        if domain.pv is not None:
            return domain.pv.mfn(pfn)
        return Mfn(int(domain.guest_frames[pfn]))

    # Building and ending domains.

    def add_pv(self, spec: PvSpec | None = None) -> Domid:
        """Build and start a 64-bit Linux-like PV guest."""
        return self._add_pv(spec or PvSpec(), self._take_domid())

    def add_hvm(
        self,
        *,
        kind: GuestKind = GuestKind.PVH,
        name: str = "pvh",
        pages: int = 256,
        vcpus: int = 2,
    ) -> Domid:
        """Build and start a PVH or HVM guest."""
        return self._add_hvm(kind, name, pages, vcpus, self._take_domid())

    def destroy(self, domid: Domid) -> None:
        """End a domain; frames that others still refer to stay until they let go."""
        with self.lock:
            domain = self.simulated(domid)
            domain.dying = True
            self.references.dying.add(int(domid))
            self.lasting_holds += [hold for hold in domain.holds if hold.lasting]
            for hold in [hold for hold in domain.holds if not hold.lasting]:
                self.release_hold(domid, hold)
            frames = self.frames
            own = np.flatnonzero((frames.owner == domid) & frames.pinned)
            for mfn in own.tolist():
                self.references.unpin(mfn)
            # From the highest on, as they were given out: relinquish_memory() goes through the
            # list that assign_pages() has appended them to.  Each finds those above it free.
            for mfn in np.flatnonzero((frames.owner == domid) & frames.allocated)[::-1].tolist():
                frames.allocated[mfn] = False
                self.references.put(mfn)
            del self.by_domid[domid]
            self._dirty_since = self.clock.monotonic()
            for tell in self.told_of_ends:
                tell()

    def reboot(self, domid: Domid) -> None:
        """End a domain and start one like it, with another uuid, under the same domid."""
        with self.lock:
            self._end(domid).rebuild()

    def migrate_to_self(self, domid: Domid) -> Domid:
        """Live migration of a PVH or HVM guest to this host: same guest, new domid and frames.

        Raises XenError ENOMEM where the host cannot hold it twice.
        """
        with self.lock:
            old = self.simulated(domid)
            if old.gfns is None:
                raise SimulationError("only PVH and HVM guests migrate here")
            present = np.flatnonzero(old.gfns != _MISSING)
            if self.frames.free_count < len(present) + 1:
                raise XenError(ENOMEM, op="populate_physmap", domid=domid)
            new = self._add_hvm(old.kind, old.name, len(present), old.vcpus, self._take_domid())
            domain = self.simulated(new)
            self.frames.contents.move(old.gfns[present], domain.guest_frames[: len(present)])
            domain.uuid, domain.behaviour, domain.activity = old.uuid, old.behaviour, None
            # Its control/feature-suspend is made anew, and Linux writes it only when it boots.
            domain.suspend_support = SuspendSupport.SILENT
            self._end(domid)
            return new

    def _end(self, domid: Domid) -> SimulatedDomain:
        domain = self.simulated(domid)
        for hold in [hold for hold in domain.holds if not hold.of_ours]:
            self.release_hold(domid, hold)
        self.destroy(domid)
        return domain

    def crash(self, domid: int, reason: str) -> None:
        """domain_crash()."""
        domain = self.by_domid.get(Domid(domid))
        if domain is None or domain.crash_reason is not None:
            return
        domain.crash_reason = reason
        domain.shutdown = ShutdownReason.CRASH
        self.crashes[Domid(domid)] = reason

    # References and grants from outside.

    def hold(self, domid: Domid, pfn: int, *, why: str, writable: bool = True) -> Hold:
        """Let something in dom0 map a guest's page, grant or not."""
        with self.lock:
            mfn = self.frame_of(domid, pfn)
            kind = FrameType.NONE
            if writable and int(domid) not in self.references.external:
                kind = FrameType.WRITABLE
                self.references.get_both(mfn, int(domid), kind)
            else:
                self.references.get(mfn, int(domid))
            hold = Hold(mfn=mfn, why=why, kind=kind, lasting=True)
            self.simulated(domid).holds.append(hold)
            return hold

    def release_hold(self, domid: Domid, hold: Hold) -> None:
        """Take such a mapping away; also after the domain has ended."""
        with self.lock:
            domain = self.by_domid.get(domid)
            holders = domain.holds if domain and hold in domain.holds else self.lasting_holds
            holders.remove(hold)
            if hold.kind is not FrameType.NONE:
                self.references.put_both(hold.mfn)
            else:
                self.references.put(hold.mfn)

    def grant(self, domid: Domid, pfn: int, *, to: Domid = DOM0, mapped: bool = False) -> Grant:
        """Let a guest offer a page to another domain, which maps it or not."""
        hold = self.hold(domid, pfn, why=f"grant mapped by d{to}") if mapped else None
        granted = Grant(pfn=Pfn(pfn), to=to, mapping=hold)
        self.simulated(domid).grants.append(granted)
        return granted

    def poison(self, mfn: int, *, known: bool = False) -> None:
        """Make the memory of a frame bad; ``known`` where Xen saw the error (PGC_broken)."""
        self.frames.poisoned[mfn] = True
        self.frames.broken[mfn] |= known
        owner = self.by_domid.get(Domid(int(self.frames.owner[mfn])))
        if known and owner is not None and owner.kind is GuestKind.PV:
            # As if Xen had handled it on pCPU 0 (docs/xen-bugs.md).
            owner.pod_lock_is_broken = True

    def set_m2p(self, mfn: int, pfn: int) -> None:
        """Change an M2P entry, as a PV guest may for its own frames (MMU_MACHPHYS_UPDATE)."""
        with self.lock:
            self.frames.m2p[mfn] = pfn

    # Inner workings.

    @contextmanager
    def call(self, op: str, domid: Domid | None = None, mfn: int | None = None) -> Iterator[None]:
        """Around every port call: one at a time, the guests run meanwhile, refusals get a name."""
        with self.lock:
            self._pass_time()
            try:
                yield
            except Refused as refused:
                where = None if mfn is None else Mfn(mfn)
                raise XenError(refused.errno, op=op, domid=domid, mfn=where) from None

    def domain_or_refuse(self, domid: Domid) -> SimulatedDomain:
        """A domain for a memory hypercall.  Refuses with ESRCH."""
        domain = self.by_domid.get(domid)
        if domain is None:
            raise Refused(ESRCH)
        return domain

    def freed_dirty(self) -> None:
        """Note that the idle loop has something to scrub."""
        self._dirty_since = self.clock.monotonic()

    def become_suspended(self, domain: SimulatedDomain) -> None:
        """The guest makes its suspend call; nothing happens if it cannot run."""
        domain.suspends_at = None
        if not domain.runs:
            return
        if domain.pv is not None:
            domain.pv.before_suspend()
        domain.shutdown = ShutdownReason.SUSPEND
        domain.thought_shut_down = True

    def _pass_time(self) -> None:
        now, since = self.clock.monotonic(), self._dirty_since
        if since is not None and now - since >= self.spec.scrub_seconds:
            self.frames.scrubbed()
            self._dirty_since = None
        for domain in list(self.by_domid.values()):
            if domain.suspends_at is not None and now >= domain.suspends_at:
                self.become_suspended(domain)
            if domain.activity is not None and domain.runs:
                try:
                    domain.activity()
                except PageFault as fault:
                    self.crash(domain.domid, str(fault))

    def _take_domid(self) -> Domid:
        domid = Domid(self._next_domid)
        self._next_domid += 1
        return domid

    def _uuid(self) -> UUID:
        return UUID(bytes=self.rng.bytes(16), version=4)

    def _lay_out(self) -> None:
        spec, frames = self.spec, self.frames
        ranges = np.cumsum([0, spec.image, spec.heap, spec.io, spec.dom0])
        image, heap, io, dom0 = (
            np.arange(first, last, dtype=np.uint64) for first, last in pairwise(ranges.tolist())
        )
        frames.reserve(np.concatenate([image, heap, io, dom0]))
        frames.image[image.astype(np.int64)] = True
        frames.owner[image.astype(np.int64)] = DOMID_XEN
        frames.owner[io.astype(np.int64)] = DOMID_IO
        frames.ram[io.astype(np.int64)] = False
        frames.special[heap.astype(np.int64)] = True
        for part in (image, heap, io):
            frames.refs[part.astype(np.int64)] = 1
        frames.assign(dom0, DOM0)
        frames.m2p[dom0.astype(np.int64)] = np.arange(len(dom0), dtype=np.uint64)
        self.by_domid[DOM0] = SimulatedDomain(
            domid=DOM0,
            uuid=UUID(int=0),
            name="Domain-0",
            kind=GuestKind.PV,
            vcpus=spec.pcpus,
            max_pages=len(dom0),
            tot_pages=len(dom0),
            shared_info=self._special_frame(DOM0),
            rebuild=lambda: None,
        )

    def _special_frame(self, domid: Domid) -> Mfn:
        """A frame of the Xen heap shared with a guest (share_xen_page_with_guest)."""
        mfn = self.frames.allocate()
        self.frames.assign(np.array([mfn], dtype=np.uint64), domid)
        self.frames.special[mfn] = True
        return mfn

    def _claim(self, domid: Domid, number: int) -> FrameArray:
        """Frames for a guest's memory in no particular order."""
        mfns = self.rng.permutation(self.frames.allocate_many(number))
        self.frames.assign(mfns, domid)
        return mfns

    def _add_pv(self, spec: PvSpec, domid: Domid) -> Domid:
        with self.lock:
            layout = plan_layout(spec)
            frames = self.frames
            domain = SimulatedDomain(
                domid=domid,
                uuid=self._uuid(),
                name=spec.name,
                kind=GuestKind.PV,
                vcpus=spec.vcpus,
                max_pages=spec.pages + spec.headroom,
                shared_info=self._special_frame(domid),
                rebuild=lambda: self._rebuild_pv(spec, domid),
            )
            pfns = np.array(layout.populated, dtype=np.int64)
            mfns = np.full(layout.max_pfn, _MISSING, dtype=np.uint64)
            mfns[pfns] = self._claim(domid, len(pfns))
            frames.m2p[mfns[pfns].astype(np.int64)] = pfns.astype(np.uint64)
            seeds = self.rng.integers(1, 2**64, len(pfns), dtype=np.uint64)
            frames.contents.fill(mfns[pfns], seeds)
            lent = np.flatnonzero((frames.owner == DOM0) & ~frames.special)
            foreign = lent[len(lent) - len(layout.foreign) :].astype(np.uint64)
            LinuxBuilder(
                layout=layout,
                mfns=mfns,
                foreign=foreign,
                frames=frames,
                references=self.references,
                domain=domain,
            ).build()
            domain.pv = PvGuest(
                layout=layout, frames=frames, references=self.references, domain=domain
            )
            self.by_domid[domid] = domain
            return domid

    def _rebuild_pv(self, spec: PvSpec, domid: Domid) -> None:
        self.references.dying.discard(int(domid))
        self._add_pv(spec, domid)

    def _add_hvm(self, kind: GuestKind, name: str, pages: int, vcpus: int, domid: Domid) -> Domid:
        with self.lock:
            gfns = self._claim(domid, pages)
            index = gfns.astype(np.int64)
            self.frames.m2p[index] = np.arange(pages, dtype=np.uint64)
            self.frames.contents.fill(gfns, self.rng.integers(1, 2**64, pages, dtype=np.uint64))
            self.references.external.add(int(domid))
            self.by_domid[domid] = SimulatedDomain(
                domid=domid,
                uuid=self._uuid(),
                name=name,
                kind=kind,
                vcpus=vcpus,
                max_pages=pages + _HEADROOM,
                tot_pages=pages,
                shared_info=self._special_frame(domid),
                gfns=gfns,
                rebuild=lambda: self._rebuild_hvm(kind, name, pages, vcpus, domid),
                # Console and xenstore ring lie at the end of memory.
                grants=[Grant(pfn=Pfn(pages - 1 - ring), to=DOM0) for ring in (0, 1)],
            )
            return domid

    def _rebuild_hvm(
        self, kind: GuestKind, name: str, pages: int, vcpus: int, domid: Domid
    ) -> None:
        self.references.dying.discard(int(domid))
        self._add_hvm(kind, name, pages, vcpus, domid)
