"""The few words in which the metrics count what was done.  They are an interface."""

from __future__ import annotations

from enum import StrEnum
from typing import assert_never

from pgofflined.core.outcomes import Damaged, Exchanged, ExchangeReport, PageResult, Refusal
from pgofflined.core.relocation_outcomes import (
    InDoubt,
    Migrated,
    MigrationOutcome,
    NotMigrated,
    NotRelocated,
    Relocated,
    RelocationOutcome,
    RelocationReason,
)


class JobKind(StrEnum):
    """How the pages of a job are emptied."""

    EXCHANGE = "exchange"
    RELOCATION = "relocation"


class JobOutcome(StrEnum):
    """How a job ended.

    ``DONE``: every page left its owner.  ``PARTLY``: some did.  ``REFUSED``: none could, and
    nothing was harmed.  ``FAILED``: somebody has to look.
    """

    DONE = "done"
    PARTLY = "partly"
    REFUSED = "refused"
    FAILED = "failed"


class MigrationResult(StrEnum):
    """How one migration ended."""

    MIGRATED = "migrated"
    FAILED = "failed"
    TIMED_OUT = "timed_out"
    IN_DOUBT = "in_doubt"


EXCHANGED = "exchanged"
DAMAGED = "damaged"


def page_outcome(result: PageResult) -> str:
    """``exchanged``, ``damaged`` or the reason of a refusal."""
    match result:
        case Exchanged():
            return EXCHANGED
        case Damaged():
            return DAMAGED
        case Refusal(reason=reason):
            return reason.value
        case _:
            assert_never(result)


def exchange_outcome(report: ExchangeReport) -> JobOutcome:
    """How an exchange job ended as a whole."""
    hurt = report.stuck is not None or report.ended is not None
    if hurt or any(isinstance(page, Damaged) for page in report.results):
        return JobOutcome.FAILED
    exchanged = sum(isinstance(page, Exchanged) for page in report.results)
    if exchanged == 0:
        return JobOutcome.REFUSED
    return JobOutcome.DONE if exchanged == len(report.results) else JobOutcome.PARTLY


def relocation_outcome(outcome: RelocationOutcome) -> JobOutcome:
    """How a relocation job ended as a whole."""
    match outcome:
        case Relocated():
            return JobOutcome.DONE if outcome.stuck is None else JobOutcome.FAILED
        case NotRelocated():
            needs_a_person = (RelocationReason.GUEST_STUCK, RelocationReason.GAVE_UP)
            if outcome.stuck is not None or outcome.reason in needs_a_person:
                return JobOutcome.FAILED
            return JobOutcome.PARTLY if outcome.offlined else JobOutcome.REFUSED
        case _:
            assert_never(outcome)


def migration_result(outcome: MigrationOutcome) -> MigrationResult:
    """How one migration ended."""
    match outcome:
        case Migrated():
            return MigrationResult.MIGRATED
        case NotMigrated(timed_out=timed_out):
            return MigrationResult.TIMED_OUT if timed_out else MigrationResult.FAILED
        case InDoubt():
            return MigrationResult.IN_DOUBT
        case _:
            assert_never(outcome)
