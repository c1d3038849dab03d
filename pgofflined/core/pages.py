"""Page types and page-table entries of x86-64 PV guests.

Sources: ``xen/include/public/domctl.h`` (XEN_DOMCTL_PFINFO_*) for the types that
XEN_DOMCTL_getpageframeinfo3 reports, and the Intel SDM volume 3, section 4.5 (4-level paging)
for the layout of an entry.  Functions take and give numpy arrays of these plain words; a module
that only needs the constants does not load numpy.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

PTE_PRESENT: Final = 1 << 0
PTE_RW: Final = 1 << 1
PTE_ACCESSED: Final = 1 << 5
PTE_DIRTY: Final = 1 << 6
PTE_PSE: Final = 1 << 7
# Bits 51:12 hold the frame; an mfn fits in 40 bits.
PTE_ADDR_MASK: Final = 0x000F_FFFF_FFFF_F000
MFN_BITS: Final = 40

PFINFO_TYPE_SHIFT: Final = 28
PFINFO_TYPE_MASK: Final = 0xF << PFINFO_TYPE_SHIFT
PFINFO_LTAB_TYPE_MASK: Final = 0x7 << PFINFO_TYPE_SHIFT
PFINFO_PINNED: Final = 0x8 << PFINFO_TYPE_SHIFT
PFINFO_BROKEN: Final = 0xD << PFINFO_TYPE_SHIFT
PFINFO_XALLOC: Final = 0xE << PFINFO_TYPE_SHIFT
PFINFO_XTAB: Final = 0xF << PFINFO_TYPE_SHIFT

# Slots 256-271 of an L4 are Xen's own (xen/include/public/arch-x86/xen-x86_64.h,
# HYPERVISOR_VIRT_START/END): no guest entry is there.
L4_XEN_SLOTS: Final = range(256, 272)


class PageKind(Enum):
    """What Xen uses a frame of a PV guest as."""

    DATA = 0
    L1 = 1
    L2 = 2
    L3 = 3
    L4 = 4
    BROKEN = 5
    NOT_THE_DOMAINS = 6

    @property
    def is_table(self) -> bool:
        """Whether the frame is a page table of any level."""
        return self in (PageKind.L1, PageKind.L2, PageKind.L3, PageKind.L4)


@dataclass(frozen=True, slots=True, kw_only=True)
class PageType:
    """Decoded XEN_DOMCTL_PFINFO_* word: the kind, and whether Xen keeps the table pinned."""

    kind: PageKind
    pinned: bool = False


def decode_page_type(word: int) -> PageType:
    """Decode one word that XEN_DOMCTL_getpageframeinfo3 gave.

    The whole four-bit field is compared before its parts, since BROKEN (0xd) would otherwise
    read as a pinned table of level 5.  Raises ValueError for a type unknown to us.
    """
    field = word & PFINFO_TYPE_MASK
    match field:
        case 0:
            return PageType(kind=PageKind.DATA)
        case f if f == PFINFO_BROKEN:
            return PageType(kind=PageKind.BROKEN)
        case f if f in (PFINFO_XTAB, PFINFO_XALLOC):
            return PageType(kind=PageKind.NOT_THE_DOMAINS)
    level = (field & PFINFO_LTAB_TYPE_MASK) >> PFINFO_TYPE_SHIFT
    if not 1 <= level <= 4:
        raise ValueError(f"unknown page type {word:#x} from getpageframeinfo3")
    return PageType(kind=PageKind(level), pinned=bool(field & PFINFO_PINNED))
