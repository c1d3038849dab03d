"""Decides, from surveyed facts alone, which pages can be exchanged and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pgofflined.core.frames import Mfn, Pfn
from pgofflined.core.offline import OfflineState
from pgofflined.core.outcomes import Refusal, RefusalReason
from pgofflined.core.pages import PageKind
from pgofflined.exchanger.survey import P2mSlot, PageFacts, PteReference


@dataclass(frozen=True, slots=True, kw_only=True)
class PagePlan:
    """All that is needed to move one page, and to put it back."""

    mfn: Mfn
    pfn: Pfn
    slot: P2mSlot
    references: tuple[PteReference, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The pages that will be exchanged, and the refused ones with their reasons."""

    pages: tuple[PagePlan, ...]
    refusals: tuple[Refusal, ...]


def make_plan(facts: Sequence[PageFacts]) -> Plan:
    """A plan or a refusal for each page."""
    decided = [plan_page(page) for page in facts]
    return Plan(
        pages=tuple(page for page in decided if isinstance(page, PagePlan)),
        refusals=tuple(page for page in decided if isinstance(page, Refusal)),
    )


def plan_page(page: PageFacts) -> PagePlan | Refusal:
    """What to do with one page."""
    early = refuse_by_state(page.mfn, page.state) or refuse_by_kind(page.mfn, page.type.kind)
    if early is not None:
        return early
    if page.granted:
        return refuse_granted(page.mfn)
    if page.pfn is None or page.slot is None:
        return Refusal(
            mfn=page.mfn,
            reason=RefusalReason.P2M_DISAGREES,
            detail="Xen's M2P notes no pfn inside the guest's p2m for it",
        )
    if page.p2m_mfn != page.mfn:
        return Refusal(
            mfn=page.mfn,
            reason=RefusalReason.P2M_DISAGREES,
            detail=f"the guest's p2m does not lead pfn {page.pfn:#x} to it",
        )
    if page.holds_p2m:
        return Refusal(
            mfn=page.mfn,
            reason=RefusalReason.P2M_FRAME,
            detail="it holds a part of the guest's p2m",
        )
    return PagePlan(mfn=page.mfn, pfn=page.pfn, slot=page.slot, references=page.references)


def refuse_by_state(mfn: Mfn, state: OfflineState) -> Refusal | None:
    """A refusal for a page whose contents must not be read or that nobody marked."""
    if state & OfflineState.BROKEN:
        return Refusal(
            mfn=mfn,
            reason=RefusalReason.BROKEN,
            detail="it has had an uncorrected error; its contents must not be read",
        )
    if not state & OfflineState.OFFLINE_PENDING:
        return Refusal(
            mfn=mfn,
            reason=RefusalReason.NOT_PENDING,
            detail="it is not marked for offlining, so an exchange would only hand it to another",
        )
    return None


def refuse_by_kind(mfn: Mfn, kind: PageKind) -> Refusal | None:
    """A refusal for a page that Xen does not use as plain data of this domain."""
    match kind:
        case PageKind.DATA:
            return None
        case PageKind.L1 | PageKind.L2 | PageKind.L3 | PageKind.L4:
            return Refusal(
                mfn=mfn,
                reason=RefusalReason.PAGE_TABLE,
                detail=f"it is in use as a page table ({kind.name}), which is not moved yet",
            )
        case PageKind.BROKEN:
            return refuse_by_state(mfn, OfflineState.BROKEN)
        case PageKind.NOT_THE_DOMAINS:
            return Refusal(
                mfn=mfn,
                reason=RefusalReason.NOT_THE_DOMAINS,
                detail="it does not belong to the domain any more",
            )


def refuse_granted(mfn: Mfn) -> Refusal:
    """The refusal for a page that the guest's grant table offers to another domain."""
    return Refusal(
        mfn=mfn,
        reason=RefusalReason.GRANTED,
        detail="the guest grants it to another domain, which may write to it at any moment",
    )
