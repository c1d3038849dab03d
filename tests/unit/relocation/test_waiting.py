"""What happens to jobs while they wait: the clock is set, guests go, policies change."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path

import pytest

from pgofflined.core.frames import Mfn
from pgofflined.core.offline import OfflineState
from pgofflined.core.policy import RelocationPolicy
from pgofflined.core.relocation_outcomes import NotRelocated, Relocated, RelocationReason
from pgofflined.core.schedule import parse_window
from pgofflined.saving import Saves
from tests.unit.relocation.doubles import guest, quiet
from tests.unit.relocation.scene import (
    AWAY,
    BROKEN_OFF,
    HERE,
    SAVING,
    World,
    by_saving,
    running,
    saving,
)

HOUR = 3600.0
DAY = 24 * HOUR
MINUTES = 300.0
NIGHT = (parse_window("22:00-06:00"),)


async def waits_for(world: World, what: str) -> None:
    """Have d7 wait for something, after midday."""
    if what == "memory":
        world.host.free = 0
    await world.submit(7, 0x10)
    if what == "retry":
        await world.relocator.calls[0].end(BROKEN_OFF)
    assert world.state() == [(7, "waiting" if what == "retry" else "deferred")]


def policy_for(what: str) -> RelocationPolicy:
    slow = replace(HERE, retry_first=HOUR, retry_last=HOUR)
    return replace(slow, maintenance_windows=NIGHT) if what == "window" else slow


@pytest.mark.parametrize("what", ["retry", "memory"])
@pytest.mark.parametrize("set_by", [-DAY, DAY])
async def test_a_clock_that_is_set_brings_no_try_forward_and_puts_none_off(
    what: str, set_by: float
) -> None:
    async with running(policy_for(what)) as world:
        await waits_for(world, what)
        begun = len(world.relocator.calls)
        world.time.set_by(set_by)
        world.host.free = 1 << 20
        # Whatever wakes it: another guest that is denied.
        world.denied[8] = "no"
        await world.submit(8, 0x20)
        await world.time.advance(HOUR - 1)
        assert len(world.relocator.calls) == begun
        await world.time.advance(1)
        assert len(world.relocator.calls) == begun + 1


async def test_a_clock_set_into_a_window_is_noticed_within_minutes() -> None:
    async with running(policy_for("window")) as world:
        await waits_for(world, "window")
        world.time.set_by(11 * HOUR)
        await world.time.advance(MINUTES)
        assert world.relocator.running == [7]


async def test_a_clock_set_back_before_a_window_opens_does_not_start_anything_early() -> None:
    async with running(policy_for("window")) as world:
        await waits_for(world, "window")
        world.time.set_by(-2 * HOUR)
        await world.time.advance(12 * HOUR - 1)
        assert world.relocator.calls == []
        await world.time.advance(1)
        assert world.relocator.running == [7]


async def test_a_window_that_closes_while_a_guest_is_looked_at_is_closed() -> None:
    async with running(replace(HERE, maintenance_windows=(parse_window("11:00-13:00"),))) as world:
        world.host.looked_at = lambda: world.time.set_by(2 * HOUR)
        await world.submit(7, 0x10)
        world.host.looked_at = lambda: None
        assert world.relocator.calls == []
        assert world.state() == [(7, "deferred")]
        await world.time.advance(21 * HOUR)
        assert world.relocator.running == [7]


@pytest.mark.parametrize("what", ["window", "retry", "memory"])
@pytest.mark.parametrize("told", [False, True])
async def test_a_guest_that_somebody_else_has_migrated_meanwhile_is_waited_for_no_longer(
    what: str, *, told: bool
) -> None:
    async with running(policy_for(what)) as world:
        await waits_for(world, what)
        begun = len(world.relocator.calls)
        world.host.move(7, 12)
        if told:
            world.service.look_again()
        await world.time.advance(1 if told else MINUTES)
        [outcome] = world.outcomes
        assert isinstance(outcome, Relocated)
        assert outcome.new_domid == 12
        assert len(world.relocator.calls) == begun
        assert world.service.snapshot() == ()
        assert world.time.sleepers == []


@pytest.mark.parametrize("what", ["window", "retry", "memory"])
async def test_pages_that_a_guest_has_given_back_are_waited_for_no_longer(what: str) -> None:
    async with running(policy_for(what)) as world:
        await waits_for(world, what)
        await world.submit(7, 0x11)
        world.host.states[0x10] = OfflineState.OFFLINED
        await world.time.advance(MINUTES)
        assert world.outcomes == []
        world.host.states[0x11] = OfflineState.OFFLINED
        await world.time.advance(MINUTES)
        [outcome] = world.outcomes
        assert isinstance(outcome, Relocated)
        assert outcome.mfns == {0x10, 0x11}


@pytest.mark.parametrize("ends", ["gone", "dying"])
async def test_a_guest_that_has_ended_while_its_page_is_held_is_said_to_have_ended(
    ends: str,
) -> None:
    async with running(policy_for("window")) as world:
        world.host.add(guest(8), 0x20)
        await waits_for(world, "window")
        if ends == "gone":
            world.host.destroy(7, free=False)
        else:
            world.host.change(7, dying=True)
        await world.time.advance(MINUTES + 200)
        [outcome] = world.outcomes
        assert isinstance(outcome, NotRelocated)
        assert outcome.reason is RelocationReason.DOMAIN_GONE
        assert outcome.mfns == {0x10}


async def test_a_domid_used_again_is_another_guest() -> None:
    async with running(policy_for("window")) as world:
        await waits_for(world, "window")
        world.host.destroy(7)
        await world.submit(7, 0x20, uuid=99)
        await world.time.advance(MINUTES)
        [outcome] = world.outcomes
        assert isinstance(outcome, Relocated)
        assert outcome.mfns == {0x10}
        assert world.state() == [(7, "deferred")]


OFF = {
    "disabled": (replace(HERE, enabled=False), RelocationReason.DISABLED),
    "no target": (replace(HERE, target=""), RelocationReason.NO_TARGET),
    "denied": (HERE, RelocationReason.DENIED),
}


@pytest.mark.parametrize("how", OFF)
@pytest.mark.parametrize("what", ["window", "retry", "memory"])
async def test_a_reload_that_forbids_it_ends_what_waits_at_once(what: str, how: str) -> None:
    policy, reason = OFF[how]
    async with running(policy_for(what)) as world:
        await waits_for(world, what)
        begun = len(world.relocator.calls)
        if how == "denied":
            world.denied[7] = "this is a dry run"
        windows = policy_for(what).maintenance_windows
        world.service.set_policy(replace(policy, maintenance_windows=windows))
        await quiet()
        [outcome] = world.outcomes
        assert isinstance(outcome, NotRelocated)
        assert outcome.reason is reason
        assert len(world.relocator.calls) == begun


async def test_a_reload_that_forbids_saves_ends_a_save_that_waits(
    saves: Saves, tmp_path: Path
) -> None:
    async with saving(saves, tmp_path, maintenance_windows=NIGHT, target="spare") as world:
        by_saving(world, 7, 0x10)
        await world.submit(9, 0x20)
        assert [state for _, state in world.state()] == ["deferred", "deferred"]
        off = replace(SAVING, save_restore=False, maintenance_windows=NIGHT, target="spare")
        world.service.set_policy(off)
        await quiet()
        [outcome] = world.outcomes
        assert isinstance(outcome, NotRelocated)
        assert (outcome.domain.domid, outcome.reason) == (7, RelocationReason.DISABLED)
        assert world.state() == [(9, "deferred")]


async def test_a_job_queued_for_another_target_goes_to_that_of_the_moment_it_starts() -> None:
    async with running(AWAY) as world:
        await world.submit(7, 0x10)
        await world.submit(8, 0x20)
        world.service.set_policy(replace(AWAY, target="other"))
        world.host.destroy(7)
        await world.relocator.calls[0].end()
        assert [call.target for call in world.relocator.calls] == ["spare", "other"]


async def test_a_target_that_is_removed_ends_what_is_queued_behind_another() -> None:
    async with running(AWAY) as world:
        await world.submit(7, 0x10)
        await world.submit(8, 0x20)
        world.service.set_policy(replace(AWAY, target=""))
        world.host.destroy(7)
        await world.relocator.calls[0].end()
        assert len(world.relocator.calls) == 1
        last = world.outcomes[-1]
        assert isinstance(last, NotRelocated)
        assert last.reason is RelocationReason.NO_TARGET


async def test_a_denial_taken_back_before_it_is_acted_upon_starts_nothing_outside_a_window() -> (
    None
):
    async with running(policy_for("window")) as world:
        await waits_for(world, "window")
        world.denied[7] = "for a moment"
        world.host.looked_at = world.denied.clear
        world.service.look_again()
        await quiet()
        assert world.relocator.calls == []
        assert world.outcomes == []
        assert world.state() == [(7, "deferred")]


async def test_a_host_that_cannot_be_asked_for_a_while_ends_nothing() -> None:
    async with running(policy_for("window")) as world:
        await waits_for(world, "window")
        world.host.queried = errno.EIO
        await world.time.advance(HOUR)
        assert world.state() == [(7, "deferred")]
        assert not world.task.done()
        world.host.queried = 0
        world.host.move(7, 12)
        await world.time.advance(MINUTES)
        assert isinstance(world.outcomes[0], Relocated)


async def test_what_waits_is_not_looked_at_all_the_time() -> None:
    async with running(policy_for("window")) as world:
        await waits_for(world, "window")
        looks = 0
        query = world.host.query

        def counted(mfn: Mfn) -> OfflineState:
            nonlocal looks
            looks += 1
            return query(mfn)

        world.host.query = counted  # type: ignore[method-assign]
        await world.time.advance(HOUR)
        assert looks == HOUR / MINUTES
