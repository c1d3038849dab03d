"""What the running service tells people, and what they ask of it, on the simulated host.

Everything is the service's own: its sockets are real, and the command line is called as it is.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from pgofflined.cli import main
from pgofflined.control import client
from pgofflined.control.protocol import (
    QueryReply,
    QueryRequest,
    Request,
    StatusReply,
    StatusRequest,
)
from pgofflined.core.book import Phase
from pgofflined.core.conditions import ConditionCode
from pgofflined.core.events import Event
from pgofflined.core.frames import DOM0, Domid, Mfn, maddr_of
from pgofflined.core.offline import OfflineState
from pgofflined.core.policy import Policy
from pgofflined.core.relocation_outcomes import InDoubt
from pgofflined.core.status import Fate
from pgofflined.notify import NullNotifier
from pgofflined.service import Service
from pgofflined.sim.clock import WallClock
from pgofflined.sim.frames import FrameState
from pgofflined.sim.scenarios import DemoHost, demo_host
from pgofflined.sim.telemetry import SimulatedTelemetry
from pgofflined.store import Store
from tests.unit.test_savewatch import service_of
from tests.unit.test_service_saves import Mover, saves_in

LIMIT = 30.0


@dataclass
class Bench:
    """A running service, and how to ask it."""

    service: Service
    demo: DemoHost
    socket: Path

    async def ask(self, request: Request) -> object:
        return await asyncio.to_thread(client.ask, self.socket, request)

    async def status(self) -> StatusReply:
        reply = await self.ask(StatusRequest())
        assert isinstance(reply, StatusReply)
        return reply

    async def query(self, mfn: int) -> QueryReply:
        reply = await self.ask(QueryRequest(mfn=f"{mfn:#x}"))
        assert isinstance(reply, QueryReply)
        return reply

    async def run(self, *arguments: str) -> int:
        # Shorter than a first look may take: whoever waits is woken, and does not just give up.
        async with asyncio.timeout(LIMIT / 2):
            return await asyncio.to_thread(main, [*arguments, "--socket", str(self.socket)])

    async def codes(self) -> list[str]:
        return [one.code for one in (await self.status()).attention]

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(LIMIT):
            while not holds():  # noqa: ASYNC110 - the snapshot tells nobody that it has changed
                await asyncio.sleep(0.01)

    def has(self, code: ConditionCode) -> bool:
        return any(one.code is code for one in self.service.snapshot().attention)

    def page(self, name: str = "web", at: int = 0) -> tuple[Domid, Mfn]:
        """A data page of a guest."""
        [domid] = [one.domid for one in self.demo.host.domains() if one.name == name]
        layout = self.demo.host.pv(domid).layout
        return domid, self.demo.host.frame_of(domid, layout.plain[at])

    def first(self, which: Sequence[bool] | np.ndarray[tuple[int], np.dtype[np.bool_]]) -> Mfn:
        return Mfn(int(np.flatnonzero(which)[0]))

    def dom0s(self) -> Mfn:
        return self.first(self.demo.host.frames.owner == DOM0)


@asynccontextmanager
async def bench_at(
    folder: Path, *, policy: Policy | None = None, demo: DemoHost | None = None
) -> AsyncIterator[Bench]:
    demo = demo or demo_host(clock=WallClock(speed=10.0), seed=1)
    demo = replace(demo, telemetry=SimulatedTelemetry())  # a service closes its source
    guest = next(one for one in demo.host.domains() if one.name == "web").identity
    with closing(Store.open(folder / "state.db", "this")) as store:
        service = service_of(
            demo,
            folder,
            store,
            policy=policy or Policy(),
            relocator=Mover(folder, InDoubt(detail="not to be called")),
            saves=saves_in(folder, guest),
        )
        stop = asyncio.Event()
        async with asyncio.timeout(2 * LIMIT), asyncio.TaskGroup() as tasks:
            tasks.create_task(service.run(stop))
            await service.ready.wait()
            # Whatever the source, it was looked for.
            bench = Bench(service, demo, folder / "control.sock")
            await bench.until(lambda: not bench.has(ConditionCode.NO_SOURCE))
            yield bench
            stop.set()


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with bench_at(tmp_path) as bench:
        yield bench


def journal(caplog: pytest.LogCaptureFixture, kind: Event) -> list[str]:
    found = []
    for record in caplog.records:
        fields: dict[str, str] = getattr(record, "pgofflined_fields", {})
        if fields.get("MESSAGE_ID") == kind.message_id:
            found.append(record.getMessage())
    return found


async def test_without_anything_to_say_all_is_well(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await bench.run("status") == 0
    assert "All is well: nothing needs you." in capsys.readouterr().out


async def test_an_operators_page_that_is_unresolved_at_once_is_not_taken(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    mfn = bench.dom0s()
    assert await bench.run("offline", hex(mfn)) == 1
    assert f"mfn {mfn:#x} stays in use: it belongs to dom0" in capsys.readouterr().out
    await bench.run("status")
    shown = capsys.readouterr().out
    assert "All is well" not in shown
    assert "Nothing needs you" not in shown
    assert f"mfn {mfn:#x} stays in use although an operator wants it retired" in shown


async def test_a_free_page_is_out_of_use_when_offline_comes_back(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    frames = bench.demo.host.frames
    with bench.demo.host.lock:
        mfn = frames.allocate()
        frames.release(mfn, dirty=False)
    assert await bench.run("offline", hex(mfn)) == 0
    assert f"mfn {mfn:#x} is out of use" in capsys.readouterr().out


async def test_offline_waits_for_the_exchange_if_it_is_asked_to(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    domid, mfn = bench.page()
    assert await bench.run("offline", hex(mfn), "--wait", "--timeout", "30s") == 0
    assert f"mfn {mfn:#x} is out of use: d{domid} was moved" in capsys.readouterr().out


async def test_a_page_that_is_put_off_keeps_all_from_being_well(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    domid, mfn = bench.page()
    bench.demo.host.crash(domid, "by itself")
    status = await bench.run("offline", hex(mfn), "--wait", "--timeout", "100ms")
    assert status == 75
    assert f"mfn {mfn:#x} is under way: waiting: " in capsys.readouterr().out
    assert await bench.codes() == ["page_put_off"]
    await bench.run("status")
    assert "Nothing needs you now; for information:" in capsys.readouterr().out


async def test_an_uncorrected_error_is_shown_until_its_page_is_out_of_use(tmp_path: Path) -> None:
    demo = demo_host(clock=WallClock(speed=10.0), seed=1)
    async with bench_at(tmp_path, demo=demo) as bench:
        domid, mfn = bench.page()
        demo.host.break_frame(mfn)
        bench.demo.telemetry.push_srao(mfn, domid)
        await bench.until(lambda: bench.has(ConditionCode.UNCORRECTED_ERROR))
        # The owner is asked for in a thread, and only then is the page in the book.
        await bench.until(lambda: mfn in bench.service.retirer.ledger.book)
    async with bench_at(tmp_path, demo=demo) as bench:
        [condition] = [
            one for one in (await bench.status()).attention if one.code == "uncorrected_error"
        ]
        assert (condition.mfn, condition.domid, condition.severity) == (mfn, domid, "critical")
        bench.service.retirer.ledger.offlined(mfn, "its owner has ended")
        assert "uncorrected_error" not in await bench.codes()
    async with bench_at(tmp_path, demo=demo) as bench:
        assert "uncorrected_error" not in await bench.codes()


async def test_an_error_of_a_page_that_is_out_of_use_needs_nobody(bench: Bench) -> None:
    frames = bench.demo.host.frames
    mfn = bench.first(frames.state == FrameState.FREE)
    assert (await bench.service.offline(mfn)).fate is Fate.OUT_OF_USE
    bench.demo.telemetry.push_srao(mfn, None)
    seen = bench.service.counters.reports
    await bench.until(lambda: seen["hypervisor_acted", "simulated"] == 1)
    assert "uncorrected_error" not in await bench.codes()
    # Somebody gives it back to Xen by hand.
    bench.demo.host.online(mfn)
    bench.demo.telemetry.push_srao(mfn, None)
    await bench.until(lambda: frames.state[mfn] == FrameState.OFFLINED)
    await bench.until(lambda: bench.service.retirer.ledger.book[mfn].phase is Phase.OFFLINED)
    assert "uncorrected_error" not in await bench.codes()


async def test_what_is_acknowledged_counts_no_more_and_who_did_it_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO, logger="pgofflined")
    demo = demo_host(clock=WallClock(speed=10.0), seed=1)

    def count(bench: Bench) -> float | None:
        labels = {"severity": "critical", "reason": "uncorrected_error"}
        registry = bench.service.metrics.registry
        return registry.get_sample_value("pgofflined_attention", labels)

    async with bench_at(tmp_path, demo=demo) as bench:
        domid, mfn = bench.page()
        bench.demo.telemetry.push_srao(mfn, domid)
        await bench.until(lambda: bench.has(ConditionCode.UNCORRECTED_ERROR))
        assert count(bench) == 1
        wrong = await bench.run("acknowledge", "uncorrected_error", "--mfn", hex(mfn + 1))
        assert (wrong, count(bench)) == (1, 1)
        assert await bench.run("acknowledge", "uncorrected_error", "--mfn", hex(mfn)) == 0
        assert count(bench) == 0
        await bench.run("status")
        shown = capsys.readouterr().out
        assert "ACKNOWLEDGED\n  - critical uncorrected_error" in shown
    async with bench_at(tmp_path, demo=demo) as bench:
        assert bench.has(ConditionCode.UNCORRECTED_ERROR)
        assert count(bench) == 0
    [line] = journal(caplog, Event.ACKNOWLEDGED)
    told = f"uid {os.geteuid()} acknowledged uncorrected_error: Xen acted on an uncorrected"
    assert line.startswith(told)


async def test_an_unresolved_page_can_be_acknowledged_and_stays_so_over_a_restart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demo = demo_host(clock=WallClock(speed=10.0), seed=1)
    async with bench_at(tmp_path, demo=demo) as bench:
        mfn = bench.dom0s()
        await bench.run("offline", hex(mfn))
        assert await bench.run("acknowledge", "page_unresolved") == 0
    async with bench_at(tmp_path, demo=demo) as bench:
        capsys.readouterr()
        await bench.run("status")
        assert "All is well: nothing needs you.\nACKNOWLEDGED" in capsys.readouterr().out


async def test_lost_records_are_shown_until_they_are_acknowledged(bench: Bench) -> None:
    bench.demo.telemetry.lose(3)
    await bench.until(lambda: bench.has(ConditionCode.RECORDS_LOST))
    assert await bench.run("acknowledge", "all") == 0
    assert await bench.codes() == []
    bench.demo.telemetry.lose(1)
    await bench.until(lambda: bench.has(ConditionCode.RECORDS_LOST))
    [condition] = (await bench.status()).attention
    assert condition.text.startswith("4 machine-check records were lost")


async def test_a_dry_run_is_for_information(tmp_path: Path) -> None:
    policy = replace(Policy(), retire=replace(Policy().retire, dry_run=True))
    async with bench_at(tmp_path, policy=policy) as bench:
        assert await bench.codes() == ["dry_run"]
        off = replace(policy, retire=replace(policy.retire, enabled=False))
        bench.service.apply(off)
        assert await bench.codes() == ["retiring_off"]


async def test_a_query_says_what_is_true_of_a_page_with_an_uncorrected_error(bench: Bench) -> None:
    _, mfn = bench.page()
    bench.service.retirer.errors.add(mfn)
    plain = await bench.query(mfn)
    assert plain.uncorrected
    assert "it is not marked, so that who gets it after its owner would get the error" in plain.note
    bench.demo.host.offline(mfn)
    assert "it is marked, and goes out of use when its owner ends" in (await bench.query(mfn)).note
    bench.demo.host.break_frame(mfn)
    assert "Xen has marked it broken" in (await bench.query(mfn)).note
    bench.service.retirer.errors.remove(mfn)
    broken = await bench.query(mfn)
    assert broken.uncorrected
    assert "which this daemon was not told of" in broken.note
    assert broken.page is None


async def test_a_query_for_what_is_no_memory_says_so(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    mfn = bench.first(~bench.demo.host.frames.ram)
    assert await bench.run("query", hex(mfn)) == 0
    shown = capsys.readouterr().out
    assert "no memory of this host" in shown
    assert "not_ram" in shown


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Xen does not answer to a query of frame 1 until this is set."""
    answer = threading.Event()

    def patch(demo: DemoHost) -> None:
        query = demo.host.query

        def hang(mfn: Mfn) -> OfflineState:
            if mfn == 1:
                answer.wait(LIMIT)
            return query(mfn)

        monkeypatch.setattr(demo.host, "query", hang)

    answer.patch = patch  # type: ignore[attr-defined]
    return answer


class Watched(NullNotifier):
    """Counts how often the watchdog is fed."""

    watchdog_interval = 0.01
    fed = 0

    def watchdog(self) -> None:
        self.fed += 1


async def test_queries_that_xen_does_not_answer_leave_everything_else_alive(
    tmp_path: Path, stuck: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched()
    monkeypatch.setattr("tests.unit.test_savewatch.NullNotifier", lambda: watched)
    async with bench_at(tmp_path) as bench:
        stuck.patch(bench.demo)  # type: ignore[attr-defined]
        # More than asyncio's pool has threads: min(32, cpus + 4).
        hanging = [asyncio.create_task(bench.service.query(Mfn(1))) for _ in range(64)]
        try:
            domid, mfn = bench.page()
            for _ in range(2):
                bench.demo.telemetry.push_corrected(maddr_of(mfn), domid=domid)
            await bench.until(lambda: bench.service.snapshot().pages_by_phase.get("offlined") == 1)
            assert (await bench.status()).pages[0].mfn == mfn
            assert bench.service.metrics.registry.get_sample_value("pgofflined_source_up") == 1
            before = watched.fed
            await bench.until(lambda: watched.fed > before)
            assert not any(task.done() for task in hanging)
        finally:
            stuck.set()
        async with asyncio.timeout(LIMIT):
            answers = await asyncio.gather(*hanging)
        assert {answer.mfn for answer in answers} == {1}


async def test_a_query_that_xen_does_not_answer_is_given_up_and_a_stop_does_not_wait_for_it(
    tmp_path: Path, stuck: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pgofflined.operations._QUERY_SECONDS", 0.05)
    async with bench_at(tmp_path) as bench:
        stuck.patch(bench.demo)  # type: ignore[attr-defined]
        with pytest.raises(client.RequestFailed, match="Xen has not answered within"):
            await bench.query(1)
    assert not stuck.is_set()
    stuck.set()
