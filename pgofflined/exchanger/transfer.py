"""Moves the planned pages of one suspended and paused guest: prepare, commit, settle.

Up to the commit of a page (XENMEM_exchange) everything can be taken back: its entries are
written as they were and the old frame never left the guest.  From the commit on only forward is
possible: contents first, then the p2m, then the entries.  In this order a failure in the middle
leaves the page unmapped, so that the guest stops there rather than reading bytes that are not
its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from errno import EINVAL, ENOMEM
from typing import TYPE_CHECKING

import numpy as np

from pgofflined.core.errors import DomainGone, PortError, XenError
from pgofflined.core.frames import Domid, Mfn
from pgofflined.core.offline import OfflineState
from pgofflined.core.outcomes import Damaged, Exchanged, PageResult, Refusal, RefusalReason
from pgofflined.core.pages import PTE_ADDR_MASK, PageKind, decode_page_type
from pgofflined.exchanger.plan import PagePlan
from pgofflined.ports import Hypervisor, PteWrite

if TYPE_CHECKING:
    from pgofflined.ports import Words

# A step after the commit is tried so often before the page counts as damaged.  The calls are
# idempotent, and what makes them fail for a moment (dom0 short of memory) passes.
SETTLE_TRIES = 5


@dataclass(frozen=True, slots=True)
class _Committed:
    """The frame that Xen gave for the page, and what has to be in it."""

    new: Mfn
    contents: Words


@dataclass(slots=True)
class _Move:
    """One page on its way: copied before the commit, at home in another frame after it."""

    plan: PagePlan
    copied: Words | None = None
    committed: _Committed | None = None
    refusal: Refusal | None = None
    damage: list[str] = field(default_factory=list)


def transfer(xen: Hypervisor, domid: Domid, pages: Sequence[PagePlan]) -> list[PageResult]:
    """Exchange ``pages`` of a suspended and paused domain; one result for each, in order.

    Never raises for what happens to a page; KeyboardInterrupt and the like pass after the
    entries of every page have been put back or settled.
    """
    moves = [_Move(plan=page) for page in pages]
    try:
        _prepare(xen, domid, moves)
        for move in moves:
            if move.copied is not None:
                _commit(xen, domid, move, move.copied)
    finally:
        for move in moves:
            _settle(xen, domid, move)
    return [_result(xen, move) for move in moves]


def _prepare(xen: Hypervisor, domid: Domid, moves: Sequence[_Move]) -> None:
    """Clear every entry that maps a page, then copy the page while nothing can reach it."""
    for move in moves:
        # Zero, not just "not present": an entry that keeps the frame's number trips Xen's L1TF
        # check, which crashes the guest where shadow paging is not built in.
        clear = [
            PteWrite(table=reference.table, index=reference.index, value=0)
            for reference in move.plan.references
        ]
        try:
            if clear:
                xen.update_ptes(domid, clear)
            move.copied = _read_page(xen, domid, move.plan.mfn)
        except PortError as error:
            move.refusal = _refuse(move, RefusalReason.XEN_REFUSED, f"{error}")


def _commit(xen: Hypervisor, domid: Domid, move: _Move, contents: Words) -> None:
    mfn = move.plan.mfn
    try:
        # A backend or dom0 itself may hold a mapping that no grant table shows.  If the page
        # changed since it was copied, one is writing to it.
        unchanged = np.array_equal(_read_page(xen, domid, mfn), contents)
    except PortError as error:
        move.refusal = _refuse(move, RefusalReason.XEN_REFUSED, f"{error}")
        return
    if not unchanged:
        move.refusal = _refuse(
            move,
            RefusalReason.CONTENTS_CHANGED,
            "something wrote to it while the guest stood still",
        )
        return
    try:
        new = xen.exchange(domid, mfn, move.plan.pfn)
    except DomainGone as error:
        move.refusal = _refuse(move, RefusalReason.DOMAIN_GONE, str(error))
    except PortError as error:
        move.refusal = _refuse_exchange(xen, domid, move, error)
    else:
        move.committed = _Committed(new, contents)


def _refuse_exchange(
    xen: Hypervisor, domid: Domid, move: _Move, error: PortError
) -> Refusal | None:
    """The refusal that a failed exchange is; None, and the damage noted, if it happened after all.

    EINVAL and ENOMEM are Xen's refusals.  After anything else the domain may have lost the frame
    for one that we do not know, and then nothing may be put back into its entries.
    """
    code = error.errno if isinstance(error, XenError) else None
    if code == EINVAL:
        return _refuse(
            move,
            RefusalReason.OTHER_REFERENCES,
            "Xen counts references besides the guest's page tables (a mapping elsewhere, a "
            "vCPU's registered area, a descriptor table)",
        )
    if code == ENOMEM:
        return _refuse(move, RefusalReason.NO_FREE_MEMORY, "the host has no free frame")
    if _is_still_owned(xen, domid, move.plan.mfn):
        return _refuse(move, RefusalReason.XEN_REFUSED, str(error))
    move.damage.append(f"the page has left the guest, and what replaces it is not known: {error}")
    return None


def _is_still_owned(xen: Hypervisor, domid: Domid, mfn: Mfn) -> bool:
    try:
        word = int(xen.page_types(domid, np.array([mfn], dtype=np.uint64))[0])
        return decode_page_type(word).kind is not PageKind.NOT_THE_DOMAINS
    except (PortError, ValueError):
        return False


def _settle(xen: Hypervisor, domid: Domid, move: _Move) -> None:
    """Make the page's home whole again: the new frame after a commit, else the old one."""
    plan = move.plan
    if move.damage:
        return
    if move.committed is None:
        _restore(xen, domid, move, plan.mfn)
        return
    new, contents = move.committed.new, move.committed.contents
    written = _insist(
        move, "write the contents", lambda: xen.write_words(domid, new, 0, contents)
    ) and _insist(move, "compare the contents", lambda: _compare(xen, domid, new, contents))
    word = np.array([new], dtype=np.uint64)
    if written and _insist(
        move,
        "write the p2m entry",
        lambda: xen.write_words(domid, plan.slot.frame, plan.slot.index, word),
    ):
        _restore(xen, domid, move, new)


def _restore(xen: Hypervisor, domid: Domid, move: _Move, home: Mfn) -> None:
    writes = [
        PteWrite(
            table=reference.table,
            index=reference.index,
            value=reference.value & ~PTE_ADDR_MASK | home << 12,
        )
        for reference in move.plan.references
    ]
    if writes:
        _insist(move, "restore the page-table entries", lambda: xen.update_ptes(domid, writes))


def _insist(move: _Move, what: str, act: Callable[[], None]) -> bool:
    """Try a step that has to succeed several times; note the damage if it never does."""
    problem = ""
    for _ in range(SETTLE_TRIES):
        try:
            act()
        except DomainGone as error:
            move.refusal = _refuse(move, RefusalReason.DOMAIN_GONE, str(error))
            return False
        except PortError as error:
            problem = str(error)
        else:
            return True
    move.damage.append(f"could not {what}: {problem}")
    return False


def _compare(xen: Hypervisor, domid: Domid, mfn: Mfn, contents: Words) -> None:
    if not np.array_equal(_read_page(xen, domid, mfn), contents):
        raise PortError(f"mfn {mfn:#x} of d{domid} does not hold what was written to it")


def _read_page(xen: Hypervisor, domid: Domid, mfn: Mfn) -> Words:
    contents: Words = xen.read_frames(domid, np.array([mfn], dtype=np.uint64))[0]
    return contents


def _is_offlined(xen: Hypervisor, mfn: Mfn) -> bool:
    try:
        return bool(xen.query(mfn) & OfflineState.OFFLINED)
    except PortError:
        # The page is moved all the same; whoever reads "not confirmed" asks again.
        return False


def _refuse(move: _Move, reason: RefusalReason, detail: str) -> Refusal:
    return Refusal(mfn=move.plan.mfn, reason=reason, detail=detail)


def _result(xen: Hypervisor, move: _Move) -> PageResult:
    plan = move.plan
    home = move.committed.new if move.committed is not None else plan.mfn
    if move.refusal is not None and move.refusal.reason is RefusalReason.DOMAIN_GONE:
        return move.refusal
    if move.damage:
        return Damaged(old=plan.mfn, new=home, pfn=plan.pfn, detail="; ".join(move.damage))
    if move.committed is not None:
        return Exchanged(
            old=plan.mfn,
            new=home,
            pfn=plan.pfn,
            references=len(plan.references),
            offlined=_is_offlined(xen, plan.mfn),
        )
    return move.refusal or _refuse(
        move, RefusalReason.XEN_REFUSED, "the exchange was not reached; nothing was changed"
    )
