"""Frames of a simulated host: their books (PGC_* and PGT_* of asm/mm.h) and the heap."""

from __future__ import annotations

from enum import IntEnum
from errno import ENOMEM
from typing import TYPE_CHECKING, Final

import numpy as np

from pgofflined.core.frames import Mfn
from pgofflined.sim.contents import Contents
from pgofflined.sim.errors import Refused

if TYPE_CHECKING:
    from pgofflined.ports import FrameArray

NOBODY: Final = -1
INVALID_M2P: Final = 0xFFFF_FFFF_FFFF_FFFF
_MAX_ORDER: Final = 18
_SEARCH_BLOCK: Final = 4096


class FrameState(IntEnum):
    """PGC_state_*."""

    INUSE = 0
    OFFLINING = 1
    OFFLINED = 2
    FREE = 3


class FrameType(IntEnum):
    """PGT_*: what the references to a frame allow it to be used as."""

    NONE = 0
    L1 = 1
    L2 = 2
    L3 = 3
    L4 = 4
    SEG_DESC = 5
    WRITABLE = 7

    @property
    def is_table(self) -> bool:
        """Whether this is a page table of any level."""
        return FrameType.L1 <= self <= FrameType.L4


def split_misaligns(order: int, offset: int) -> bool:
    """Whether taking one frame out of a free buddy leaves chunks that are not aligned.

    This is what reserve_offlined_page() did before 71c6a62317: it grew each remaining chunk by
    its length alone.  A chunk that is not aligned to its own size makes the allocator merge and
    hand out frames twice later.
    """
    size = 1 << order
    start = 0
    while start < size:
        if start == offset:
            start += 1
            continue
        chunk = 0
        while chunk < order:
            end = start + (2 << chunk)
            if end >= size or start + (1 << chunk) <= offset < end:
                break
            chunk += 1
        if start % (1 << chunk):
            return True
        start += 1 << chunk
    return False


class Frames:
    """The frame table: one entry of each array for each host frame; all free at first."""

    def __init__(
        self,
        count: int,
        rng: np.random.Generator,
        *,
        splits_safely: bool,
        reuses_first: bool = False,
    ) -> None:
        self.count = count
        self.contents = Contents(count, rng)
        self.owner = np.full(count, NOBODY, dtype=np.int32)
        self.refs = np.zeros(count, dtype=np.int32)
        self.allocated = np.zeros(count, dtype=np.bool_)
        self.type = np.zeros(count, dtype=np.uint8)
        self.type_refs = np.zeros(count, dtype=np.int32)
        self.validated = np.zeros(count, dtype=np.bool_)
        self.pinned = np.zeros(count, dtype=np.bool_)
        self.special = np.zeros(count, dtype=np.bool_)  # PGC_xen_heap or PGC_extra
        self.state = np.full(count, FrameState.FREE, dtype=np.uint8)
        self.broken = np.zeros(count, dtype=np.bool_)  # Xen knows (PGC_broken)
        self.poisoned = np.zeros(count, dtype=np.bool_)  # the memory is, whether Xen knows or not
        self.ram = np.ones(count, dtype=np.bool_)
        self.image = np.zeros(count, dtype=np.bool_)
        self.dirty = np.zeros(count, dtype=np.bool_)  # free, not scrubbed yet
        self.m2p = np.full(count, INVALID_M2P, dtype=np.uint64)
        self.free_count = count
        self.corrupted: str | None = None
        self.dirty_taken_out = 0
        self._splits_safely = splits_safely
        # Whether the frame that was freed last is given out first, as a list of single frames does.
        self._reuses_first = reuses_first
        self._freed: list[int] = []
        self._cursor = count

    def valid(self, mfn: int) -> bool:
        """mfn_valid(): the frame table has an entry for it."""
        return 0 <= mfn < self.count

    def reserve(self, mfns: FrameArray) -> None:
        """Take frames out of the heap for good, before anything is allocated."""
        index = mfns.astype(np.int64)
        self.free_count -= int((self.state[index] == FrameState.FREE).sum())
        self.state[index] = FrameState.INUSE

    def allocate(self) -> Mfn:
        """Take one frame from the heap, without owner or reference.  Refuses with ENOMEM."""
        if self.free_count == 0:
            raise Refused(ENOMEM)
        while self._reuses_first and self._freed:
            mfn = self._freed.pop()
            if self.state[mfn] == FrameState.FREE:
                self._leave_heap(np.array([mfn], dtype=np.int64))
                self.contents.scramble(mfn)
                return Mfn(mfn)
        for _ in range(2):
            while self._cursor > 0:
                low = max(0, self._cursor - _SEARCH_BLOCK)
                found = np.flatnonzero(self.state[low : self._cursor] == FrameState.FREE)
                if len(found):
                    mfn = low + int(found[-1])
                    self._cursor = mfn
                    self._leave_heap(np.array([mfn], dtype=np.int64))
                    self.contents.scramble(mfn)
                    return Mfn(mfn)
                self._cursor = low
            self._cursor = self.count
        raise Refused(ENOMEM)

    def allocate_many(self, number: int) -> FrameArray:
        """Take the highest free frames from the heap.  Refuses with ENOMEM."""
        free = np.flatnonzero(self.state == FrameState.FREE)
        if len(free) < number:
            raise Refused(ENOMEM)
        index = free[len(free) - number :]
        self._leave_heap(index)
        return index.astype(np.uint64)

    def assign(self, mfns: FrameArray, owner: int) -> None:
        """Make a domain the owner (assign_pages): one reference, that of the allocation."""
        index = mfns.astype(np.int64)
        self.owner[index] = owner
        self.allocated[index] = True
        self.refs[index] = 1

    def release(self, mfn: int, *, dirty: bool) -> None:
        """The last reference is gone (free_heap_pages, mark_page_free).

        A frame that is marked leaves the heap at once; a dirty one then stays in the count of
        frames to scrub for ever (hazard 8), since reserve_offlined_page() does not subtract it.
        """
        self.owner[mfn] = NOBODY
        self.allocated[mfn] = False
        self.refs[mfn] = 0
        self.type[mfn] = FrameType.NONE
        self.type_refs[mfn] = 0
        self.validated[mfn] = False
        self.pinned[mfn] = False
        self.special[mfn] = False
        self.m2p[mfn] = INVALID_M2P
        marked = self.state[mfn] == FrameState.OFFLINING
        self.state[mfn] = FrameState.FREE
        self.dirty[mfn] = dirty
        self.free_count += 1
        self._freed.append(mfn)
        if marked:
            self.take_out(mfn)

    def take_out(self, mfn: int) -> None:
        """Take a free frame out of its buddy (reserve_offlined_page)."""
        if not self._splits_safely:
            order, head = self._buddy(mfn)
            if split_misaligns(order, mfn - head):
                self.corrupted = (
                    f"mfn {mfn:#x} was taken out of a free buddy of order {order}: "
                    "the free lists hold misaligned chunks now"
                )
        if self.dirty[mfn]:
            self.dirty_taken_out += 1
            self.dirty[mfn] = False
        self.state[mfn] = FrameState.OFFLINED
        self.free_count -= 1

    def scrubbed(self) -> None:
        """The idle loop has cleaned what was dirty."""
        self.dirty[:] = False

    def _leave_heap(self, index: np.ndarray[tuple[int], np.dtype[np.int64]]) -> None:
        self.state[index] = FrameState.INUSE
        self.dirty[index] = False
        self.free_count -= len(index)

    def _buddy(self, mfn: int) -> tuple[int, int]:
        """Order and head of the free buddy around mfn; buddies always merge as far as they can."""
        order, head = 0, mfn
        while order < _MAX_ORDER:
            sibling = head ^ (1 << order)
            end = sibling + (1 << order)
            if end > self.count or (self.state[sibling:end] != FrameState.FREE).any():
                break
            head = min(head, sibling)
            order += 1
        return order, head
