"""Searches through page tables and p2m lists that are already in memory, as numpy arrays."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from pgofflined.core.pages import (
    L4_XEN_SLOTS,
    MFN_BITS,
    PFINFO_LTAB_TYPE_MASK,
    PFINFO_TYPE_MASK,
    PFINFO_TYPE_SHIFT,
    PTE_ADDR_MASK,
    PTE_PRESENT,
)

Frames = NDArray[np.uint64]
Words = NDArray[np.uint64]
LowBits = NDArray[np.uint16]
_Match = Callable[[LowBits, NDArray[np.bool_]], None]
"""Sets each of the second array where the first has one of the wanted values."""

_PAGE_SHIFT = np.uint64(12)
_PRESENT = np.uint64(PTE_PRESENT)
_ADDRESS = np.uint64(PTE_ADDR_MASK)

# Entries looked at in one go: with all that is computed from them they fit in a core's L2 cache,
# and they are enough for numpy's cost of a call not to count.
_BLOCK = 64 << 10
# From about so many frames on, a table look-up for each entry is faster than one vectorised
# comparison for each entry and frame; it costs the same however many there are.
_COMPARED_FRAMES = 12


def table_levels(types: NDArray[np.uint32]) -> NDArray[np.uint8]:
    """Level 1-4 of each frame that is a page table, 0 for every other.

    ``types`` are XEN_DOMCTL_PFINFO_* words.  BROKEN, XALLOC and XTAB share bits with the table
    types and are no tables.
    """
    field = types & np.uint32(PFINFO_TYPE_MASK)
    level = ((field & np.uint32(PFINFO_LTAB_TYPE_MASK)) >> np.uint32(PFINFO_TYPE_SHIFT)).astype(
        np.uint8
    )
    level[level > 4] = 0
    return level


def find_references(
    tables: Words, levels: NDArray[np.uint8], wanted: Frames
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Rows and columns of the present entries that map one of the wanted frames.

    ``tables`` has the shape (n, 512), ``levels`` the level of each of the n tables.  The slots
    of an L4 that are Xen's own are passed over.
    """
    rows, columns = np.divmod(_candidates(tables.reshape(-1), wanted), tables.shape[1])
    entries = tables[rows, columns]
    hits = (entries & _PRESENT).astype(np.bool_)
    hits &= np.isin((entries & _ADDRESS) >> _PAGE_SHIFT, wanted)
    hits &= ~((levels[rows] == 4) & (columns >= L4_XEN_SLOTS.start) & (columns < L4_XEN_SLOTS.stop))
    return rows[hits], columns[hits]


def _candidates(entries: Words, wanted: Frames) -> NDArray[np.intp]:
    """Positions of all entries whose frame has the low bits of a wanted one."""
    low_bits = np.unique(wanted.astype(np.uint16))
    # Block by block, so that what is in between stays in the processor's cache: only the
    # entries themselves come from memory, once.
    size = min(_BLOCK, entries.size)
    low, maybe = np.empty(size, dtype=np.uint16), np.empty(size, dtype=np.bool_)
    match = (_comparing if low_bits.size <= _COMPARED_FRAMES else _looking_up)(low_bits, size)
    found = [np.empty(0, dtype=np.intp)]
    for start in range(0, entries.size, _BLOCK):
        block = entries[start : start + _BLOCK]
        some, hits = low[: block.size], maybe[: block.size]
        np.right_shift(block, _PAGE_SHIFT, out=some, casting="unsafe")
        match(some, hits)
        found.append(np.flatnonzero(hits) + start)
    return np.concatenate(found)


def _comparing(wanted: LowBits, size: int) -> _Match:
    values = list(wanted)
    space = np.empty(size, dtype=np.bool_)

    def match(low: LowBits, hits: NDArray[np.bool_]) -> None:
        one = space[: low.size]
        hits[:] = False
        for value in values:
            np.equal(low, value, out=one)
            np.logical_or(hits, one, out=hits)

    return match


def _looking_up(wanted: LowBits, size: int) -> _Match:
    table = np.zeros(1 << 16, dtype=np.bool_)
    table[wanted] = True
    space = np.empty(size, dtype=np.intp)

    def match(low: LowBits, hits: NDArray[np.bool_]) -> None:
        # numpy indexes by intp only and would make such a copy anew for each block.
        index = space[: low.size]
        index[:] = low
        # No index is out of bounds; but the default mode goes through a copy of `hits` as well.
        np.take(table, index, out=hits, mode="wrap")

    return match


def guest_frames(p2m: Frames) -> NDArray[np.bool_]:
    """Which entries of a Linux p2m list name a frame of the guest's own.

    Linux marks foreign entries with bit 63, identity ones with bit 62 and missing ones with all
    ones (arch/x86/xen/p2m.c); what does not fit in an mfn is none either.
    """
    own: NDArray[np.bool_] = p2m < np.uint64(1 << MFN_BITS)
    return own
