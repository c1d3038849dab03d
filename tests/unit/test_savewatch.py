"""What is told of saves that are not ended, and how it reaches the operator."""

from __future__ import annotations

import asyncio
import logging
from contextlib import closing
from dataclasses import replace
from datetime import UTC
from pathlib import Path
from uuid import UUID

import pytest

from pgofflined.aftercare import CareTimes
from pgofflined.core.conditions import ConditionCode
from pgofflined.core.domains import DomainIdentity
from pgofflined.core.events import Event
from pgofflined.core.frames import Domid
from pgofflined.core.machine import CpuVendor, Machine
from pgofflined.core.policy import ControlPolicy, MetricsPolicy, Policy
from pgofflined.core.saves import SaveNote, SavePhase
from pgofflined.demo import SimulatedRelocator
from pgofflined.journal_log import FieldHandler
from pgofflined.notify import NullNotifier
from pgofflined.relocation import KernelLinks, Relocator
from pgofflined.savewatch import TELL_AGAIN, SaveWatch
from pgofflined.saving import Saves, only_one, write_note
from pgofflined.service import Service
from pgofflined.sim.clock import ManualClock, WallClock
from pgofflined.sim.ends import SimulatedEnds
from pgofflined.sim.journal import MemoryJournal
from pgofflined.sim.scenarios import DemoHost, demo_host
from pgofflined.store import Store
from pgofflined.world import World

NOTE = SaveNote(
    domain=DomainIdentity(Domid(7), UUID(int=7)),
    phase=SavePhase.SAVING,
    file="/saves/7",
    boot="this",
)
LIMIT = 1800.0


class Scene:
    """A note, and a watch that looks at it when told to."""

    def __init__(self, notes: Path) -> None:
        self.clock = ManualClock()
        self.watch = SaveWatch(self.clock, lambda: LIMIT)
        self._saves = Saves("this", notes=notes)
        write_note(NOTE, notes, new=True)

    def look(self, after: float = 0.0) -> str:
        self.clock.wait(after)
        self.watch.see(self._saves.left_over(list))
        [condition] = self.watch.conditions
        return condition.text

    def shows(self, code: ConditionCode) -> bool:
        return [one.code for one in self.watch.conditions] == [code]


def told(caplog: pytest.LogCaptureFixture) -> list[tuple[int, str | None]]:
    """Levels and domids of the entries on unfinished saves so far."""
    entries = []
    for record in caplog.records:
        fields: dict[str, str] = getattr(record, "pgofflined_fields", {})
        assert fields.get("MESSAGE_ID") != Event.GUEST_STUCK.message_id
        if fields.get("MESSAGE_ID") == Event.SAVE_UNFINISHED.message_id:
            entries.append((record.levelno, fields.get("DOMID")))
    return entries


def test_a_save_that_was_cut_off_is_told_once_and_shown_for_as_long_as_it_is_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scene = Scene(tmp_path)
    assert "was cut off" in scene.look()
    assert "was cut off" in scene.look(after=10 * LIMIT)
    assert told(caplog) == [(logging.CRITICAL, "7")]
    assert scene.shows(ConditionCode.SAVE_UNFINISHED)
    scene.watch.see([])
    assert scene.watch.conditions == ()


def test_a_save_that_an_earlier_daemon_began_is_nothing_to_act_upon_until_it_lasts_too_long(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scene = Scene(tmp_path)
    with only_one(tmp_path, NOTE.domain.uuid):
        scene.look()
        assert "hangs" not in scene.look(after=LIMIT - 1)
        assert told(caplog) == [(logging.WARNING, "7")]
        assert scene.shows(ConditionCode.SAVE_UNDER_WAY)
        assert "30 min" in scene.look(after=1)
        assert scene.shows(ConditionCode.SAVE_OVERDUE)
        scene.look(after=15)
        assert told(caplog)[1:] == [(logging.ERROR, "7")]
        assert "90 min" in scene.look(after=TELL_AGAIN - 15)
        assert told(caplog)[1:] == 2 * [(logging.ERROR, "7")]
    assert "was cut off" in scene.look(after=1)
    assert told(caplog)[-1] == (logging.CRITICAL, "7")


def service_of(
    demo: DemoHost,
    folder: Path,
    store: Store,
    *,
    policy: Policy = Policy(),  # noqa: B008 - it does not change
    relocator: Relocator | None = None,
    saves: Saves | None = None,
    times: CareTimes = CareTimes(),  # noqa: B008 - it does not change
) -> Service:
    host = demo.host
    world = World(
        xen=host,
        times=times,
        clock=host.clock,
        machine=Machine(vendor=CpuVendor.INTEL, family=6, physical_bits=46, max_mfn=host.max_mfn()),
        sources=[lambda: demo.telemetry],
        relocator=relocator or SimulatedRelocator(demo),
        links=KernelLinks(),
        zone=UTC,
        store=store,
        journal=MemoryJournal(),
        notifier=NullNotifier(),
        ends=lambda: SimulatedEnds(host),
        saves=saves or Saves("this", notes=folder),
    )
    policy = replace(
        policy,
        metrics=MetricsPolicy(listen=None),
        control=ControlPolicy(socket=str(folder / "control.sock")),
    )
    return Service(world, policy)


async def test_the_service_shows_a_save_that_was_cut_off_before_it_was_started(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "7.state"
    file.touch()
    write_note(replace(NOTE, file=str(file)), tmp_path, new=True)
    heard = asyncio.Event()
    listener = FieldHandler(lambda *_, **__: heard.set())
    monkeypatch.setattr(logging.getLogger(SaveWatch.__module__), "handlers", [listener])
    with closing(Store.open(tmp_path / "state.db", "this")) as store:
        service = service_of(demo_host(clock=WallClock(), seed=1), tmp_path, store)
        stop = asyncio.Event()
        async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
            tasks.create_task(service.run(stop))
            await heard.wait()
            attention = service.snapshot().attention
            stop.set()
    assert any(f"xl restore {file}" in condition.text for condition in attention)
    assert told(caplog) == [(logging.CRITICAL, "7")]
