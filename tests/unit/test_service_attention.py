"""What needs a person while nothing is done about a page, or a guest does not run: on the service.

Each is what `pgofflined status` would show, and what the next daemon would show of it.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pgofflined.aftercare import CareTimes
from pgofflined.cli import view
from pgofflined.control.replies import status_reply
from pgofflined.core.book import Cause, PageEntry, Phase
from pgofflined.core.conditions import Condition, ConditionCode
from pgofflined.core.domains import DomainIdentity, ShutdownReason
from pgofflined.core.events import Event
from pgofflined.core.frames import Domid, Mfn, maddr_of
from pgofflined.core.policy import DomainPolicy, ExchangePolicy, Policy, RelocationPolicy
from pgofflined.core.recovery import Recovered, RecoveryReport
from pgofflined.core.relocation_outcomes import InDoubt, MigrationOutcome, NotMigrated
from pgofflined.core.suspending import SuspendSupport
from pgofflined.ports import BY_NAME_ONLY, SuspendLimits
from pgofflined.relocation.relocator import BreakOff
from pgofflined.sim.scenarios import SmallHost, small_host

from .test_service_relocations import closed_now
from .whole import POLICY, SettableClock, Whole, at_work, exchanging
from .whole_pages import LOCAL, told

# Guests are looked at without waiting.
OFTEN = CareTimes(interval=0.02)
FAILED = NotMigrated(detail="xl failed with status 1")


def migrating(**changes: object) -> Policy:
    """A policy with other keys of [relocation]."""
    return replace(LOCAL, relocation=replace(LOCAL.relocation, **changes))  # type: ignore[arg-type]


def found(whole: Whole, code: ConditionCode) -> list[Condition]:
    return [one for one in whole.service.snapshot().attention if one.code is code]


def codes(whole: Whole) -> list[str]:
    """All but that of a page which was retired as it was freed."""
    shown = [one.code for one in whole.service.snapshot().attention]
    return [code.value for code in shown if code is not ConditionCode.IDLE_SCRUB]


def status(whole: Whole) -> str:
    reply = status_reply(whole.service.snapshot(), pages=10)
    return "\n".join(view.status(reply, whole.clock.now()))


def page_of(small: SmallHost, which: int = 5) -> Mfn:
    """A page of the PVH guest."""
    return small.host.frame_of(small.pvh, which)


def in_migration(small: SmallHost, phase: Phase = Phase.RELOCATION) -> PageEntry:
    """A page that an earlier daemon was about to have its guest migrated off."""
    mfn = page_of(small)
    small.host.offline(mfn)
    guest = small.host.domain(small.pvh)
    return PageEntry(
        mfn=mfn,
        cause=Cause.CORRECTED,
        phase=phase,
        since=1.0,
        marked=True,
        domain=guest.identity,
        domain_name=guest.name,
    )


def is_suspended(small: SmallHost) -> bool:
    return small.host.domain(small.pvh).shutdown is ShutdownReason.SUSPEND


def migrates(
    whole: Whole, outcome: MigrationOutcome, act: Callable[[Domid], object] = lambda _: None
) -> None:
    """What the toolstack does to the guest, and what it says."""

    async def migrate(
        domain: DomainIdentity, name: str, target: str, time_limit: float, off: BreakOff
    ) -> MigrationOutcome:
        del name, target, time_limit, off
        whole.migration.asked.append(domain)
        await asyncio.to_thread(act, domain.domid)
        return outcome

    whole.migration.migrate = migrate  # type: ignore[method-assign]


async def left_in_doubt(whole: Whole) -> Mfn:
    """A page of a guest whose migration broke off in its last handshake."""
    host = whole.small.host
    migrates(
        whole,
        InDoubt(detail="the line broke in the handshake"),
        lambda domid: host.suspend(domid, SuspendLimits()),
    )
    mfn = page_of(whole.small)
    await whole.corrected(mfn)
    await whole.page(mfn, Phase.LEFT, reason="guest_stuck")
    return mfn


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        (migrating(free_memory_reserve=1 << 40), "a second copy of d"),
        (migrating(maintenance_windows=closed_now()), "outside the maintenance windows"),
    ],
)
async def test_a_migration_that_is_put_off_is_for_information(
    tmp_path: Path, policy: Policy, said: str
) -> None:
    async with at_work(tmp_path, policy) as whole:
        mfn = page_of(whole.small)
        await whole.corrected(mfn)
        await whole.until(lambda: codes(whole) == ["page_put_off"])
        [one] = found(whole, ConditionCode.PAGE_PUT_OFF)
        assert (one.mfn, one.domid) == (mfn, whole.small.pvh)
        assert said in one.text
        assert "Nothing needs you now; for information:" in status(whole)


async def test_a_migration_that_has_failed_and_is_tried_again_is_for_information(
    tmp_path: Path,
) -> None:
    async with at_work(tmp_path, migrating(retry_first=3600.0, attempts=3)) as whole:
        migrates(whole, FAILED)
        await whole.corrected(page_of(whole.small))
        await whole.until(lambda: codes(whole) == ["page_put_off"])
        assert "xl failed with status 1" in found(whole, ConditionCode.PAGE_PUT_OFF)[0].text


async def test_all_is_not_well_while_a_page_that_waited_is_tried_once_more(
    tmp_path: Path,
) -> None:
    async with at_work(tmp_path, exchanging(attempts=100)) as whole:
        mfn = whole.granted()
        await whole.corrected(mfn)
        await whole.page(mfn, Phase.WAITING, reason="granted")
        ledger = whole.service.retirer.ledger
        shown: dict[Phase, set[str]] = {}
        heard = ledger.changed

        def look(entry: PageEntry) -> None:
            heard(entry)
            shown.setdefault(entry.phase, set()).update(codes(whole) or ("none",))

        ledger.changed = look
        await whole.until(lambda: ledger.book[mfn].attempts >= 3)
        assert shown.keys() >= {Phase.EXCHANGE, Phase.WAITING}
        assert set().union(*shown.values()) == {"page_put_off"}, shown


async def test_a_migration_that_waits_for_a_person_needs_one(tmp_path: Path) -> None:
    policy = migrating(retry_first=0.05, retry_last=0.05)
    async with at_work(tmp_path, policy) as whole:
        whole.small.host.simulated(whole.small.pvh).suspend_support = SuspendSupport.SILENT
        mfn = page_of(whole.small)
        await whole.corrected(mfn)
        await whole.until(lambda: codes(whole) == ["page_unresolved"])
        assert "exchange.ask_unannounced" in status(whole)
        # Nor while it is looked at once more, which would end the alert each time.
        for _ in range(50):
            assert codes(whole) == ["page_unresolved"]
            await asyncio.sleep(0.002)
        named = ExchangePolicy(ask_unannounced=("pvh*",))
        whole.service.apply(replace(policy, exchange=named))
        await whole.page(mfn, Phase.OFFLINED)
        assert codes(whole) == []


@pytest.mark.parametrize("named_only", [False, True])
async def test_a_guest_that_a_migration_of_an_earlier_daemon_has_left_needs_a_person(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, *, named_only: bool
) -> None:
    small = small_host(clock=SettableClock())
    entry = in_migration(small)
    small.host.suspend(small.pvh, SuspendLimits())
    if named_only:
        # xl renames what may run at the target, and has gone.
        small.host.simulated(small.pvh).somebody = f"{BY_NAME_ONLY} (pvh--migratedaway) tells,"
    async with at_work(tmp_path, LOCAL, small=small, earlier=[entry], times=OFTEN) as whole:
        await whole.until(lambda: "guest_in_doubt" in codes(whole))
        [one] = found(whole, ConditionCode.GUEST_IN_DOUBT)
        assert one.domid == small.pvh
        assert f"d{small.pvh} is suspended and may run at localhost" in one.text
        assert "All is well" not in status(whole)
        # Nobody but a person may let it run, and no job says how.
        await whole.until(lambda: "page_put_off" in codes(whole))
        assert "xl resume" not in found(whole, ConditionCode.PAGE_PUT_OFF)[0].text
        assert [record.levelno for record in told(caplog, Event.GUEST_IN_DOUBT)] == [
            logging.CRITICAL
        ]
        assert is_suspended(small)
        small.host.simulated(small.pvh).somebody = None
        small.host.resume(small.pvh)
        await whole.until(lambda: "guest_in_doubt" not in codes(whole))


async def test_a_migration_that_has_outlived_its_daemon_is_waited_for(tmp_path: Path) -> None:
    small = small_host(clock=SettableClock())
    entry = in_migration(small)
    guest = small.host.simulated(small.pvh)
    guest.somebody = "process 77 (xl migrate 2 localhost)"
    small.host.suspend(small.pvh, SuspendLimits())
    async with at_work(tmp_path, LOCAL, small=small, earlier=[entry], times=OFTEN) as whole:
        looks = len(whole.xen.trace.of("somebody_at"))
        await whole.until(lambda: len(whole.xen.trace.of("somebody_at")) > looks + 2)
        assert "guest_in_doubt" not in codes(whole)
        guest.somebody = None
        await whole.until(lambda: "guest_in_doubt" in codes(whole))


async def test_a_guest_that_runs_after_a_restart_is_in_no_doubt(tmp_path: Path) -> None:
    small = small_host(clock=SettableClock())
    entry = in_migration(small)
    async with at_work(tmp_path, LOCAL, small=small, earlier=[entry], times=OFTEN) as whole:
        await whole.page(entry.mfn, Phase.OFFLINED)
        assert codes(whole) == []


async def test_a_guest_that_somebody_has_paused_is_in_no_doubt(tmp_path: Path) -> None:
    small = small_host(clock=SettableClock())
    entry = in_migration(small)
    small.host.pause(small.pvh)
    async with at_work(tmp_path, LOCAL, small=small, earlier=[entry], times=OFTEN) as whole:
        await whole.until(lambda: codes(whole) == ["page_put_off"])
        await whole.until(lambda: not whole.service.retirer.in_doubt)
        assert codes(whole) == ["page_put_off"]


async def test_a_guest_in_doubt_is_shown_over_a_restart_until_it_is_settled(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small = small_host(clock=SettableClock())
    async with at_work(tmp_path, LOCAL, small=small) as whole:
        await left_in_doubt(whole)
        assert set(codes(whole)) == {"guest_in_doubt", "page_unresolved"}
        [before] = found(whole, ConditionCode.GUEST_IN_DOUBT)
    # As the next daemon does know of it.
    assert "no later start knows of it" not in caplog.text
    async with at_work(tmp_path, LOCAL, small=small, times=OFTEN) as whole:
        assert found(whole, ConditionCode.GUEST_IN_DOUBT) == [before]
        small.host.resume(small.pvh)
        await whole.until(lambda: codes(whole) == ["page_unresolved"])
    async with at_work(tmp_path, LOCAL, small=small) as whole:
        await whole.until(lambda: not whole.service.retirer.care)
        assert codes(whole) == ["page_unresolved"]


async def test_a_guest_that_is_paused_at_its_new_place_needs_a_person(tmp_path: Path) -> None:
    small = small_host(clock=SettableClock())
    async with at_work(tmp_path, LOCAL, small=small) as whole:
        migrate = whole.migration.migrate

        async def paused(
            domain: DomainIdentity, name: str, target: str, time_limit: float, off: BreakOff
        ) -> MigrationOutcome:
            outcome = await migrate(domain, name, target, time_limit, off)
            [new] = [one for one in small.host.domains() if one.uuid == domain.uuid]
            small.host.pause(new.domid)
            return outcome

        whole.migration.migrate = paused  # type: ignore[method-assign]
        mfn = page_of(small)
        await whole.corrected(mfn)
        await whole.page(mfn, Phase.OFFLINED)
        [one] = found(whole, ConditionCode.GUEST_IN_DOUBT)
        assert "is paused after its migration" in one.text


async def test_a_reload_takes_the_page_of_a_guest_up_that_was_helped(tmp_path: Path) -> None:
    small = small_host(clock=SettableClock())
    async with at_work(tmp_path, LOCAL, small=small) as whole:
        mfn = await left_in_doubt(whole)
        small.host.resume(small.pvh)
        del whole.migration.migrate
        whole.service.apply(whole.service.policy)
        await whole.page(mfn, Phase.OFFLINED)


@pytest.mark.parametrize("how", ["destroyed", "powered off", "rebooting"])
async def test_a_guest_that_somebody_ends_while_it_is_migrated_has_not_ended_by_our_doing(
    tmp_path: Path, how: str
) -> None:
    # xl copies its memory for minutes before it asks it.
    small = small_host(clock=SettableClock())

    def end(domid: Domid) -> None:
        if how == "destroyed":
            small.host.destroy(domid)
        else:
            reason = ShutdownReason.POWEROFF if how == "powered off" else ShutdownReason.REBOOT
            small.host.simulated(domid).shutdown = reason

    async with at_work(tmp_path, LOCAL, small=small) as whole:
        migrates(whole, replace(FAILED, was_asked=True), end)
        mfn = page_of(small)
        await whole.corrected(mfn)
        if how != "destroyed":
            jobs = whole.service.relocation.snapshot
            await whole.until(lambda: any("has left" in job.detail for job in jobs()))
            await asyncio.to_thread(small.host.destroy, small.pvh)
        await whole.page(mfn, Phase.OFFLINED)
        assert found(whole, ConditionCode.GUEST_ENDED) == []


async def test_a_guest_that_follows_the_request_of_a_migration_that_failed_is_let_go(
    tmp_path: Path,
) -> None:
    small = small_host(clock=SettableClock())
    async with at_work(tmp_path, LOCAL, small=small, times=OFTEN) as whole:
        migrates(whole, replace(FAILED, was_asked=True), lambda _domid: None)
        await whole.corrected(page_of(small))
        await whole.until(lambda: bool(whole.service.retirer.aftercare))
        small.host.simulated(small.pvh).shutdown = ShutdownReason.SUSPEND
        await whole.until(lambda: small.host.domain(small.pvh).shutdown is None)


async def test_a_guest_that_may_run_elsewhere_is_not_let_go_when_it_suspends_later(
    tmp_path: Path,
) -> None:
    small = small_host(clock=SettableClock())
    async with at_work(tmp_path, LOCAL, small=small, times=OFTEN) as whole:
        failed = replace(FAILED, was_asked=True, may_run_there=True)
        migrates(whole, failed, lambda _domid: None)
        await whole.corrected(page_of(small))
        await whole.until(lambda: bool(codes(whole)))
        assert not whole.service.retirer.aftercare


async def test_a_guest_that_crashes_when_xl_has_asked_it_is_reported_as_our_doing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small = small_host(clock=SettableClock())
    async with at_work(tmp_path, LOCAL, small=small) as whole:
        migrates(whole, replace(FAILED, was_asked=True), lambda domid: small.host.crash(domid, ""))
        guest = small.host.domain(small.pvh)
        await whole.corrected(page_of(small))
        await whole.until(lambda: bool(found(whole, ConditionCode.GUEST_ENDED)))
        [one] = found(whole, ConditionCode.GUEST_ENDED)
        assert one.domid == small.pvh
        assert "we had just asked it to suspend itself" in one.text
        registry = whole.service.metrics.registry
        assert registry.get_sample_value("pgofflined_guests_ended_total") == 1
        [record] = told(caplog, Event.GUEST_ENDED)
        assert record.levelno == logging.CRITICAL
        # Its toolstack may start it again, under the same uuid.
        objection = whole.service.retirer.exchanging.objection
        assert objection(guest, SuspendSupport.ANNOUNCED) is not None
    async with at_work(tmp_path, LOCAL, small=small) as whole:
        assert found(whole, ConditionCode.GUEST_ENDED) == [one]


async def test_a_guest_that_xl_has_not_asked_has_ended_by_itself(tmp_path: Path) -> None:
    small = small_host(clock=SettableClock())
    async with at_work(tmp_path, LOCAL, small=small) as whole:
        migrates(whole, FAILED, small.host.destroy)
        mfn = page_of(small)
        await whole.corrected(mfn)
        await whole.page(mfn, Phase.OFFLINED)
        assert codes(whole) == []


@pytest.mark.parametrize(
    "outcome",
    [
        NotMigrated(detail="xl failed", was_asked=True),
        InDoubt(detail="d1 crashed, and its note is there"),
    ],
)
async def test_a_guest_that_crashes_as_it_is_to_be_saved_is_reported_as_our_doing(
    tmp_path: Path, outcome: MigrationOutcome
) -> None:
    saving = RelocationPolicy(
        save_restore=True, save_directory=str(tmp_path), free_memory_reserve=0
    )
    policy = replace(exchanging(attempts=1), relocation=saving)
    async with at_work(tmp_path, policy) as whole:

        async def save(domain: DomainIdentity, directory: str) -> MigrationOutcome:
            del directory
            whole.small.host.crash(domain.domid, "asked to suspend itself")
            return outcome

        whole.migration.save_and_restore = save  # type: ignore[method-assign]
        mfn = whole.granted()
        identity = whole.small.host.domain(whole.small.pv).identity
        entry = PageEntry(
            mfn=mfn, cause=Cause.CORRECTED, phase=Phase.RELOCATION, since=1.0, domain=identity
        )
        whole.service.retirer.ledger.put(entry)
        service = whole.service.relocation
        service._queue.submit(identity, "pv", [mfn], service._now(), by_saving=True)
        await service._save_and_restore(identity, saving)
        [one] = found(whole, ConditionCode.GUEST_ENDED)
        assert one.domid == whole.small.pv
        assert "crashed" in one.text


async def test_lost_records_that_nobody_has_asked_about_are_shown_by_the_next_daemon(
    tmp_path: Path,
) -> None:
    small = small_host(clock=SettableClock())
    async with at_work(tmp_path, small=small) as whole:
        whole.telemetry.lose(7)
        await whole.until(lambda: whole.service.counters.lost.total() == 7)
    async with at_work(tmp_path, small=small) as whole:
        [one] = found(whole, ConditionCode.RECORDS_LOST)
        assert one.text.startswith("7 machine-check records were lost")


async def test_a_job_that_nobody_has_asked_about_is_shown_by_the_next_daemon(
    tmp_path: Path,
) -> None:
    small = small_host(clock=SettableClock())
    guest = small.host.domain(small.pv).identity
    async with at_work(tmp_path, small=small) as whole:
        exchanging = whole.service.retirer.exchanging
        report = RecoveryReport(domain=guest, outcome=Recovered.LEFT_ALONE, detail="it was changed")
        exchanging._not_recovered.put(report)
    async with at_work(tmp_path, small=small) as whole:
        assert [one.text for one in found(whole, ConditionCode.JOB_NOT_RECOVERED)] == [
            "it was changed"
        ]


@pytest.mark.parametrize("set_by", [2 * 86400.0, -2 * 86400.0])
async def test_how_long_a_page_waits_is_not_told_by_the_date(tmp_path: Path, set_by: float) -> None:
    async with at_work(tmp_path, exchanging(retry_first=3600.0, attempts=9)) as whole:
        mfn = whole.granted()
        await whole.corrected(mfn)
        await whole.page(mfn, Phase.WAITING)

        def seconds() -> float:
            name = "pgofflined_pages_pending_oldest_seconds"
            value = whole.service.metrics.registry.get_sample_value(name)
            assert value is not None
            return value

        before = seconds()
        whole.clock.offset = set_by
        # The clock of this host is fast.
        assert before < seconds() < before + 3600.0


async def test_a_page_that_is_taken_up_again_has_not_waited_before(tmp_path: Path) -> None:
    policy = replace(exchanging(retry_first=3600.0), domains=DomainPolicy(deny=("pv",)))
    async with at_work(tmp_path, policy) as whole:
        mfn = whole.granted()
        await whole.corrected(mfn)
        await whole.page(mfn, Phase.LEFT, reason="denied")
        left = whole.clock.now()
        whole.service.apply(replace(policy, domains=DomainPolicy()))
        await whole.page(mfn, Phase.WAITING)
        oldest = whole.service.snapshot().oldest_unfinished
        assert oldest is not None
        assert oldest >= left


async def test_an_acknowledged_page_stays_so_when_another_line_of_it_is_scrubbed(
    tmp_path: Path,
) -> None:
    async with at_work(tmp_path) as whole:
        mfn = whole.plain()

        async def scrubbed(offset: int) -> None:
            before = whole.service.counters.reports.total()
            whole.telemetry.push_ucna(maddr_of(mfn) + offset)  # type: ignore[arg-type]
            await whole.until(lambda: whole.service.counters.reports.total() > before)
            await asyncio.sleep(0)

        def counts() -> list[bool]:
            return [one.counts for one in found(whole, ConditionCode.UNCORRECTED_ERROR)]

        for offset in (0x100, 0x840):
            await scrubbed(offset)
        await whole.page(mfn, Phase.LEFT)
        whole.service.acknowledge(ConditionCode.UNCORRECTED_ERROR, mfn, None, uid=0)
        for offset in (0x100, 0x840, 0xA00):
            await scrubbed(offset)
            assert counts() == [False]
        # That it was consumed is something else.
        whole.telemetry.push_srao(mfn, whole.small.pv)
        await whole.until(lambda: counts() == [True])


async def test_a_page_that_stays_for_another_reason_is_not_acknowledged(tmp_path: Path) -> None:
    policy = replace(POLICY, domains=DomainPolicy(deny=("pv",)))
    async with at_work(tmp_path, policy) as whole:
        mfn = whole.granted()
        await whole.corrected(mfn)
        await whole.page(mfn, Phase.LEFT, reason="denied")
        whole.service.acknowledge(ConditionCode.PAGE_UNRESOLVED, None, None, uid=0)
        assert [one.counts for one in found(whole, ConditionCode.PAGE_UNRESOLVED)] == [False]
        whole.service.apply(replace(policy, domains=DomainPolicy()))
        await whole.page(mfn, Phase.WAITING)
        assert codes(whole) == ["page_put_off"]
        await whole.page(mfn, Phase.LEFT, reason="granted")
        assert [one.counts for one in found(whole, ConditionCode.PAGE_UNRESOLVED)] == [True]


async def test_a_worker_that_xen_does_not_answer_needs_a_person(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Beyond the guest's own limits, which are short here.
    monkeypatch.setattr("pgofflined.service._STUCK_MARGIN", 0.2)
    answered = threading.Event()
    async with at_work(tmp_path) as whole:
        host = whole.small.host
        exchange = host.exchange

        def slow(*arguments: object) -> object:
            answered.wait(20.0)
            return exchange(*arguments)  # type: ignore[arg-type]

        host.exchange = slow  # type: ignore[method-assign,assignment]
        mfn = whole.plain()
        await whole.corrected(mfn)
        try:
            await whole.until(lambda: "worker_stuck" in codes(whole))
            assert "All is well" not in status(whole)
        finally:
            answered.set()
        await whole.page(mfn, Phase.OFFLINED)
        await whole.until(lambda: codes(whole) == [])


async def test_what_came_of_a_guest_is_forgotten_when_that_is_gone(tmp_path: Path) -> None:
    small = small_host(clock=SettableClock())

    def guest() -> DomainIdentity:
        [one] = [info for info in small.host.domains() if info.uuid == uuid]
        return one.identity

    uuid = small.host.domain(small.pvh).uuid
    async with at_work(tmp_path, LOCAL, small=small) as whole:
        for which in (5, 6):
            mfn = small.host.frame_of(guest().domid, which)
            await whole.corrected(mfn)
            await whole.page(mfn, Phase.OFFLINED)
            await whole.until(lambda: whole.service.retirer.restored == {guest()})
    small.host.destroy(guest().domid)
    async with at_work(tmp_path, LOCAL, small=small) as whole:
        assert whole.service.retirer.restored == frozenset()


async def test_the_same_action_of_xen_told_again_and_again_does_not_fill_the_journal(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with at_work(tmp_path) as whole:

        async def acted(mfn: Mfn) -> None:
            before = whole.service.counters.reports.total()
            whole.telemetry.push_srao(mfn, whole.small.pvh)
            await whole.until(lambda: whole.service.counters.reports.total() > before)

        for _ in range(100):
            await acted(page_of(whole.small))
        first = len(told(caplog, Event.HYPERVISOR_ACTED))
        assert 1 <= first < 30
        for which in range(6, 36):
            await acted(page_of(whole.small, which))
        await asyncio.sleep(0)
        await whole.until(lambda: len(told(caplog, Event.HYPERVISOR_ACTED)) == first + 30)
