"""The words in which jobs, pages and migrations are counted."""

from __future__ import annotations

import pytest

from pgofflined.core.frames import Mfn, Pfn
from pgofflined.core.outcomes import (
    Blackout,
    Damaged,
    Exchanged,
    ExchangeReport,
    PageResult,
    Refusal,
    RefusalReason,
)
from pgofflined.core.relocation_outcomes import (
    InDoubt,
    Migrated,
    MigrationOutcome,
    NotMigrated,
    NotRelocated,
    Relocated,
    RelocationReason,
)
from pgofflined.core.tally import (
    JobOutcome,
    MigrationResult,
    exchange_outcome,
    migration_result,
    page_outcome,
    relocation_outcome,
)
from tests.unit.rim_samples import WEB

GONE = Exchanged(old=Mfn(1), new=Mfn(2), pfn=Pfn(3), references=1, offlined=True)
KEPT = Refusal(mfn=Mfn(4), reason=RefusalReason.GRANTED, detail="")
LOST = Damaged(old=Mfn(5), new=Mfn(6), pfn=Pfn(7), detail="")


@pytest.mark.parametrize(
    ("results", "stuck", "expected"),
    [
        ((GONE, GONE), None, JobOutcome.DONE),
        ((GONE, KEPT), None, JobOutcome.PARTLY),
        ((KEPT,), None, JobOutcome.REFUSED),
        ((), None, JobOutcome.REFUSED),
        ((GONE, LOST), None, JobOutcome.FAILED),
        ((GONE,), "resume failed", JobOutcome.FAILED),
    ],
)
def test_an_exchange_job_ends_as_its_worst_page_or_its_guest(
    results: tuple[PageResult, ...], stuck: str | None, expected: JobOutcome
) -> None:
    blackout = Blackout(whole=0.2, ours=0.1)
    report = ExchangeReport(domain=WEB, results=results, blackout=blackout, stuck=stuck)
    assert exchange_outcome(report) is expected


def test_a_job_after_whose_request_the_guest_ended_has_failed() -> None:
    report = ExchangeReport(domain=WEB, results=(KEPT,), blackout=None, ended="d7 crashed")
    assert exchange_outcome(report) is JobOutcome.FAILED


def test_pages_are_counted_by_their_refusal() -> None:
    assert [page_outcome(page) for page in (GONE, KEPT, LOST)] == [
        "exchanged",
        "granted",
        "damaged",
    ]


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        (Migrated(), MigrationResult.MIGRATED),
        (NotMigrated(detail=""), MigrationResult.FAILED),
        (NotMigrated(detail="", timed_out=True), MigrationResult.TIMED_OUT),
        (InDoubt(detail=""), MigrationResult.IN_DOUBT),
    ],
)
def test_migrations_end_in_four_ways(outcome: MigrationOutcome, expected: MigrationResult) -> None:
    assert migration_result(outcome) is expected


def relocated(stuck: str | None) -> Relocated:
    return Relocated(
        domain=WEB,
        mfns=frozenset({Mfn(1)}),
        new_domid=None,
        attempts=1,
        seconds=9.0,
        stuck=stuck,
    )


def not_relocated(
    reason: RelocationReason, offlined: frozenset[Mfn] = frozenset(), stuck: str | None = None
) -> NotRelocated:
    return NotRelocated(
        domain=WEB,
        mfns=frozenset({Mfn(1)}),
        offlined=offlined,
        reason=reason,
        detail="",
        attempts=1,
        stuck=stuck,
    )


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        (relocated(None), JobOutcome.DONE),
        (relocated("paused at the target"), JobOutcome.FAILED),
        (not_relocated(RelocationReason.NO_TARGET), JobOutcome.REFUSED),
        (not_relocated(RelocationReason.PAGES_REMAIN, frozenset({Mfn(2)})), JobOutcome.PARTLY),
        (not_relocated(RelocationReason.GAVE_UP), JobOutcome.FAILED),
        (not_relocated(RelocationReason.DOMAIN_GONE, stuck="xl failed"), JobOutcome.FAILED),
    ],
)
def test_a_relocation_that_needs_a_person_has_failed(
    outcome: Relocated | NotRelocated, expected: JobOutcome
) -> None:
    assert relocation_outcome(outcome) is expected
