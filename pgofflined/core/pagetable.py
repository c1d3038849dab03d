"""Searches through page tables and p2m lists that are already in memory, as numpy arrays."""

from __future__ import annotations

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

_PAGE_SHIFT = np.uint64(12)
_PRESENT = np.uint64(PTE_PRESENT)
_ADDRESS = np.uint64(PTE_ADDR_MASK)
_LOW = np.uint64(0xFFFF)


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
    # A table of the wanted frames' low bits tells nearly all entries apart with one look-up
    # each, however many frames are wanted; what passes is then compared in full.
    hint = np.zeros(int(_LOW) + 1, dtype=np.bool_)
    hint[wanted & _LOW] = True
    maybe = hint[(tables >> _PAGE_SHIFT) & _LOW]
    rows, columns = np.nonzero(maybe)
    entries = tables[rows, columns]
    hits = (entries & _PRESENT).astype(np.bool_)
    hits &= np.isin((entries & _ADDRESS) >> _PAGE_SHIFT, wanted)
    hits &= ~((levels[rows] == 4) & (columns >= L4_XEN_SLOTS.start) & (columns < L4_XEN_SLOTS.stop))
    return rows[hits], columns[hits]


def guest_frames(p2m: Frames) -> NDArray[np.bool_]:
    """Which entries of a Linux p2m list name a frame of the guest's own.

    Linux marks foreign entries with bit 63, identity ones with bit 62 and missing ones with all
    ones (arch/x86/xen/p2m.c); what does not fit in an mfn is none either.
    """
    own: NDArray[np.bool_] = p2m < np.uint64(1 << MFN_BITS)
    return own
