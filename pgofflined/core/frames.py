"""Address spaces of a Xen host, one type each, so that mypy tells them apart.

The words are those of ``xen/include/xen/mm.h``: an *mfn* numbers a host frame, a *pfn* a
frame of a guest's own linear memory, a *gfn* what a guest puts in its page tables (its mfn
for PV, its pfn for HVM and PVH).  A *maddr* is a machine address in bytes.
"""

from __future__ import annotations

from typing import Final, NewType

Mfn = NewType("Mfn", int)
Pfn = NewType("Pfn", int)
Gfn = NewType("Gfn", int)
Maddr = NewType("Maddr", int)
Domid = NewType("Domid", int)

PAGE_SHIFT: Final = 12
PAGE_SIZE: Final = 1 << PAGE_SHIFT
WORDS_PER_PAGE: Final = PAGE_SIZE // 8

# Reserved domids, xen/include/public/xen.h.
DOMID_FIRST_RESERVED: Final = Domid(0x7FF0)
DOMID_SELF: Final = Domid(0x7FF0)
DOMID_IO: Final = Domid(0x7FF1)
DOMID_XEN: Final = Domid(0x7FF2)
DOMID_COW: Final = Domid(0x7FF3)
DOMID_INVALID: Final = Domid(0x7FF4)
DOM0: Final = Domid(0)


def mfn_of(maddr: Maddr) -> Mfn:
    """The frame in which a machine address lies."""
    return Mfn(maddr >> PAGE_SHIFT)


def maddr_of(mfn: Mfn) -> Maddr:
    """The first byte of a frame."""
    return Maddr(mfn << PAGE_SHIFT)


def parse_mfn(untrusted_text: str, *, max_mfn: Mfn) -> Mfn:
    """Read an mfn that a person typed: ``0x1a2b3`` is hexadecimal, ``107187`` decimal.

    Raises ValueError with what is allowed when the text is no number or lies outside the host.
    """
    text = untrusted_text.strip().lower()
    digits, base = (text[2:], 16) if text.startswith("0x") else (text, 10)
    allowed = "0123456789abcdef"[:base]
    if not digits or len(digits) > 16 or any(digit not in allowed for digit in digits):
        raise ValueError(
            f"{untrusted_text!r} is no mfn: give hexadecimal digits after 0x, or decimal ones"
        )
    number = int(digits, base)
    if number > max_mfn:
        raise ValueError(f"mfn {number:#x} lies beyond the host's last frame {max_mfn:#x}")
    return Mfn(number)
