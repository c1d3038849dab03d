"""What is looked at just before a guest is migrated or saved."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pgofflined.core.frames import Mfn
from pgofflined.core.relocation_outcomes import (
    NotRelocated,
    RelocationReason,
)
from pgofflined.core.schedule import parse_window
from pgofflined.saving import Saves
from tests.unit.relocation.doubles import (
    quiet,
)
from tests.unit.relocation.scene import (
    BROKEN_OFF,
    HERE,
    SAVING,
    by_saving,
    running,
    saving,
)


@pytest.mark.parametrize("how", ["save", "migration"])
async def test_nothing_is_begun_when_an_uncorrected_error_is_reported_while_it_waits(
    saves: Saves, tmp_path: Path, how: str
) -> None:
    night = (parse_window("22:00-06:00"),)
    async with saving(saves, tmp_path, target="localhost", maintenance_windows=night) as world:
        if how == "save":
            by_saving(world, 7, 0x10)
        else:
            await world.submit(9, 0x10)
        await quiet()
        assert [state for _, state in world.state()] == ["deferred"]
        domid = 7 if how == "save" else 9
        world.host.poison = {domid: f"mfn 0x77 of d{domid} has had an uncorrected error"}
        await world.time.advance(10 * 3600)
        assert world.relocator.calls == []
        [job] = world.service.snapshot()
        assert job.state == "deferred"
        assert f"mfn 0x77 of d{domid}" in job.detail
        # It ends by itself when that page is out of use.
        world.host.poison = {}
        await world.time.advance(600)
        assert world.relocator.running == [domid]


@pytest.mark.parametrize("how", ["save", "migration"])
async def test_nothing_is_tried_again_when_an_uncorrected_error_is_reported_meanwhile(
    saves: Saves, tmp_path: Path, how: str
) -> None:
    async with saving(saves, tmp_path, target="localhost") as world:
        if how == "save":
            by_saving(world, 7, 0x10)
        else:
            await world.submit(9, 0x10)
        await quiet()
        world.host.poison = {7: "mfn 0x77", 9: "mfn 0x77"}
        await world.relocator.calls[0].end(BROKEN_OFF)
        await world.time.advance(3600)
        assert len(world.relocator.calls) == 1
        assert "mfn 0x77" in world.service.snapshot()[0].detail


async def test_a_migration_is_broken_off_when_an_uncorrected_error_is_reported_meanwhile() -> None:
    async with running(replace(HERE, parallel=2)) as world:
        await world.submit(7, 0x10)
        await world.submit(8, 0x20)
        assert world.relocator.running == [7, 8]
        world.host.poison = {7: "mfn 0x77 of d7 has had an uncorrected error"}
        world.service.poison_reported()
        await quiet()
        its, others = world.relocator.calls
        assert its.off.why == "mfn 0x77 of d7 has had an uncorrected error"
        assert others.off.why is None
        await its.end(BROKEN_OFF)
        await world.time.advance(3600)
        # It is not begun again before that page is out of use.
        assert world.relocator.running == [8]
        assert "mfn 0x77" in world.service.snapshot()[0].detail


async def test_a_migration_is_broken_off_for_an_error_that_came_as_it_was_begun() -> None:
    async with running() as world:
        poison = world.host.poison
        world.denied_asked = lambda: poison.update({7: "mfn 0x77"})
        await world.submit(7, 0x10)
        assert [call.off.why for call in world.relocator.calls] == ["mfn 0x77"]


async def test_an_uncorrected_error_of_another_guest_keeps_nobody() -> None:
    async with running() as world:
        world.host.poison = {8: "mfn 0x77 of d8 has had an uncorrected error"}
        await world.submit(7, 0x10)
        assert world.relocator.running == [7]


async def test_a_guest_whose_own_bad_page_has_an_uncorrected_error_is_left_at_once() -> None:
    async with running() as world:
        world.host.poisoned = {Mfn(0x11)}
        await world.submit(7, 0x10, 0x11)
        assert world.relocator.calls == []
        [outcome] = world.outcomes
        assert isinstance(outcome, NotRelocated)
        assert outcome.reason is RelocationReason.UNCORRECTED
        assert "mfn 0x11 of d7" in outcome.detail


@pytest.mark.parametrize("what", ["denied", "devices"])
@pytest.mark.parametrize("how", ["save", "migration"])
async def test_what_forbids_it_while_it_waits_is_seen(
    saves: Saves, tmp_path: Path, how: str, what: str
) -> None:
    night = (parse_window("22:00-06:00"),)
    async with saving(saves, tmp_path, target="spare", maintenance_windows=night) as world:
        if how == "save":
            by_saving(world, 7, 0x10)
        else:
            await world.submit(7 + 2, 0x10)
        await quiet()
        assert [state for _, state in world.state()] == ["deferred"]
        for domid in (7, 9):
            if what == "devices":
                world.host.devices.add(domid)
            else:
                world.denied[domid] = "domains.deny has it"
        await world.time.advance(10 * 3600)
        assert world.relocator.calls == []
        [outcome] = world.outcomes
        assert isinstance(outcome, NotRelocated)
        expected = {"denied": RelocationReason.DENIED, "devices": RelocationReason.HAS_DEVICES}
        assert outcome.reason is expected[what]
        assert f"d{outcome.domain.domid}" in outcome.detail


async def test_another_policy_that_comes_while_a_guest_is_looked_at_is_the_one_that_counts(
    saves: Saves, tmp_path: Path
) -> None:
    async with saving(saves, tmp_path) as world:
        off = replace(SAVING, save_restore=False)
        world.host.looked_at = lambda: world.service.set_policy(off)
        by_saving(world, 7, 0x10)
        await quiet()
        assert world.relocator.calls == []
        [outcome] = world.outcomes
        assert isinstance(outcome, NotRelocated)
        assert outcome.reason is RelocationReason.DISABLED
