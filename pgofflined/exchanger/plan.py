"""Decides, from surveyed facts alone, which pages can be exchanged and in which groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Final

from pgofflined.core.frames import Mfn, Pfn
from pgofflined.core.moves import Entries, Group, References, frames_of, no_contents
from pgofflined.core.offline import OfflineState, WhenMarked
from pgofflined.core.outcomes import Refusal, RefusalReason
from pgofflined.core.pages import PageKind, PageType
from pgofflined.exchanger.scan import MAX_REFERENCES
from pgofflined.exchanger.survey import P2mSlot, PageFacts

# What a page, and an entry that maps one, add to the time for which the guest is kept; generously,
# for hosts that are slow or busy.  An entry is read, cleared and set, each time checked by Xen.
_SECONDS_PER_PAGE: Final = 200e-6
_SECONDS_PER_REFERENCE: Final = 5e-6


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PagePlan:
    """All that is needed to move one page, and to put it back."""

    mfn: Mfn
    pfn: Pfn
    slot: P2mSlot
    type: PageType
    references: Entries


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The groups that will be moved one after the other, and the refused pages."""

    groups: tuple[Group, ...]
    refusals: tuple[Refusal, ...]


def make_plan(
    facts: Sequence[PageFacts], *, when: WhenMarked = WhenMarked.BEFORE, blackout: float = inf
) -> Plan:
    """A plan or a refusal for each page, which ``when`` says that it is marked.

    Data pages go together, as many as the guest need not be kept for longer than ``blackout``
    seconds for; those that alone would keep it longer are refused.  A page table goes by itself and
    after them: that its entries can be set again is checked against the guest's memory as it is
    then.
    """
    decided = [_within(plan_page(page, when=when), blackout) for page in facts]
    pages = [page for page in decided if isinstance(page, PagePlan)]
    data = [page for page in pages if not page.type.kind.is_table]
    tables = [page for page in pages if page.type.kind.is_table]
    groups = [*_split(data, blackout), *([page] for page in tables)]
    return Plan(
        groups=tuple(_group(group) for group in groups),
        refusals=tuple(page for page in decided if isinstance(page, Refusal)),
    )


def seconds_for(pages: int, references: int) -> float:
    """For how long the guest has to be kept for pages with so many entries, as an upper bound."""
    return pages * _SECONDS_PER_PAGE + references * _SECONDS_PER_REFERENCE


def _within(page: PagePlan | Refusal, blackout: float) -> PagePlan | Refusal:
    """The page, or a refusal where it alone would keep the guest for too long."""
    if isinstance(page, Refusal):
        return page
    seconds = seconds_for(1, len(page.references))
    if seconds <= blackout:
        return page
    return Refusal(
        mfn=page.mfn,
        reason=RefusalReason.BLACKOUT_LIMIT,
        detail=f"{len(page.references)} entries of the guest's page tables map it, and to change "
        f"them may keep the guest for {seconds:.2g} s; exchange.max_blackout is {blackout:g} s",
    )


def _split(pages: Sequence[PagePlan], blackout: float) -> list[list[PagePlan]]:
    """Pages in groups that are each moved within the time, and have not too many entries."""
    groups: list[list[PagePlan]] = []
    references = 0
    for page in pages:
        references += len(page.references)
        fits = groups and references <= MAX_REFERENCES
        if fits and seconds_for(len(groups[-1]) + 1, references) <= blackout:
            groups[-1].append(page)
        else:
            groups.append([page])
            references = len(page.references)
    return groups


def _group(pages: Sequence[PagePlan]) -> Group:
    return Group(
        kind=pages[0].type.kind,
        pinned=pages[0].type.pinned,
        mfns=frames_of([page.mfn for page in pages]),
        pfns=frames_of([page.pfn for page in pages]),
        slot_frames=frames_of([page.slot.frame for page in pages]),
        slot_indexes=frames_of([page.slot.index for page in pages]),
        references=References.of([page.references for page in pages]),
        contents=no_contents(len(pages)),
        props=frames_of([]),
    )


def plan_page(page: PageFacts, *, when: WhenMarked = WhenMarked.BEFORE) -> PagePlan | Refusal:
    """What to do with one page."""
    if page.is_shared:
        return Refusal(
            mfn=page.mfn,
            reason=RefusalReason.SHARED_INFO,
            detail="it is Xen's own and lent to the guest (shared_info or grant table); "
            "it goes when the guest ends",
        )
    early = refuse_by_state(page.mfn, page.state, when=when)
    early = early or refuse_by_kind(page.mfn, page.type.kind)
    if early is not None:
        return early
    if page.granted:
        return refuse_granted(page.mfn)
    if page.in_gdt:
        return Refusal(
            mfn=page.mfn,
            reason=RefusalReason.DESCRIPTOR_TABLE,
            detail="a vCPU of the guest has it loaded as a descriptor table (GDT)",
        )
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
    if page.too_many:
        return Refusal(
            mfn=page.mfn,
            reason=RefusalReason.TOO_MANY_REFERENCES,
            detail=f"more than {MAX_REFERENCES} entries of the guest's page tables map it (or too "
            "many with the other pages of its job): to change them would keep the guest too long",
        )
    if page.type.kind.is_table:
        refusal = _refuse_table(page)
        if refusal is not None:
            return refusal
    return PagePlan(
        mfn=page.mfn, pfn=page.pfn, slot=page.slot, type=page.type, references=page.references
    )


def _refuse_table(page: PageFacts) -> Refusal | None:
    level = page.type.kind.value
    if page.is_root:
        return refuse_root(page.mfn)
    if page.maps_others:
        return refuse_mapping_others(page.mfn)
    if level > 1 and bool((page.references.levels == level).any()):
        return Refusal(
            mfn=page.mfn,
            reason=RefusalReason.LINEAR_MAPPING,
            detail=f"it is an L{level} table that an L{level} table refers to (a linear mapping)",
        )
    return None


def refuse_by_state(
    mfn: Mfn, state: OfflineState, *, when: WhenMarked = WhenMarked.BEFORE
) -> Refusal | None:
    """A refusal for a page whose contents must not be read or that nobody marked."""
    if state & OfflineState.BROKEN:
        return Refusal(
            mfn=mfn,
            reason=RefusalReason.BROKEN,
            detail="it has had an uncorrected error; its contents must not be read",
        )
    if when is WhenMarked.BEFORE and not state & OfflineState.OFFLINE_PENDING:
        return Refusal(
            mfn=mfn,
            reason=RefusalReason.NOT_PENDING,
            detail="it is not marked for offlining, so an exchange would only hand it to another",
        )
    return None


def refuse_by_kind(mfn: Mfn, kind: PageKind) -> Refusal | None:
    """A refusal for a page that is not the domain's, or broken."""
    match kind:
        case PageKind.DATA | PageKind.L1 | PageKind.L2 | PageKind.L3 | PageKind.L4:
            return None
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


def refuse_root(mfn: Mfn) -> Refusal:
    """The refusal for the root of an address space that a vCPU is in."""
    return Refusal(
        mfn=mfn,
        reason=RefusalReason.ROOT_IN_USE,
        detail="it is the root of the address space that a vCPU of the guest is in",
    )


def refuse_mapping_others(mfn: Mfn) -> Refusal:
    """The refusal for a page table with entries that could not be set again."""
    return Refusal(
        mfn=mfn,
        reason=RefusalReason.MAPS_OTHERS,
        detail="it is a page table with entries for frames that are not the guest's own, which "
        "Xen would not let us set again",
    )
