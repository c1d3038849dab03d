"""PV guests that are saved and restored, as the queue does it."""

from __future__ import annotations

import logging
import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pytest

from pgofflined.core.domains import GuestKind, ShutdownReason
from pgofflined.core.events import Event
from pgofflined.core.relocation_outcomes import (
    InDoubt,
    NotMigrated,
    NotRelocated,
    Relocated,
    RelocationReason,
)
from pgofflined.core.saves import SaveNote, SavePhase
from pgofflined.savesteps import StaysError
from pgofflined.saving import Saves, only_one, write_note
from tests.unit.relocation.doubles import (
    guest,
    quiet,
)
from tests.unit.relocation.scene import (
    SAVING,
    by_saving,
    saving,
)
from tests.unit.test_mover import World as MoverWorld


async def test_a_pv_guest_is_saved_and_its_page_is_offline(saves: Saves, tmp_path: Path) -> None:
    async with saving(saves, tmp_path) as world:
        identity = by_saving(world, 7, 0x10)
        await quiet()
        [call] = world.relocator.calls
        assert (call.domain, call.target) == (identity, str(tmp_path))
        world.host.move(7, 8)
        await call.end()
        [outcome] = world.outcomes
        assert isinstance(outcome, Relocated)
        assert outcome.new_domid == 8


async def test_a_guest_that_a_save_has_asked_to_suspend_itself_in_vain_is_looked_after(
    saves: Saves, tmp_path: Path
) -> None:
    failed = save_that_failed(tmp_path / "mover")
    async with saving(saves, tmp_path) as world:
        identity = by_saving(world, 7, 0x10)
        await quiet()
        await world.relocator.calls[0].end(failed)
        assert world.asked_in_vain == [identity]
        assert world.state() == [(7, "waiting")]


async def test_a_guest_whose_save_was_not_begun_is_tried_again_and_not_looked_after(
    saves: Saves, tmp_path: Path
) -> None:
    async with saving(saves, tmp_path) as world:
        by_saving(world, 7, 0x10)
        await quiet()
        world.host.change(7, shutdown=ShutdownReason.SUSPEND)
        await world.relocator.calls[0].end(NotMigrated(detail="no space"))
        assert world.state() == [(7, "waiting")]
        await world.time.advance(3600)
        assert len(world.relocator.calls) == 1, "it stands still for somebody"
        world.host.change(7, shutdown=None)
        await world.time.advance(3600)
        assert len(world.relocator.calls) == 2
        assert world.asked_in_vain == []


async def test_a_guest_that_is_down_for_long_raises_an_alarm_again_and_again(
    saves: Saves, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with saving(saves, tmp_path, time_limit=1800.0) as world:
        by_saving(world, 7, 0x10)
        await world.time.advance(1799)
        assert world.service.overdue() == {}
        await world.time.advance(1)
        [line] = world.service.overdue().values()
        assert "d7" in line
        assert str(tmp_path) in line
        await world.time.advance(2 * 3600)
        errors = [record for record in caplog.records if record.levelno == logging.ERROR]
        assert len(errors) == 3
        assert fields_of(errors[0]) == {
            "MESSAGE_ID": Event.SAVE_UNFINISHED.message_id,
            "DOMID": "7",
            "JOB": "relocation-1",
        }
        [call] = world.relocator.calls
        assert not call.outcome.done()
        world.host.move(7, 8)
        await call.end()
        assert world.service.overdue() == {}
        await world.time.advance(2 * 3600)
        assert world.time.sleepers == []


async def test_what_is_told_of_a_save_in_doubt_does_not_ask_for_the_guest_to_be_resumed(
    saves: Saves, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with saving(saves, tmp_path) as world:
        by_saving(world, 7, 0x10)
        await quiet()
        await world.relocator.calls[0].end(InDoubt(detail="look"))
    kinds = {fields_of(record).get("MESSAGE_ID") for record in caplog.records}
    assert Event.SAVE_UNFINISHED.message_id in kinds
    assert Event.GUEST_STUCK.message_id not in kinds


def fields_of(record: logging.LogRecord) -> dict[str, str]:
    fields: dict[str, str] = getattr(record, "pgofflined_fields", {})
    return fields


async def test_of_a_save_it_is_not_told_that_a_migration_failed_or_the_guest_runs_on(
    saves: Saves, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with saving(saves, tmp_path, attempts=2) as world:
        by_saving(world, 7, 0x10)
        await quiet()
        await world.relocator.calls[0].end(NotMigrated(detail="it is not there"))
        await world.time.advance(60)
        await world.relocator.calls[1].end(NotMigrated(detail="it is not there"))
        assert len(world.outcomes) == 1
    told = [record.getMessage() for record in caplog.records if "d7" in record.getMessage()]
    assert any("the save of d7 failed" in line for line in told), told
    assert not [line for line in told if "migrat" in line or "runs on" in line]


def save_that_failed(root: Path) -> NotMigrated:
    """What a process says whose `xl save` was run and has failed."""
    root.mkdir()
    world = MoverWorld(root)
    world.save = "fails"
    with pytest.raises(StaysError) as error:
        world.mover().run()
    return NotMigrated(detail=f"saving and restoring failed: {error.value}", was_asked=True)


async def test_a_guest_stands_still_for_saves_that_fail_twice_and_no_more(
    saves: Saves, tmp_path: Path
) -> None:
    failed = save_that_failed(tmp_path / "mover")
    async with saving(saves, tmp_path, attempts=10) as world:
        identity = by_saving(world, 7, 0x10)
        await quiet()
        await world.relocator.calls[0].end(failed)
        await world.time.advance(3600)
        await world.relocator.calls[1].end(failed)
        [outcome] = world.outcomes
        assert isinstance(outcome, NotRelocated)
        assert (outcome.domain, outcome.reason) == (identity, RelocationReason.GAVE_UP)
        assert "status 1" in outcome.detail
        assert "systemctl reload" in outcome.detail
        # Nor for another page, until the operator has seen to the cause.
        by_saving(world, 7, 0x11)
        await quiet()
        assert len(world.outcomes) == 2
        assert len(world.relocator.calls) == 2
        world.service.set_policy(replace(SAVING, save_directory=str(tmp_path)))
        by_saving(world, 7, 0x11)
        await quiet()
        assert len(world.relocator.calls) == 3


async def test_what_was_refused_before_xl_was_run_is_tried_as_often_as_the_policy_says(
    saves: Saves, tmp_path: Path
) -> None:
    async with saving(saves, tmp_path, attempts=5) as world:
        by_saving(world, 7, 0x10)
        for tries in range(5):
            await world.time.advance(600)
            await world.relocator.calls[tries].end(NotMigrated(detail="another guest is saved"))
        assert len(world.outcomes) == 1


async def test_a_save_in_doubt_is_left_to_a_person(saves: Saves, tmp_path: Path) -> None:
    async with saving(saves, tmp_path) as world:
        by_saving(world, 7, 0x10)
        await quiet()
        world.host.destroy(7)
        await world.relocator.calls[0].end(InDoubt(detail="`xl restore FILE`"))
        [outcome] = world.outcomes
        assert isinstance(outcome, NotRelocated)
        assert outcome.reason is RelocationReason.GUEST_STUCK
        assert outcome.detail == "`xl restore FILE`"
        assert outcome.stuck is None, "it would be shown for ever"
        assert world.host.resumed == []
        assert len(world.relocator.calls) == 1


async def test_nothing_else_moves_while_a_saved_guests_memory_is_free(
    saves: Saves, tmp_path: Path
) -> None:
    async with saving(saves, tmp_path, target="localhost") as world:
        await world.submit(9, 0x30)
        by_saving(world, 7, 0x10)
        await world.submit(11, 0x40)
        first, *others = world.relocator.calls
        assert (first.domain.domid, others) == (9, [])
        world.host.move(9, 10)
        await first.end()
        _, second, *others = world.relocator.calls
        assert (second.domain.domid, others) == (7, [])
        world.host.move(7, 8)
        await second.end()
        assert world.relocator.calls[2].domain.domid == 11


def note_of(domid: int, notes: Path) -> Path:
    """The note of a save that an earlier daemon began."""
    notes.mkdir(exist_ok=True)
    domain = guest(domid).identity
    note = SaveNote(domain=domain, phase=SavePhase.SAVING, file="/x", boot="b")
    return write_note(note, notes, new=True)


@pytest.mark.parametrize("at_work", [True, False])
@pytest.mark.parametrize("how", ["save", "migration"])
async def test_nobody_takes_the_memory_of_a_guest_that_an_earlier_daemon_has_saved(
    saves: Saves, tmp_path: Path, how: str, *, at_work: bool
) -> None:
    notes = tmp_path / "notes"
    async with saving(saves, tmp_path, target="localhost") as world:
        note = note_of(8, notes)
        with only_one(notes) if at_work else nullcontext():
            if how == "save":
                by_saving(world, 7, 0x10)
            else:
                await world.submit(9, 0x10)
            await world.time.advance(3600)
        assert world.relocator.calls == []
        [job] = world.service.snapshot()
        assert job.state == "deferred"
        assert "d8" in job.detail
        note.unlink()
        await world.time.advance(3600)
        assert len(world.relocator.calls) == 1


def note_is_made(notes: Path) -> None:
    note_of(8, notes)


@pytest.mark.parametrize("when", ["is restored", "is saved"])
async def test_memory_that_was_free_while_a_guest_was_away_does_not_count(
    saves: Saves, tmp_path: Path, when: str
) -> None:
    notes = tmp_path / "notes"
    async with saving(saves, tmp_path, target="localhost") as world:
        if when == "is restored":
            note = note_of(8, notes)
            world.host.looked_at = lambda: note.unlink(missing_ok=True)
        else:
            world.host.looked_at = lambda: note_is_made(notes)
        await world.submit(9, 0x10)
        assert world.relocator.calls == []
        assert world.state() == [(9, "deferred")]


async def test_a_guest_goes_to_another_host_whoever_is_saved_here(
    saves: Saves, tmp_path: Path
) -> None:
    async with saving(saves, tmp_path, target="spare") as world:
        note_of(8, tmp_path / "notes")
        await world.submit(9, 0x10)
        assert world.relocator.running == [9]


@pytest.mark.parametrize("what", ["off", "serves", "no config", "libvirt", "hvm"])
async def test_a_guest_that_must_not_be_saved_is_not(
    saves: Saves, tmp_path: Path, what: str
) -> None:
    async with saving(saves, tmp_path, save_restore=what != "off") as world:
        if what == "serves":
            world.host.serving = "serves devices to other domains"
        if what == "hvm":
            world.host.change(7, kind=GuestKind.PVH)
        if what == "libvirt":
            (tmp_path / f"userdata-d.7.{UUID(int=7)}.libvirt-xml").touch()
        if what == "no config":
            (tmp_path / f"userdata-d.7.{UUID(int=7)}.libxl-json").unlink()
        by_saving(world, 7, 0x10)
        await quiet()
        assert world.relocator.calls == []
        [outcome] = world.outcomes
        assert isinstance(outcome, NotRelocated)
        assert "d7" in outcome.detail


@pytest.mark.parametrize("what", ["disk", "memory", "open directory", "noted", "somebody"])
async def test_a_save_waits_for_what_may_pass(saves: Saves, tmp_path: Path, what: str) -> None:
    async with saving(saves, tmp_path) as world:
        if what == "disk":
            world.host.change(7, max_pages=1 << 40, tot_pages=1 << 40)
        if what == "memory":
            world.host.free = 1000
        if what == "open directory":
            os.chmod(tmp_path, 0o755)  # noqa: S103 - that is the mistake
        if what == "noted":
            note_of(7, tmp_path / "notes")
        if what == "somebody":
            world.host.somebody = "process 5 (xl save)"
        by_saving(world, 7, 0x10)
        await quiet()
        assert world.relocator.calls == []
        assert world.state() == [(7, "deferred")]
