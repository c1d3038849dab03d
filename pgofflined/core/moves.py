"""Pages that are moved together, as arrays: what an exchange changes and must be able to undo.

Everything here is plain data, so that it can be kept where it outlives the process.  Arrays of one
object have one row for each page or entry.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from pgofflined.core.frames import PAGE_SHIFT, WORDS_PER_PAGE, Mfn, Pfn
from pgofflined.core.pages import L4_XEN_SLOTS, PTE_ACCESSED, PTE_ADDR_MASK, PTE_DIRTY, PageKind

Frames = NDArray[np.uint64]
Words = NDArray[np.uint64]
Chosen = NDArray[np.bool_]

_ADDRESS: Final = np.uint64(PTE_ADDR_MASK)
_SHIFT: Final = np.uint64(PAGE_SHIFT)
# What the processor itself sets in an entry; it tells nothing of what the entry maps.
_SET_BY_PROCESSOR: Final = np.uint64(PTE_ACCESSED | PTE_DIRTY)
_COMPARED_AT_ONCE: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class PteWrite:
    """One page-table entry to be set: the table's frame, the entry's index, its whole value."""

    table: Mfn
    index: int
    value: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PteWrites:
    """Page-table entries to be set, in order; or words of other frames (p2m slots)."""

    tables: Frames
    indexes: Frames
    values: Words

    @classmethod
    def of(cls, writes: Iterable[PteWrite]) -> Self:
        """The same as arrays."""
        listed = list(writes)
        return cls(
            tables=np.array([write.table for write in listed], dtype=np.uint64),
            indexes=np.array([write.index for write in listed], dtype=np.uint64),
            values=np.array([write.value for write in listed], dtype=np.uint64),
        )

    def __len__(self) -> int:
        return len(self.tables)

    def __getitem__(self, rows: slice | Chosen) -> PteWrites:
        return PteWrites(
            tables=self.tables[rows], indexes=self.indexes[rows], values=self.values[rows]
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Entries:
    """Present entries that map one page: of tables of which level, with their whole values."""

    levels: NDArray[np.uint8]
    tables: Frames
    indexes: Frames
    values: Words

    def __len__(self) -> int:
        return len(self.tables)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class References:
    """Present entries that map the pages of a group.

    ``pages`` is the row of the page in its group, ``levels`` the level of the table that holds the
    entry; ``values`` are the whole entries.
    """

    pages: NDArray[np.intp]
    levels: NDArray[np.uint8]
    tables: Frames
    indexes: Frames
    values: Words

    def __len__(self) -> int:
        return len(self.pages)

    @classmethod
    def of(cls, pages: Sequence[Entries]) -> Self:
        """The entries of each page of a group."""
        return cls(
            pages=np.repeat(np.arange(len(pages), dtype=np.intp), [len(page) for page in pages]),
            levels=np.concatenate([page.levels for page in pages]),
            tables=np.concatenate([page.tables for page in pages]),
            indexes=np.concatenate([page.indexes for page in pages]),
            values=np.concatenate([page.values for page in pages]),
        )

    @classmethod
    def joined(cls, parts: Sequence[References]) -> Self:
        """Several after one another, of the same pages."""
        none = np.empty(0, dtype=np.uint64)
        return cls(
            pages=np.concatenate([none.astype(np.intp), *(part.pages for part in parts)]),
            levels=np.concatenate([none.astype(np.uint8), *(part.levels for part in parts)]),
            tables=np.concatenate([none, *(part.tables for part in parts)]),
            indexes=np.concatenate([none, *(part.indexes for part in parts)]),
            values=np.concatenate([none, *(part.values for part in parts)]),
        )

    def entries(self, rows: slice) -> Entries:
        """Some of the entries, which are those of one page."""
        return Entries(
            levels=self.levels[rows],
            tables=self.tables[rows],
            indexes=self.indexes[rows],
            values=self.values[rows],
        )

    def chosen(self, rows: Chosen | NDArray[np.intp]) -> References:
        """Some of the entries, or all in another order; themselves where all are chosen as such."""
        if rows.dtype == np.bool_ and rows.all():
            return self
        return References(
            pages=self.pages[rows],
            levels=self.levels[rows],
            tables=self.tables[rows],
            indexes=self.indexes[rows],
            values=self.values[rows],
        )

    def upwards(self) -> References:
        """Entries of L1 tables first, those of L4 tables last: the order to clear them in."""
        if self._has_one_level():
            return self
        return self.chosen(np.argsort(self.levels, kind="stable"))

    def downwards(self) -> References:
        """Entries of L4 tables first: the order to set them in."""
        if self._has_one_level():
            return self
        return self.chosen(np.argsort(-self.levels.astype(np.int8), kind="stable"))

    def _has_one_level(self) -> bool:
        """As those of ordinary pages have: there is nothing to put in order while a guest waits."""
        return not len(self) or bool((self.levels == self.levels[0]).all())

    def cleared(self) -> PteWrites:
        """Writes that take all the entries away.

        Zero, not just "not present": an entry that keeps the frame's number trips Xen's L1TF
        check, which crashes the guest where shadow paging is not built in.
        """
        return PteWrites(
            tables=self.tables, indexes=self.indexes, values=np.zeros(len(self), dtype=np.uint64)
        )

    def leading_to(self, homes: Frames) -> PteWrites:
        """Writes that let every entry map the frame that is its page's home now."""
        values = (self.values & ~_ADDRESS) | (homes[self.pages] << _SHIFT)
        return PteWrites(tables=self.tables, indexes=self.indexes, values=values)


def same_mapping(one: Words, other: Words) -> Chosen:
    """Which entries map the same with the same rights, whatever the processor has noted there."""
    equal: Chosen = (one | _SET_BY_PROCESSOR) == (other | _SET_BY_PROCESSOR)
    return equal


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Group:
    """Pages of one domain that are moved at the same time; page tables each by themselves.

    ``slot_frames`` and ``slot_indexes`` say where the guest's p2m list holds each page's mfn.
    ``contents`` has the shape (pages, 512).  ``props`` are the tables that a page table refers to
    and that are to be pinned while it is away: else Xen would take them down with it, and all that
    is below them.
    """

    kind: PageKind
    pinned: bool
    mfns: Frames
    pfns: Frames
    slot_frames: Frames
    slot_indexes: Frames
    references: References
    contents: Words
    props: Frames

    def __len__(self) -> int:
        return len(self.mfns)

    def page(self, row: int) -> tuple[Mfn, Pfn]:
        """A page's frame and pfn."""
        return Mfn(int(self.mfns[row])), Pfn(int(self.pfns[row]))

    def frames(self) -> list[Mfn]:
        """The pages' frames one by one."""
        return [Mfn(mfn) for mfn in self.mfns.tolist()]

    def only(self, rows: Chosen) -> Group:
        """Some of the pages, with the entries that map them."""
        if rows.all():
            return self
        numbers = np.cumsum(rows) - 1
        references = self.references.chosen(rows[self.references.pages])
        return replace(
            self,
            mfns=self.mfns[rows],
            pfns=self.pfns[rows],
            slot_frames=self.slot_frames[rows],
            slot_indexes=self.slot_indexes[rows],
            references=replace(references, pages=numbers[references.pages]),
            contents=self.contents[rows],
        )

    def renamed(self, olds: Frames, news: Frames) -> Group:
        """The same after frames have moved that hold entries or p2m slots of it."""
        known = np.sort(olds)
        # As for ordinary pages, while the guest waits.
        if not (among(self.references.tables, known).any() or among(self.slot_frames, known).any()):
            return self
        references = replace(self.references, tables=_renamed(self.references.tables, olds, news))
        slots = _renamed(self.slot_frames, olds, news)
        return replace(self, references=references, slot_frames=slots)

    def slots_leading_to(self, homes: Frames) -> PteWrites:
        """Writes that let the guest's p2m name the frames that are the pages' homes now."""
        return PteWrites(tables=self.slot_frames, indexes=self.slot_indexes, values=homes)

    def bare_contents(self) -> Words:
        """What the pages hold while none of the entries that map them is set.

        Without the entries that lie in the pages themselves (a table of the direct map may map
        itself), and without what Xen keeps in an L4.
        """
        if not self.kind.is_table:
            return self.contents
        words = self.contents.copy()
        for row, mfn in enumerate(self.mfns.tolist()):
            inside = self.references.tables == np.uint64(mfn)
            words[row, self.references.indexes[inside]] = 0
        if self.kind is PageKind.L4:
            words[:, L4_XEN_SLOTS.start : L4_XEN_SLOTS.stop] = 0
        return words


def _renamed(frames: Frames, olds: Frames, news: Frames) -> Frames:
    order = np.argsort(olds)
    places = np.searchsorted(olds, frames, sorter=order)
    nearest = order[np.minimum(places, len(olds) - 1)]
    renamed: Frames = np.where(olds[nearest] == frames, news[nearest], frames)
    return renamed


def chosen_rows(contents: Words, rows: Sequence[int] | NDArray[np.intp]) -> Words:
    """Rows of contents, ascending; the same array where that is all of them."""
    if len(rows) == len(contents):
        return contents
    some: Words = contents[rows]
    return some


def among(values: Frames, members: Frames) -> Chosen:
    """Which values are among some that are sorted.

    Far quicker than ``np.isin`` for the few that one group has: a guest waits for it.
    """
    if not len(members):
        return np.zeros(len(values), dtype=np.bool_)
    places = np.minimum(members.searchsorted(values), len(members) - 1)
    found: Chosen = members[places] == values
    return found


def differing(one: Words, other: Words) -> Chosen:
    """Which rows of contents differ.

    Some at a time: what is in between needs memory, and fresh memory costs more than comparing.
    """
    found = np.empty(len(one), dtype=np.bool_)
    for start in range(0, len(one), _COMPARED_AT_ONCE):
        some = slice(start, start + _COMPARED_AT_ONCE)
        found[some] = (one[some] != other[some]).any(axis=1)
    return found


def no_contents(pages: int) -> Words:
    """Contents that have not been read yet."""
    return np.zeros((pages, WORDS_PER_PAGE), dtype=np.uint64)


def frames_of(mfns: Sequence[int]) -> Frames:
    """Frame numbers as an array."""
    return np.array(mfns, dtype=np.uint64)
