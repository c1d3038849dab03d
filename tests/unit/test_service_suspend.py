"""Guests that cannot suspend themselves, as the assembled service meets them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from pgofflined.core.domains import DomainIdentity, ShutdownReason
from pgofflined.core.events import Event
from pgofflined.core.frames import Domid, Mfn
from pgofflined.core.offline import OfflineState
from pgofflined.core.policy import ExchangePolicy, Policy, RelocationPolicy
from pgofflined.core.relocation_outcomes import Migrated, MigrationOutcome
from pgofflined.core.suspending import SuspendSupport
from pgofflined.relocation import Relocator
from pgofflined.relocation.relocator import BreakOff
from pgofflined.service import Service
from pgofflined.sim.clock import WallClock
from pgofflined.sim.guests import Answer, SimulatedDomain, SuspendBehaviour
from pgofflined.sim.scenarios import DemoHost, demo_host
from pgofflined.sim.telemetry import SimulatedTelemetry
from pgofflined.store import Store

from .test_savewatch import service_of

QUICK = ExchangePolicy(retry_first=0.05, retry_last=0.05, attempts=1000)


class Entries(logging.Handler):
    """The entries of the journal, of whichever thread, for a test to wait for one."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[logging.LogRecord] = []
        self._changed = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def emit(self, record: logging.LogRecord) -> None:
        self._loop.call_soon_threadsafe(self._take, record)

    def _take(self, record: logging.LogRecord) -> None:
        self.seen.append(record)
        self._changed.set()

    def of(self, kind: Event) -> list[logging.LogRecord]:
        return [
            record
            for record in self.seen
            if getattr(record, "pgofflined_fields", {}).get("MESSAGE_ID") == kind.message_id
        ]

    async def until(self, kind: Event, count: int = 1) -> logging.LogRecord:
        while len(self.of(kind)) < count:
            self._changed.clear()
            await self._changed.wait()
        return self.of(kind)[count - 1]


class NoMigration:
    """In place of the toolstack; nothing may be asked of it."""

    async def migrate(self, *args: object) -> MigrationOutcome:
        raise AssertionError(args)

    async def save_and_restore(self, *args: object) -> MigrationOutcome:
        raise AssertionError(args)


class Here:
    """Migrates guests to this host, at once."""

    def __init__(self, demo: DemoHost) -> None:
        self._demo = demo

    async def migrate(
        self, domain: DomainIdentity, name: str, target: str, time_limit: float, off: BreakOff
    ) -> MigrationOutcome:
        del name, time_limit, off
        assert target == "localhost"
        self._demo.host.migrate_to_self(domain.domid)
        return Migrated()

    async def save_and_restore(self, *args: object) -> MigrationOutcome:
        raise AssertionError(args)


@dataclass
class Bench:
    service: Service
    demo: DemoHost
    entries: Entries
    domid: Domid
    policy: Policy
    suspended: list[ShutdownReason | None] = field(default_factory=list)

    @property
    def guest(self) -> SimulatedDomain:
        return self.demo.host.simulated(self.domid)

    def frame(self, which: int = 0) -> Mfn:
        layout = self.demo.host.pv(self.domid).layout
        return self.demo.host.frame_of(self.domid, layout.plain[which])

    def metric(self, name: str) -> float:
        text = generate_latest(self.service.metrics.registry).decode()
        [line] = [line for line in text.splitlines() if line.startswith(f"pgofflined_{name} ")]
        return float(line.split()[1])


@asynccontextmanager
async def bench_at(
    folder: Path,
    *,
    support: SuspendSupport,
    exchange: ExchangePolicy = QUICK,
    relocation: RelocationPolicy = RelocationPolicy(),  # noqa: B008 - it does not change
    demo: DemoHost | None = None,
    relocator: Relocator | None = None,
) -> AsyncIterator[Bench]:
    demo = demo or demo_host(clock=WallClock(speed=100.0), seed=1)
    # A service closes its source.
    demo = replace(demo, telemetry=SimulatedTelemetry())
    guest = next(one for one in demo.host.domains() if one.name == "web")
    policy = replace(Policy(), exchange=exchange, relocation=relocation)
    # It would crash, and the test with it.
    demo.host.simulated(guest.domid).behaviour = SuspendBehaviour(answer=Answer.CRASHES_READING)
    demo.host.simulated(guest.domid).suspend_support = support
    entries = Entries()
    logger = logging.getLogger("pgofflined")
    logger.addHandler(entries)
    before, level = logger.level, logging.INFO
    logger.setLevel(level)
    try:
        with closing(Store.open(folder / "state.db", "this")) as store:
            service = service_of(
                demo, folder, store, policy=policy, relocator=relocator or NoMigration()
            )
            stop = asyncio.Event()
            async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
                tasks.create_task(service.run(stop))
                await service.ready.wait()
                yield Bench(service, demo, entries, guest.domid, policy)
                stop.set()
    finally:
        logger.removeHandler(entries)
        logger.setLevel(before)


async def test_a_guest_that_announces_that_it_cannot_suspend_is_never_asked(tmp_path: Path) -> None:
    named = replace(QUICK, ask_unannounced=("web",))
    async with bench_at(tmp_path, support=SuspendSupport.DENIED, exchange=named) as bench:
        mfn = bench.frame()
        await bench.service.offline(mfn)
        told = await bench.entries.until(Event.PAGE_LEFT)
        assert "control/feature-suspend is 0" in told.getMessage()
        assert bench.guest.shutdown is None
        entry = bench.service.retirer.ledger.book.get(mfn)
        assert entry is not None
        assert (entry.reason, entry.marked) == ("no_suspend_support", True)


async def test_a_silent_guest_is_asked_when_a_reload_names_it_and_not_before(
    tmp_path: Path,
) -> None:
    async with bench_at(tmp_path, support=SuspendSupport.SILENT) as bench:
        mfn = bench.frame()
        await bench.service.offline(mfn)
        # Again and again: it may be starting.
        told = await bench.entries.until(Event.PAGE_REFUSED, count=3)
        for words in ("control/feature-suspend", "Mini-OS", "4.10", "exchange.ask_unannounced"):
            assert words in told.getMessage()
        assert bench.guest.shutdown is None
        bench.guest.behaviour = SuspendBehaviour()
        exchange = replace(bench.policy.exchange, ask_unannounced=("we?",))
        bench.service.apply(replace(bench.policy, exchange=exchange))
        await bench.entries.until(Event.PAGE_OFFLINED)
        assert bench.demo.host.query(mfn) is OfflineState.OFFLINED
        assert bench.guest.shutdown is None


async def test_a_guest_that_has_started_meanwhile_is_asked(tmp_path: Path) -> None:
    async with bench_at(tmp_path, support=SuspendSupport.SILENT) as bench:
        await bench.service.offline(bench.frame())
        await bench.entries.until(Event.PAGE_REFUSED)
        bench.guest.behaviour = SuspendBehaviour()
        bench.guest.suspend_support = SuspendSupport.ANNOUNCED
        await bench.entries.until(Event.PAGE_OFFLINED)


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        (Answer.CRASHES_READING, "crashed"),
        (Answer.CRASHES, "crashed"),
        (Answer.POWERS_OFF, "powered itself off"),
        (Answer.DIES, "is gone"),
    ],
)
async def test_a_guest_that_ends_after_our_request_is_our_doing_and_is_not_asked_again(
    tmp_path: Path, answer: Answer, what: str
) -> None:
    async with bench_at(tmp_path, support=SuspendSupport.ANNOUNCED) as bench:
        bench.guest.behaviour = SuspendBehaviour(answer=answer)
        uuid, domid = bench.guest.uuid, bench.domid
        assert bench.metric("guests_ended_total") == 0
        await bench.service.offline(bench.frame())
        told = await bench.entries.until(Event.GUEST_ENDED)
        assert told.levelno == logging.CRITICAL
        assert what in told.getMessage()
        assert "asked it to suspend itself" in told.getMessage()
        assert vars(told)["pgofflined_fields"]["DOMID"] == str(domid)
        await bench.entries.until(Event.EXCHANGE_DONE)
        assert bench.metric("guests_ended_total") == 1
        assert bench.metric('jobs_total{kind="exchange",outcome="failed"}') == 1

        # Its toolstack starts it again, as it was.
        if domid in bench.demo.host.by_domid:
            bench.demo.host.destroy(domid)
        again = bench.demo.host.add_pv()
        bench.domid = again
        bench.guest.uuid = uuid
        bench.guest.behaviour = SuspendBehaviour(answer=answer)
        mfn = bench.frame()
        await bench.service.offline(mfn)
        told = await bench.entries.until(Event.PAGE_LEFT)
        assert "has ended before when it was asked" in told.getMessage()
        assert bench.guest.shutdown is None
        assert len(bench.entries.of(Event.GUEST_ENDED)) == 1


async def test_a_guest_that_crashes_some_time_after_our_request_is_our_doing(
    tmp_path: Path,
) -> None:
    async with bench_at(tmp_path, support=SuspendSupport.ANNOUNCED) as bench:
        bench.guest.behaviour = SuspendBehaviour(answer=Answer.STALLS)
        mfn = bench.frame()
        await bench.service.offline(mfn)
        await bench.entries.until(Event.EXCHANGE_DONE)
        assert bench.entries.of(Event.GUEST_ENDED) == []
        bench.demo.host.crash(bench.domid, "on the way to its suspend")
        told = await bench.entries.until(Event.GUEST_ENDED)
        assert told.levelno == logging.CRITICAL
        assert "has crashed since pgofflined asked it" in told.getMessage()
        while bench.metric("guests_ended_total") == 0:  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(0.001)
        codes = [one.code.value for one in bench.service.snapshot().attention]
        assert "guest_ended" in codes


@pytest.mark.parametrize("support", [SuspendSupport.SILENT, SuspendSupport.DENIED])
async def test_a_pvh_guest_that_may_crash_when_asked_is_not_migrated(
    tmp_path: Path, support: SuspendSupport
) -> None:
    here = RelocationPolicy(target="localhost")
    async with bench_at(tmp_path, support=SuspendSupport.ANNOUNCED, relocation=here) as bench:
        host, pvh = bench.demo.host, bench.demo.pvh
        host.simulated(pvh).suspend_support = support
        mfn = host.frame_of(pvh, 5)
        await bench.service.offline(mfn)
        ends = support is SuspendSupport.DENIED
        told = await bench.entries.until(Event.PAGE_LEFT if ends else Event.MIGRATION_DEFERRED)
        assert "control/feature-suspend" in told.getMessage()
        assert host.query(mfn) is OfflineState.OFFLINE_PENDING


async def test_a_guest_that_we_have_moved_is_moved_again_although_it_is_silent_since(
    tmp_path: Path,
) -> None:
    here = RelocationPolicy(target="localhost", free_memory_reserve=0)
    demo = demo_host(clock=WallClock(speed=100.0), seed=1)

    async def move() -> None:
        async with bench_at(
            tmp_path,
            support=SuspendSupport.ANNOUNCED,
            relocation=here,
            demo=demo,
            relocator=Here(demo),
        ) as bench:
            for _ in range(2):
                mail = next(one for one in demo.host.domains() if one.name == "mail")
                mfn = demo.host.frame_of(mail.domid, 5)
                before = len(bench.entries.of(Event.PAGE_OFFLINED))
                await bench.service.offline(mfn)
                await bench.entries.until(Event.PAGE_OFFLINED, before + 1)
                assert demo.host.query(mfn) is OfflineState.OFFLINED

    await move()
    mail = next(one for one in demo.host.domains() if one.name == "mail")
    assert demo.host.suspend_support(mail.domid) is SuspendSupport.SILENT
    # Another daemon, with what the first one has stored.
    await move()
    moved = next(one for one in demo.host.domains() if one.name == "mail")
    assert moved.identity != mail.identity
    # What was moved by somebody else has to be named.
    other = demo.host.migrate_to_self(moved.domid)
    async with bench_at(
        tmp_path, support=SuspendSupport.ANNOUNCED, relocation=here, demo=demo
    ) as bench:
        await bench.service.offline(demo.host.frame_of(other, 5))
        told = await bench.entries.until(Event.MIGRATION_DEFERRED)
        assert "was migrated or restored since it booted" in told.getMessage()


async def test_a_silent_pvh_guest_is_migrated_when_a_reload_names_it(tmp_path: Path) -> None:
    here = RelocationPolicy(target="localhost", free_memory_reserve=0, retry_first=3600.0)
    demo = demo_host(clock=WallClock(speed=100.0), seed=1)
    demo.host.simulated(demo.pvh).suspend_support = SuspendSupport.SILENT
    async with bench_at(
        tmp_path,
        support=SuspendSupport.ANNOUNCED,
        relocation=here,
        demo=demo,
        relocator=Here(demo),
    ) as bench:
        mfn = demo.host.frame_of(demo.pvh, 5)
        await bench.service.offline(mfn)
        await bench.entries.until(Event.MIGRATION_DEFERRED)
        # At once: a policy that changes is no time to wait for.
        exchange = replace(bench.policy.exchange, ask_unannounced=("mail",))
        bench.service.apply(replace(bench.policy, exchange=exchange))
        await bench.entries.until(Event.PAGE_OFFLINED)
        assert demo.host.query(mfn) is OfflineState.OFFLINED
