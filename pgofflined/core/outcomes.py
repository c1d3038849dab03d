"""What became of a page that was to be moved.  A refusal is an answer, not an error."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import assert_never

from pgofflined.core.domains import DomainIdentity
from pgofflined.core.frames import Mfn, Pfn


class RefusalReason(StrEnum):
    """Why a page was not exchanged.  The guest runs on unharmed in every case."""

    NOT_PENDING = "not_pending"
    CANNOT_MARK = "cannot_mark"
    NEIGHBOUR_FREE = "neighbour_free"
    BROKEN = "broken"
    NOT_THE_DOMAINS = "not_the_domains"
    SHARED_INFO = "shared_info"
    DESCRIPTOR_TABLE = "descriptor_table"
    ROOT_IN_USE = "root_in_use"
    MAPS_OTHERS = "maps_others"
    LINEAR_MAPPING = "linear_mapping"
    TOO_MANY_REFERENCES = "too_many_references"
    GRANTED = "granted"
    P2M_DISAGREES = "p2m_disagrees"
    GUEST_LAYOUT = "guest_layout"
    OTHER_REFERENCES = "other_references"
    CONTENTS_CHANGED = "contents_changed"
    OUT_OF_DATE = "out_of_date"
    BLACKOUT_LIMIT = "blackout_limit"
    NO_FREE_MEMORY = "no_free_memory"
    NOT_KEPT = "not_kept"
    NOT_PV = "not_pv"
    HAS_DEVICES = "has_devices"
    DENIED = "denied"
    DOMAIN_BUSY = "domain_busy"
    DOMAIN_GONE = "domain_gone"
    NO_SUSPEND = "no_suspend"
    NO_SUSPEND_SUPPORT = "no_suspend_support"
    SUSPEND_UNANNOUNCED = "suspend_unannounced"
    XEN_REFUSED = "xen_refused"
    INTERNAL = "internal"

    @property
    def may_pass(self) -> bool:
        """Whether the same page of the same domain may be movable later."""
        return self in _MAY_PASS


_MAY_PASS = frozenset(
    {
        RefusalReason.CANNOT_MARK,
        RefusalReason.NEIGHBOUR_FREE,
        RefusalReason.TOO_MANY_REFERENCES,
        RefusalReason.GRANTED,
        RefusalReason.OTHER_REFERENCES,
        RefusalReason.CONTENTS_CHANGED,
        RefusalReason.NO_FREE_MEMORY,
        RefusalReason.DOMAIN_BUSY,
        RefusalReason.NO_SUSPEND,
        # A guest that is still starting has yet to announce it, and the policy may change.
        RefusalReason.SUSPEND_UNANNOUNCED,
        RefusalReason.P2M_DISAGREES,
        RefusalReason.GUEST_LAYOUT,
        RefusalReason.ROOT_IN_USE,
        RefusalReason.MAPS_OTHERS,
        RefusalReason.OUT_OF_DATE,
        RefusalReason.BLACKOUT_LIMIT,
        RefusalReason.NOT_KEPT,
        RefusalReason.XEN_REFUSED,
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchanged:
    """The guest's pfn lives in ``new`` now; ``old`` has left the guest.

    ``offlined`` says that Xen has confirmed that ``old`` is out of use.
    """

    old: Mfn
    new: Mfn
    pfn: Pfn
    references: int
    offlined: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """The page stays where it was."""

    mfn: Mfn
    reason: RefusalReason
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Damaged:
    """The exchange happened, and the guest's memory could not be put right afterwards.

    What could not be restored is left unmapped, so that the guest stops at it instead of
    reading another page's bytes.
    """

    old: Mfn
    new: Mfn
    pfn: Pfn
    detail: str


PageResult = Exchanged | Refusal | Damaged


def page_of(result: PageResult) -> Mfn:
    """The bad page that a result is about."""
    match result:
        case Refusal(mfn=mfn):
            return mfn
        case Exchanged(old=old) | Damaged(old=old):
            return old
        case _:
            assert_never(result)


@dataclass(frozen=True, slots=True, kw_only=True)
class Blackout:
    """How long one suspend kept the guest, in seconds.

    ``whole`` runs from our request to the resume call and contains the guest's own way into the
    suspend; ``ours`` starts only when the guest is suspended.
    """

    whole: float
    ours: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What of a guest's standing still is ours, where it could not be resumed.

    ``paused``: our pause may not have been taken back.  ``cpu_time`` is the processor time in ns
    that the guest had used when it was held: with more it has run since, and whoever has stopped it
    again was not we.  None where it is not known.
    """

    paused: bool = False
    cpu_time: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeReport:
    """One job: all pages of one domain in one suspend.

    ``blackout`` is None where the guest was never suspended.  ``stuck`` says what keeps the
    guest from running if our own clean-up failed; an operator has to act then, and ``standing``
    says what may be taken back.  ``may_suspend_late`` says that the guest has read our request and
    may still follow it.  ``ended`` says that the guest crashed, shut down or vanished after our
    request to suspend, before we let it run again or just as it did, and what to do.
    """

    domain: DomainIdentity
    results: tuple[PageResult, ...]
    blackout: Blackout | None
    stuck: str | None = None
    may_suspend_late: bool = False
    ended: str | None = None
    standing: Standing = field(default_factory=Standing)
