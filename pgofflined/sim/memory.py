"""Foreign memory, page-table updates and the exchange on a simulated host."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from errno import EBUSY, EINVAL, ENOMEM, EOPNOTSUPP
from typing import TYPE_CHECKING, Final

import numpy as np

from pgofflined.core.errors import PortError, XenError
from pgofflined.core.frames import WORDS_PER_PAGE, Domid, Mfn, Pfn
from pgofflined.core.pages import (
    L4_XEN_SLOTS,
    PFINFO_BROKEN,
    PFINFO_PINNED,
    PFINFO_TYPE_SHIFT,
    PFINFO_XTAB,
    PTE_PRESENT,
)
from pgofflined.ports import Swapped
from pgofflined.sim.errors import PoisonRead, Refused, UnsafeUpdate
from pgofflined.sim.frames import FrameState, FrameType
from pgofflined.sim.guests import Hold, SimulatedDomain
from pgofflined.sim.host import HostState
from pgofflined.sim.references import adjust_entry, check_flags, needs_no_check

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pgofflined.core.moves import Chosen, PteWrites
    from pgofflined.ports import FrameArray, FrameWindow, TypeArray, Words

_PLAIN_TYPES: Final = (FrameType.NONE, FrameType.WRITABLE)


@dataclass(frozen=True, slots=True)
class _Window:
    memory: SimulatedMemory
    frames: FrameArray

    def read(self, rows: NDArray[np.intp]) -> Words:
        """What the frames hold now."""
        with self.memory.lock:
            frames = self.frames[rows]
            # What was mapped while it was sound may not be so any more.
            self.memory.refuse_poison(frames)
            return self.memory.frames.contents.read(frames)

    def words(self, rows: NDArray[np.intp], indexes: FrameArray) -> Words:
        """Some words of them."""
        words: Words = self.read(rows)[np.arange(len(rows)), indexes]
        return words

    def differing(self, rows: NDArray[np.intp], contents: Words) -> Chosen:
        """Which of them hold something else."""
        differing: Chosen = (self.read(rows) != contents).any(axis=1)
        return differing


class SimulatedMemory(HostState):
    """``ports.ForeignMemory``, ``ports.PageTableControl`` and ``ports.FrameExchange``."""

    def read_frames(self, domid: Domid, mfns: FrameArray) -> Words:
        """Read-only foreign mappings, copied and taken down at once."""
        with self.call("foreignmemory_map", domid):
            domain = self.domain_or_refuse(domid)
            frames = self._translate(domain, mfns)
            self._check_mappable(domid, frames)
            return self.frames.contents.read(frames)

    @contextmanager
    def window(self, domid: Domid, mfns: FrameArray) -> Iterator[FrameWindow]:
        """Read-only foreign mappings, which refer to their frames as long as they last."""
        with self.call("foreignmemory_map", domid):
            domain = self.domain_or_refuse(domid)
            frames = self._translate(domain, mfns)
            self._check_mappable(domid, frames)
            holds = [self._hold_frame(domain, Mfn(mfn)) for mfn in frames.tolist()]
        try:
            yield _Window(self, frames)
        finally:
            with self.lock:
                for hold in holds:
                    self.release_hold(domid, hold)

    def _hold_frame(self, domain: SimulatedDomain, mfn: Mfn) -> Hold:
        self.references.get(mfn, int(domain.domid))
        hold = Hold(mfn=mfn, why="a window", lasting=True, of_ours=True)
        domain.holds.append(hold)
        return hold

    def write_frames(
        self, domid: Domid, mfns: FrameArray, contents: Words, slots: PteWrites
    ) -> None:
        """Writable foreign mappings; get_page_from_l1e() refuses those of a table or GDT."""
        with self.call("foreignmemory_map", domid):
            if (slots.indexes >= np.uint64(WORDS_PER_PAGE)).any():
                raise Refused(EINVAL)
            mapped = self._map_writable(domid, np.concatenate([mfns, slots.tables]))
            for frame, words in zip(mapped[: len(mfns)], contents, strict=True):
                self.frames.contents.write(frame, 0, words)
            for row, frame in enumerate(mapped[len(mfns) :]):
                word = slots.values[row : row + 1]
                self.frames.contents.write(frame, int(slots.indexes[row]), word)

    def _map_writable(self, domid: Domid, mfns: FrameArray) -> list[int]:
        domain = self.domain_or_refuse(domid)
        frames = self._translate(domain, mfns)
        self._check_mappable(domid, frames)
        mapped: list[int] = frames.tolist()
        if not all(self._writable(frame) for frame in mapped):
            raise Refused(EBUSY)
        for frame in mapped:
            if domain.pv is not None and not self.frames.type_refs[frame]:
                # The mapping's type reference comes and goes; the type itself stays.
                self.references.get_type(frame, FrameType.WRITABLE)
                self.references.put_type(frame)
        return mapped

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
            if self.frames.poisoned[domain.shared_info]:
                # It stands for the grant table too, see ``shared_frames``.
                raise PoisonRead(domain.shared_info)
            offered = {int(granted.pfn) for granted in domain.grants}
            if domain.pv is not None and offered:
                mfns = domain.pv.mfns()
                offered = {int(mfns[pfn]) for pfn in offered}
            return np.array(sorted(offered), dtype=np.uint64)

    def shared_frames(self, domid: Domid) -> FrameArray:
        """Frames of the Xen heap that belong to the domain; here that is its shared_info alone."""
        with self.call("acquire_resource", domid):
            own = self.domain_or_refuse(domid)
            return np.array([own.shared_info], dtype=np.uint64)

    def update_ptes(self, domid: Domid, writes: PteWrites) -> None:
        """mmu_update with both owners given, one request after the other."""
        done = 0
        try:
            with self.call("mmu_update", domid):
                self._demand_paused_pv(domid)
                if (writes.indexes >= np.uint64(WORDS_PER_PAGE)).any():
                    raise Refused(EINVAL)
                for row in zip(
                    writes.tables.tolist(),
                    writes.indexes.tolist(),
                    writes.values.tolist(),
                    strict=True,
                ):
                    self._update(domid, *row)
                    done += 1
        except XenError as error:
            mfn = Mfn(int(writes.tables[done])) if done < len(writes) else None
            raise XenError(error.errno, op=error.op, domid=domid, mfn=mfn, done=done) from None

    def guest_update(self, domid: Domid, table: int, index: int, value: int) -> None:
        """mmu_update by the guest itself, which runs.  Refused as Xen refuses."""
        self._update(domid, table, index, value)

    def pin_tables(self, domid: Domid, mfns: FrameArray, level: int) -> None:
        """MMUEXT_PIN_L*_TABLE."""
        self._each_table(
            "pin", domid, mfns, lambda mfn: self.references.pin(mfn, int(domid), level)
        )

    def unpin_tables(self, domid: Domid, mfns: FrameArray) -> None:
        """MMUEXT_UNPIN_TABLE."""
        self._each_table("unpin", domid, mfns, self.references.unpin)

    def _each_table(
        self, what: str, domid: Domid, mfns: FrameArray, act: Callable[[int], None]
    ) -> None:
        for done, mfn in enumerate(mfns.tolist()):
            try:
                with self.call(f"mmuext_op({what})", domid, mfn):
                    self._demand_paused_pv(domid)
                    if not self.frames.valid(mfn) or self.frames.owner[mfn] != domid:
                        raise Refused(EINVAL)
                    act(mfn)
            except XenError as error:
                error.done = done
                raise

    def _demand_paused_pv(self, domid: Domid) -> None:
        domain = self.domain_or_refuse(domid)
        if domain.pv is None:
            raise Refused(EOPNOTSUPP)
        if not domain.pauses:
            raise UnsafeUpdate(f"d{domid} is not paused: its TLBs are not flushed for us")

    def exchange(self, domid: Domid, mfns: FrameArray, pfns: FrameArray) -> Swapped:
        """memory_exchange(), one frame after the other until one is refused."""
        new: list[int] = []
        error: PortError | None = None
        for mfn, pfn in zip(mfns.tolist(), pfns.tolist(), strict=True):
            try:
                new.append(self._exchange(domid, Mfn(mfn), Pfn(pfn)))
            except PortError as refusal:
                error = refusal
                break
        return Swapped(new=np.array(new, dtype=np.uint64), error=error)

    def _exchange(self, domid: Domid, mfn: Mfn, pfn: Pfn) -> Mfn:
        """One frame, with the refusals of steal_page()."""
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
        self.refuse_poison(mfns)

    def refuse_poison(self, mfns: FrameArray) -> None:
        """Raises PoisonRead where one of some frames would give a machine check."""
        index = mfns.astype(np.int64)
        bad = self.frames.poisoned[index] | self.frames.broken[index]
        if bad.any():
            raise PoisonRead(int(mfns[bad][0]))

    def _writable(self, mfn: int) -> bool:
        return not self.frames.type_refs[mfn] or self.frames.type[mfn] in _PLAIN_TYPES

    def _update(self, domid: Domid, table: int, index: int, new: int) -> None:
        frames, references = self.frames, self.references
        references.get(table, int(domid))
        try:
            kind = FrameType(int(frames.type[table]))
            if not (kind.is_table and frames.validated[table]):
                # do_mmu_update() writes to any frame that may be written to.
                if not self._writable(table):
                    raise Refused(EINVAL)
                word = np.array([new], dtype=np.uint64)
                frames.contents.write(table, index, word)
                return
            level = int(kind)
            if level == FrameType.L4 and index in L4_XEN_SLOTS:
                raise Refused(EINVAL)
            value = adjust_entry(new, level)
            old = frames.contents.word(table, index)
            if value & PTE_PRESENT:
                check_flags(value, level)
                if needs_no_check(old, value):
                    frames.contents.page(table)[index] = value
                    return
                references.take_entry(value, level, int(domid))
            else:
                words = np.array([value], dtype=np.uint64)
                references.check_l1tf(words, level, int(domid))
            frames.contents.page(table)[index] = value
            if old & PTE_PRESENT:
                references.drop_entry(old, level, int(domid))
        finally:
            references.put(table)
