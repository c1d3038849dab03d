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
    SAVING,
    by_saving,
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
        world.host.poison = Mfn(0x77)
        await world.time.advance(10 * 3600)
        assert world.relocator.calls == []
        [outcome] = world.outcomes
        assert isinstance(outcome, NotRelocated)
        assert outcome.reason is RelocationReason.UNCORRECTED
        assert "0x77" in outcome.detail


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
        world.host.poison = Mfn(0x77)
        await world.relocator.calls[0].end(BROKEN_OFF)
        await world.time.advance(3600)
        assert len(world.relocator.calls) == 1
        [outcome] = world.outcomes
        assert isinstance(outcome, NotRelocated)
        assert outcome.reason is RelocationReason.UNCORRECTED


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
