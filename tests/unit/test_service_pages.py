"""Pages of the assembled service in bad moments: asked for twice, held, poisoned, left for good."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from pgofflined.core.book import Cause, PageEntry, Phase
from pgofflined.core.conditions import ConditionCode
from pgofflined.core.events import Event
from pgofflined.core.frames import Mfn, Pfn, maddr_of
from pgofflined.core.offline import OfflineState
from pgofflined.core.outcomes import Damaged, ExchangeReport
from pgofflined.core.policy import DomainPolicy, Policy, RelocationPolicy
from pgofflined.core.status import Fate
from pgofflined.core.units import AmountOfMemory
from pgofflined.core.xenversion import XenVersion
from pgofflined.sim.faults import Fault
from pgofflined.sim.host import HostSpec
from pgofflined.sim.scenarios import small_host

from .test_promises import LATER, SLOW, messages
from .whole import POLICY, SettableClock, Whole, at_work, exchanging, retiring

OLD_XEN = HostSpec(version=XenVersion(4, 17, 7))
DRY = retiring(dry_run=True)
OFF = retiring(enabled=False)


# Asked for more than once.


async def test_a_page_out_of_use_that_is_asked_for_again_costs_no_idle_cpu(tmp_path: Path) -> None:
    async with at_work(tmp_path) as whole:
        mfn = whole.plain()
        await whole.corrected(mfn)
        await whole.page(mfn, Phase.OFFLINED)
        assert whole.service.snapshot().idle_scrub == 1
        for _ in range(3):
            answer = await whole.service.offline(mfn)
            assert answer.fate is Fate.OUT_OF_USE
        assert whole.service.snapshot().idle_scrub == 1
        assert whole.service.snapshot().retired_frames == 1


async def test_an_address_that_is_no_memory_is_refused_and_needs_nobody(tmp_path: Path) -> None:
    async with at_work(tmp_path) as whole:
        beyond = Mfn(whole.small.host.frames.count + 5)
        answer = await whole.service.offline(beyond)
        assert answer.fate is Fate.REFUSED
        assert "no memory of this host" in answer.detail
        assert whole.service.snapshot().attention == ()


# Errors that cannot be corrected, reported again and again.


@pytest.mark.parametrize("policy", [POLICY, DRY], ids=["old xen", "dry run"])
async def test_a_page_that_is_not_marked_is_told_once_however_often_it_is_reported(
    tmp_path: Path, policy: Policy, caplog: pytest.LogCaptureFixture
) -> None:
    spec = OLD_XEN if policy is POLICY else None
    async with at_work(tmp_path, policy, spec=spec) as whole:
        mfn = whole.plain()
        reports = whole.service.counters.reports
        whole.telemetry.push_ucna(maddr_of(mfn))
        first = await whole.page(mfn, Phase.LEFT, Phase.WAITING)
        assert not first.marked
        for count in range(2, 31):
            whole.telemetry.push_ucna(maddr_of(mfn))
            await whole.until(lambda count=count: reports.total() == count)  # type: ignore[misc]
            assert await whole.page(mfn, Phase.LEFT, Phase.WAITING) == first
        for kind in (Event.PAGE_TO_RETIRE, Event.PAGE_LEFT):
            assert len(messages(caplog, kind)) <= 1


async def test_what_becomes_known_of_a_page_while_it_is_looked_at_is_not_lost(
    tmp_path: Path,
) -> None:
    # Its guest is denied; the uncorrected error comes with the look at the owner.
    loop = asyncio.get_running_loop()
    running: list[Whole] = []

    def report() -> None:
        async def now() -> None:
            running[0].service.retirer.take_poisoned(mfn, "an uncorrected error")

        asyncio.run_coroutine_threadsafe(now(), loop).result(10)

    policy = replace(POLICY, domains=DomainPolicy(deny=("pv",)))
    async with at_work(tmp_path, policy, faults=[Fault(method="page_types", act=report)]) as whole:
        running.append(whole)
        mfn = whole.plain()
        await whole.corrected(mfn)
        entry = await whole.page(mfn, Phase.LEFT, reason="uncorrected")
        assert entry.marked
        assert whole.small.host.query(mfn) is OfflineState.OFFLINE_PENDING


async def test_a_guest_that_xen_has_hit_is_known_without_xenstore(tmp_path: Path) -> None:
    dead = Fault(method="domain", times=10**6)
    async with at_work(tmp_path, faults=[dead]) as whole:
        host, pv = whole.small.host, whole.small.pv
        mfn = whole.plain()
        host.break_frame(mfn)
        whole.telemetry.push_srao(mfn, pv)
        await whole.page(mfn, Phase.LEFT)
        assert host.domain(pv).identity in whole.service.retirer.errors.wedged


@pytest.mark.parametrize("marked", [True, False], ids=["marked before", "not marked"])
async def test_a_page_that_xen_broke_without_our_being_told_is_never_read(
    tmp_path: Path, *, marked: bool
) -> None:
    # As with the mcelog source, which passes on nothing of what Xen did.
    policy = retiring(max_retired=AmountOfMemory(size=2 << 12))
    target = RelocationPolicy(target="localhost", free_memory_reserve=0)
    async with at_work(tmp_path, replace(policy, relocation=target)) as whole:
        host, pvh = whole.small.host, whole.small.pvh
        broken, other = host.frame_of(pvh, 5), host.frame_of(pvh, 6)
        if marked:
            host.offline(broken)
        host.break_frame(broken)
        await whole.corrected(broken)
        await whole.page(broken, Phase.LEFT, reason="broken")
        # Nor do its like use up the limit, or let its guest be read for another page.
        assert whole.service.snapshot().retired_frames == 0
        assert [one.mfn for one in whole.service.snapshot().attention] == [broken]
        await whole.corrected(other)
        entry = await whole.page(other, Phase.RELOCATION)
        assert entry.domain == host.domain(pvh).identity
        await whole.until(lambda: "uncorrected" in whole.service.snapshot().jobs[0].detail)
        assert whole.migration.asked == []
        await asyncio.to_thread(host.destroy, pvh)
        await whole.page(broken, Phase.OFFLINED)
        await whole.page(other, Phase.OFFLINED)


# Pages that nothing is done about, and those that wait long.


@pytest.mark.parametrize("held", [True, False], ids=["on hold", "waiting"])
async def test_a_page_that_waits_is_seen_to_go_with_its_guest(
    tmp_path: Path, *, held: bool
) -> None:
    async with at_work(tmp_path, SLOW) as whole:
        mfn = whole.granted()
        await whole.corrected(mfn)
        await whole.page(mfn, Phase.WAITING)
        if held:
            whole.service.apply(replace(whole.service.policy, retire=DRY.retire))
            whole.service.retirer.ledger.look_again([mfn])
            whole.service.retirer.domain_ended()
            await whole.page(mfn, Phase.WAITING, reason="on_hold")
        await asyncio.to_thread(whole.small.host.destroy, whole.small.pv)
        await whole.page(mfn, Phase.OFFLINED)


async def test_a_reload_is_not_forgotten_because_xen_could_not_be_asked(tmp_path: Path) -> None:
    async with at_work(tmp_path) as whole:
        mfn = whole.small.host.frame_of(whole.small.pvh, 5)
        await whole.corrected(mfn)
        await whole.page(mfn, Phase.LEFT, reason="no_relocation")
        made = len(whole.xen.trace.of("conditions"))
        whole.xen.plan.append(Fault(method="conditions", nth=made + 1))
        target = RelocationPolicy(target="localhost", free_memory_reserve=0)
        whole.service.apply(replace(whole.service.policy, relocation=target))
        await whole.page(mfn, Phase.OFFLINED)


async def test_a_page_that_its_guest_was_damaged_off_is_kept_from_the_next_owner(
    tmp_path: Path,
) -> None:
    # Not marked before the exchange, and free since.
    async with at_work(tmp_path, LATER) as whole:
        host, ledger = whole.small.host, whole.service.retirer.ledger
        with host.lock:
            mfn = host.frames.allocate()
            host.frames.release(mfn, dirty=False)
        domain = host.domain(whole.small.pv)
        ledger.begin(mfn, Cause.CORRECTED, "2 corrected errors")
        ledger.hand_over(mfn, domain, Phase.EXCHANGE, marked=False)
        damaged = Damaged(old=mfn, new=whole.plain(), pfn=Pfn(7), detail="no memory in dom0")
        report = ExchangeReport(domain=domain.identity, results=(damaged,), blackout=None)
        whole.service.retirer.exchange_finished("x1", report)
        await whole.page(mfn, Phase.OFFLINED)


# Over a restart.


@pytest.mark.parametrize("before", [DRY, OFF], ids=["dry run", "disabled"])
async def test_errors_enough_retire_a_page_when_the_next_daemon_may(
    tmp_path: Path, before: Policy
) -> None:
    small = small_host(clock=SettableClock())
    async with at_work(tmp_path, before, small=small) as whole:
        mfn = whole.plain()
        await whole.corrected(mfn)
        assert whole.entry(mfn) is None
    async with at_work(tmp_path, small=small) as whole:
        await whole.page(mfn, Phase.OFFLINED)


async def test_pages_that_keep_a_cpu_awake_are_counted_over_a_restart(tmp_path: Path) -> None:
    small = small_host(clock=SettableClock())
    async with at_work(tmp_path, small=small) as whole:
        mfn = small.host.frame_of(small.pvh, 5)
        await whole.corrected(mfn)
        await whole.page(mfn, Phase.LEFT, reason="no_relocation")
        await asyncio.to_thread(small.host.destroy, small.pvh)
        await whole.page(mfn, Phase.OFFLINED)
        assert whole.service.snapshot().idle_scrub == 1
    async with at_work(tmp_path, small=small) as whole:
        assert whole.service.snapshot().idle_scrub == 1


# What is booked.


async def test_a_page_of_dom0_that_is_marked_already_is_booked_so(tmp_path: Path) -> None:
    async with at_work(tmp_path) as whole:
        mfn = whole.of_dom0()
        whole.small.host.offline(mfn)
        await whole.corrected(mfn)
        entry = await whole.page(mfn, Phase.LEFT, reason="dom0")
        assert entry.marked
        assert whole.service.snapshot().retired_frames == 1


async def test_a_page_whose_owner_is_ending_keeps_what_is_known_of_its_mark(
    tmp_path: Path,
) -> None:
    small = small_host(clock=SettableClock())
    mfn = small.host.frame_of(small.pv, small.host.pv(small.pv).layout.plain[0])
    small.host.offline(mfn)
    left = PageEntry(mfn=mfn, cause=Cause.CORRECTED, phase=Phase.WAITING, since=1.0, marked=True)
    small.host.crash(small.pv, "a fault of its own")
    async with at_work(tmp_path, small=small, earlier=[left]) as whole:
        entry = await whole.page(mfn, Phase.WAITING, reason="owner_ending")
        assert entry.marked


async def test_workers_that_need_a_restart_are_named_at_every_reload(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with at_work(tmp_path, exchanging(workers=1)) as whole:
        policy = whole.service.policy
        more = replace(policy, exchange=replace(policy.exchange, workers=3))
        for _ in range(2):
            whole.service.apply(more)
        named = [r for r in caplog.records if "exchange.workers" in r.getMessage()]
        assert len(named) == 2
        assert whole.service.policy.exchange.workers == 1
        assert ConditionCode.CONFIG_REJECTED not in {
            one.code for one in whole.service.snapshot().attention
        }
