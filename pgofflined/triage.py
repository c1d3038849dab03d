"""Finds out whose a page is, marks it where that is safe, and says who is to move it.

Synchronous: every step is a hypercall.  The order is what keeps hosts alive: the state is
queried first (an offline call for a broken and owned page makes Xen crash the owner), the owner
is looked for before anything is marked, and the mark is set only for pages that can follow it.

A page with an uncorrected error is marked wherever that is safe, whatever the policy says of its
owner, and nobody is sent to move it: to mark it reads nothing, and keeps it from the next owner.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from errno import EINVAL

from pgofflined.core.book import NOT_RAM
from pgofflined.core.domains import DomainInfo, GuestKind, ShutdownReason
from pgofflined.core.errors import DomainGone, OfflineCallUnsafe, PortError, XenError
from pgofflined.core.frames import DOM0, DOMID_COW, DOMID_IO, DOMID_XEN, Domid, Mfn
from pgofflined.core.offline import OfflineFlag, OfflineReply, OfflineState
from pgofflined.marks import may_join, take_mark_back, take_marks_back
from pgofflined.owners import (
    find_pv_owner,
    find_special_owner,
    named,
    named_if_possible,
    what_of_broken,
)
from pgofflined.ports import Hypervisor

log = logging.getLogger(__name__)


class LeftReason(StrEnum):
    """Why a page stays where it is."""

    DOM0 = "dom0"
    XEN = "xen"
    IO = "io"
    SHARED = "shared"
    NOT_RAM = NOT_RAM
    BROKEN = "broken"
    DENIED = "denied"
    UNFIXED_XEN = "unfixed_xen"
    UNSAFE_CALL = "unsafe_call"
    NOT_UNDERSTOOD = "not_understood"
    UNCORRECTED = "uncorrected"


class LaterReason(StrEnum):
    """Why the same page is looked at again later."""

    ANONYMOUS = "anonymous"
    OWNER_ENDING = "owner_ending"
    OWNER_DYING = "owner_dying"
    OWNER_UNNAMED = "owner_unnamed"
    OWNER_CHANGED = "owner_changed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Offlined:
    """Out of use already."""

    mfn: Mfn
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ToExchange:
    """Its PV owner is to be moved off it in place; ``marked`` says whether Xen has its mark."""

    mfn: Mfn
    domain: DomainInfo
    marked: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ToRelocate:
    """Marked; its HVM or PVH owner is to be migrated."""

    mfn: Mfn
    domain: DomainInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """Not to be moved by us; ``marked`` says whether Xen holds it pending all the same.

    ``domain`` is its owner, where that is known: a guest, or the PV domain of a broken page.
    """

    mfn: Mfn
    reason: LeftReason
    detail: str
    marked: bool = False
    domain: DomainInfo | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Later:
    """Cannot be settled now.  ``domain`` is its owner, where that is known."""

    mfn: Mfn
    reason: LaterReason
    detail: str
    marked: bool = False
    domain: DomainInfo | None = None


Disposition = Offlined | ToExchange | ToRelocate | Left | Later


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What the policy and the host's past allow.

    ``denial`` gives the reason why a domain's pages are to be left alone, None where they are
    not.  ``wedged`` says whether Xen itself has broken a page of that domain: the lock that such
    a pass may have left behind would make the next offline call hang the host.
    ``mark_pv_later``: this page of a PV guest is marked when the guest has left it, not before.
    """

    denial: Callable[[DomainInfo], str | None]
    wedged: Callable[[DomainInfo], bool]
    mark_pv_later: Callable[[Mfn], bool] = lambda _mfn: False


def triage(mfn: Mfn, xen: Hypervisor, rules: Rules, *, poisoned: bool = False) -> Disposition:
    """Settle one page as far as that goes without moving its owner.

    Marks the page unless the result says ``marked`` False.  ``poisoned``: it has had an uncorrected
    error, so nobody is to be moved off it.  Raises PortError when Xen cannot be asked.
    """
    try:
        state = xen.query(mfn)
    except XenError as error:
        if error.errno != EINVAL:
            raise
        return Left(mfn=mfn, reason=LeftReason.NOT_RAM, detail="it is no memory of this host")
    if state is OfflineState.OFFLINE_PENDING and not xen.version().offlines_free_frames_safely:
        # Set by an earlier release or by hand; its owner may end at any moment.
        problems = take_marks_back(xen, [mfn])
        for problem in problems:
            log.critical("%s", problem)
        if not problems:
            state = OfflineState.ONLINE
    settled = _settled_by_state(mfn, state, xen) or (
        _poison_settled_by_owner(mfn, state, xen, rules)
        if poisoned
        else _settled_by_owner(mfn, state, xen, rules)
    )
    if settled is not None:
        return settled
    try:
        reply = xen.offline(mfn)
    except OfflineCallUnsafe as error:
        marked = _is_marked(state)
        return Left(mfn=mfn, reason=LeftReason.UNSAFE_CALL, detail=str(error), marked=marked)
    return _settled_by_reply(mfn, xen, rules, reply, poisoned=poisoned)


def _settled_by_state(mfn: Mfn, state: OfflineState, xen: Hypervisor) -> Disposition | None:
    if state & OfflineState.OFFLINED:
        return Offlined(mfn=mfn, detail="it is out of use")
    if state & OfflineState.BROKEN:
        owner = find_pv_owner(mfn, xen)
        return Left(
            mfn=mfn,
            reason=LeftReason.BROKEN,
            detail=f"Xen holds it for broken while somebody owns it; {what_of_broken(owner, xen)}",
            marked=True,
            domain=None if owner is None else named_if_possible(owner, xen),
        )
    return None


def _settled_by_owner(
    mfn: Mfn, state: OfflineState, xen: Hypervisor, rules: Rules
) -> Disposition | None:
    """What can be said before the mark; None when the page is to be marked."""
    fixed = xen.version().offlines_free_frames_safely
    owner = _find_owner(mfn, xen, rules)
    if owner is None:
        if fixed:
            return None
        is_free = xen.m2p(mfn) is None
        why = "it is free, or Xen's own" if is_free else "its guest would have to end"
        return _unfixed(mfn, why, marked=_is_marked(state))
    if owner.is_dom0:
        return _dom0(mfn, marked=_is_marked(state))
    if _is_ending(owner) or rules.wedged(owner):
        return _ending(mfn, owner, marked=_is_marked(state))
    domain = named(owner, xen)
    if domain is None:
        return _owner_gone(mfn, owner.domid, marked=_is_marked(state))
    denial = rules.denial(domain)
    if denial is not None:
        return _denied(mfn, state, xen, domain, denial)
    if not fixed:
        # A freed frame joins its neighbour only where that one is free too, and it is the join
        # that this allocator takes apart wrongly.  Should the guest end while the page waits for
        # its job, both are freed: the mark is set when the guest is held, and not before.
        if may_join(xen, mfn):
            why = "its neighbour is free, and the two would be joined"
            return _unfixed(mfn, why, marked=_is_marked(state))
        return ToExchange(mfn=mfn, domain=domain, marked=_is_marked(state))
    if rules.mark_pv_later(mfn):
        return ToExchange(mfn=mfn, domain=domain, marked=_is_marked(state))
    return None


def _poison_settled_by_owner(
    mfn: Mfn, state: OfflineState, xen: Hypervisor, rules: Rules
) -> Disposition | None:
    """The same for a page with an uncorrected error."""
    owner = _find_owner(mfn, xen, rules)
    if owner is not None and owner.is_dom0:
        # It lives on when Xen has broken a page of it, and not every source tells whose that was.
        return _dom0(mfn, marked=_is_marked(state))
    if owner is not None and (rules.wedged(owner) or _is_ending(owner)):
        # One that has crashed may have by what Xen did about another page of it.
        return _ending(mfn, owner, marked=_is_marked(state))
    if xen.version().offlines_free_frames_safely:
        return None
    whose = "it is in use or Xen's own" if owner is None else f"d{owner.domid} has it"
    if xen.m2p(mfn) is None and owner is None:
        whose = "it is free, or Xen's own"
    return Left(
        mfn=mfn,
        reason=LeftReason.UNFIXED_XEN,
        detail=f"it has had an uncorrected error, {whose}, and this Xen's allocator is damaged by "
        "taking it out, so that it is not marked: whoever is given it next may be hit.  Reboot the "
        f"host with badpage={mfn:#x} on Xen's command line, and do not end its owner before that",
        marked=_is_marked(state),
        domain=owner,
    )


def _find_owner(mfn: Mfn, xen: Hypervisor, rules: Rules) -> DomainInfo | None:
    """The PV domain of a page, also of one of Xen's that nobody may mark for its sake."""
    # Whatever the M2P says of it: a PV guest writes the entries of its own frames.
    return find_pv_owner(mfn, xen) or find_special_owner(
        mfn, xen, lambda domain: domain.is_dom0 or rules.wedged(domain) or _is_ending(domain)
    )


def _owner_gone(mfn: Mfn, owner: Domid, *, marked: bool) -> Later:
    return Later(
        mfn=mfn,
        reason=LaterReason.OWNER_CHANGED,
        detail=f"its owner d{owner} has just gone",
        marked=marked,
    )


def _is_marked(state: OfflineState) -> bool:
    return bool(state & OfflineState.OFFLINE_PENDING)


def _is_ending(owner: DomainInfo) -> bool:
    return owner.dying or owner.shutdown is ShutdownReason.CRASH


def _ending(mfn: Mfn, owner: DomainInfo, *, marked: bool) -> Later:
    if owner.dying:
        detail = f"its owner d{owner.domid} is being taken apart"
        return Later(
            mfn=mfn, reason=LaterReason.OWNER_DYING, detail=detail, marked=marked, domain=owner
        )
    detail = f"its owner d{owner.domid} has crashed"
    if not _is_ending(owner):
        detail = (
            f"Xen has broken a page of its owner d{owner.domid} by itself, or may have, and to "
            f"mark another one could hang the host: it waits until d{owner.domid} has ended"
        )
    return Later(
        mfn=mfn, reason=LaterReason.OWNER_ENDING, detail=detail, marked=marked, domain=owner
    )


def _denied(mfn: Mfn, state: OfflineState, xen: Hypervisor, owner: DomainInfo, denial: str) -> Left:
    """The page of a domain that the policy excludes has no mark, or none any more."""
    marked = False
    if state is OfflineState.OFFLINE_PENDING:
        problem = take_mark_back(xen, mfn)
        if problem is not None:
            marked = True
            log.error(
                "mfn %#x of d%d stays marked, although %s: the mark could not be taken back (%s); "
                "`xen-hptool mem-online %x` does it",
                mfn,
                owner.domid,
                denial,
                problem,
                mfn,
            )
    return Left(mfn=mfn, reason=LeftReason.DENIED, detail=denial, marked=marked, domain=owner)


def _settled_by_reply(
    mfn: Mfn, xen: Hypervisor, rules: Rules, reply: OfflineReply, *, poisoned: bool
) -> Disposition:
    flags = reply.flags
    if flags & OfflineFlag.OFFLINED:
        return Offlined(mfn=mfn, detail="it was free and is out of use now")
    if flags & OfflineFlag.AGAIN:
        return Left(
            mfn=mfn,
            reason=LeftReason.BROKEN,
            detail="it broke between our query and our call, and Xen has crashed its owner",
            marked=True,
        )
    if flags & OfflineFlag.NOT_CONV_RAM:
        return Left(mfn=mfn, reason=LeftReason.NOT_RAM, detail="it is no ordinary memory")
    if flags & OfflineFlag.XENPAGE:
        return _xens(mfn, marked=bool(flags & OfflineFlag.PENDING))
    if flags & OfflineFlag.ANONYMOUS:
        return Later(
            mfn=mfn,
            reason=LaterReason.ANONYMOUS,
            detail="it is being handed to an owner that Xen cannot name yet",
            marked=True,
        )
    if flags & OfflineFlag.OWNED and flags & OfflineFlag.PENDING and reply.owner is not None:
        return _settled_by_marked_owner(mfn, xen, rules, reply.owner, poisoned=poisoned)
    return Left(
        mfn=mfn,
        reason=LeftReason.NOT_UNDERSTOOD,
        detail=f"Xen answered the offline call with {flags}",
    )


def _settled_by_marked_owner(
    mfn: Mfn, xen: Hypervisor, rules: Rules, owner: Domid, *, poisoned: bool
) -> Disposition:
    if owner == DOM0:
        return _dom0(mfn, marked=True)
    if owner == DOMID_XEN:
        return _xens(mfn, marked=True)
    if owner == DOMID_IO:
        return Left(mfn=mfn, reason=LeftReason.IO, detail="it is given to I/O", marked=True)
    if owner == DOMID_COW:
        return Left(
            mfn=mfn,
            reason=LeftReason.SHARED,
            detail="several guests share it copy-on-write",
            marked=True,
        )
    try:
        unnamed = xen.condition(owner)
    except DomainGone:
        return _owner_gone(mfn, owner, marked=True)
    if _is_ending(unnamed):
        return _ending(mfn, unnamed, marked=True)
    if poisoned:
        return Left(
            mfn=mfn,
            reason=LeftReason.UNCORRECTED,
            detail="it has had an uncorrected error, must not be copied, and is marked: it goes "
            f"out of use when d{owner} ends; restart that guest, do not save or migrate it",
            marked=True,
            domain=named_if_possible(unnamed, xen),
        )
    try:
        domain = named(unnamed, xen)
    except PortError as error:
        return Later(
            mfn=mfn,
            reason=LaterReason.OWNER_UNNAMED,
            detail=f"what d{owner} is called cannot be told: {error}",
            marked=True,
            domain=unnamed,
        )
    if domain is None:
        return _owner_gone(mfn, owner, marked=True)
    denial = rules.denial(domain)
    if denial is not None:
        return _denied(mfn, OfflineState.OFFLINE_PENDING, xen, domain, denial)
    if domain.kind is GuestKind.PV:
        return ToExchange(mfn=mfn, domain=domain)
    return ToRelocate(mfn=mfn, domain=domain)


def _dom0(mfn: Mfn, *, marked: bool) -> Left:
    return Left(
        mfn=mfn,
        reason=LeftReason.DOM0,
        detail="it belongs to dom0; plan a reboot with badpage=, or have dom0 give it up",
        marked=marked,
    )


def _xens(mfn: Mfn, *, marked: bool) -> Left:
    return Left(
        mfn=mfn,
        reason=LeftReason.XEN,
        detail="it belongs to Xen itself; plan a reboot with badpage=",
        marked=marked,
    )


def _unfixed(mfn: Mfn, why: str, *, marked: bool) -> Left:
    return Left(
        mfn=mfn,
        reason=LeftReason.UNFIXED_XEN,
        marked=marked,
        detail=f"{why}: this Xen's allocator is damaged by taking such a page out; "
        "update Xen (4.20.4, 4.21.2, 4.22 or later), or plan a reboot with badpage=",
    )
