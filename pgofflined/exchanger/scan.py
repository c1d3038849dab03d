"""Searches a guest's page tables for the entries that map some frames.

What is in memory for it is bounded, whatever the guest does: it can map one page as often as it
has room for entries (every page table full of the zero page), make most of its memory page tables,
and name each of them as often as it likes in its p2m.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from pgofflined.core.frames import PAGE_SHIFT, WORDS_PER_PAGE, Domid
from pgofflined.core.moves import Entries, References
from pgofflined.core.pages import PTE_ADDR_MASK
from pgofflined.core.pagetable import Search, guest_frames, table_levels
from pgofflined.exchanger.poison import NO_POISON, Poison
from pgofflined.ports import Hypervisor

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pgofflined.ports import FrameArray

# Entries that map one page, or the pages of one group.  Each has to be cleared and set again while
# the guest waits (``plan.seconds_for``): with so many that takes a third of a second, within the
# default of ``exchange.max_blackout``.  A page of a library that every process maps has a few
# thousand.
MAX_REFERENCES: Final = 1 << 16
# Entries that map the pages of one job, all together: 9 MiB of them.
MAX_TOGETHER: Final = 4 * MAX_REFERENCES
# Page tables that are searched: 16 GiB of them.  A guest of 1 TiB has half a million for its
# direct map; to search so many takes half a minute of a processor.
MAX_TABLES: Final = 1 << 22

_TABLE_BATCH: Final = 1024
_ENTRY_BITS: Final = np.uint64(WORDS_PER_PAGE.bit_length() - 1)


class TooManyTables(Exception):
    """The guest has, or claims to have, more page tables than are searched."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Found:
    """The entries that map each frame; ``beyond`` are frames that have too many, and no entry."""

    entries: dict[int, Entries]
    beyond: frozenset[int]


def find_entries(
    xen: Hypervisor,
    domid: Domid,
    p2m: Iterable[FrameArray],
    wanted: FrameArray,
    poison: Poison = NO_POISON,
) -> Found:
    """Every present entry of the domain's page tables that maps one of some frames.

    ``p2m`` gives the domain's p2m part by part.  Tables with ``poison`` are passed over.  Raises
    TooManyTables, XenError.
    """
    collected = _Collected(wanted)
    for tables, levels in _tables(xen, domid, p2m):
        for start in range(0, len(tables), _TABLE_BATCH):
            search = collected.search
            if search is None:
                return collected.found()
            part, its_levels = tables[start:][:_TABLE_BATCH], levels[start:][:_TABLE_BATCH]
            bad = poison.among(part)
            if bad.any():
                part, its_levels = part[~bad], its_levels[~bad]
            contents = xen.read_frames(domid, part)
            rows, columns = search.find(contents, its_levels)
            collected.add(
                its_levels[rows],
                part[rows],
                columns.astype(np.uint64),
                contents[rows, columns],
            )
    return collected.found()


def _tables(
    xen: Hypervisor, domid: Domid, p2m: Iterable[FrameArray]
) -> Iterator[tuple[FrameArray, NDArray[np.uint8]]]:
    """The page tables that each part of a p2m names, and their levels."""
    claimed = 0
    for part in p2m:
        own = part[guest_frames(part)]
        levels = table_levels(xen.page_types(domid, own))
        is_table = levels > 0
        tables, first = np.unique(own[is_table], return_index=True)
        claimed += len(tables)
        if claimed > MAX_TABLES:
            raise TooManyTables(f"its p2m names more than {MAX_TABLES} page tables")
        yield tables, levels[is_table][first]


class _Collected:
    """Entries found so far, as long as they are not too many for their page or all together."""

    def __init__(self, wanted: FrameArray) -> None:
        self._wanted = np.unique(wanted)
        self._counts = np.zeros(len(self._wanted), dtype=np.int64)
        self._beyond = np.zeros(len(self._wanted), dtype=np.bool_)
        self._entries: list[References] = []
        self.search: Search | None = Search(self._wanted)

    def add(
        self,
        levels: NDArray[np.uint8],
        tables: FrameArray,
        indexes: FrameArray,
        values: FrameArray,
    ) -> None:
        """Take entries that map frames which are searched for."""
        frames = (values & np.uint64(PTE_ADDR_MASK)) >> np.uint64(PAGE_SHIFT)
        pages = np.searchsorted(self._wanted, frames)
        self._entries.append(
            References(pages=pages, levels=levels, tables=tables, indexes=indexes, values=values)
        )
        self._counts += np.bincount(pages, minlength=len(self._counts))
        self._drop()

    def _drop(self) -> None:
        """Let go of pages that have too many; they are searched for no more."""
        before = int(self._beyond.sum())
        self._beyond |= self._counts > MAX_REFERENCES
        kept = np.where(self._beyond, 0, self._counts)
        while kept.sum() > MAX_TOGETHER:
            most = int(kept.argmax())
            self._beyond[most], kept[most] = True, 0
        if int(self._beyond.sum()) == before:
            return
        together = self._together()
        self._entries = [together.chosen(~self._beyond[together.pages])]
        left = self._wanted[~self._beyond]
        self.search = Search(left) if len(left) else None

    def _together(self) -> References:
        return References.joined(self._entries)

    def found(self) -> Found:
        """The entries by frame, each once, by table and index."""
        entries = self._together()
        # A lying p2m may name a table twice.
        _, first = np.unique(entries.tables << _ENTRY_BITS | entries.indexes, return_index=True)
        order = first[np.argsort(entries.pages[first], kind="stable")]
        entries = entries.chosen(order)
        ends = np.searchsorted(entries.pages, np.arange(len(self._wanted) + 1))
        return Found(
            entries={
                int(mfn): entries.entries(slice(int(ends[row]), int(ends[row + 1])))
                for row, mfn in enumerate(self._wanted.tolist())
            },
            beyond=frozenset(self._wanted[self._beyond].tolist()),
        )
