from __future__ import annotations

import pytest

from pgofflined.aftercare import Aftercare, CareTimes
from pgofflined.core.conditions import ConditionCode
from pgofflined.core.domains import DomainIdentity
from pgofflined.core.outcomes import Standing
from pgofflined.ports import SuspendLimits
from pgofflined.sim.faults import Fault, FaultyHypervisor
from pgofflined.sim.journal import MemoryJournal
from pgofflined.sim.scenarios import SmallHost, small_host


@pytest.fixture
def held() -> SmallHost:
    """A host with a guest that a job had to leave suspended and paused."""
    small = small_host()
    small.host.suspend(small.pv, SuspendLimits())
    small.host.pause(small.pv)
    return small


def ours(small: SmallHost) -> Standing:
    """Both are ours: the suspend, and a pause that could not be taken back."""
    return Standing(paused=True, cpu_time=small.host.domain(small.pv).cpu_time)


def caring(small: SmallHost, *plan: Fault) -> Aftercare:
    xen = FaultyHypervisor(small.host, *plan)
    aftercare = Aftercare(xen, small.host.clock, times=CareTimes(), ended=MemoryJournal().done_with)
    domain = small.host.domain(small.pv).identity
    aftercare.note(
        "x1", domain, stuck="could not unpause it", may_suspend_late=False, standing=ours(small)
    )
    return aftercare


def plain(small: SmallHost) -> Aftercare:
    host = small.host
    return Aftercare(host, host.clock, times=CareTimes(), ended=MemoryJournal().done_with)


def runs(small: SmallHost) -> bool:
    info = small.host.domain(small.pv)
    return info.shutdown is None and not info.paused


def test_a_stuck_guest_is_unpaused_and_resumed(held: SmallHost) -> None:
    aftercare = caring(held)
    aftercare.look()
    assert runs(held)
    assert not aftercare
    assert aftercare.stuck == {}


@pytest.mark.parametrize("method", ["unpause", "resume"])
def test_a_guest_that_stays_stuck_is_looked_at_until_it_runs(held: SmallHost, method: str) -> None:
    aftercare = caring(held, Fault(method=method, times=15))
    aftercare.look()
    assert not runs(held)
    assert aftercare.stuck
    aftercare.look()
    assert runs(held)
    assert not aftercare


def test_a_guest_that_somebody_has_helped_is_left_alone(held: SmallHost) -> None:
    aftercare = caring(held)
    held.host.unpause(held.pv)
    held.host.resume(held.pv)
    aftercare.look()
    assert runs(held)
    assert not aftercare


def test_a_guest_that_suspends_late_is_resumed(held: SmallHost) -> None:
    held.host.unpause(held.pv)
    aftercare = plain(held)
    domain = held.host.domain(held.pv).identity
    aftercare.note("x1", domain, stuck=None, may_suspend_late=True)
    aftercare.look()
    assert runs(held)
    assert not aftercare


def test_a_guest_that_may_suspend_late_is_given_up_after_a_while() -> None:
    small = small_host()
    aftercare = plain(small)
    domain = small.host.domain(small.pv).identity
    aftercare.note("x1", domain, stuck=None, may_suspend_late=True)
    aftercare.look()
    assert aftercare
    small.host.clock.wait(301)
    aftercare.look()
    assert not aftercare


@pytest.mark.parametrize("stuck", [None, "could not unpause it"])
def test_a_guest_that_somebody_saves_is_let_go_only_when_he_has_ended(
    held: SmallHost, stuck: str | None
) -> None:
    if stuck is None:
        held.host.unpause(held.pv)
    guest = held.host.simulated(held.pv)
    guest.somebody = "process 5 (xl save)"
    xen = FaultyHypervisor(held.host)
    aftercare = Aftercare(xen, held.host.clock, times=CareTimes(), ended=MemoryJournal().done_with)
    domain = held.host.domain(held.pv).identity
    aftercare.note(
        "x1", domain, stuck=stuck, may_suspend_late=stuck is None, standing=Standing(paused=True)
    )
    aftercare.look()
    assert not {"resume", "unpause"} & set(xen.trace.methods)
    assert aftercare
    guest.somebody = None
    aftercare.look()
    assert runs(held)
    assert not aftercare


@pytest.mark.parametrize("trouble", ["somebody", "xen"])
def test_a_guest_that_stands_still_is_never_given_up(trouble: str) -> None:
    small = small_host()
    guest = small.host.simulated(small.pv)
    xen = FaultyHypervisor(small.host, *[Fault(method="resume", times=20)][: trouble == "xen"])
    ended: list[DomainIdentity] = []
    aftercare = Aftercare(xen, small.host.clock, times=CareTimes(), ended=ended.append)
    domain = small.host.domain(small.pv).identity
    aftercare.note("x1", domain, stuck=None, may_suspend_late=True)
    small.host.suspend(small.pv, SuspendLimits())
    guest.somebody = "process 5 (xl save)" if trouble == "somebody" else None
    for _ in range(2):
        small.host.clock.wait(301)
        aftercare.look()
        assert aftercare
    assert ended == []
    guest.somebody = None
    aftercare.look()
    assert runs(small)
    assert ended == [domain]


def test_what_is_shown_does_not_change_while_guests_are_looked_at(held: SmallHost) -> None:
    aftercare = caring(held)
    shown = iter(aftercare.stuck.items())
    aftercare.look()
    assert [one.text for _, one in shown] == ["could not unpause it"]
    assert aftercare.stuck == {}


def test_a_guest_that_is_left_to_a_person_is_shown_until_it_runs_and_never_touched(
    held: SmallHost,
) -> None:
    aftercare = plain(held)
    domain = held.host.domain(held.pv).identity
    aftercare.leave_to_operator(domain, "it may run elsewhere")
    began = aftercare.stuck[domain].since
    assert aftercare.stuck[domain].code is ConditionCode.GUEST_HELD
    held.host.clock.wait(10_000)
    aftercare.look()
    assert not runs(held)
    assert not aftercare.holds_up_a_stop
    assert aftercare.stuck[domain].since == began
    assert [(guest.text, guest.is_kept) for guest in aftercare.left()] == [
        ("it may run elsewhere", False)
    ]
    held.host.unpause(held.pv)
    held.host.resume(held.pv)
    aftercare.look()
    assert not aftercare


def test_a_guest_that_somebody_has_paused_may_follow_when_it_runs_again(held: SmallHost) -> None:
    held.host.resume(held.pv)
    aftercare = plain(held)
    domain = held.host.domain(held.pv).identity
    aftercare.note("x1", domain, stuck=None, may_suspend_late=True)
    for _ in range(3):
        held.host.clock.wait(299)
        aftercare.look()
    held.host.unpause(held.pv)
    held.host.suspend(held.pv, SuspendLimits())
    held.host.clock.wait(299)
    aftercare.look()
    assert runs(held)
    assert not aftercare


def test_a_guest_that_was_held_and_has_run_is_nobodys_concern_when_it_is_suspended_again(
    held: SmallHost,
) -> None:
    aftercare = plain(held)
    domain = held.host.domain(held.pv).identity
    aftercare.note("x1", domain, stuck=None, may_suspend_late=True, standing=ours(held))
    held.host.unpause(held.pv)
    held.host.resume(held.pv)
    held.host.suspend(held.pv, SuspendLimits())
    aftercare.look()
    assert not runs(held)
    assert not aftercare
