"""The host that we run on, as ``ports.Hypervisor``."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import UUID

from pgofflined.core.domains import DomainInfo
from pgofflined.core.frames import Domid, Mfn, Pfn
from pgofflined.core.offline import OfflineReply, OfflineState, OnlineFlag
from pgofflined.core.suspending import SuspendSupport
from pgofflined.core.xenversion import XenVersion
from pgofflined.ports import SuspendLimits, Swapped, VcpuFrames, nothing
from pgofflined.ports.affinity import AffinityNote
from pgofflined.saving import unfinished_save
from pgofflined.xen.control import Control, probe_interface, read_version
from pgofflined.xen.domains import Domains
from pgofflined.xen.frames import Frames
from pgofflined.xen.libs import ForeignPages, XenCall
from pgofflined.xen.monitors import Monitors
from pgofflined.xen.placement import LinuxThread, Placement, restore
from pgofflined.xen.suspension import Suspension
from pgofflined.xen.toolstack import FirstLook
from pgofflined.xen.vcpus import Dom0Vcpus

if TYPE_CHECKING:
    from pgofflined.core.moves import PteWrites
    from pgofflined.ports import FrameArray, FrameWindow, Hypervisor, TypeArray, Words
    from pgofflined.xen.exchange import Exchange
    from pgofflined.xen.memory import Memory
    from pgofflined.xen.pagetables import PageTables


@dataclass(frozen=True, slots=True, kw_only=True)
class _Guests:
    """What reaches into guests' memory."""

    memory: Memory
    tables: PageTables
    exchange: Exchange


@dataclass(frozen=True, slots=True, kw_only=True)
class _Looked:
    """When nobody worked on a domain."""

    domid: Domid
    uuid: UUID
    look: FirstLook


class _Last(threading.local):
    """A thread's last look.  A job looks twice in its thread; no other thread's look is its own."""

    at: _Looked | None = None


class XenHypervisor:
    """Xen, seen from dom0.  Methods may be called from any thread; their contracts are the ports'.

    Opening it asks the hypervisor for its version and for the interface that it speaks.  Raises
    PortError when this is no dom0, the libraries are missing, or the release is not known.
    ``affinity`` is where it is noted that dom0's vCPUs are narrowed; None for nowhere.
    """

    def __init__(self, affinity: AffinityNote | None = None) -> None:
        self._call = XenCall()
        version = read_version(self._call)
        self._control = Control(self._call, probe_interface(self._call, version))
        self._pages = ForeignPages()
        self._placement = Placement(
            Dom0Vcpus(self._call, self._control), LinuxThread(), note=affinity
        )
        self._frames = Frames(
            call=self._call,
            control=self._control,
            pages=self._pages,
            placement=self._placement,
            version=version,
        )
        self._domains = Domains(self._call, self._control)
        self._looked = _Last()
        self._suspension = Suspension(
            call=self._call,
            control=self._control,
            domains=self._domains,
            monitors=Monitors() if version.xl_takes_a_suspend_for_the_end else None,
            newcomer=self._newcomer,
        )
        self._guests_parts: _Guests | None = None
        self._guests_lock = threading.Lock()

    def close(self) -> None:
        """Let go of the hypervisor; no call may follow."""
        self._pages.close()
        self._call.close()

    def version(self) -> XenVersion:
        """Version of the running hypervisor."""
        return self._frames.version()

    def max_mfn(self) -> Mfn:
        """Highest frame of the host."""
        return self._frames.max_mfn()

    def total_frames(self) -> int:
        """Frames of memory that the host has."""
        return self._frames.total_frames()

    def free_frames(self) -> int:
        """Frames that the hypervisor could hand out now."""
        return self._frames.free_frames()

    def query(self, mfn: Mfn) -> OfflineState:
        """Offline state of a frame."""
        return self._frames.query(mfn)

    def held_back(self) -> Mapping[Mfn, OfflineState]:
        """Every frame of the host that is marked, broken or out of use."""
        return self._frames.held_back()

    def offline(self, mfn: Mfn) -> OfflineReply:
        """Mark a frame for offlining, off pCPU 0."""
        return self._frames.offline(mfn)

    @contextmanager
    def placed(self) -> Iterator[None]:
        """Keep this thread in place for several ``offline`` calls, which makes each cheaper.

        Raises OfflineCallUnsafe where there is no safe place.
        """
        with self._placement.placed():
            yield

    def online(self, mfn: Mfn) -> OnlineFlag:
        """Take a mark back, or give an offlined frame back."""
        return self._frames.online(mfn)

    def m2p(self, mfn: Mfn) -> Pfn | None:
        """The pfn that the M2P notes for a frame."""
        return self._frames.m2p(mfn)

    def m2p_search(self, pfns: FrameArray) -> FrameArray:
        """Frames that the M2P notes at one of ``pfns``."""
        return self._frames.m2p_search(pfns)

    def domains(self) -> Sequence[DomainInfo]:
        """All domains, dom0 first."""
        return self._domains.domains()

    def domain(self, domid: Domid) -> DomainInfo:
        """One domain."""
        return self._domains.domain(domid)

    def conditions(self) -> Sequence[DomainInfo]:
        """All domains, without their names."""
        return self._domains.conditions()

    def condition(self, domid: Domid) -> DomainInfo:
        """One domain, without its name."""
        return self._domains.condition(domid)

    def suspend_support(self, domid: Domid) -> SuspendSupport:
        """Whether the guest has announced that it suspends itself when asked."""
        return self._suspension.support(domid)

    def suspend(self, domid: Domid, limits: SuspendLimits) -> None:
        """Ask the guest to suspend itself and wait until it has."""
        self._suspension.suspend(domid, limits)

    def withdraw_suspend(self, domid: Domid) -> bool:
        """Take a request to suspend back that nobody has read; whether there was one."""
        return self._suspension.withdraw(domid)

    def somebody_at(self, domid: Domid) -> str | None:
        """The process that saves or migrates a domain for somebody, or a save that is not ended."""
        self._looked.at = None
        uuid = self._domains.condition(domid).uuid
        somebody = _noted(uuid)
        if somebody is not None:
            return somebody
        look = FirstLook(domid, self._domains.name_in_store(domid))
        if look.somebody is None:
            self._looked.at = _Looked(domid=domid, uuid=uuid, look=look)
        return look.somebody

    def _newcomer(self, domid: Domid) -> str | None:
        """What ``somebody_at``, which this thread has asked before, would give now, and quickly."""
        looked = self._looked.at
        if looked is None or looked.domid != domid:
            return self.somebody_at(domid)
        return _noted(looked.uuid) or looked.look.newcomer()

    def serves(self, domid: Domid) -> str | None:
        """What other domains need a domain for."""
        return self._domains.serves(domid)

    def resume(self, domid: Domid, before: Callable[[], None] = nothing) -> None:
        """Let a suspended guest run on."""
        self._suspension.resume(domid, before)

    def tell_resumed(self, domid: Domid) -> None:
        """Tell xenstored of a resume."""
        self._suspension.tell_resumed(domid)

    def pause(self, domid: Domid) -> None:
        """Pause every vCPU."""
        self._domains.pause(domid)

    def unpause(self, domid: Domid) -> None:
        """Take one pause back."""
        self._domains.unpause(domid)

    def vcpu_frames(self, domid: Domid) -> VcpuFrames:
        """Frames that the vCPUs have loaded."""
        return self._domains.vcpu_frames(domid)

    def has_devices(self, domid: Domid) -> bool:
        """Whether devices of the host are assigned to the domain."""
        return self._domains.has_devices(domid)

    def _guests(self) -> _Guests:
        """Loaded with the first exchange: an idle daemon has no use for numpy."""
        with self._guests_lock:
            if self._guests_parts is None:
                from pgofflined.xen.exchange import Exchange
                from pgofflined.xen.memory import Memory
                from pgofflined.xen.pagetables import PageTables

                self._guests_parts = _Guests(
                    memory=Memory(call=self._call, control=self._control, pages=self._pages),
                    tables=PageTables(self._call),
                    exchange=Exchange(self._call),
                )
            return self._guests_parts

    def read_frames(self, domid: Domid, mfns: FrameArray) -> Words:
        """Copies of frames of a domain."""
        return self._guests().memory.read_frames(domid, mfns)

    @contextmanager
    def window(self, domid: Domid, mfns: FrameArray) -> Iterator[FrameWindow]:
        """Frames mapped for several looks."""
        with self._guests().memory.window(domid, mfns) as window:
            yield window

    def write_frames(
        self, domid: Domid, mfns: FrameArray, contents: Words, slots: PteWrites
    ) -> None:
        """Write whole frames that are no page tables, then single words."""
        self._guests().memory.write_frames(domid, mfns, contents, slots)

    def page_types(self, domid: Domid, mfns: FrameArray) -> TypeArray:
        """XEN_DOMCTL_PFINFO_* words of frames."""
        return self._guests().memory.page_types(domid, mfns)

    def granted_frames(self, domid: Domid) -> FrameArray:
        """Frames that the domain's grant table offers."""
        return self._guests().memory.granted_frames(domid)

    def shared_frames(self, domid: Domid) -> FrameArray:
        """Xen's own frames that the domain may map."""
        return self._guests().memory.shared_frames(domid)

    def update_ptes(self, domid: Domid, writes: PteWrites) -> None:
        """Set entries of the domain's page tables."""
        self._guests().tables.update_ptes(domid, writes)

    def pin_tables(self, domid: Domid, mfns: FrameArray, level: int) -> None:
        """Pin page tables."""
        self._guests().tables.pin_tables(domid, mfns, level)

    def unpin_tables(self, domid: Domid, mfns: FrameArray) -> None:
        """Unpin page tables."""
        self._guests().tables.unpin_tables(domid, mfns)

    def exchange(self, domid: Domid, mfns: FrameArray, pfns: FrameArray) -> Swapped:
        """Swap frames for fresh ones."""
        return self._guests().exchange.exchange(domid, mfns, pfns)


def _noted(uuid: UUID) -> str | None:
    note = unfinished_save(uuid)
    return None if note is None else f"a save of it, which is noted in {note},"


def release_monitors() -> list[int]:
    """Let xl's monitors go on that a process of ours which has died had stopped; their numbers.

    First the guest is to be let go that stands still because of that process: its own monitor would
    take that for the end.

    Nothing to do on releases where none is ever stopped.  Raises PortError where Xen cannot be
    asked which one it is.
    """
    return Monitors().release_all() if stops_monitors() else []


def restore_affinity(note: AffinityNote) -> None:
    """Give dom0's vCPUs their affinity back that a killed process has left narrowed.

    Raises PortError where Xen cannot be asked; without a note it is not.
    """
    if not note.read():
        return
    call = XenCall()
    try:
        restore(Dom0Vcpus(call, Control(call, probe_interface(call, read_version(call)))), note)
    finally:
        call.close()


def stops_monitors() -> bool:
    """Whether an exchange stops xl's monitors on this release of Xen.  Raises PortError."""
    call = XenCall()
    try:
        return read_version(call).xl_takes_a_suspend_for_the_end
    finally:
        call.close()


if TYPE_CHECKING:

    def _fulfils(host: XenHypervisor) -> Hypervisor:
        return host
