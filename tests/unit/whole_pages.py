"""Pages of the assembled service as a test wants them, and what the journal says of them."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from pgofflined.core.book import Cause, PageEntry, Phase
from pgofflined.core.events import Event
from pgofflined.core.frames import Mfn, maddr_of
from pgofflined.core.outcomes import Blackout, ExchangeReport, PageResult, Refusal, RefusalReason
from pgofflined.core.policy import RelocationPolicy
from pgofflined.core.reports import OtherKind, Sighting, UncorrectedPageError
from pgofflined.core.telemetry import BankEntry

from .whole import POLICY, Whole, exchanging

LOCAL = replace(POLICY, relocation=RelocationPolicy(target="localhost", free_memory_reserve=0))
# Nothing that waits is due while a test lasts.
SLOW = exchanging(retry_first=3600.0, retry_last=3600.0, attempts=3, scrub_wait=50.0)


def told(caplog: pytest.LogCaptureFixture, kind: Event) -> list[logging.LogRecord]:
    return [record for record in caplog.records if fields(record)["MESSAGE_ID"] == kind.message_id]


def fields(record: logging.LogRecord) -> dict[str, str]:
    found: dict[str, str] = getattr(record, "pgofflined_fields", {"MESSAGE_ID": ""})
    return found


def in_hand(whole: Whole, mfn: Mfn, phase: Phase = Phase.EXCHANGE, **changes: object) -> PageEntry:
    """A page of the PV guest that a job has."""
    domain = whole.small.host.domain(whole.small.pv)
    entry = PageEntry(
        mfn=mfn,
        cause=Cause.CORRECTED,
        phase=phase,
        since=1.0,
        marked=True,
        domain=domain.identity,
        domain_name=domain.name,
    )
    whole.service.retirer.ledger.put(replace(entry, **changes))  # type: ignore[arg-type]
    return entry


def finish(whole: Whole, *results: PageResult, blackout: Blackout | None = None) -> None:
    domain = whole.small.host.domain(whole.small.pv).identity
    report = ExchangeReport(domain=domain, results=results, blackout=blackout)
    whole.service.retirer.exchange_finished("x9", report)


def entry_of(whole: Whole, mfn: Mfn) -> PageEntry:
    entry = whole.entry(mfn)
    assert entry is not None
    return entry


def refusal(mfn: Mfn, reason: RefusalReason) -> Refusal:
    return Refusal(mfn=mfn, reason=reason, detail="so it is")


def uncorrected(mfn: Mfn) -> UncorrectedPageError:
    """An error that Xen leaves alone."""
    kind = OtherKind.UNCORRECTED_NOT_SIGNALLED
    bank = BankEntry(bank=7, status=1 << 63, addr=maddr_of(mfn), misc=0)
    return UncorrectedPageError(mfn=mfn, kind=kind, domid=None, bank=bank)


async def poison(whole: Whole, mfn: Mfn) -> None:
    await whole.service.intake.take(Sighting(when=1.0, source="simulated", report=uncorrected(mfn)))
