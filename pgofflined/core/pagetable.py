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
Parts = NDArray[np.uint16]
_Match = Callable[[Parts, NDArray[np.bool_]], None]
"""Sets each of the second array where the first has one of the wanted values."""

_PAGE_SHIFT = np.uint64(12)
_PRESENT = np.uint64(PTE_PRESENT)
_ADDRESS = np.uint64(PTE_ADDR_MASK)

# Entries looked at in one go: what is computed from them stays in the processor's caches, and they
# are enough for numpy's cost of a call not to count.
_BLOCK = 256 << 10
# From about so many frames on, a table look-up for each entry is faster than one vectorised
# comparison for each entry and frame; it costs the same however many there are.
_COMPARED_FRAMES = 10
# From so many candidates in a block on, numpy finds them faster than one search for each.
_FEW = 32
# Of an entry's four 16-bit parts, the second has nothing but bits of the frame: 4 to 19.
_PART, _PARTS, _PART_SHIFT = 1, 4, np.uint64(4)


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


class Search:
    """Finds the entries that map some frames, in as many page tables as are given to it.

    Made once for a whole scan: the memory that it works in stays where it is.
    """

    def __init__(self, wanted: Frames) -> None:
        if not wanted.size:
            raise ValueError("a search for no frame")
        self._wanted = np.unique(wanted)
        parts = np.unique((wanted >> _PART_SHIFT).astype(np.uint16))
        self._match = (_comparing if parts.size <= _COMPARED_FRAMES else _looking_up)(parts)
        self._flags = bytearray(_BLOCK)
        self._maybe: NDArray[np.bool_] = np.frombuffer(self._flags, dtype=np.bool_)

    def find(
        self, tables: Words, levels: NDArray[np.uint8]
    ) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Rows and columns of the present entries that map one of the wanted frames.

        ``tables`` has the shape (n, 512), ``levels`` the level of each of the n tables.  The
        slots of an L4 that are Xen's own are passed over.
        """
        entries = tables.reshape(-1)
        positions = self._candidates(entries)
        words = entries[positions]
        frames = (words & _ADDRESS) >> _PAGE_SHIFT
        # Nearly every batch has a few candidates, so this is quicker than np.isin, which sorts.
        nearest = self._wanted.take(self._wanted.searchsorted(frames), mode="clip")
        hits = (nearest == frames) & (words & _PRESENT).astype(np.bool_)
        rows, columns = np.divmod(positions[hits], tables.shape[1])
        of_xen = (columns >= L4_XEN_SLOTS.start) & (columns < L4_XEN_SLOTS.stop)
        guests = ~((levels[rows] == 4) & of_xen)
        return rows[guests], columns[guests]

    def _candidates(self, entries: Words) -> NDArray[np.intp]:
        """Positions of all entries whose frame has the same bits 4 to 19 as a wanted one."""
        # The entries come from memory once, and nothing is computed of them: the part is there.
        parts = entries.view(np.uint16)[_PART::_PARTS]
        found = [np.empty(0, dtype=np.intp)]
        for start in range(0, entries.size, _BLOCK):
            block = parts[start : start + _BLOCK]
            hits = self._maybe[: block.size]
            self._match(block, hits)
            found.append(self._which(hits) + start)
        return np.concatenate(found)

    def _which(self, hits: NDArray[np.bool_]) -> NDArray[np.intp]:
        """Positions of what is set at the start of the flags."""
        few: list[int] = []
        # This is memchr, which passes over what is not set several times faster than numpy.
        at = self._flags.find(1, 0, hits.size)
        while at >= 0 and len(few) < _FEW:
            few.append(at)
            at = self._flags.find(1, at + 1, hits.size)
        return np.flatnonzero(hits) if at >= 0 else np.array(few, dtype=np.intp)


def find_references(
    tables: Words, levels: NDArray[np.uint8], wanted: Frames
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """What a ``Search`` for the wanted frames finds; nothing where there are none."""
    if not wanted.size:
        none = np.empty(0, dtype=np.intp)
        return none, none
    return Search(wanted).find(tables, levels)


def _comparing(wanted: Parts) -> _Match:
    gathered = np.empty(_BLOCK, dtype=np.uint16)
    space = np.empty(_BLOCK, dtype=np.bool_)
    first, *others = wanted

    def match(parts: Parts, hits: NDArray[np.bool_]) -> None:
        # Side by side they are compared many at a time.
        close, one = gathered[: parts.size], space[: parts.size]
        close[:] = parts
        np.equal(close, first, out=hits)
        for value in others:
            np.equal(close, value, out=one)
            np.logical_or(hits, one, out=hits)

    return match


def _looking_up(wanted: Parts) -> _Match:
    table = np.zeros(1 << 16, dtype=np.bool_)
    table[wanted] = True
    space = np.empty(_BLOCK, dtype=np.intp)

    def match(parts: Parts, hits: NDArray[np.bool_]) -> None:
        # numpy indexes by intp only and would make such a copy anew for each block.
        index = space[: parts.size]
        index[:] = parts
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
