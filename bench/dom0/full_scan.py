"""Searches all page tables of a PV guest for one of its pages in two ways: ... DOMID ROUNDS.

One way is that of Xen's tool of 2009: map a page table, read it, unmap it, go on to the next.  The
other is the survey's, which maps many at once.  Both copy the tables and search the copies in the
same manner, so that what differs is the mapping.  The guest is paused meanwhile: both see the
same tables, and nothing but dom0 runs.

The first way's loop is timed once more with a library that maps nothing: so much of its time is
Python's own and would be less in C.

Prints one JSON object.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable
from time import perf_counter
from typing import TYPE_CHECKING, Final, TypedDict

import numpy as np

from pgofflined.core.frames import PAGE_SIZE, WORDS_PER_PAGE, Domid, Mfn
from pgofflined.core.pagetable import find_references, guest_frames, table_levels
from pgofflined.exchanger.survey import read_p2m, survey
from pgofflined.xen.hypervisor import XenHypervisor
from pgofflined.xen.libs import ForeignPages

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pgofflined.ports import FrameArray, Hypervisor, Words

# As many as a survey reads in one call.
_BATCH: Final = 1024

Hits = tuple[tuple[int, int], ...]


class Scans(TypedDict):
    """Seconds of each round, and how many tables were searched and entries found."""

    tables: int
    found: int
    one_by_one: list[float]
    of_it_python: list[float]
    batched: list[float]
    survey: list[float]


def all_tables(xen: Hypervisor, domid: Domid) -> tuple[FrameArray, NDArray[np.uint8]]:
    """A guest's page tables and their levels."""
    entries = read_p2m(xen, xen.domain(domid)).entries
    own = entries[guest_frames(entries)]
    levels = table_levels(xen.page_types(domid, own))
    return own[levels > 0], levels[levels > 0]


def scan_one_by_one(
    pages: ForeignPages, domid: Domid, tables: FrameArray, levels: NDArray[np.uint8], mfn: Mfn
) -> Hits:
    """Rows and columns of the entries that map a page, with one mapping for each table."""
    contents = np.empty((_BATCH, WORDS_PER_PAGE), dtype=np.uint64)
    first = contents.ctypes.data

    def read(batch: FrameArray) -> Words:
        target = first
        for table in batch.tolist():
            with pages.frames(domid, (table,)) as address:
                ctypes.memmove(target, address, PAGE_SIZE)
            target += PAGE_SIZE
        return contents[: len(batch)]

    return _scan(read, tables, levels, mfn)


def scan_batched(
    xen: Hypervisor, domid: Domid, tables: FrameArray, levels: NDArray[np.uint8], mfn: Mfn
) -> Hits:
    """The same as a survey does it."""
    return _scan(lambda batch: xen.read_frames(domid, batch), tables, levels, mfn)


def _scan(
    read: Callable[[FrameArray], Words], tables: FrameArray, levels: NDArray[np.uint8], mfn: Mfn
) -> Hits:
    wanted = np.array([mfn], dtype=np.uint64)
    found: list[tuple[int, int]] = []
    for start in range(0, len(tables), _BATCH):
        part = slice(start, start + _BATCH)
        rows, columns = find_references(read(tables[part]), levels[part], wanted)
        found += zip((rows + start).tolist(), columns.tolist(), strict=True)
    return tuple(found)


class MapsNothing:
    """In place of libxenforeignmemory: every mapping is one and the same page of our own."""

    def __init__(self) -> None:
        self._page = ctypes.create_string_buffer(PAGE_SIZE)

    def xenforeignmemory_open(self, *_: object) -> int:
        """A handle."""
        return 1

    def xenforeignmemory_map(self, *_: object) -> int:
        """An address."""
        return ctypes.addressof(self._page)

    def xenforeignmemory_unmap(self, *_: object) -> int:
        """Done."""
        return 0


def main(domid: Domid, rounds: int) -> None:
    """Pause the guest, measure, let it run."""
    xen = XenHypervisor()
    xen.pause(domid)
    try:
        print(json.dumps(compare(xen, domid, rounds, ForeignPages())), flush=True)
    finally:
        xen.unpause(domid)


def compare(xen: Hypervisor, domid: Domid, rounds: int, pages: ForeignPages) -> Scans:
    """All ways in each round, one after the other; the first round is not counted."""
    tables, levels = all_tables(xen, domid)
    info = xen.domain(domid)
    p2m = read_p2m(xen, info).entries
    data = p2m[guest_frames(p2m)]
    mfn = Mfn(int(data[~np.isin(data, tables)][-1]))
    nothing = ForeignPages(MapsNothing())
    results: list[Hits] = []
    ways: dict[str, Callable[[], object]] = {
        "one_by_one": lambda: results.append(scan_one_by_one(pages, domid, tables, levels, mfn)),
        "of_it_python": lambda: scan_one_by_one(nothing, domid, tables, levels, mfn),
        "batched": lambda: results.append(scan_batched(xen, domid, tables, levels, mfn)),
        "survey": lambda: survey(xen, info, [mfn]),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way, scan in ways.items():
            began = perf_counter()
            scan()
            seconds[way] += [perf_counter() - began] if number else []
    if len(set(results)) != 1 or not results[0]:
        raise SystemExit(f"the ways found different entries that map mfn {mfn:#x}: {results}")
    return Scans(
        tables=len(tables),
        found=len(results[0]),
        one_by_one=seconds["one_by_one"],
        of_it_python=seconds["of_it_python"],
        batched=seconds["batched"],
        survey=seconds["survey"],
    )


if __name__ == "__main__":
    main(Domid(int(sys.argv[1])), int(sys.argv[2]))
