"""The two encodings in which XEN_SYSCTL_page_offline_op answers, decoded once.

Source: ``xen/include/public/sysctl.h``.  A *query* answers with PG_OFFLINE_STATUS_* bits, an
*offline* or *online* call with PG_OFFLINE_* / PG_ONLINE_* bits and the owner's domid in bits
16-31.  The same bit means different things in the two (``1 << 3`` is pending in one and failed
in the other), hence two types.  Unknown bits raise ValueError: an answer that is not understood
must never be acted on.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, Flag
from functools import reduce
from operator import or_
from typing import Final, TypeVar

from pgofflined.core.frames import Domid

# Xen fills the answer array with this byte before it starts (memset in sysctl.c); a word that
# still holds it was not reached.
NOT_HANDLED: Final = 0x01010101
_OWNER_SHIFT: Final = 16
_FLAGS_MASK: Final = 0xFFFF
_Bits = TypeVar("_Bits", bound=Flag)


class WhenMarked(Enum):
    """When a page of a PV guest gets its mark, seen from its exchange."""

    BEFORE = "before"
    """Long before; a page without a mark is not exchanged."""
    WHEN_HELD = "when_held"
    """While the guest stands still for it, and taken back from what does not go: where a marked
    page that its owner frees damages the allocator."""
    AFTER_SCRUB = "after_scrub"
    """When it is free and has been scrubbed: the exchange has nothing to do with it."""


class OfflineState(Flag):
    """What a query says of a frame; no bit at all means in normal use (online)."""

    ONLINE = 0
    OFFLINED = 1 << 1
    ONLINE_EXPLICIT = 1 << 2  # defined by the header, never set by any Xen so far
    OFFLINE_PENDING = 1 << 3
    BROKEN = 1 << 4


class OfflineFlag(Flag):
    """Bits of the answer to an offline call."""

    NONE = 0
    INVALID = 1 << 0
    OFFLINED = 1 << 1
    PENDING = 1 << 2
    FAILED = 1 << 3
    AGAIN = 1 << 4
    XENPAGE = 1 << 8
    DOM0PAGE = 1 << 9
    ANONYMOUS = 1 << 10
    NOT_CONV_RAM = 1 << 11
    OWNED = 1 << 12
    BROKEN = 1 << 13


@dataclass(frozen=True, slots=True, kw_only=True)
class OfflineReply:
    """Answer to an offline call: its flags, and the owner where Xen names one."""

    flags: OfflineFlag
    owner: Domid | None


class OnlineFlag(Flag):
    """Bits of the answer to an online call."""

    NONE = 0
    INVALID = 1 << 0
    ONLINED = 1 << 1
    FAILED = 1 << 3
    BROKEN = 1 << 13


def decode_query(word: int) -> OfflineState:
    """Decode one status word of a query.

    Raises ValueError for a word that Xen did not fill or with bits unknown to us.
    """
    if word == NOT_HANDLED:
        raise ValueError("Xen did not reach this frame")
    return _known(OfflineState, word)


def decode_offline(word: int) -> OfflineReply:
    """Decode one status word of an offline call.

    Raises ValueError for a word that Xen did not fill or with bits unknown to us.
    """
    if word == NOT_HANDLED:
        raise ValueError("Xen did not reach this frame")
    flags = _known(OfflineFlag, word & _FLAGS_MASK)
    # AGAIN comes without an owner: Xen has just crashed it and writes no more than the flag.
    owner_known = OfflineFlag.OWNED | OfflineFlag.XENPAGE | OfflineFlag.ANONYMOUS
    owner = Domid(word >> _OWNER_SHIFT) if flags & owner_known else None
    return OfflineReply(flags=flags, owner=owner)


def decode_online(word: int) -> OnlineFlag:
    """Decode one status word of an online call.

    Raises ValueError for a word that Xen did not fill or with bits unknown to us.
    """
    if word == NOT_HANDLED:
        raise ValueError("Xen did not reach this frame")
    return _known(OnlineFlag, word & _FLAGS_MASK)


def _known(kind: type[_Bits], bits: int) -> _Bits:
    # Flag itself refuses them too, but not those between known ones in Python 3.11.2 (Debian 12).
    if unknown := bits & ~reduce(or_, (member.value for member in kind)):
        raise ValueError(f"invalid value {bits:#x}: {kind.__name__} has no bits {unknown:#x}")
    return kind(bits)
