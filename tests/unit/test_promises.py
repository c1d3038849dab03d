"""What operators are promised of pages, whatever happens around them: on the assembled service."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from errno import EIO
from pathlib import Path

import pytest

from pgofflined.core.book import Cause, PageEntry, Phase
from pgofflined.core.errors import PortError, XenError
from pgofflined.core.events import Event
from pgofflined.core.frames import Mfn, maddr_of
from pgofflined.core.offline import OfflineState
from pgofflined.core.policy import DomainPolicy, Marking, Policy, RelocationPolicy
from pgofflined.core.status import Fate
from pgofflined.core.suspending import SuspendSupport
from pgofflined.core.units import AmountOfMemory
from pgofflined.core.xenversion import XenVersion
from pgofflined.sim.faults import Fault
from pgofflined.sim.frames import INVALID_M2P, FrameState
from pgofflined.sim.guests import SuspendBehaviour
from pgofflined.sim.host import HostSpec
from pgofflined.sim.layout import PvSpec
from pgofflined.sim.scenarios import small_host

from .whole import POLICY, SettableClock, Whole, at_work, exchanging, retiring

EIGHT = retiring(max_retired=AmountOfMemory(size=8 << 12))
DAY = 86400.0
LATER = exchanging(mark=Marking.AFTER_SCRUB, scrub_wait=0.1)
SLOW = exchanging(retry_first=60.0, retry_last=60.0, attempts=100)


def messages(caplog: pytest.LogCaptureFixture, kind: Event) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if getattr(record, "pgofflined_fields", {}).get("MESSAGE_ID") == kind.message_id
    ]


# The cap.


@pytest.mark.parametrize("marking", list(Marking))
async def test_a_burst_over_the_cap_retires_as_many_pages_as_it_allows(
    tmp_path: Path, marking: Marking, caplog: pytest.LogCaptureFixture
) -> None:
    policy = exchanging(EIGHT, mark=marking, scrub_wait=0.05)
    async with at_work(tmp_path, policy, spec=HostSpec(scrub_seconds=0.01)) as whole:
        mfns = [whole.plain(which) for which in range(30)]
        await whole.corrected(*mfns)
        await whole.until(lambda: len(whole.pages(mfns, Phase.OFFLINED)) == 8)
        assert not list(whole.service.retirer.ledger.book.unfinished())
        assert len(whole.service.retirer.ledger.book) == 8
        # Each of the others is told once, however often it fails.
        await whole.corrected(*mfns)
        assert len(messages(caplog, Event.CAP_REACHED)) == 22


async def test_an_operators_pages_use_up_the_cap_as_well(tmp_path: Path) -> None:
    async with at_work(tmp_path, EIGHT) as whole:
        answers = [await whole.service.offline(whole.plain(which)) for which in range(12)]
        assert [answer.fate is Fate.REFUSED for answer in answers] == [False] * 8 + [True] * 4
        assert "max_retired" in answers[-1].detail


async def test_a_page_over_the_cap_is_taken_up_when_there_is_room_again(tmp_path: Path) -> None:
    one = retiring(LATER, max_retired=AmountOfMemory(size=1 << 12))
    async with at_work(tmp_path, one) as whole:
        first, second = whole.of_dom0(), whole.plain(1)
        await whole.corrected(first, second)
        # The first is left, has no mark, and uses up nothing any more.
        await whole.page(second, Phase.OFFLINED)
        assert (await whole.page(first, Phase.LEFT)).marked is False


async def test_pages_that_xen_broke_do_not_use_up_the_cap(tmp_path: Path) -> None:
    one = retiring(max_retired=AmountOfMemory(size=1 << 12))
    async with at_work(tmp_path, one) as whole:
        broken = whole.small.host.frame_of(whole.small.pvh, 5)
        whole.small.host.break_frame(broken)
        whole.telemetry.push_srao(broken, whole.small.pvh)
        await whole.page(broken, Phase.LEFT)
        mfn = whole.plain()
        await whole.corrected(mfn)
        await whole.page(mfn, Phase.OFFLINED)


# Policy holds at every step.


async def test_a_page_that_an_earlier_daemon_left_is_not_touched_in_a_dry_run(
    tmp_path: Path,
) -> None:
    small = small_host(clock=SettableClock())
    mfn = small.host.frame_of(small.pv, small.host.pv(small.pv).layout.plain[0])
    left = PageEntry(mfn=mfn, cause=Cause.CORRECTED, phase=Phase.TRIAGE, since=1.0)
    async with at_work(tmp_path, retiring(dry_run=True), small=small, earlier=[left]) as whole:
        entry = await whole.page(mfn, Phase.WAITING)
        assert "retire.dry_run" in entry.detail
        assert small.host.query(mfn) is OfflineState.ONLINE
        assert whole.suspended() == []
        whole.service.apply(replace(whole.service.policy, retire=POLICY.retire))
        await whole.page(mfn, Phase.OFFLINED)


@pytest.mark.parametrize(
    ("changed", "phase"),
    [
        (retiring(dry_run=True), Phase.WAITING),
        (retiring(enabled=False), Phase.WAITING),
        (replace(POLICY, domains=DomainPolicy(deny=("second",))), Phase.LEFT),
        (exchanging(enabled=False), Phase.LEFT),
    ],
    ids=["dry_run", "disabled", "denied", "no exchange"],
)
async def test_a_reload_holds_for_jobs_that_are_queued(
    tmp_path: Path, changed: Policy, phase: Phase
) -> None:
    small = small_host(clock=SettableClock(), guest=PvSpec(name="first"))
    second = small.host.add_pv(PvSpec(name="second"))
    # The first guest keeps the only worker for 0.5 s.
    small.host.simulated(small.pv).behaviour = SuspendBehaviour(suspend_after=50.0)
    policy = exchanging(workers=1, suspend_timeout=100.0)
    changed = replace(changed, exchange=replace(changed.exchange, workers=1))
    async with at_work(tmp_path, policy, small=small) as whole:
        first_page, second_page = whole.plain(), whole.plain(domid=second)
        await whole.corrected(first_page)
        await whole.until(lambda: whole.suspended() == [small.pv])
        await whole.corrected(second_page)
        await whole.page(second_page, Phase.EXCHANGE)
        whole.service.apply(replace(changed, metrics=whole.service.policy.metrics))
        entry = await whole.page(second_page, phase)
        assert whole.suspended() == [small.pv]
        marked = bool(small.host.query(second_page) & OfflineState.OFFLINE_PENDING)
        assert marked == entry.marked, "a page that is not to be touched is booked as it is"
        assert marked == (phase is Phase.WAITING)


async def test_a_policy_that_comes_just_before_the_suspend_is_obeyed(tmp_path: Path) -> None:
    # With the last look at who else works on the guest, which comes right before the request.
    applied = asyncio.Event()
    loop = asyncio.get_running_loop()
    running: list[Whole] = []

    def apply() -> None:
        service = running[0].service
        service.apply(replace(service.policy, retire=retiring(dry_run=True).retire))
        applied.set()

    def reload() -> None:
        loop.call_soon_threadsafe(apply)
        asyncio.run_coroutine_threadsafe(applied.wait(), loop).result(30)

    async with at_work(tmp_path, faults=[Fault(method="somebody_at", act=reload)]) as whole:
        running.append(whole)
        mfn = whole.plain()
        await whole.corrected(mfn)
        await whole.page(mfn, Phase.WAITING, reason="on_hold")
        assert whole.suspended() == []


async def test_pages_that_a_dry_run_has_named_are_retired_when_it_ends(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with at_work(tmp_path, retiring(dry_run=True)) as whole:
        mfn = whole.plain()
        await whole.corrected(mfn, times=5)
        assert len(messages(caplog, Event.PAGE_WOULD_RETIRE)) == 1
        assert whole.entry(mfn) is None
        whole.service.apply(replace(whole.service.policy, retire=POLICY.retire))
        await whole.page(mfn, Phase.OFFLINED)


# The clock.


@pytest.mark.parametrize("step", [-DAY, DAY])
async def test_a_page_that_waits_is_tried_in_its_time_whatever_the_date(
    tmp_path: Path, step: float
) -> None:
    policy = exchanging(retry_first=0.3, retry_last=0.3, attempts=100)
    async with at_work(tmp_path, policy) as whole:
        mfn = whole.granted()
        await whole.corrected(mfn)
        await whole.page(mfn, Phase.WAITING)
        whole.clock.offset = step
        suspended = len(whole.suspended())
        whole.small.host.simulated(whole.small.pv).grants.clear()
        await whole.page(mfn, Phase.OFFLINED)
        assert len(whole.suspended()) > suspended


@pytest.mark.parametrize("step", [-DAY, DAY])
async def test_a_step_of_the_date_makes_no_page_due_at_once(tmp_path: Path, step: float) -> None:
    async with at_work(tmp_path, SLOW) as whole:
        mfn = whole.granted()
        await whole.corrected(mfn)
        await whole.page(mfn, Phase.WAITING)
        whole.clock.offset = step
        left = whole.service.retirer.ledger.seconds_to_next()
        assert left is not None
        assert 30 < left <= 60
        [shown] = whole.service.snapshot().pages
        assert shown.next_try is not None
        assert 30 < shown.next_try - whole.clock.now() <= 60


@pytest.mark.parametrize("step", [-DAY, DAY])
async def test_how_long_the_daemon_is_up_does_not_change_with_the_date(
    tmp_path: Path, step: float
) -> None:
    async with at_work(tmp_path) as whole:
        whole.clock.offset = step
        up = whole.clock.now() - whole.service.snapshot().started
        assert 0 <= up < DAY / 2


async def test_errors_count_together_over_a_step_of_the_date(tmp_path: Path) -> None:
    async with at_work(tmp_path) as whole:
        mfn = whole.plain()
        await whole.corrected(mfn, times=1)
        whole.clock.offset = 30 * DAY
        await whole.corrected(mfn, times=1)
        await whole.page(mfn, Phase.OFFLINED)


# Pages that stay in use are asked about again.


async def test_a_page_left_for_want_of_a_target_is_seen_to_go_when_its_guest_is_migrated(
    tmp_path: Path,
) -> None:
    async with at_work(tmp_path) as whole:
        mfn = whole.small.host.frame_of(whole.small.pvh, 5)
        await whole.corrected(mfn)
        await whole.page(mfn, Phase.LEFT, reason="no_relocation")
        await asyncio.to_thread(whole.small.host.migrate_to_self, whole.small.pvh)
        await whole.page(mfn, Phase.OFFLINED)


async def test_a_page_left_for_want_of_a_target_is_moved_when_a_reload_sets_one(
    tmp_path: Path,
) -> None:
    async with at_work(tmp_path) as whole:
        mfn = whole.small.host.frame_of(whole.small.pvh, 5)
        await whole.corrected(mfn)
        await whole.page(mfn, Phase.LEFT, reason="no_relocation")
        target = RelocationPolicy(target="localhost", free_memory_reserve=0)
        whole.service.apply(replace(whole.service.policy, relocation=target))
        await whole.page(mfn, Phase.OFFLINED)
        assert len(whole.migration.asked) == 1


async def test_a_denied_page_is_exchanged_when_a_reload_allows_it(tmp_path: Path) -> None:
    policy = replace(POLICY, domains=DomainPolicy(deny=("pv",)))
    async with at_work(tmp_path, policy) as whole:
        mfn = whole.plain()
        await whole.corrected(mfn)
        entry = await whole.page(mfn, Phase.LEFT, reason="denied")
        assert not entry.marked
        whole.service.apply(replace(whole.service.policy, domains=DomainPolicy()))
        await whole.page(mfn, Phase.OFFLINED)


async def test_a_guest_is_not_asked_again_for_a_refused_page_because_another_has_ended(
    tmp_path: Path,
) -> None:
    async with at_work(tmp_path) as whole:
        other = whole.small.host.add_pv(PvSpec(name="other"))
        mfn = whole.granted()
        await whole.corrected(mfn)
        await whole.page(mfn, Phase.LEFT, reason="granted")
        asked = len(whole.suspended())
        looks = whole.calls("query", mfn)
        await asyncio.to_thread(whole.small.host.destroy, other)
        await whole.until(lambda: whole.calls("query", mfn) > looks)
        assert whole.entry(mfn) is not None
        assert len(whole.suspended()) == asked
        await asyncio.to_thread(whole.small.host.destroy, whole.small.pv)
        await whole.page(mfn, Phase.OFFLINED)


async def test_the_word_of_ended_domains_is_had_again_when_it_was_lost(tmp_path: Path) -> None:
    async with at_work(tmp_path) as whole:
        host = whole.small.host
        await whole.until(lambda: bool(host.told_of_ends))
        [announce] = host.told_of_ends
        announce.__self__.fail("xenstored has gone")  # type: ignore[attr-defined]
        await whole.until(lambda: host.told_of_ends not in ([], [announce]))
        mfn = host.frame_of(whole.small.pvh, 5)
        await whole.corrected(mfn)
        await whole.page(mfn, Phase.LEFT, reason="no_relocation")
        await asyncio.to_thread(host.destroy, whole.small.pvh)
        await whole.page(mfn, Phase.OFFLINED)


# Guests that lie, and Xen's own pages.


async def test_a_guest_cannot_hide_its_page_from_the_search_for_the_owner(tmp_path: Path) -> None:
    # All ones in its own M2P entry; Xen has broken another page of it, so that one more offline
    # call could hang the host.
    async with at_work(tmp_path) as whole:
        host, pv = whole.small.host, whole.small.pv
        mfn = whole.plain()
        host.set_m2p(mfn, int(INVALID_M2P))
        whole.service.retirer.errors.add_wedged(host.domain(pv).identity)
        await whole.corrected(mfn)
        entry = await whole.page(mfn, Phase.WAITING)
        assert entry.reason == "owner_ending"
        assert whole.calls("offline", mfn) == 0


async def test_a_page_that_is_marked_on_a_xen_that_it_would_damage_loses_its_mark(
    tmp_path: Path,
) -> None:
    small = small_host(HostSpec(version=XenVersion(4, 17, 7)), clock=SettableClock())
    mfn = small.host.frame_of(small.pvh, 5)
    small.host.offline(mfn)
    left = PageEntry(mfn=mfn, cause=Cause.CORRECTED, phase=Phase.WAITING, since=1.0, marked=True)
    async with at_work(tmp_path, small=small, earlier=[left]) as whole:
        entry = await whole.page(mfn, Phase.LEFT)
        assert not entry.marked
        assert small.host.query(mfn) is OfflineState.ONLINE
        small.host.destroy(small.pvh)
        assert small.host.corrupted is None


async def test_pages_are_looked_at_although_others_wait_for_xen(tmp_path: Path) -> None:
    async with at_work(tmp_path) as whole:
        release = asyncio.Event()
        loop = asyncio.get_running_loop()

        def wait() -> None:
            asyncio.run_coroutine_threadsafe(release.wait(), loop).result(60)

        waiting = [asyncio.ensure_future(asyncio.to_thread(wait)) for _ in range(64)]
        mfn = whole.of_dom0()
        await whole.corrected(mfn)
        await whole.page(mfn, Phase.LEFT)
        assert not any(future.done() for future in waiting)
        release.set()
        await asyncio.gather(*waiting)


# At a stop.


async def test_every_record_that_was_read_is_decided_upon_before_the_daemon_stops(
    tmp_path: Path,
) -> None:
    small = small_host(clock=SettableClock())
    async with at_work(tmp_path, retiring(dry_run=True), small=small) as whole:
        # As many as Xen keeps.
        mfns = [whole.plain(which) for which in range(20)]
        reports = whole.service.counters.reports
        for mfn in mfns:
            whole.telemetry.push_corrected(maddr_of(mfn))
        await whole.until(lambda: reports.total() > 0)
        assert reports.total() < len(mfns), "the stop comes in the middle of what was read"
    async with at_work(tmp_path, retiring(dry_run=True), small=small) as whole:
        assert [whole.hits(mfn) for mfn in mfns] == [1] * len(mfns)


# Over a restart.


async def test_errors_count_together_over_a_restart(tmp_path: Path) -> None:
    small = small_host(clock=SettableClock())
    async with at_work(tmp_path, small=small) as whole:
        mfn = whole.plain()
        await whole.corrected(mfn, times=1)
        assert whole.entry(mfn) is None
    async with at_work(tmp_path, small=small) as whole:
        await whole.corrected(mfn, times=1)
        await whole.page(mfn, Phase.OFFLINED)


async def test_a_page_that_waits_is_taken_up_by_the_next_daemon(tmp_path: Path) -> None:
    small = small_host(clock=SettableClock())
    async with at_work(tmp_path, SLOW, small=small) as whole:
        mfn = whole.granted()
        await whole.corrected(mfn)
        await whole.page(mfn, Phase.WAITING)
    small.host.simulated(small.pv).grants.clear()
    async with at_work(tmp_path, SLOW, small=small) as whole:
        entry = await whole.page(mfn, Phase.OFFLINED)
        assert entry.attempts == 1, "the try before the restart still counts"


async def test_the_cap_holds_over_a_restart(tmp_path: Path) -> None:
    small = small_host(clock=SettableClock())
    async with at_work(tmp_path, EIGHT, small=small) as whole:
        mfns = [whole.plain(which) for which in range(12)]
        await whole.corrected(*mfns[:6])
        await whole.until(lambda: len(whole.pages(mfns, Phase.OFFLINED)) == 6)
    async with at_work(tmp_path, EIGHT, small=small) as whole:
        await whole.corrected(*mfns[6:])
        await whole.until(lambda: len(whole.pages(mfns, Phase.OFFLINED)) == 8)
        assert len(whole.service.retirer.ledger.book) == 8


async def test_what_became_of_a_page_while_no_daemon_ran_is_found_out_at_the_start(
    tmp_path: Path,
) -> None:
    small = small_host(clock=SettableClock())
    async with at_work(tmp_path, small=small) as whole:
        mfn = small.host.frame_of(small.pvh, 5)
        await whole.corrected(mfn)
        await whole.page(mfn, Phase.LEFT, reason="no_relocation")
    small.host.migrate_to_self(small.pvh)
    async with at_work(tmp_path, small=small) as whole:
        await whole.page(mfn, Phase.OFFLINED)


async def test_a_page_with_an_uncorrected_error_is_not_exchanged_by_the_next_daemon(
    tmp_path: Path,
) -> None:
    small = small_host(clock=SettableClock())
    async with at_work(tmp_path, small=small) as whole:
        mfn = whole.plain()
        small.host.poison(mfn)
        whole.service.retirer.take_poisoned(mfn, "an uncorrected error")
        await whole.page(mfn, Phase.LEFT, reason="uncorrected")
    async with at_work(tmp_path, small=small) as whole:
        await whole.corrected(mfn, times=3)
        answer = await whole.service.offline(mfn)
        assert whole.suspended() == []
        assert "uncorrected" in answer.detail
        small.host.destroy(small.pv)
        await whole.page(mfn, Phase.OFFLINED)


async def test_a_domain_that_xen_has_hit_is_not_marked_although_it_could_not_be_asked_for(
    tmp_path: Path,
) -> None:
    fault = Fault(method="condition", error=XenError(EIO, op="getdomaininfo"))
    async with at_work(tmp_path, faults=[fault]) as whole:
        host, pv = whole.small.host, whole.small.pv
        broken, other = whole.plain(0), whole.plain(1)
        host.poison(broken, known=True)
        whole.telemetry.push_srao(broken, pv)
        await whole.page(broken, Phase.LEFT)
        await whole.corrected(other)
        assert (await whole.page(other, Phase.WAITING)).reason == "owner_ending"
        assert whole.calls("offline", other) == 0


async def test_a_page_with_an_uncorrected_error_is_marked_while_xenstored_is_down(
    tmp_path: Path,
) -> None:
    down = PortError("xenstored does not answer")
    names = [Fault(method=method, times=10**6, error=down) for method in ("domain", "domains")]
    async with at_work(tmp_path, faults=names) as whole:
        frames = whole.small.host.frames
        free = next(Mfn(mfn) for mfn in range(frames.count) if frames.state[mfn] == FrameState.FREE)
        owned, pvh = whole.plain(), whole.small.host.frame_of(whole.small.pvh, 5)
        for mfn in (free, owned, pvh):
            whole.telemetry.push_ucna(maddr_of(mfn))
        await whole.page(free, Phase.OFFLINED)
        for mfn, domid in ((owned, whole.small.pv), (pvh, whole.small.pvh)):
            entry = await whole.page(mfn, Phase.LEFT, reason="uncorrected")
            assert entry.marked
            assert entry.domain is not None
            assert entry.domain.domid == domid
        # Whom the policy excludes is told by names.
        predicted = whole.plain(1)
        await whole.corrected(predicted)
        await whole.page(predicted, Phase.WAITING, reason="cannot_ask_xen")
        assert whole.calls("offline", predicted) == 0
        assert whole.suspended() == []
        whole.xen.plan.clear()
        await whole.page(predicted, Phase.OFFLINED)


async def test_a_guest_that_is_named_before_a_restart_is_asked_after_it(tmp_path: Path) -> None:
    small = small_host(clock=SettableClock(), guest=PvSpec(name="silent"))
    small.host.simulated(small.pv).suspend_support = SuspendSupport.SILENT
    async with at_work(tmp_path, exchanging(attempts=1), small=small) as whole:
        mfn = whole.plain()
        await whole.corrected(mfn)
        await whole.page(mfn, Phase.LEFT, reason="suspend_unannounced")
    async with at_work(tmp_path, exchanging(ask_unannounced=("silent",)), small=small) as whole:
        await whole.page(mfn, Phase.OFFLINED)


async def test_a_restart_alone_asks_no_guest_again(tmp_path: Path) -> None:
    small = small_host(clock=SettableClock())
    once = exchanging(attempts=1)
    async with at_work(tmp_path, once, small=small) as whole:
        refused = whole.granted()
        await whole.corrected(refused)
        await whole.page(refused, Phase.LEFT, reason="granted")
        small.host.simulated(small.pv).grants.clear()
    async with at_work(tmp_path, once, small=small) as whole:
        other = whole.plain(1)
        await whole.corrected(other)
        await whole.page(other, Phase.OFFLINED)
        assert whole.suspended() == [small.pv]
        assert whole.pages([refused, other], Phase.LEFT) == [refused]
    async with at_work(tmp_path, exchanging(attempts=2), small=small) as whole:
        await whole.page(refused, Phase.OFFLINED)
