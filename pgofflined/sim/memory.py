"""Foreign memory, page-table updates and the exchange on a simulated host."""

from __future__ import annotations

from collections.abc import Sequence
from errno import EBUSY, EINVAL, ENOMEM, EOPNOTSUPP
from typing import TYPE_CHECKING, Final

import numpy as np

from pgofflined.core.errors import XenError
from pgofflined.core.frames import WORDS_PER_PAGE, Domid, Mfn, Pfn
from pgofflined.core.pages import (
    L4_XEN_SLOTS,
    PFINFO_BROKEN,
    PFINFO_PINNED,
    PFINFO_TYPE_SHIFT,
    PFINFO_XTAB,
    PTE_PRESENT,
)
from pgofflined.ports import PteWrite
from pgofflined.sim.errors import PoisonRead, Refused, UnsafeUpdate
from pgofflined.sim.frames import FrameState, FrameType
from pgofflined.sim.guests import SimulatedDomain
from pgofflined.sim.host import HostState
from pgofflined.sim.references import adjust_entry, check_flags, needs_no_check

if TYPE_CHECKING:
    from pgofflined.ports import FrameArray, TypeArray, Words

_PLAIN_TYPES: Final = (FrameType.NONE, FrameType.WRITABLE)


class SimulatedMemory(HostState):
    """``ports.ForeignMemory``, ``ports.PageTableControl`` and ``ports.FrameExchange``."""

    def read_frames(self, domid: Domid, mfns: FrameArray) -> Words:
        """Read-only foreign mappings, copied and taken down at once."""
        with self.call("foreignmemory_map", domid):
            domain = self.domain_or_refuse(domid)
            frames = self._translate(domain, mfns)
            self._check_mappable(domid, frames)
            return self.frames.contents.read(frames)

    def write_words(self, domid: Domid, mfn: Mfn, index: int, words: Words) -> None:
        """A writable foreign mapping; get_page_from_l1e() refuses one of a table or GDT."""
        with self.call("foreignmemory_map", domid, mfn):
            if index < 0 or index + len(words) > WORDS_PER_PAGE:
                raise Refused(EINVAL)
            domain = self.domain_or_refuse(domid)
            frame = int(self._translate(domain, np.array([mfn], dtype=np.uint64))[0])
            self._check_mappable(domid, np.array([frame], dtype=np.uint64))
            if not self._writable(frame):
                raise Refused(EBUSY)
            if domain.pv is not None and not self.frames.type_refs[frame]:
                # The mapping's type reference comes and goes; the type itself stays.
                self.references.get_type(frame, FrameType.WRITABLE)
                self.references.put_type(frame)
            self.frames.contents.write(frame, index, words)

    def page_types(self, domid: Domid, mfns: FrameArray) -> TypeArray:
        """XEN_DOMCTL_getpageframeinfo3 (xen/arch/x86/domctl.c)."""
        with self.call("getpageframeinfo3", domid):
            domain = self.simulated(domid)
            frames = self.frames
            numbers = self._translate(domain, mfns, strict=False)
            inside = numbers < frames.count
            index = np.where(inside, numbers, 0).astype(np.int64)
            kind = frames.type[index]
            table = (kind >= FrameType.L1) & (kind <= FrameType.L4) & frames.validated[index]
            words = np.where(table, kind, 0).astype(np.uint32) << np.uint32(PFINFO_TYPE_SHIFT)
            words |= np.where(frames.pinned[index], PFINFO_PINNED, 0).astype(np.uint32)
            words[frames.broken[index]] = PFINFO_BROKEN
            theirs = inside & (frames.owner[index] == domid) & (frames.refs[index] > 0)
            words[~theirs | frames.special[index]] = PFINFO_XTAB
            return words

    def granted_frames(self, domid: Domid) -> FrameArray:
        """What the grant table's entries offer: frames for PV, guest frames for PVH and HVM."""
        with self.call("gnttab", domid):
            domain = self.domain_or_refuse(domid)
            offered = {int(granted.pfn) for granted in domain.grants}
            if domain.pv is not None and offered:
                mfns = domain.pv.mfns()
                offered = {int(mfns[pfn]) for pfn in offered}
            return np.array(sorted(offered), dtype=np.uint64)

    def update_ptes(self, domid: Domid, writes: Sequence[PteWrite]) -> None:
        """mmu_update with both owners given, one request after the other."""
        done = 0
        try:
            with self.call("mmu_update", domid):
                domain = self.domain_or_refuse(domid)
                if domain.pv is None:
                    raise Refused(EOPNOTSUPP)
                if not domain.pauses:
                    raise UnsafeUpdate(f"d{domid} is not paused: its TLBs are not flushed for us")
                if not all(0 <= write.index < WORDS_PER_PAGE for write in writes):
                    raise Refused(EINVAL)
                for write in writes:
                    self._update(domid, write)
                    done += 1
        except XenError as error:
            mfn = writes[done].table if done < len(writes) else None
            raise XenError(error.errno, op=error.op, domid=domid, mfn=mfn, done=done) from None

    def exchange(self, domid: Domid, mfn: Mfn, pfn: Pfn) -> Mfn:
        """memory_exchange() for one frame, with the refusals of steal_page()."""
        with self.call("memory_exchange", domid, mfn):
            domain = self.domain_or_refuse(domid)
            frames = self.frames
            if domain.gfns is not None:
                raise Refused(EOPNOTSUPP)
            if (
                not frames.valid(mfn)
                or frames.owner[mfn] != domid
                or frames.special[mfn]
                or not frames.allocated[mfn]
                or frames.refs[mfn] != 1
            ):
                raise Refused(EINVAL)
            try:
                new = frames.allocate()
            except Refused:
                # The stolen frame is given back by assign_pages(), which keeps only
                # PGC_preserved of the count word: marks are lost without a word.
                frames.state[mfn] = FrameState.INUSE
                frames.broken[mfn] = False
                frames.type[mfn] = FrameType.NONE
                frames.validated[mfn] = False
                raise Refused(ENOMEM) from None
            # Without owner by now, the old frame is freed as an anonymous one: to be scrubbed.
            frames.release(mfn, dirty=True)
            self.freed_dirty()
            frames.assign(np.array([new], dtype=np.uint64), domid)
            frames.m2p[new] = pfn
            return new

    def _translate(
        self, domain: SimulatedDomain, mfns: FrameArray, *, strict: bool = True
    ) -> FrameArray:
        """The host frames that a caller's frame numbers mean: gfns for PVH and HVM."""
        if domain.gfns is None:
            return mfns
        inside = mfns < len(domain.gfns)
        if strict and not inside.all():
            raise Refused(EINVAL)
        found = domain.gfns[np.where(inside, mfns, 0).astype(np.int64)]
        return np.where(inside, found, np.uint64(0xFFFF_FFFF_FFFF_FFFF))

    def _check_mappable(self, domid: Domid, mfns: FrameArray) -> None:
        frames = self.frames
        if (mfns >= np.uint64(frames.count)).any():
            raise Refused(EINVAL)
        index = mfns.astype(np.int64)
        if not frames.ram[index].all():
            raise Refused(EINVAL)
        if (frames.owner[index] != domid).any() or (frames.refs[index] == 0).any():
            # "could_not_pin" of get_page_from_l1e().
            raise Refused(EBUSY)
        bad = frames.poisoned[index] | frames.broken[index]
        if bad.any():
            raise PoisonRead(int(mfns[bad][0]))

    def _writable(self, mfn: int) -> bool:
        return not self.frames.type_refs[mfn] or self.frames.type[mfn] in _PLAIN_TYPES

    def _update(self, domid: Domid, write: PteWrite) -> None:
        frames, references = self.frames, self.references
        references.get(write.table, int(domid))
        try:
            kind = FrameType(int(frames.type[write.table]))
            if not (kind.is_table and frames.validated[write.table]):
                # do_mmu_update() writes to any frame that may be written to.
                if not self._writable(write.table):
                    raise Refused(EINVAL)
                word = np.array([write.value], dtype=np.uint64)
                frames.contents.write(write.table, write.index, word)
                return
            level = int(kind)
            if level == FrameType.L4 and write.index in L4_XEN_SLOTS:
                raise Refused(EINVAL)
            value = adjust_entry(write.value, level)
            old = frames.contents.word(write.table, write.index)
            if value & PTE_PRESENT:
                check_flags(value, level)
                if needs_no_check(old, value):
                    frames.contents.page(write.table)[write.index] = value
                    return
                references.take_entry(value, level, int(domid))
            else:
                words = np.array([value], dtype=np.uint64)
                references.check_l1tf(words, level, int(domid))
            frames.contents.page(write.table)[write.index] = value
            if old & PTE_PRESENT:
                references.drop_entry(old, level, int(domid))
        finally:
            references.put(write.table)
