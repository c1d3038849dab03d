"""Walks through a PV guest's page tables, as the processor would make them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from pgofflined.core.frames import PAGE_SHIFT, WORDS_PER_PAGE
from pgofflined.core.pages import L4_XEN_SLOTS, PTE_ADDR_MASK, PTE_PRESENT
from pgofflined.sim.references import target_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pgofflined.ports import FrameArray, Words
    from pgofflined.sim.contents import Contents

_PRESENT: Final = np.uint64(PTE_PRESENT)
_ADDR: Final = np.uint64(PTE_ADDR_MASK)
_SHIFT: Final = np.uint64(PAGE_SHIFT)
_INDEX_MASK: Final = WORDS_PER_PAGE - 1


class PageFault(Exception):
    """A virtual address is not mapped."""

    def __init__(self, address: int, level: int) -> None:
        self.address = address
        super().__init__(f"no present L{level} entry for {address:#018x}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """Where one entry is: the table's frame and the index in it; and the entry itself."""

    table: int
    index: int
    entry: int


def table_index(address: int, level: int) -> int:
    """Index of an address in the table of a level."""
    return (address >> (PAGE_SHIFT + 9 * (level - 1))) & _INDEX_MASK


def walk(contents: Contents, root: int, address: int) -> Slot:
    """The L1 entry that maps an address.  Raises PageFault."""
    table = root
    for level in (4, 3, 2, 1):
        index = table_index(address, level)
        entry = contents.word(table, index)
        if not entry & PTE_PRESENT:
            raise PageFault(address, level)
        if level == 1:
            return Slot(table=table, index=index, entry=entry)
        table = target_of(entry)
    raise AssertionError("unreachable")


def mapped_frames(contents: Contents, root: int, address: int, count: int) -> FrameArray:
    """Frames behind ``count`` pages from an address on, L1 table by L1 table.  Raises PageFault."""
    frames = np.empty(count, dtype=np.uint64)
    done = 0
    while done < count:
        here = address + (done << PAGE_SHIFT)
        first = walk(contents, root, here)
        number = min(count - done, WORDS_PER_PAGE - first.index)
        entries = contents.read(np.array([first.table], dtype=np.uint64))[0]
        entries = entries[first.index : first.index + number]
        absent = np.flatnonzero((entries & _PRESENT) == 0)
        if len(absent):
            raise PageFault(here + (int(absent[0]) << PAGE_SHIFT), 1)
        frames[done : done + number] = (entries & _ADDR) >> _SHIFT
        done += number
    return frames


def all_mappings(contents: Contents, root: int) -> tuple[NDArray[np.uint64], Words]:
    """Every mapped virtual page under a root and its L1 entry, in the order of addresses.

    Without Xen's own slots.  Addresses are not sign-extended.
    """
    tables = np.array([root], dtype=np.uint64)
    bases = np.zeros(1, dtype=np.uint64)
    for level in (4, 3, 2, 1):
        words = contents.read(tables)
        present = (words & _PRESENT) != 0
        if level == 4:
            present[:, L4_XEN_SLOTS.start : L4_XEN_SLOTS.stop] = False
        row, index = np.nonzero(present)
        shift = np.uint64(PAGE_SHIFT + 9 * (level - 1))
        bases = bases[row] | (index.astype(np.uint64) << shift)
        entries: Words = words[row, index]
        if level == 1:
            return bases, entries
        tables = (entries & _ADDR) >> _SHIFT
    raise AssertionError("unreachable")
