"""What becomes of a page after a look at it and after a job, on the assembled service."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pgofflined.core.book import Cause, PageEntry, Phase
from pgofflined.core.errors import DomainGone
from pgofflined.core.events import Event
from pgofflined.core.frames import Domid, Mfn, Pfn
from pgofflined.core.offline import OfflineState
from pgofflined.core.outcomes import (
    Blackout,
    Damaged,
    Exchanged,
    ExchangeReport,
    PageResult,
    Refusal,
    RefusalReason,
)
from pgofflined.core.policy import DomainPolicy, Marking, Policy, RelocationPolicy
from pgofflined.core.relocation_outcomes import NotRelocated, Relocated, RelocationReason
from pgofflined.core.reports import OtherError, OtherKind, Sighting
from pgofflined.sim.faults import Fault
from pgofflined.sim.guests import SuspendBehaviour
from pgofflined.triage import Later, LaterReason

from .whole import POLICY, Whole, at_work, exchanging

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


async def poison(whole: Whole, mfn: Mfn) -> None:
    kind = OtherKind.UNCORRECTED_NOT_SIGNALLED
    report = OtherError(kind=kind, bank=7, status=1 << 63, mfn=mfn)
    await whole.service.intake.take(Sighting(when=1.0, source="simulated", report=report))


# How an exchange ended.


async def test_an_exchanged_page_is_out_of_use_when_xen_has_said_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with at_work(tmp_path, SLOW) as whole:
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


# What a look at a page has shown.


async def test_only_a_page_that_somebody_freed_while_it_was_marked_keeps_a_cpu_searching(
    tmp_path: Path,
) -> None:
    async with at_work(tmp_path, SLOW) as whole:
        host = whole.small.host
        free = host.frames.allocate()
        host.frames.release(free, dirty=False)
        whole.service.retirer.take(free, Cause.CORRECTED, "two errors")
        entry = await whole.page(free, Phase.OFFLINED)
        assert entry.detail == "it was free and is out of use now"
        assert whole.service.snapshot().idle_scrub == 0
        left = host.frame_of(whole.small.pvh, 5)
        await whole.corrected(left)
        await whole.page(left, Phase.LEFT, reason="no_relocation")
        await asyncio.to_thread(host.destroy, whole.small.pvh)
        assert (await whole.page(left, Phase.OFFLINED)).detail == "its owner has left it"
        assert whole.service.snapshot().idle_scrub == 1
        waiting = whole.plain()
        host.offline(waiting)
        in_hand(whole, waiting, Phase.TRIAGE)
        host.destroy(whole.small.pv)
        whole.service.retirer.domain_ended()
        await whole.page(waiting, Phase.OFFLINED)
        assert whole.service.snapshot().idle_scrub == 2


async def test_an_address_that_is_no_memory_keeps_nobody_from_anything(tmp_path: Path) -> None:
    async with at_work(tmp_path, SLOW) as whole:
        device = Mfn(whole.small.host.frames.count + 7)
        await poison(whole, device)
        await poison(whole, whole.plain())
        await whole.page(device, Phase.LEFT, reason="not_ram")
        await whole.page(whole.plain(), Phase.LEFT, reason="uncorrected")
        assert whole.service.retirer.errors.poisoned == {whole.plain()}


async def test_a_page_that_xen_names_no_owner_of_is_tried_three_times_more(tmp_path: Path) -> None:
    async with at_work(tmp_path, SLOW) as whole:
        mfn, apply = whole.plain(), whole.service.retirer.consequences.apply
        in_hand(whole, mfn, marked=False)
        anonymous = Later(mfn=mfn, reason=LaterReason.ANONYMOUS, detail="nobody's", marked=True)
        for _ in range(3):
            apply(mfn, anonymous)
            entry = entry_of(whole, mfn)
            assert (entry.phase, entry.reason, entry.marked) == (
                *(Phase.WAITING, "anonymous", True),
            )
        apply(mfn, anonymous)
        entry = entry_of(whole, mfn)
        assert (entry.phase, entry.reason, entry.marked) == (Phase.LEFT, "xen", True)


async def test_a_xen_that_cannot_be_asked_is_asked_again_soon(tmp_path: Path) -> None:
    lost = Fault(method="query", error=DomainGone(Domid(3)))
    async with at_work(tmp_path, SLOW, faults=[lost]) as whole:
        mfn = whole.of_dom0()
        await whole.corrected(mfn)
        entry = await whole.page(mfn, Phase.WAITING, reason="cannot_ask_xen")
        assert entry.detail == "d3 is gone"
        seconds = whole.service.retirer.ledger.seconds_to_next()
        assert seconds is not None
        assert 0 < seconds <= 2


@pytest.mark.parametrize("kind", ["pv", "pvh"])
async def test_a_page_that_breaks_between_the_look_and_its_job_is_given_to_nobody(
    tmp_path: Path, kind: str
) -> None:
    running: list[Whole] = []
    loop = asyncio.get_running_loop()

    def strike() -> None:
        coroutine = poison(running[0], page(running[0]))
        asyncio.run_coroutine_threadsafe(coroutine, loop).result(30)

    page: Callable[[Whole], Mfn] = (
        Whole.plain if kind == "pv" else lambda whole: whole.small.host.frame_of(whole.small.pvh, 5)
    )
    async with at_work(tmp_path, LOCAL, faults=[Fault(method="offline", act=strike)]) as whole:
        running.append(whole)
        await whole.corrected(page(whole))
        await whole.page(page(whole), Phase.LEFT, reason="uncorrected")
        assert whole.suspended() == []
        assert whole.migration.asked == []


async def test_a_page_for_which_no_exchange_can_be_queued_waits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with at_work(
        tmp_path, exchanging(max_queued=1, workers=1, suspend_timeout=1000.0)
    ) as whole:
        guest = whole.small.host.simulated(whole.small.pv)
        guest.behaviour = SuspendBehaviour(suspend_after=200.0)
        mfns = [whole.plain(which) for which in range(3)]
        await whole.corrected(mfns[0])
        await whole.until(lambda: whole.suspended() == [whole.small.pv])
        await whole.corrected(mfns[1])
        await whole.page(mfns[1], Phase.EXCHANGE)
        await whole.corrected(mfns[2])
        entry = await whole.page(mfns[2], Phase.WAITING, reason="queue_full")
        assert (entry.detail, entry.marked) == ("the queue of exchanges is full", True)
        [record] = told(caplog, Event.QUEUE_FULL)
        assert record.levelno == logging.WARNING
        assert record.getMessage() == f"mfn {mfns[2]:#x} waits: the queue of exchanges is full"


async def test_where_no_guest_is_migrated_a_pvh_page_stays_pending_with_what_ends_that(
    tmp_path: Path,
) -> None:
    off = replace(LOCAL, relocation=replace(LOCAL.relocation, enabled=False))
    saving = replace(POLICY, relocation=RelocationPolicy(save_restore=True))
    for number, policy in enumerate((off, saving)):
        folder = tmp_path / str(number)
        folder.mkdir()
        async with at_work(folder, policy) as whole:
            mfn = whole.small.host.frame_of(whole.small.pvh, 5)
            await whole.corrected(mfn)
            entry = await whole.page(mfn, Phase.LEFT, reason="no_relocation")
            assert entry.marked
            assert f"until d{whole.small.pvh} ends or is migrated" in entry.detail
            assert entry.domain == whole.small.host.domain(whole.small.pvh).identity


@pytest.mark.parametrize(
    ("policy", "mark"),
    [
        (POLICY, "is marked offline-pending"),
        (
            exchanging(mark=Marking.AFTER_SCRUB, scrub_wait=0.05),
            "is to be marked when it has been scrubbed",
        ),
    ],
)
async def test_what_a_page_waits_for_is_told_with_whether_it_is_marked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, policy: Policy, mark: str
) -> None:
    with caplog.at_level(logging.INFO):
        async with at_work(tmp_path, policy) as whole:
            mfn = whole.plain()
            await whole.corrected(mfn)
            await whole.page(mfn, Phase.OFFLINED)
            record = told(caplog, Event.PAGE_MARKED)[0]
            domid = whole.small.pv
            assert record.getMessage() == f"mfn {mfn:#x} of d{domid} {mark} and waits for exchange"
            assert record.levelno == logging.INFO
