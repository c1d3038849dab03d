"""What becomes of the pages of a job, on the assembled service."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from pgofflined.core.book import Cause, Phase
from pgofflined.core.events import Event
from pgofflined.core.frames import Mfn, Pfn
from pgofflined.core.offline import OfflineState
from pgofflined.core.outcomes import (
    Blackout,
    Damaged,
    Exchanged,
    RefusalReason,
)
from pgofflined.core.policy import DomainPolicy, Marking
from pgofflined.core.relocation_outcomes import NotRelocated, Relocated, RelocationReason

from .whole import Whole, at_work, exchanging
from .whole_pages import SLOW, entry_of, fields, finish, in_hand, poison, refusal, told

# How an exchange ended.


async def test_an_exchanged_page_is_out_of_use_when_xen_has_said_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    later = exchanging(SLOW, mark=Marking.AFTER_SCRUB)
    async with at_work(tmp_path, later) as whole:
        done, marked, unmarked = (whole.plain(which) for which in range(3))
        in_hand(whole, done)
        in_hand(whole, marked)
        in_hand(whole, unmarked, marked=False)
        finish(
            whole,
            Exchanged(old=done, new=Mfn(0x99), pfn=Pfn(1), references=1, offlined=True),
            *(
                Exchanged(old=mfn, new=Mfn(0x98), pfn=Pfn(1), references=1, offlined=False)
                for mfn in (marked, unmarked)
            ),
        )
        entry = entry_of(whole, done)
        assert entry.phase is Phase.OFFLINED
        assert entry.detail == f"d{whole.small.pv} was moved from it to mfn 0x99"
        waiting = entry_of(whole, marked)
        assert (waiting.phase, waiting.reason) == (Phase.WAITING, "not_confirmed")
        scrubbed = entry_of(whole, unmarked)
        assert (scrubbed.phase, scrubbed.reason) == (Phase.WAITING, "scrubbing")
        assert scrubbed.detail == "it is free, and is marked when there were 50 s to scrub it"
        due = whole.service.retirer.ledger.shown(scrubbed).next_try
        assert due is not None
        assert 40 < due - whole.clock.now() <= 50
        # Only what Xen took out unscrubbed keeps an idle CPU searching.
        assert whole.service.snapshot().idle_scrub == 1
        assert len(told(caplog, Event.IDLE_SCRUB_HAZARD)) == 1


async def test_a_page_that_was_marked_while_its_guest_was_held_is_not_said_to_be_scrubbed(
    tmp_path: Path,
) -> None:
    async with at_work(tmp_path, SLOW) as whole:
        mfn = whole.plain()
        in_hand(whole, mfn, marked=False)
        finish(whole, Exchanged(old=mfn, new=Mfn(9), pfn=Pfn(1), references=1, offlined=False))
        assert entry_of(whole, mfn).reason == "not_confirmed"


async def test_what_keeps_an_idle_cpu_searching_is_counted_and_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with at_work(tmp_path, SLOW) as whole:
        for which in range(3):
            mfn = whole.plain(which)
            in_hand(whole, mfn)
            moved = Exchanged(old=mfn, new=Mfn(9), pfn=Pfn(1), references=1, offlined=True)
            finish(whole, moved)
        assert whole.service.snapshot().idle_scrub == 3
        [record] = told(caplog, Event.IDLE_SCRUB_HAZARD)
        assert record.levelno == logging.WARNING


@pytest.mark.parametrize(
    ("blackout", "pause"),
    [
        (None, "was not suspended"),
        (
            Blackout(whole=0.25, ours=0.125),
            "stood still for 0.250 s, 0.125 s of them for our work",
        ),
    ],
)
async def test_what_a_job_has_cost_its_guest_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, blackout: Blackout | None, pause: str
) -> None:
    with caplog.at_level(logging.INFO):
        async with at_work(tmp_path, SLOW) as whole:
            first, second = whole.plain(0), whole.plain(1)
            in_hand(whole, first)
            in_hand(whole, second)
            finish(
                whole,
                Exchanged(old=first, new=Mfn(9), pfn=Pfn(1), references=1, offlined=True),
                refusal(second, RefusalReason.GRANTED),
                blackout=blackout,
            )
            [record] = told(caplog, Event.EXCHANGE_DONE)
            domid = whole.small.pv
            assert record.getMessage() == f"d{domid} was moved off 1 of 2 pages and {pause}"
            assert (fields(record)["DOMID"], fields(record)["JOB"]) == (str(domid), "x9")


async def test_damage_is_told_as_critical_and_is_the_last_that_happens_to_the_page(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with at_work(tmp_path, SLOW) as whole:
        mfn = whole.plain()
        in_hand(whole, mfn)
        finish(whole, Damaged(old=mfn, new=Mfn(9), pfn=Pfn(1), detail="an entry is lost"))
        entry = entry_of(whole, mfn)
        assert (entry.phase, entry.reason, entry.detail, entry.marked) == (
            *(Phase.LEFT, "damaged", "an entry is lost", True),
        )
        [record] = told(caplog, Event.PAGE_DAMAGED)
        assert record.levelno == logging.CRITICAL
        assert "could not be put right: an entry is lost; restart it at once" in record.getMessage()
        assert fields(record).items() >= {
            *(("MFN", f"{mfn:#x}"), ("DOMID", str(whole.small.pv)), ("JOB", "x9")),
        }


async def test_a_refusal_is_told_and_waited_for_as_the_policy_says(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with at_work(tmp_path, SLOW) as whole:
        mfn = whole.plain()
        for tries in (1, 2, 3):
            in_hand(whole, mfn, attempts=tries - 1)
            finish(whole, refusal(mfn, RefusalReason.GRANTED))
            entry = entry_of(whole, mfn)
            assert (entry.reason, entry.marked) == ("granted", True)
            assert entry.phase is (Phase.WAITING if tries < 3 else Phase.LEFT)
        record = told(caplog, Event.PAGE_REFUSED)[0]
        assert record.levelno == logging.WARNING
        assert (
            record.getMessage() == f"mfn {mfn:#x} of d{whole.small.pv} was not exchanged: so it is"
        )
        assert fields(record)["JOB"] == "x9"


@pytest.mark.parametrize("marked", [True, False])
async def test_a_refused_page_is_booked_with_the_mark_that_it_has(
    tmp_path: Path, *, marked: bool
) -> None:
    async with at_work(tmp_path, SLOW) as whole:
        for which, reason in enumerate(
            (RefusalReason.GRANTED, RefusalReason.NOT_PENDING, RefusalReason.SHARED_INFO)
        ):
            mfn = whole.plain(which)
            in_hand(whole, mfn, marked=marked)
            finish(whole, refusal(mfn, reason))
            entry = entry_of(whole, mfn)
            assert entry.marked is marked
            final = reason is RefusalReason.SHARED_INFO
            if final and not marked:
                # So that it goes with its guest, it is marked before it is left.
                assert entry.phase is Phase.TRIAGE
                return
            assert entry.phase is (Phase.LEFT if final else Phase.WAITING)
            assert (entry.reason, entry.detail) == (reason.value, "so it is")


async def test_a_page_whose_owner_is_gone_is_looked_at_again_soon_and_no_try_is_lost(
    tmp_path: Path,
) -> None:
    async with at_work(tmp_path, SLOW) as whole:
        mfn = whole.plain()
        in_hand(whole, mfn, attempts=1)
        finish(whole, refusal(mfn, RefusalReason.DOMAIN_GONE))
        entry = entry_of(whole, mfn)
        assert (entry.phase, entry.attempts) == (Phase.WAITING, 1)
        seconds = whole.service.retirer.ledger.seconds_to_next()
        assert seconds is not None
        assert seconds <= 2


async def test_a_page_that_the_policy_denies_after_all_loses_its_mark(tmp_path: Path) -> None:
    denying = replace(SLOW, domains=DomainPolicy(deny=("pv",)))
    async with at_work(tmp_path, denying) as whole:
        mfn = whole.plain()
        whole.small.host.offline(mfn)
        in_hand(whole, mfn)
        finish(whole, refusal(mfn, RefusalReason.DENIED))
        entry = await whole.page(mfn, Phase.LEFT, reason="denied")
        assert not entry.marked
        assert whole.small.host.query(mfn) is OfflineState.ONLINE


async def test_a_page_with_an_uncorrected_error_is_not_tried_again_after_a_refusal(
    tmp_path: Path,
) -> None:
    async with at_work(tmp_path, SLOW) as whole:
        mfn = whole.plain()
        in_hand(whole, mfn)
        await poison(whole, mfn)
        assert entry_of(whole, mfn).phase is Phase.EXCHANGE, "its job gives it back"
        assert entry_of(whole, mfn).cause is Cause.UNCORRECTED
        finish(whole, refusal(mfn, RefusalReason.BROKEN))
        await whole.page(mfn, Phase.LEFT, reason="uncorrected")


# How a migration ended.


def relocated(whole: Whole, mfn: Mfn, reason: RelocationReason, *, gone: Mfn) -> None:
    domain = whole.small.host.domain(whole.small.pv).identity
    outcome = NotRelocated(
        domain=domain,
        mfns=frozenset({mfn}),
        offlined=frozenset({gone}),
        reason=reason,
        detail="so it is",
        attempts=1,
    )
    whole.service.retirer.relocation_finished(domain, outcome)


async def test_of_a_migration_that_failed_the_pages_stay_for_its_reason(tmp_path: Path) -> None:
    async with at_work(tmp_path, SLOW) as whole:
        mfn, gone = whole.plain(0), whole.plain(1)
        in_hand(whole, mfn, Phase.RELOCATION)
        in_hand(whole, gone, Phase.RELOCATION)
        relocated(whole, mfn, RelocationReason.GAVE_UP, gone=gone)
        entry = entry_of(whole, mfn)
        assert (entry.phase, entry.reason, entry.detail, entry.marked) == (
            *(Phase.LEFT, RelocationReason.GAVE_UP.value, "so it is", True),
        )
        assert entry_of(whole, gone).phase is Phase.OFFLINED
        assert whole.service.snapshot().idle_scrub == 1


@pytest.mark.parametrize("reason", [RelocationReason.DOMAIN_GONE, RelocationReason.DENIED])
async def test_a_page_is_looked_at_anew_when_its_guest_has_ended_or_may_not_be_migrated(
    tmp_path: Path, reason: RelocationReason
) -> None:
    async with at_work(tmp_path, replace(SLOW, domains=DomainPolicy(deny=("pv",)))) as whole:
        mfn, gone = whole.plain(0), whole.plain(1)
        in_hand(whole, mfn, Phase.RELOCATION)
        in_hand(whole, gone, Phase.RELOCATION)
        relocated(whole, mfn, reason, gone=gone)
        await whole.page(mfn, Phase.LEFT, reason="denied")


async def test_every_page_of_a_migrated_guest_is_out_of_use(tmp_path: Path) -> None:
    async with at_work(tmp_path, SLOW) as whole:
        mfns = [whole.plain(which) for which in range(3)]
        for mfn in mfns:
            in_hand(whole, mfn, Phase.RELOCATION)
        domain = whole.small.host.domain(whole.small.pv).identity
        outcome = Relocated(
            domain=domain, mfns=frozenset(mfns), new_domid=None, attempts=1, seconds=2.0
        )
        whole.service.retirer.relocation_finished(domain, outcome)
        for mfn in mfns:
            entry = entry_of(whole, mfn)
            assert (entry.phase, entry.detail) == (
                *(Phase.OFFLINED, f"its owner d{domain.domid} has left it"),
            )
        assert whole.service.snapshot().idle_scrub == 3
