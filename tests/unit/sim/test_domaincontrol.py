from __future__ import annotations

import pytest

from pgofflined.core.domains import GuestKind, ShutdownReason
from pgofflined.core.errors import DomainGone, GuestDidNotSuspend, GuestEnded, XenError
from pgofflined.core.frames import DOM0
from pgofflined.core.offline import OfflineState
from pgofflined.ports import SuspendLimits
from pgofflined.sim.guests import Answer, SuspendBehaviour
from pgofflined.sim.scenarios import SmallHost, small_host

LIMITS = SuspendLimits(acknowledge=1.0, suspend=2.0)


def answering(answer: Answer, *, seconds: float = 0.2) -> SmallHost:
    small = small_host()
    small.host.simulated(small.pv).behaviour = SuspendBehaviour(
        answer=answer, suspend_after=seconds
    )
    return small


def test_guest_takes_its_time_and_no_more() -> None:
    small = answering(Answer.SUSPENDS, seconds=1.5)
    small.host.suspend(small.pv, LIMITS)

    assert small.host.clock.monotonic() == pytest.approx(1.51)
    assert small.host.domain(small.pv).shutdown is ShutdownReason.SUSPEND


def test_deaf_guest_costs_the_time_to_acknowledge() -> None:
    small = answering(Answer.IGNORES)
    with pytest.raises(GuestDidNotSuspend) as caught:
        small.host.suspend(small.pv, LIMITS)

    assert caught.value.stage == "acknowledge"
    assert small.host.clock.monotonic() == pytest.approx(1.0)


def test_stalling_guest_runs_on() -> None:
    small = answering(Answer.STALLS)
    with pytest.raises(GuestDidNotSuspend) as caught:
        small.host.suspend(small.pv, LIMITS)

    assert caught.value.stage == "suspend"
    small.host.clock.wait(100.0)
    assert small.host.domain(small.pv).shutdown is None


def test_late_guest_suspends_when_nobody_waits_any_more() -> None:
    small = answering(Answer.SUSPENDS, seconds=5.0)
    with pytest.raises(GuestDidNotSuspend):
        small.host.suspend(small.pv, LIMITS)
    assert small.host.domain(small.pv).shutdown is None
    small.host.clock.wait(3.0)

    assert small.host.domain(small.pv).shutdown is ShutdownReason.SUSPEND


def test_guest_that_suspends_at_the_withdrawal_counts_as_suspended() -> None:
    small = answering(Answer.AT_WITHDRAWAL)
    small.host.suspend(small.pv, LIMITS)

    assert small.host.domain(small.pv).shutdown is ShutdownReason.SUSPEND


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Answer.DIES, None),
        (Answer.REBOOTS, None),
        (Answer.CRASHES, ShutdownReason.CRASH),
        (Answer.CRASHES_READING, ShutdownReason.CRASH),
        (Answer.POWERS_OFF, ShutdownReason.POWEROFF),
    ],
)
def test_guest_that_ends_meanwhile_has_ended_after_it_was_asked(
    answer: Answer, reason: ShutdownReason | None
) -> None:
    small = answering(answer)
    with pytest.raises(GuestEnded) as caught:
        small.host.suspend(small.pv, LIMITS)
    assert caught.value.reason is reason
    # It never took the request, which is still there to be withdrawn.
    unread = answer is Answer.CRASHES_READING
    if reason is not None:
        assert small.host.withdraw_suspend(small.pv) is unread


def test_guest_that_ended_before_was_not_asked() -> None:
    small = small_host()
    small.host.crash(small.pv, "before")
    with pytest.raises(DomainGone) as caught:
        small.host.suspend(small.pv, LIMITS)
    assert not isinstance(caught.value, GuestEnded)


def test_rebooted_guest_has_the_domid_and_another_uuid() -> None:
    small = small_host()
    before = small.host.domain(small.pv)
    small.host.reboot(small.pv)
    after = small.host.domain(small.pv)

    assert after.domid == before.domid
    assert after.identity != before.identity
    small.host.check_invariants()


def test_paused_guest_cannot_answer() -> None:
    small = small_host()
    small.host.pause(small.pv)

    with pytest.raises(GuestDidNotSuspend):
        small.host.suspend(small.pv, LIMITS)


def test_dom0_does_not_answer() -> None:
    small = small_host()

    with pytest.raises(GuestDidNotSuspend):
        small.host.suspend(DOM0, LIMITS)


def test_guest_sees_the_same_memory_after_a_suspend() -> None:
    small = small_host()
    before = small.host.snapshot(small.pv)
    small.host.suspend(small.pv, LIMITS)
    small.host.pause(small.pv)
    small.host.check_invariants()
    small.host.unpause(small.pv)
    small.host.resume(small.pv)

    assert before.differences(small.host.snapshot(small.pv)) == []
    small.host.check_invariants()


def test_resume_before_the_unpause_works_as_well() -> None:
    small = small_host()
    before = small.host.snapshot(small.pv)
    small.host.suspend(small.pv, LIMITS)
    small.host.pause(small.pv)
    small.host.resume(small.pv)
    small.host.unpause(small.pv)

    assert before.differences(small.host.snapshot(small.pv)) == []


def test_frame_of_a_destroyed_guest_stays_until_its_last_user_lets_go() -> None:
    small = small_host()
    mfn = small.host.frame_of(small.pv, 9)
    small.host.offline(mfn)
    hold = small.host.hold(small.pv, 9, why="backend")
    small.host.destroy(small.pv)
    small.host.check_invariants()
    assert small.host.query(mfn) == OfflineState.OFFLINE_PENDING
    small.host.release_hold(small.pv, hold)

    assert small.host.query(mfn) == OfflineState.OFFLINED
    small.host.check_invariants()


def test_destroyed_guest_gives_all_its_memory_back() -> None:
    small = small_host()
    before = small.host.free_frames()
    domid = small.host.add_pv()
    small.host.destroy(domid)

    assert small.host.free_frames() == before
    small.host.check_invariants()


def test_migrated_guest_leaves_its_marked_page_behind() -> None:
    small = small_host()
    before, mfn = small.host.snapshot(small.pvh), small.host.frame_of(small.pvh, 9)
    small.host.offline(mfn)
    new = small.host.migrate_to_self(small.pvh)

    assert small.host.query(mfn) == OfflineState.OFFLINED
    assert before.differences(small.host.snapshot(new)) == []
    assert small.host.domain(new).kind is GuestKind.PVH
    assert [info.domid for info in small.host.domains()] == [DOM0, small.pv, new]
    small.host.check_invariants()


def test_guest_does_not_migrate_to_where_there_is_no_room() -> None:
    small = small_host()
    small.host.frames.allocate_many(small.host.free_frames() - 100)

    with pytest.raises(XenError):
        small.host.migrate_to_self(small.pvh)


def test_marked_page_of_a_destroyed_guest_leaves_an_idle_cpu_spinning() -> None:
    """A dying domain's pages are freed dirty."""
    small = small_host()
    small.host.offline(small.host.frame_of(small.pv, 9))
    small.host.destroy(small.pv)

    assert small.host.idle_scrub_spinning
