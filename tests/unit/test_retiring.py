from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace

import numpy as np

from pgofflined.aftercare import CareTimes
from pgofflined.core.book import Cause, PageEntry, Phase
from pgofflined.core.domains import DomainIdentity
from pgofflined.core.frames import Domid, Mfn
from pgofflined.core.offline import OfflineState
from pgofflined.core.outcomes import ExchangeReport, Refusal, RefusalReason
from pgofflined.core.policy import (
    Backoff,
    DomainPolicy,
    ExchangePolicy,
    Marking,
    Policy,
    RelocationPolicy,
    RetirePolicy,
)
from pgofflined.core.relocation_outcomes import NotRelocated, RelocationReason
from pgofflined.core.xenversion import XenVersion
from pgofflined.jobs import ExchangePool
from pgofflined.ledger import Ledger
from pgofflined.ports import Clock, SuspendLimits
from pgofflined.retiring import Retirer
from pgofflined.sim.clock import WallClock
from pgofflined.sim.faults import Fault, FaultyHypervisor, Moment
from pgofflined.sim.guests import Answer, SuspendBehaviour
from pgofflined.sim.host import HostSpec
from pgofflined.sim.journal import MemoryJournal
from pgofflined.sim.layout import PvSpec
from pgofflined.sim.scenarios import SmallHost, small_host
from pgofflined.uncorrected import UncorrectedErrors

QUICK = Policy(
    exchange=ExchangePolicy(
        retry_first=0.05, retry_last=0.05, attempts=2, acknowledge_timeout=0.2, suspend_timeout=0.2
    )
)


class Pages:
    """A store that remembers what it was given, and tells who waits for a page's phase."""

    def __init__(self) -> None:
        self.entries: dict[Mfn, PageEntry] = {}
        self.meta: dict[str, str] = {}
        self._changed = asyncio.Event()

    def put_page(self, entry: PageEntry) -> None:
        self.entries[entry.mfn] = entry
        self._changed.set()

    def remove_page(self, mfn: Mfn) -> None:
        del self.entries[mfn]

    def get_meta(self, key: str) -> str | None:
        return self.meta.get(key)

    def set_meta(self, key: str, value: str) -> None:
        self.meta[key] = value

    async def changed(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    async def until(self, mfn: Mfn, *phases: Phase) -> PageEntry:
        async with asyncio.timeout(30):
            while mfn not in self.entries or self.entries[mfn].phase not in phases:
                await self.changed()
        return self.entries[mfn]


class Scene:
    """A simulated host, and a retirer with its pool at work on it."""

    def __init__(self, small: SmallHost, policy: Policy) -> None:
        self.small = small
        self.pages = Pages()
        self.resumed = threading.Event()
        clock: Clock = small.host.clock
        xen = FaultyHypervisor(
            small.host,
            Fault(method="resume", moment=Moment.AFTER, times=10**6, act=self.resumed.set),
        )
        self.retirer = Retirer(
            xen=xen,
            journal=MemoryJournal(),
            clock=clock,
            policy=policy,
            ledger=Ledger(self.pages, clock),
            errors=UncorrectedErrors(self.pages),
            times=CareTimes(interval=0.05),
            soon=Backoff(first=0.01, last=0.02),
        )
        self.reports: list[ExchangeReport] = []
        self.pool = ExchangePool(
            self.retirer.exchanging.run,
            self._finished,
            clock=clock,
            workers=1,
            max_pages=policy.exchange.max_pages_per_suspend,
            queue_limit=policy.exchange.max_queued,
        )
        self.retirer.connect(self.pool, None)

    def pv_frame(self, which: int = 0) -> Mfn:
        layout = self.small.host.pv(self.small.pv).layout
        return self.small.host.frame_of(self.small.pv, layout.plain[which])

    def _finished(self, job: str, report: ExchangeReport) -> None:
        self.reports.append(report)
        self.retirer.exchange_finished(job, report)


@asynccontextmanager
async def at_work(
    policy: Policy = QUICK, spec: HostSpec | None = None, *, workers: bool = True
) -> AsyncIterator[Scene]:
    """Without ``workers`` every exchange waits in the queue."""
    scene = Scene(small_host(spec, clock=WallClock(speed=100.0)), policy)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(scene.retirer.run())
        if workers:
            tasks.create_task(scene.pool.run())
        yield scene
        scene.retirer.stop()
        scene.pool.stop()


async def test_a_page_of_a_pv_guest_ends_offlined() -> None:
    async with at_work() as scene:
        mfn = scene.pv_frame()
        scene.retirer.take(mfn, Cause.CORRECTED, "two errors")
        entry = await scene.pages.until(mfn, Phase.OFFLINED)
        assert entry.marked
        assert entry.domain_name == "pv"
        assert scene.small.host.query(mfn) is OfflineState.OFFLINED


async def test_a_page_that_is_taken_out_before_it_is_scrubbed_keeps_an_idle_cpu_searching() -> None:
    async with at_work() as scene:
        mfn = scene.pv_frame()
        scene.retirer.take(mfn, Cause.CORRECTED, "two errors")
        await scene.pages.until(mfn, Phase.OFFLINED)
        await asyncio.to_thread(scene.small.host.clock.wait, 10)
        assert scene.small.host.idle_scrub_spinning
        assert scene.retirer.consequences.idle_scrub == 1


LATER = replace(QUICK, exchange=replace(QUICK.exchange, mark=Marking.AFTER_SCRUB, scrub_wait=0.1))


async def test_a_page_that_is_marked_after_it_was_scrubbed_keeps_no_cpu_searching() -> None:
    async with at_work(LATER, HostSpec(scrub_seconds=0.02)) as scene:
        mfn = scene.pv_frame()
        scene.retirer.take(mfn, Cause.CORRECTED, "two errors")
        entry = await scene.pages.until(mfn, Phase.OFFLINED)
        assert entry.marked
        assert scene.small.host.query(mfn) is OfflineState.OFFLINED
        assert not scene.small.host.idle_scrub_spinning
        assert scene.retirer.consequences.idle_scrub == 0
        assert [len(report.results) for report in scene.reports] == [1]


async def test_a_page_that_is_handed_out_again_meanwhile_is_moved_from_its_next_owner() -> None:
    async with at_work(LATER) as scene:
        host = scene.small.host
        mfn = scene.pv_frame()
        scene.retirer.take(mfn, Cause.CORRECTED, "two errors")
        await scene.pages.until(mfn, Phase.WAITING)
        # The next guest takes the highest free frames, and among them the bad one.
        heir = host.add_pv(PvSpec(name="heir", pages=2048))
        assert int(host.frames.owner[mfn]) == heir
        await scene.pages.until(mfn, Phase.OFFLINED)
        assert host.query(mfn) is OfflineState.OFFLINED
        host.check_invariants()


async def test_a_refused_page_that_was_to_be_marked_later_is_marked_when_it_is_left() -> None:
    async with at_work(LATER) as scene:
        mfn = scene.pv_frame()
        scene.small.host.hold(scene.small.pv, int(scene.small.host.m2p(mfn) or 0), why="dom0")
        scene.retirer.take(mfn, Cause.CORRECTED, "two errors")
        entry = await scene.pages.until(mfn, Phase.LEFT)
        assert entry.marked
        assert scene.small.host.query(mfn) is OfflineState.OFFLINE_PENDING


UNFIXED = HostSpec(version=XenVersion(4, 17, 7))


def frame_that_a_dying_guest_joins(scene: Scene) -> Mfn:
    """Its guest owns the whole block of four that it begins, and frees it from the top."""
    host, pv = scene.small.host, scene.small.pv
    own = set(host.pv(pv).mfns().tolist())
    plain = [host.frame_of(pv, pfn) for pfn in host.pv(pv).layout.plain]
    return next(m for m in plain if not m % 4 and {m + 1, m + 2, m + 3} <= own)


async def test_on_an_unfixed_xen_a_guest_may_be_destroyed_while_its_page_waits_its_turn() -> None:
    async with at_work(spec=UNFIXED, workers=False) as scene:
        mfn = frame_that_a_dying_guest_joins(scene)
        scene.retirer.take(mfn, Cause.CORRECTED, "two errors")
        await scene.pages.until(mfn, Phase.EXCHANGE)
        scene.small.host.destroy(scene.small.pv)
        assert scene.small.host.corrupted is None


async def test_on_an_unfixed_xen_a_guest_may_be_destroyed_while_its_page_waits_for_a_retry() -> (
    None
):
    policy = replace(QUICK, exchange=replace(QUICK.exchange, attempts=100, retry_first=1000.0))
    async with at_work(policy, UNFIXED) as scene:
        host, pv = scene.small.host, scene.small.pv
        mfn = frame_that_a_dying_guest_joins(scene)
        host.hold(pv, int(host.m2p(mfn) or 0), why="dom0")
        scene.retirer.take(mfn, Cause.CORRECTED, "two errors")
        await scene.pages.until(mfn, Phase.WAITING)
        assert scene.reports[0].blackout is not None
        host.destroy(pv)
        for hold in tuple(host.lasting_holds):
            host.release_hold(pv, hold)
        assert host.corrupted is None


async def test_on_an_unfixed_xen_a_guest_may_be_destroyed_after_it_did_not_suspend() -> None:
    async with at_work(spec=UNFIXED) as scene:
        host, pv = scene.small.host, scene.small.pv
        mfn = frame_that_a_dying_guest_joins(scene)
        dies = SuspendBehaviour(answer=Answer.DIES)
        host.simulated(pv).behaviour = dies
        scene.retirer.take(mfn, Cause.CORRECTED, "two errors")
        while not scene.reports:
            await scene.pages.changed()
        assert host.corrupted is None


async def test_on_an_unfixed_xen_no_page_has_a_mark_when_the_daemon_has_stopped() -> None:
    async with at_work(spec=UNFIXED, workers=False) as scene:
        mfns = [scene.pv_frame(which) for which in range(12)]
        for mfn in mfns:
            scene.retirer.take(mfn, Cause.CORRECTED, "two errors")
        for mfn in mfns:
            await scene.pages.until(mfn, Phase.EXCHANGE, Phase.LEFT)
    states = {scene.small.host.query(mfn) for mfn in mfns}
    assert states == {OfflineState.ONLINE}


async def test_on_an_unfixed_xen_pages_are_marked_in_the_exchange_whatever_the_policy_says() -> (
    None
):
    async with at_work(LATER, UNFIXED) as scene:
        host, pv = scene.small.host, scene.small.pv
        plain = [host.frame_of(pv, pfn) for pfn in host.pv(pv).layout.plain]
        mfn = next(m for m in plain if host.m2p(Mfn(m ^ 1)) is not None)
        scene.retirer.take(mfn, Cause.CORRECTED, "two errors")
        await scene.pages.until(mfn, Phase.OFFLINED)
        assert host.corrupted is None


async def test_pages_that_come_together_go_in_one_suspend() -> None:
    async with at_work() as scene:
        mfns = [scene.pv_frame(which) for which in range(12)]
        for mfn in mfns:
            scene.retirer.take(mfn, Cause.CORRECTED, "two errors")
        for mfn in mfns:
            await scene.pages.until(mfn, Phase.OFFLINED)
        assert [len(report.results) for report in scene.reports] == [12]


async def test_a_refused_page_is_tried_again_and_then_left_pending() -> None:
    async with at_work() as scene:
        mfn = scene.pv_frame()
        scene.small.host.hold(scene.small.pv, int(scene.small.host.m2p(mfn) or 0), why="dom0")
        scene.retirer.take(mfn, Cause.CORRECTED, "two errors")
        entry = await scene.pages.until(mfn, Phase.LEFT)
        assert entry.reason == "other_references"
        assert entry.attempts == 1
        assert len(scene.reports) == 2
        assert scene.small.host.query(mfn) is OfflineState.OFFLINE_PENDING


async def test_a_page_whose_reference_goes_away_is_moved_at_the_next_try() -> None:
    policy = replace(QUICK, exchange=replace(QUICK.exchange, attempts=100))
    async with at_work(policy) as scene:
        host, pv = scene.small.host, scene.small.pv
        mfn = scene.pv_frame()
        hold = host.hold(pv, int(host.m2p(mfn) or 0), why="dom0")
        scene.retirer.take(mfn, Cause.CORRECTED, "two errors")
        await scene.pages.until(mfn, Phase.WAITING)
        host.release_hold(pv, hold)
        await scene.pages.until(mfn, Phase.OFFLINED)


async def test_on_an_unfixed_xen_the_mark_of_a_refused_page_is_taken_back() -> None:
    async with at_work(spec=UNFIXED) as scene:
        host, pv = scene.small.host, scene.small.pv
        frames = [Mfn(int(m)) for m in host.pv(pv).mfns() if m < host.frames.count]
        plain = {host.frame_of(pv, pfn) for pfn in host.pv(pv).layout.plain}
        mfn = next(m for m in frames if m in plain and host.m2p(Mfn(m ^ 1)) is not None)
        host.hold(pv, int(host.m2p(mfn) or 0), why="dom0")
        scene.retirer.take(mfn, Cause.CORRECTED, "two errors")
        entry = await scene.pages.until(mfn, Phase.LEFT)
        assert not entry.marked
        assert host.query(mfn) is OfflineState.ONLINE
        assert host.corrupted is None


async def test_a_poisoned_page_is_never_copied() -> None:
    async with at_work() as scene:
        mfn = scene.pv_frame()
        scene.small.host.poison(mfn)
        scene.retirer.take_poisoned(mfn, "an uncorrected error")
        entry = await scene.pages.until(mfn, Phase.LEFT)
        assert entry.reason == "uncorrected"
        assert scene.reports == []


async def test_without_a_migration_target_a_pvh_page_stays_pending_with_the_reason() -> None:
    async with at_work() as scene:
        mfn = scene.small.host.frame_of(scene.small.pvh, 5)
        scene.retirer.take(mfn, Cause.CORRECTED, "two errors")
        entry = await scene.pages.until(mfn, Phase.LEFT)
        assert (entry.reason, entry.marked) == ("no_relocation", True)
        assert "relocation.target" in entry.detail


async def test_a_denied_domain_is_left_alone() -> None:
    async with at_work(replace(QUICK, domains=DomainPolicy(deny=("pv",)))) as scene:
        mfn = scene.pv_frame()
        scene.retirer.take(mfn, Cause.CORRECTED, "two errors")
        entry = await scene.pages.until(mfn, Phase.LEFT)
        assert (entry.reason, entry.marked) == ("denied", False)
        assert scene.small.host.query(mfn) is OfflineState.ONLINE


async def test_a_guest_that_ends_meanwhile_leaves_its_page_offlined() -> None:
    async with at_work() as scene:
        mfn = scene.pv_frame()
        scene.small.host.simulated(scene.small.pv).behaviour = SuspendBehaviour(answer=Answer.DIES)
        scene.retirer.take(mfn, Cause.CORRECTED, "two errors")
        await scene.pages.until(mfn, Phase.WAITING, Phase.OFFLINED)
        assert scene.small.host.query(mfn) is OfflineState.OFFLINED


async def test_a_guest_that_suspends_after_we_gave_up_is_resumed() -> None:
    async with at_work() as scene:
        host, pv = scene.small.host, scene.small.pv
        host.simulated(pv).behaviour = SuspendBehaviour(suspend_after=0.4)
        mfn = scene.pv_frame()
        scene.retirer.take(mfn, Cause.CORRECTED, "two errors")
        await scene.pages.until(mfn, Phase.WAITING)
        assert scene.reports[0].may_suspend_late
        assert await asyncio.to_thread(scene.resumed.wait, 30)
        assert host.domain(pv).shutdown is None


async def test_what_an_earlier_run_left_unfinished_is_looked_at_anew() -> None:
    small = small_host(clock=WallClock(speed=100.0))
    mfn = small.host.frame_of(small.pv, small.host.pv(small.pv).layout.plain[0])
    small.host.offline(mfn)
    left = PageEntry(
        mfn=mfn,
        cause=Cause.CORRECTED,
        phase=Phase.EXCHANGE,
        since=1.0,
        marked=True,
        domain=DomainIdentity(Domid(77), small.host.domain(small.pv).uuid),
    )
    scene = Scene(small, QUICK)
    scene.retirer.ledger.book.put(left)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(scene.retirer.run())
        tasks.create_task(scene.pool.run())
        entry = await scene.pages.until(mfn, Phase.OFFLINED)
        scene.retirer.stop()
        scene.pool.stop()
    assert entry.since == 1.0


class Moves:
    """Takes guests to be saved, and remembers them."""

    def __init__(self, *, has_room: bool = True) -> None:
        self.taken: list[tuple[int, tuple[int, ...], bool]] = []
        self._has_room = has_room

    def submit(
        self, domain: DomainIdentity, name: str, mfns: Iterable[Mfn], *, by_saving: bool = False
    ) -> bool:
        assert name == "pv"
        if self._has_room:
            self.taken.append((domain.domid, tuple(mfns), by_saving))
        return self._has_room


SAVING = replace(QUICK, relocation=RelocationPolicy(save_restore=True))


def granted_frame(scene: Scene) -> Mfn:
    mfn = scene.pv_frame()
    pfn = scene.small.host.m2p(mfn)
    assert pfn is not None
    scene.small.host.grant(scene.small.pv, pfn)
    return mfn


async def test_a_page_that_cannot_be_exchanged_has_its_guest_saved_after_the_last_try() -> None:
    async with at_work(SAVING) as scene:
        moves = Moves()
        scene.retirer.connect(scene.pool, moves)
        mfn = granted_frame(scene)
        scene.retirer.take(mfn, Cause.CORRECTED, "two errors")
        await scene.pages.until(mfn, Phase.RELOCATION)
        assert moves.taken == [(scene.small.pv, (mfn,), True)]
        assert len(scene.reports) == QUICK.exchange.attempts
        assert scene.small.host.query(mfn) is OfflineState.OFFLINE_PENDING
        outcome = NotRelocated(
            domain=scene.small.host.domain(scene.small.pv).identity,
            mfns=frozenset({mfn}),
            offlined=frozenset(),
            reason=RelocationReason.GUEST_STUCK,
            detail="look",
            attempts=1,
            stuck="look",
        )
        scene.small.host.pause(scene.small.pv)
        scene.retirer.relocation_finished(outcome.domain, outcome)
        assert (await scene.pages.until(mfn, Phase.LEFT)).reason == "guest_stuck"
        assert [one.text for one in scene.retirer.in_doubt.stuck.values()] == ["look"]
        await asyncio.to_thread(scene.retirer.aftercare.look)
        assert scene.small.host.domain(scene.small.pv).paused, "that is for a person to end"
        scene.small.host.unpause(scene.small.pv)
        await asyncio.to_thread(scene.retirer.aftercare.look)
        assert not scene.retirer.aftercare


async def test_a_guest_that_follows_the_request_of_a_save_that_failed_is_resumed() -> None:
    async with at_work() as scene:
        domain = scene.small.host.domain(scene.small.pv).identity
        scene.retirer.asked_in_vain(domain)
        # No exchange may suspend it meanwhile, and be resumed in its middle.
        [refusal] = scene.retirer.exchanging.run(domain, (Mfn(1),)).results
        assert isinstance(refusal, Refusal)
        assert refusal.reason is RefusalReason.DOMAIN_BUSY
        await asyncio.to_thread(scene.small.host.suspend, scene.small.pv, SuspendLimits())
        assert await asyncio.to_thread(scene.resumed.wait, 30)
        assert scene.small.host.domain(scene.small.pv).shutdown is None


async def test_a_guest_is_not_saved_earlier_because_its_page_had_to_wait_for_xen() -> None:
    policy = replace(SAVING, exchange=replace(SAVING.exchange, attempts=10, retry_first=60.0))
    async with at_work(policy) as scene:
        moves = Moves()
        scene.retirer.connect(scene.pool, moves)
        mfn = granted_frame(scene)
        scene.retirer.take(mfn, Cause.CORRECTED, "two errors")
        await scene.pages.until(mfn, Phase.EXCHANGE)
        for _ in range(20):
            scene.retirer.ledger.wait(mfn, Backoff(first=60, last=60), "cannot_ask_xen", "no")
        while not scene.reports:
            await scene.pages.changed()
        entry = await scene.pages.until(mfn, Phase.WAITING)
        assert (entry.reason, entry.attempts, moves.taken) == ("granted", 1, [])


async def test_a_guest_is_not_saved_where_the_policy_has_no_such_step() -> None:
    async with at_work(QUICK) as scene:
        moves = Moves()
        scene.retirer.connect(scene.pool, moves)
        mfn = granted_frame(scene)
        scene.retirer.take(mfn, Cause.CORRECTED, "two errors")
        entry = await scene.pages.until(mfn, Phase.LEFT)
        assert entry.reason == "granted"
        assert moves.taken == []


async def test_a_guest_that_may_not_be_touched_any_more_is_not_saved() -> None:
    async with at_work(SAVING) as scene:
        moves = Moves()
        scene.retirer.connect(scene.pool, moves)
        mfn = granted_frame(scene)
        scene.retirer.take(mfn, Cause.CORRECTED, "two errors")
        await scene.pages.until(mfn, Phase.EXCHANGE)
        scene.retirer.policy = replace(SAVING, domains=DomainPolicy(deny=("pv",)))
        entry = await scene.pages.until(mfn, Phase.LEFT)
        assert "domains.deny" in entry.detail
        assert moves.taken == []


async def test_a_page_waits_where_no_more_guests_can_be_queued_to_be_saved() -> None:
    async with at_work(SAVING) as scene:
        moves = Moves(has_room=False)
        scene.retirer.connect(scene.pool, moves)
        mfn = granted_frame(scene)
        scene.retirer.take(mfn, Cause.CORRECTED, "two errors")
        async with asyncio.timeout(30):
            while (await scene.pages.until(mfn, Phase.WAITING)).reason != "queue_full":
                await scene.pages.changed()


def test_a_guest_is_saved_or_migrated_as_the_policy_says_at_that_moment() -> None:
    scene = Scene(small_host(), QUICK)
    domain = scene.small.host.domain(scene.small.pvh)
    assert scene.retirer.denial(domain) is None
    for changed, told in (
        (replace(QUICK, domains=DomainPolicy(deny=(domain.name,))), "domains.deny"),
        (replace(QUICK, retire=RetirePolicy(dry_run=True)), "retire.dry_run"),
        (replace(QUICK, retire=RetirePolicy(enabled=False)), "retire.enabled"),
    ):
        scene.retirer.policy = changed
        assert told in str(scene.retirer.denial(domain))


async def test_a_page_that_xen_goes_on_to_call_anonymous_is_xens() -> None:
    async with at_work() as scene:
        frames = scene.small.host.frames
        # Allocated without an owner, as the tables of a guest's second-level address translation.
        mfn = frames.allocate()
        frames.refs[mfn] = 1
        scene.retirer.take(mfn, Cause.CORRECTED, "two errors")
        entry = await scene.pages.until(mfn, Phase.LEFT)
        assert (entry.reason, entry.marked) == ("xen", True)
        assert "Xen's own" in entry.detail
        assert scene.small.host.query(mfn) is OfflineState.OFFLINE_PENDING


async def test_a_page_that_is_just_being_handed_out_is_not_taken_for_xens() -> None:
    async with at_work() as scene:
        host = scene.small.host
        mfn = host.frames.allocate()
        host.frames.refs[mfn] = 1
        scene.retirer.take(mfn, Cause.CORRECTED, "two errors")
        await scene.pages.until(mfn, Phase.WAITING)
        host.frames.assign(np.array([mfn], dtype=np.uint64), scene.small.pvh)
        entry = await scene.pages.until(mfn, Phase.LEFT)
        assert entry.reason == "no_relocation"
