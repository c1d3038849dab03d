"""The queue of migrations at work."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path

import pytest

from pgofflined.core.domains import GuestKind, ShutdownReason
from pgofflined.core.frames import Domid, Mfn
from pgofflined.core.offline import OfflineState
from pgofflined.core.premigration import Route
from pgofflined.core.relocation_outcomes import (
    InDoubt,
    Migrated,
    MigrationOutcome,
    NotMigrated,
    NotRelocated,
    Relocated,
    RelocationReason,
)
from pgofflined.core.schedule import parse_window
from pgofflined.core.xenversion import XenVersion
from pgofflined.saving import Saves
from tests.unit.relocation.doubles import (
    PENDING,
    guest,
    quiet,
)
from tests.unit.relocation.scene import (
    AWAY,
    BROKEN_OFF,
    HERE,
    by_saving,
    running,
    saving,
)


async def test_a_guest_is_migrated_and_its_page_is_offline() -> None:
    async with running() as world:
        identity = await world.submit(7, 0x10)
        [call] = world.relocator.calls
        assert (call.domain, call.target, call.time_limit) == (identity, "localhost", 1800.0)
        await world.time.advance(4)
        world.host.move(7, 8)
        await call.end()
        assert world.outcomes == [
            Relocated(
                domain=identity,
                mfns=frozenset({Mfn(0x10)}),
                new_domid=Domid(8),
                attempts=1,
                seconds=4.0,
            )
        ]
        assert world.service.snapshot() == ()


async def test_idle_it_waits_for_nothing_but_to_be_woken() -> None:
    async with running() as world:
        assert world.time.sleepers == []
        assert world.links.changed is None


async def test_one_migration_at_a_time() -> None:
    async with running() as world:
        await world.submit(7, 0x10)
        await world.submit(8, 0x20)
        assert world.relocator.running == [7]
        assert world.state() == [(7, "running"), (8, "due")]
        world.host.move(7, 17)
        await world.relocator.calls[0].end()
        assert world.relocator.running == [8]


async def test_pages_that_come_while_it_waits_or_runs_need_no_second_migration() -> None:
    async with running() as world:
        await world.submit(7, 0x10)
        await world.submit(8, 0x20)
        await world.submit(8, 0x21, 0x22)
        world.host.move(7, 17)
        await world.relocator.calls[0].end()
        await world.submit(8, 0x23)
        world.host.move(8, 18)
        await world.relocator.calls[1].end()
        assert len(world.relocator.calls) == 2
        last = world.outcomes[-1]
        assert isinstance(last, Relocated)
        assert last.mfns == {0x20, 0x21, 0x22, 0x23}


async def test_a_failure_is_tried_again_with_growing_waits_and_then_given_up() -> None:
    async with running() as world:
        await world.submit(7, 0x10)
        await world.relocator.calls[0].end(BROKEN_OFF)
        assert world.state() == [(7, "waiting")]
        await world.time.advance(59)
        assert len(world.relocator.calls) == 1
        await world.time.advance(1)
        await world.relocator.calls[1].end(BROKEN_OFF)
        await world.time.advance(119)
        assert len(world.relocator.calls) == 2
        await world.time.advance(1)
        assert world.outcomes == []
        await world.relocator.calls[2].end(BROKEN_OFF)
        [outcome] = world.outcomes
        assert isinstance(outcome, NotRelocated)
        assert outcome.reason is RelocationReason.GAVE_UP
        assert outcome.attempts == 3
        assert outcome.stuck is None
        assert "status 1" in outcome.detail
        assert world.time.sleepers == []


async def test_migrations_start_only_within_the_maintenance_window() -> None:
    night = replace(HERE, maintenance_windows=(parse_window("22:00-06:00"),))
    async with running(night) as world:
        await world.submit(7, 0x10)
        assert world.state() == [(7, "deferred")]
        await world.time.advance(10 * 3600 - 1)
        assert world.relocator.calls == []
        await world.time.advance(1)
        assert world.relocator.running == [7]


async def test_another_policy_wakes_what_waits_for_the_window() -> None:
    night = replace(HERE, maintenance_windows=(parse_window("22:00-06:00"),))
    async with running(night) as world:
        await world.submit(7, 0x10)
        world.service.set_policy(HERE)
        await quiet()
        assert world.relocator.running == [7]


async def test_a_full_queue_says_so() -> None:
    async with running(replace(HERE, max_queued=1)) as world:
        await world.submit(7, 0x10)
        other = world.host.add(guest(8), 0x20)
        assert not world.service.submit(other.identity, "guest8", [Mfn(0x20)])


async def test_pages_freed_late_are_waited_for() -> None:
    async with running() as world:
        await world.submit(7, 0x10)
        world.host.destroy(7, free=False)
        await world.relocator.calls[0].end()
        assert world.outcomes == []
        await world.time.advance(10)
        world.host.free_pages(7)
        await world.time.advance(8)
        [outcome] = world.outcomes
        assert isinstance(outcome, Relocated)


async def test_a_page_that_stays_is_no_success() -> None:
    async with running() as world:
        identity = await world.submit(7, 0x10, 0x11)
        world.host.destroy(7, free=False)
        world.host.states[0x11] = OfflineState.OFFLINED
        await world.relocator.calls[0].end()
        await world.time.advance(200)
        [outcome] = world.outcomes
        assert isinstance(outcome, NotRelocated)
        assert outcome.domain == identity
        assert outcome.reason is RelocationReason.PAGES_REMAIN
        assert outcome.mfns == {0x10}
        assert outcome.offlined == {0x11}
        assert "0x10" in outcome.detail
        assert world.time.sleepers == []


async def test_an_old_domain_that_was_not_destroyed_is_named() -> None:
    async with running() as world:
        await world.submit(7, 0x10)
        world.host.add(guest(8, uuid=7))
        await world.relocator.calls[0].end()
        await world.time.advance(200)
        [outcome] = world.outcomes
        assert isinstance(outcome, NotRelocated)
        assert "xl destroy 7" in outcome.detail


async def test_a_guest_left_paused_after_its_migration_is_reported() -> None:
    async with running() as world:
        await world.submit(7, 0x10)
        world.host.move(7, 8)
        world.host.change(8, paused=True)
        await world.relocator.calls[0].end()
        [outcome] = world.outcomes
        assert isinstance(outcome, Relocated)
        assert outcome.stuck is not None
        assert "xl unpause 8" in outcome.stuck


async def test_a_domain_that_ended_before_its_turn_leaves_its_pages_offline() -> None:
    async with running() as world:
        await world.submit(7, 0x10)
        await world.submit(8, 0x20)
        world.host.destroy(8)
        world.host.move(7, 17)
        await world.relocator.calls[0].end()
        assert len(world.relocator.calls) == 1
        last = world.outcomes[-1]
        assert isinstance(last, Relocated)
        assert last.attempts == 0


async def test_a_domain_that_ended_and_whose_page_is_still_held() -> None:
    async with running() as world:
        await world.submit(7, 0x10)
        await world.submit(8, 0x20)
        world.host.destroy(8, free=False)
        world.host.move(7, 17)
        await world.relocator.calls[0].end()
        await world.time.advance(200)
        last = world.outcomes[-1]
        assert isinstance(last, NotRelocated)
        assert last.reason is RelocationReason.DOMAIN_GONE


async def test_a_domid_used_again_is_not_migrated() -> None:
    async with running() as world:
        await world.submit(7, 0x10)
        await world.submit(8, 0x20)
        world.host.destroy(8)
        world.host.add(guest(8, uuid=99))
        world.host.move(7, 17)
        await world.relocator.calls[0].end()
        assert len(world.relocator.calls) == 1


@pytest.mark.parametrize("kind", [GuestKind.PVH, GuestKind.HVM])
async def test_a_broken_page_is_never_migrated(kind: GuestKind) -> None:
    async with running() as world:
        world.host.add(guest(7, kind=kind), 0x10)
        world.host.states[0x10] = PENDING | OfflineState.BROKEN
        world.service.submit(world.host.guests[7].identity, "guest7", [Mfn(0x10)])
        await quiet()
        assert world.relocator.calls == []
        [outcome] = world.outcomes
        assert isinstance(outcome, NotRelocated)
        assert outcome.reason is RelocationReason.BROKEN


async def test_a_xen_that_corrupts_its_free_lists_is_refused() -> None:
    async with running() as world:
        world.host.xen = XenVersion(4, 19, 3)
        await world.submit(7, 0x10)
        [outcome] = world.outcomes
        assert isinstance(outcome, NotRelocated)
        assert outcome.reason is RelocationReason.XEN_FREE_LISTS
        assert world.relocator.calls == []


async def test_too_little_memory_is_looked_at_again() -> None:
    async with running() as world:
        world.host.free = 1024
        await world.submit(7, 0x10)
        assert world.state() == [(7, "deferred")]
        assert "MiB" in world.service.snapshot()[0].detail
        world.host.free = 1 << 20
        await world.time.advance(60)
        assert world.relocator.running == [7]


async def test_a_link_that_comes_back_starts_what_waited_for_it() -> None:
    async with running(AWAY) as world:
        up = world.links.found
        assert isinstance(up, Route)
        world.links.found = replace(up, carrier=False)
        await world.submit(7, 0x10)
        assert world.state() == [(7, "deferred")]
        assert world.links.changed is not None
        world.links.found = up
        world.links.changed()
        await world.time.advance(1)
        assert world.relocator.running == [7]
        assert world.links.changed is None


async def test_a_flapping_link_does_not_have_the_way_looked_at_each_time() -> None:
    async with running(AWAY) as world:
        up = world.links.found
        assert isinstance(up, Route)
        world.links.found = replace(up, up=False)
        await world.submit(7, 0x10)
        for _ in range(50):
            assert world.links.changed is not None
            world.links.changed()
            await quiet()
        await world.time.advance(1)
        assert world.links.asked <= 3


async def test_to_this_host_no_link_is_looked_at() -> None:
    async with running() as world:
        await world.submit(7, 0x10)
        assert world.links.asked == 0


async def test_a_guest_left_suspended_is_resumed_and_tried_again() -> None:
    async with running() as world:
        await world.submit(7, 0x10)
        world.host.change(7, shutdown=ShutdownReason.SUSPEND)
        await world.relocator.calls[0].end(BROKEN_OFF)
        assert world.host.resumed == [7]
        assert world.outcomes == []
        assert world.state() == [(7, "waiting")]


async def test_a_guest_that_an_earlier_process_still_migrates_is_not_migrated_twice() -> None:
    async with running() as world:
        world.host.somebody = "process 4711 (xl migrate -s ssh 7 spare)"
        await world.submit(7, 0x10)
        assert world.relocator.calls == []
        assert world.state() == [(7, "deferred")]
        world.host.somebody = None
        await world.time.advance(3600)
        assert world.relocator.running == [7]


async def test_a_guest_that_somebody_has_suspended_meanwhile_is_not_resumed() -> None:
    async with running() as world:
        await world.submit(7, 0x10)
        world.host.change(7, shutdown=ShutdownReason.SUSPEND)
        world.host.somebody = "process 4711 (xl save 7 /srv/seven)"
        await world.relocator.calls[0].end(BROKEN_OFF)
        assert world.host.resumed == []
        [outcome] = world.outcomes
        assert isinstance(outcome, NotRelocated)
        assert outcome.reason is RelocationReason.GUEST_STUCK
        assert outcome.stuck is not None
        assert "process 4711 (xl save 7 /srv/seven)" in outcome.stuck


@pytest.mark.parametrize("kind", [GuestKind.PVH, GuestKind.HVM])
async def test_a_guest_that_stays_suspended_is_reported_loudly(kind: GuestKind) -> None:
    async with running() as world:
        world.host.resume_works = False
        world.host.add(guest(7, kind=kind))
        await world.submit(7, 0x10)
        world.host.change(7, shutdown=ShutdownReason.SUSPEND)
        await world.relocator.calls[0].end(BROKEN_OFF)
        [outcome] = world.outcomes
        assert isinstance(outcome, NotRelocated)
        assert outcome.reason is RelocationReason.GUEST_STUCK
        assert outcome.stuck is not None
        assert "xl resume 7" in outcome.stuck
        assert world.host.resumed == ([7] if kind is GuestKind.PVH else [])


@pytest.mark.parametrize(
    "came",
    [
        InDoubt(detail="the line broke"),
        NotMigrated(detail="xl says that it was resumed", may_run_there=True),
    ],
)
async def test_in_doubt_nothing_is_resumed(came: MigrationOutcome) -> None:
    async with running(AWAY) as world:
        await world.submit(7, 0x10)
        world.host.change(7, shutdown=ShutdownReason.SUSPEND)
        await world.relocator.calls[0].end(came)
        [outcome] = world.outcomes
        assert isinstance(outcome, NotRelocated)
        assert outcome.stuck is not None
        assert "spare" in outcome.stuck
        assert world.host.resumed == []


async def test_a_guest_that_moved_although_xl_failed_is_a_success() -> None:
    async with running() as world:
        await world.submit(7, 0x10)
        world.host.move(7, 8)
        await world.relocator.calls[0].end(InDoubt(detail="xl was ended by signal 9"))
        [outcome] = world.outcomes
        assert isinstance(outcome, Relocated)
        assert outcome.new_domid == 8


async def test_when_the_daemon_stops_a_migration_may_end_first() -> None:
    async with running() as world:
        await world.submit(7, 0x10)
        [call] = world.relocator.calls
        world.task.cancel()
        await world.time.advance(19)
        assert not world.task.done()
        world.host.move(7, 8)
        await call.end(Migrated())
        assert world.task.done()
        assert not call.cancelled


async def test_when_the_daemon_stops_a_long_migration_goes_on_without_it() -> None:
    async with running() as world:
        await world.submit(7, 0x10)
        await world.submit(8, 0x20)
        world.task.cancel()
        await world.time.advance(20)
        assert world.task.done()
        [call] = world.relocator.calls
        assert call.cancelled


async def test_a_fault_of_the_system_is_a_failed_try_of_one_job_and_no_end_of_the_service(
    saves: Saves, tmp_path: Path
) -> None:
    def fail() -> None:
        raise OSError(errno.EMFILE, "too many open files")

    async with saving(saves, tmp_path, target="localhost", attempts=2) as world:
        world.host.looked_at = fail
        await world.submit(9, 0x10)
        assert world.state() == [(9, "waiting")]
        assert "too many open files" in world.service.snapshot()[0].detail
        await world.time.advance(60)
        [outcome] = world.outcomes
        assert isinstance(outcome, NotRelocated)
        assert outcome.reason is RelocationReason.GAVE_UP
        world.host.looked_at = lambda: None
        by_saving(world, 7, 0x20)
        await quiet()
        assert world.relocator.running == [7]


@pytest.mark.parametrize("how", ["save", "migration"])
async def test_what_cannot_be_followed_any_more_is_left_to_a_person(
    saves: Saves, tmp_path: Path, how: str
) -> None:
    async with saving(saves, tmp_path, target="spare") as world:
        if how == "save":
            by_saving(world, 7, 0x10)
        else:
            await world.submit(9, 0x10)
        await quiet()
        world.host.change(7 if how == "save" else 9, shutdown=ShutdownReason.SUSPEND)
        world.relocator.calls[0].outcome.set_exception(OSError(errno.EIO, "broken"))
        await quiet()
        [outcome] = world.outcomes
        assert isinstance(outcome, NotRelocated)
        assert outcome.reason is RelocationReason.GUEST_STUCK
        assert "broken" in outcome.detail
        assert world.host.resumed == []
        assert not world.task.done()


async def test_pages_that_cannot_be_looked_at_after_a_migration_are_left() -> None:
    async with running() as world:
        await world.submit(7, 0x10)
        world.host.queried = errno.EMFILE
        await world.relocator.calls[0].end()
        await world.time.advance(200)
        [outcome] = world.outcomes
        assert isinstance(outcome, NotRelocated)
        assert outcome.reason is RelocationReason.PAGES_REMAIN
        assert not world.task.done()


async def test_a_pv_guest_is_never_migrated() -> None:
    async with running() as world:
        world.host.add(guest(7, kind=GuestKind.PV))
        await world.submit(7, 0x10)
        assert world.relocator.calls == []
        [outcome] = world.outcomes
        assert isinstance(outcome, NotRelocated)
        assert outcome.reason is RelocationReason.NOT_HVM
