from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from errno import EBUSY, EEXIST, ENOENT
from typing import NoReturn

import pytest

from pgofflined.core.errors import PortError, SourceUnavailable
from pgofflined.core.frames import Domid, Maddr, Mfn
from pgofflined.core.machine import CpuVendor, Machine
from pgofflined.core.policy import Backoff
from pgofflined.core.reports import CorrectedPageError, HypervisorActed, Sighting
from pgofflined.core.telemetry import Flaw
from pgofflined.mce_listener import (
    IntakeCounters,
    MceListener,
    SourceChoice,
    choose_source,
    keep_source,
)
from pgofflined.ports import RecordFormat, TelemetrySource
from pgofflined.sim.telemetry import SimulatedTelemetry
from tests.unit.mca_records import (
    VAL,
    BankError,
    bank_entry,
    global_entry,
    mc_info,
    mc_info_of,
    xen_mce_of,
)
from tests.unit.pipe_source import PipeSource, StuckSource

MACHINE = Machine(vendor=CpuVendor.INTEL, family=6, physical_bits=46, max_mfn=Mfn(0xFFFFF))
ERROR = BankError()
EPOCH = 1_700_000_000.0


@dataclass
class SetClock:
    """A clock that tests set."""

    time: float = EPOCH
    uptime: float = 0.0

    def now(self) -> float:
        return self.time

    def monotonic(self) -> float:
        return self.uptime

    def wait(self, seconds: float) -> None:
        self.uptime += seconds


@dataclass
class Intake:
    """A listener's surroundings."""

    counters: IntakeCounters = field(default_factory=IntakeCounters)
    clock: SetClock = field(default_factory=SetClock)
    queue: asyncio.Queue[Sighting] = field(default_factory=lambda: asyncio.Queue(100))

    def listener(self, source: TelemetrySource) -> MceListener:
        return MceListener(
            source,
            machine=MACHINE,
            clock=self.clock,
            deliver=self.queue.put,
            counters=self.counters,
        )

    async def next(self) -> Sighting:
        return await asyncio.wait_for(self.queue.get(), timeout=5)


@pytest.fixture
def source() -> Iterator[PipeSource]:
    pipe = PipeSource()
    yield pipe
    pipe.close()


@asynccontextmanager
async def listening(intake: Intake, source: TelemetrySource) -> AsyncIterator[None]:
    task = asyncio.create_task(intake.listener(source).run())
    try:
        yield
    finally:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def turns_of_the_loop(count: int) -> None:
    """Let everything that is ready run, so often."""
    for _ in range(count):
        await asyncio.sleep(0)


async def test_record_becomes_a_report_stamped_by_our_clock(source: PipeSource) -> None:
    intake = Intake()
    async with listening(intake, source):
        source.put([mc_info_of(ERROR)])
        sighting = await intake.next()
    assert (sighting.when, sighting.source) == (EPOCH, "native")
    assert isinstance(sighting.report, CorrectedPageError)
    assert sighting.report.mfn == 0x12345
    assert intake.counters.reports == {("corrected", "native"): 1}
    assert intake.counters.last_record == EPOCH


async def test_records_from_before_the_start_are_read_without_an_event(
    source: PipeSource,
) -> None:
    source.put([mc_info_of(ERROR)])
    source.read_event_away()
    intake = Intake()
    async with listening(intake, source):
        await intake.next()


async def test_nothing_is_read_while_nothing_comes(source: PipeSource) -> None:
    intake = Intake()
    async with listening(intake, source):
        source.put([mc_info_of(ERROR)])
        await intake.next()
        settled = source.reads
        await turns_of_the_loop(50)
        assert source.reads == settled
        source.put([mc_info_of(ERROR)])
        await intake.next()
        assert source.reads == settled + 1


async def test_reports_keep_their_order(source: PipeSource) -> None:
    intake = Intake()
    async with listening(intake, source):
        source.put(mc_info_of(BankError(addr=number << 12)) for number in range(20))
        seen = [(await intake.next()).report for _ in range(20)]
    assert [getattr(report, "mfn", None) for report in seen] == list(range(20))


async def test_full_queue_stops_the_reading_and_loses_nothing(source: PipeSource) -> None:
    intake = Intake(queue=asyncio.Queue(2))
    async with listening(intake, source):
        source.put(mc_info_of(BankError(addr=number << 12)) for number in range(5))
        await intake.next()
        before = source.reads
        source.put([mc_info_of(BankError(addr=5 << 12))])
        await turns_of_the_loop(50)
        assert source.reads == before
        seen = [(await intake.next()).report for _ in range(5)]
    assert [getattr(report, "mfn", None) for report in seen] == [1, 2, 3, 4, 5]


async def test_lost_and_incomplete_records_are_counted_and_told(
    source: PipeSource, caplog: pytest.LogCaptureFixture
) -> None:
    intake = Intake()
    async with listening(intake, source):
        source.put(lost=3)
        source.put([mc_info(global_entry(ERROR), bank_entry(ERROR), flags=1)], lost=1)
        await intake.next()
    assert intake.counters.lost == {"native": 4}
    assert intake.counters.incomplete == 1
    assert intake.counters.lost_by_place() == {
        "native": 4,
        "incomplete": 1,
        "hardware": 0,
        "undecodable": 0,
    }
    assert any("has lost" in message for message in caplog.messages)


async def test_garbage_is_counted_and_what_follows_it_is_read(
    source: PipeSource, caplog: pytest.LogCaptureFixture
) -> None:
    intake = Intake()
    async with listening(intake, source):
        source.put([b"", b"\xff" * 768, b"x" * 5000, mc_info_of(ERROR)])
        assert isinstance((await intake.next()).report, CorrectedPageError)
    assert intake.counters.undecodable == {
        Flaw.SHORT: 1,
        Flaw.TOO_MANY_ENTRIES: 1,
        Flaw.OVERSIZED: 1,
    }
    assert len([message for message in caplog.messages if "dropped" in message]) == 3


async def test_classes_and_sources_are_counted_apart() -> None:
    source = PipeSource(name="mcelog", record_format=RecordFormat.XEN_MCE)
    intake = Intake()
    async with listening(intake, source):
        source.put([xen_mce_of(ERROR), xen_mce_of(BankError(status=VAL | 0x151))])
        await intake.next()
        await intake.next()
    source.close()
    assert intake.counters.reports == {("corrected", "mcelog"): 1, ("not_memory", "mcelog"): 1}


async def test_broken_source_ends_the_listener_with_its_error(source: PipeSource) -> None:
    source.fail("the device has gone")
    with pytest.raises(PortError, match="the device has gone"):
        await Intake().listener(source).run()


async def test_source_that_wakes_us_for_nothing_over_and_over_is_given_up() -> None:
    source = StuckSource()
    source.wake()
    with pytest.raises(PortError, match="says that there are records, and gives none"):
        await Intake().listener(source).run()
    # The read at the start, and a hundred for nothing within a second.
    assert source.reads == 101
    source.close()


async def test_rare_wakes_for_nothing_do_no_harm(source: PipeSource) -> None:
    intake = Intake()
    async with listening(intake, source):
        read = asyncio.Event()
        source.on_read = read.set
        for _ in range(300):
            read.clear()
            intake.clock.uptime += 0.5
            source.wake()
            await asyncio.wait_for(read.wait(), timeout=5)
        source.put([mc_info_of(ERROR)])
        await intake.next()


async def test_simulated_source_delivers_both_kinds_of_errors() -> None:
    source = SimulatedTelemetry()
    intake = Intake()
    async with listening(intake, source):
        source.push_corrected(Maddr(0x5000), domid=Domid(3), count=2)
        source.push_srao(Mfn(7), Domid(3), guest_address=0x9000)
        # What is urgent comes first.
        acted = (await intake.next()).report
        corrected = (await intake.next()).report
    source.close()
    assert isinstance(corrected, CorrectedPageError)
    assert (corrected.mfn, corrected.count, corrected.domid) == (5, 2, 3)
    assert isinstance(acted, HypervisorActed)
    assert (acted.mfn, acted.domid, acted.broken) == (7, 3, True)


def unavailable(errno: int, source: str) -> Callable[[], TelemetrySource]:
    def factory() -> TelemetrySource:
        raise SourceUnavailable(errno, source=source, reason="it is taken")

    return factory


class TestChoice:
    def test_first_source_that_opens_is_taken(self, source: PipeSource) -> None:
        choice = choose_source([lambda: source, unavailable(EBUSY, "mcelog")])
        assert choice == SourceChoice(source=source)
        assert choice.describe() == "machine checks come from the native source"

    def test_fallback_says_why_the_better_one_is_not_in_use(self) -> None:
        source = PipeSource(name="mcelog")
        choice = choose_source([unavailable(EEXIST, "native"), lambda: source])
        assert choice.source is source
        assert choice.describe() == (
            "machine checks come from the mcelog source "
            "(the native source is unavailable (EEXIST): it is taken)"
        )
        source.close()

    def test_without_any_source_every_reason_is_told(self) -> None:
        choice = choose_source([unavailable(EEXIST, "native"), unavailable(ENOENT, "mcelog")])
        assert choice.source is None
        assert "EEXIST" in choice.describe()
        assert "ENOENT" in choice.describe()

    def test_no_source_at_all_is_told(self) -> None:
        assert choose_source([]).describe() == (
            "no machine checks can be received: none is configured"
        )


class Stopped(Exception):
    """Ends a loop that would go on for ever."""


@dataclass
class Keeping:
    """``keep_source`` with waits that only note themselves."""

    waits_left: int
    waits: list[float] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    listened: list[TelemetrySource] = field(default_factory=list)

    async def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        if len(self.waits) == self.waits_left:
            raise Stopped

    async def listen(self, source: TelemetrySource) -> NoReturn:
        self.listened.append(source)
        raise PortError(f"broken after {len(self.listened)}")

    async def run(self, *factories: Callable[[], TelemetrySource]) -> None:
        with pytest.raises(Stopped):
            await keep_source(
                factories,
                listen=self.listen,
                chosen=lambda choice: self.told.append(choice.describe()),
                retry=Backoff(first=1.0, last=5.0),
                sleep=self.sleep,
            )


class TestKeepSource:
    async def test_without_a_source_tries_go_on_at_growing_intervals(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        keeping = Keeping(waits_left=5)
        await keeping.run(unavailable(EEXIST, "native"), unavailable(EBUSY, "mcelog"))
        assert keeping.waits == [1.0, 2.0, 4.0, 5.0, 5.0]
        assert len(keeping.told) == 5
        # The journal hears of it once, not at every try.
        errors = [record for record in caplog.records if record.levelno >= logging.ERROR]
        assert len(errors) == 1
        assert "no machine checks" in errors[0].getMessage()

    async def test_source_that_breaks_is_closed_told_and_opened_again(self) -> None:
        keeping = Keeping(waits_left=3)
        sources = [PipeSource() for _ in range(3)]
        waiting = iter(sources)
        await keeping.run(lambda: next(waiting))
        assert keeping.listened == sources
        assert all(source.closed for source in sources)
        # One that breaks at once is not reopened in a rush.
        assert keeping.waits == [1.0, 2.0, 4.0]
        assert keeping.told[:2] == [
            "machine checks come from the native source",
            "no machine checks can be received: broken after 1",
        ]

    async def test_source_that_worked_for_a_while_is_reopened_without_delay_from_before(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        keeping = Keeping(waits_left=4)
        loop = asyncio.get_running_loop()
        now = loop.time()

        async def listen(source: TelemetrySource) -> NoReturn:
            # The third one holds for two minutes.
            nonlocal now
            keeping.listened.append(source)
            if len(keeping.listened) == 3:
                now += 120.0
                monkeypatch.setattr(loop, "time", lambda: now)
            raise PortError("broken")

        keeping.listen = listen  # type: ignore[method-assign]
        await keeping.run(PipeSource)
        assert keeping.waits == [1.0, 2.0, 1.0, 2.0]

    async def test_source_is_closed_when_the_daemon_stops(self, source: PipeSource) -> None:
        opened = asyncio.Event()

        async def listen(_: TelemetrySource) -> NoReturn:
            opened.set()
            await asyncio.Event().wait()
            raise AssertionError

        task = asyncio.create_task(
            keep_source(
                [lambda: source],
                listen=listen,
                chosen=lambda _: None,
                retry=Backoff(first=1.0, last=5.0),
            )
        )
        await asyncio.wait_for(opened.wait(), timeout=5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert source.closed

    async def test_a_bug_in_the_listener_is_not_mistaken_for_a_broken_source(
        self, source: PipeSource
    ) -> None:
        async def listen(_: TelemetrySource) -> NoReturn:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await keep_source(
                [lambda: source],
                listen=listen,
                chosen=lambda _: None,
                retry=Backoff(first=1.0, last=5.0),
            )
        assert source.closed
