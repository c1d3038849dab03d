"""What needs a person, or what a person should know: typed, and parsed by nobody.

A condition is either a *state*, true as long as the daemon's snapshot shows it, or an *incident*,
something that happened and stays until it is resolved or acknowledged (``core.incidents``).
The codes are an interface: metrics, alert rules and ``pgofflined acknowledge`` name them, and
docs/runbook.md has a section on each.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final, assert_never

from pgofflined.core.frames import Domid, Mfn
from pgofflined.core.reports import (
    CorrectedPageError,
    ErrorReport,
    HypervisorActed,
    OtherError,
    UncorrectedPageError,
)


class Severity(StrEnum):
    """How urgent it is.

    ``CRITICAL``: a guest or its data is in danger, or errors are not seen: at once.
    ``WARNING``: somebody has to do something soon.  ``INFO``: nobody has to do anything now, or
    only a reboot or an update ends it.
    """

    CRITICAL = "critical"
    WARNING = "warning"
    INFO = "info"


class ConditionCode(StrEnum):
    """What is the matter, in one word."""

    GUEST_STUCK = "guest_stuck"
    GUEST_HELD = "guest_held"
    GUEST_IN_DOUBT = "guest_in_doubt"
    GUEST_ENDED = "guest_ended"
    SAVE_UNFINISHED = "save_unfinished"
    SAVE_OVERDUE = "save_overdue"
    PAGE_DAMAGED = "page_damaged"
    JOB_NOT_RECOVERED = "job_not_recovered"
    UNCORRECTED_ERROR = "uncorrected_error"
    HEAP_IN_DOUBT = "heap_in_doubt"
    WORKER_STUCK = "worker_stuck"
    NO_SOURCE = "no_source"
    PAGE_UNRESOLVED = "page_unresolved"
    CAP_REACHED = "cap_reached"
    RECORDS_LOST = "records_lost"
    CONFIG_REJECTED = "config_rejected"
    STATE_LOST = "state_lost"
    STATE_NOT_STORED = "state_not_stored"
    EXCHANGES_OFF = "exchanges_off"
    PAGE_PUT_OFF = "page_put_off"
    SAVE_UNDER_WAY = "save_under_way"
    IDLE_SCRUB = "idle_scrub"
    NO_POLLING = "no_polling"
    FREE_FRAMES_UNSAFE = "free_frames_unsafe"
    DRY_RUN = "dry_run"
    RETIRING_OFF = "retiring_off"

    @property
    def severity(self) -> Severity:
        """How urgent it is; the same for every condition of this code."""
        return _SEVERITIES[self]

    @property
    def can_be_acknowledged(self) -> bool:
        """Whether a person may say that it is known and taken care of.

        Not where a guest stands still or exists in a file only, where no errors are seen, or
        where the daemon's file has mistakes: these end only when they are put right.
        """
        return self not in _NOT_TO_ACKNOWLEDGE


_CRITICAL: Final = (
    ConditionCode.GUEST_STUCK,
    ConditionCode.GUEST_HELD,
    ConditionCode.GUEST_IN_DOUBT,
    ConditionCode.GUEST_ENDED,
    ConditionCode.SAVE_UNFINISHED,
    ConditionCode.SAVE_OVERDUE,
    ConditionCode.PAGE_DAMAGED,
    ConditionCode.JOB_NOT_RECOVERED,
    ConditionCode.UNCORRECTED_ERROR,
    ConditionCode.HEAP_IN_DOUBT,
    ConditionCode.WORKER_STUCK,
    ConditionCode.NO_SOURCE,
)
_WARNING: Final = (
    ConditionCode.PAGE_UNRESOLVED,
    ConditionCode.CAP_REACHED,
    ConditionCode.RECORDS_LOST,
    ConditionCode.CONFIG_REJECTED,
    ConditionCode.STATE_LOST,
    ConditionCode.STATE_NOT_STORED,
    ConditionCode.EXCHANGES_OFF,
)
_INFO: Final = (
    ConditionCode.PAGE_PUT_OFF,
    ConditionCode.SAVE_UNDER_WAY,
    ConditionCode.IDLE_SCRUB,
    ConditionCode.NO_POLLING,
    ConditionCode.FREE_FRAMES_UNSAFE,
    ConditionCode.DRY_RUN,
    ConditionCode.RETIRING_OFF,
)
_SEVERITIES: Final = {
    **dict.fromkeys(_CRITICAL, Severity.CRITICAL),
    **dict.fromkeys(_WARNING, Severity.WARNING),
    **dict.fromkeys(_INFO, Severity.INFO),
}
_NOT_TO_ACKNOWLEDGE: Final = frozenset(
    (
        ConditionCode.GUEST_STUCK,
        ConditionCode.GUEST_HELD,
        ConditionCode.GUEST_IN_DOUBT,
        ConditionCode.WORKER_STUCK,
        ConditionCode.SAVE_UNFINISHED,
        ConditionCode.SAVE_OVERDUE,
        ConditionCode.NO_SOURCE,
        ConditionCode.CONFIG_REJECTED,
    )
)
_RANKS: Final = {severity: rank for rank, severity in enumerate(Severity)}
_ORDER: Final = {code: place for place, code in enumerate(ConditionCode)}

Key = tuple[ConditionCode, Mfn | None, Domid | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """One of them.

    ``since`` is in seconds since the epoch.  ``mfn`` and ``domid`` name the page and the guest
    where it is about one.  ``text`` says in a sentence what is the matter and what to do.  ``kind``
    tells apart what a person has to know anew once he has acknowledged it: of an error of a page
    that is not where in the page it was, of a page that stays not how often it was tried.
    """

    code: ConditionCode
    text: str
    since: float
    mfn: Mfn | None = None
    domid: Domid | None = None
    kind: str = ""
    acknowledged: bool = False

    @property
    def severity(self) -> Severity:
        """How urgent it is."""
        return self.code.severity

    @property
    def key(self) -> Key:
        """What makes two conditions the same: the code and the page, without a page the guest."""
        return self.code, self.mfn, self.domid if self.mfn is None else None

    @property
    def counts(self) -> bool:
        """Whether somebody has to act on it: not if it is for information, or acknowledged."""
        return self.severity is not Severity.INFO and not self.acknowledged

    @property
    def ends_by_itself(self) -> bool:
        """Whether an incident goes with its cause; one that does not goes when acknowledged."""
        return self.code is ConditionCode.UNCORRECTED_ERROR and self.mfn is not None


def by_urgency(condition: Condition) -> tuple[bool, int, int, float, int]:
    """To sort by: what is acknowledged last, the most urgent first, then the oldest."""
    rank, place = _RANKS[condition.severity], _ORDER[condition.code]
    return condition.acknowledged, rank, place, condition.since, condition.mfn or 0


def uncorrected_error(report: ErrorReport, when: float) -> Condition | None:
    """The incident that a report is, if it is of an uncorrected error, of whatever kind."""
    match report:
        case CorrectedPageError():
            return None
        case HypervisorActed(mfn=mfn, domid=domid):
            # What it did counts too: it may have crashed the owner this time.
            kind = f"{_ACTED}:{report.result.value}"
            return _uncorrected(report.describe(), when, mfn, domid, kind)
        case UncorrectedPageError(mfn=mfn, domid=domid, kind=kind):
            return _uncorrected(report.describe(), when, mfn, domid, kind.value)
        case OtherError():
            if report.is_uncorrected:
                domid = report.bank.domid
                return _uncorrected(report.describe(), when, None, domid, report.kind.value)
            return None
        case _:
            assert_never(report)


def unreported_error(mfn: Mfn, detail: str, when: float) -> Condition:
    """The incident that a page is which Xen has broken by itself; ``detail`` says what ends it."""
    what = f"mfn {mfn:#x} has had an uncorrected error, of which no record came: {detail}"
    return _uncorrected(what, when, mfn, None, _ACTED)


# Xen has acted upon the error: it was consumed, or about to be, and its guest may be gone.
_ACTED: Final = "acted"


def _uncorrected(
    what: str, when: float, mfn: Mfn | None, domid: Domid | None, kind: str
) -> Condition:
    look = (
        "which page is not known: look at `xl list` and the board's own log"
        if mfn is None
        else f"`pgofflined query {mfn:#x}` says whose page it is and what ends this"
    )
    return Condition(
        code=ConditionCode.UNCORRECTED_ERROR,
        text=f"{what}; {look}",
        since=when,
        mfn=mfn,
        domid=domid,
        kind=kind,
    )
