"""Whatever an operator has done with a guest since a daemon was killed stays as he has left it.

Every stage of a job, and everything that he may have done by then: what is ours is undone, and no
more.  Two cases cannot be told apart by anything that Xen or xenstore knows, and are tests of
their own at the end.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest

from pgofflined.ports import SuspendLimits
from pgofflined.sim.faults import Fault, FaultyHypervisor, Moment
from tests.crash.killing import killed
from tests.unit.exchanger.conftest import Bench

# The last thing that the process did, and how many pauses of its own it leaves.
STAGES = {
    "asked, unread": (Fault(method="suspend", moment=Moment.BEFORE, kills=True), 0),
    "asked, followed": (Fault(method="suspend", moment=Moment.AFTER, kills=True), 0),
    "held": (Fault(method="pause", moment=Moment.AFTER, kills=True), 1),
    "in the middle": (Fault(method="update_ptes", moment=Moment.AFTER, kills=True), 1),
    "exchanged": (Fault(method="exchange", moment=Moment.AFTER, kills=True), 1),
    "resumed": (Fault(method="resume", moment=Moment.AFTER, kills=True), 1),
    "unpaused": (Fault(method="unpause", moment=Moment.AFTER, kills=True), 0),
}
ACTS = ("pause", "unpause", "resume", "suspend")


def act(bench: Bench, what: str) -> bool:
    """What the operator does with xl; False where xl refuses it."""
    host, domid = bench.host, bench.domid
    guest = host.simulated(domid)
    match what:
        case "pause":
            host.pause(domid)
        case "unpause":
            if not guest.pauses:
                return False
            host.unpause(domid)
        case "resume":
            if not guest.suspended:
                return False
            host.resume(domid)
        case "suspend":
            if not guest.runs:
                return False
            host.suspend(domid, SuspendLimits())
        case _:
            raise AssertionError(what)
    return True


def sequences() -> list[tuple[str, ...]]:
    return [acts for length in range(4) for acts in itertools.product(ACTS, repeat=length)]


def is_told_apart(stage: str, acts: Sequence[str]) -> bool:
    """Whether anything tells what is the operator's."""
    if stage == "asked, followed":
        # He has let it run, and suspended it again: our request may have led to either.
        return "suspend" not in acts
    # He has taken our pause back and made one of his own, and it has not run: it is the same.
    own = 0
    for what in acts:
        own += {"pause": 1, "unpause": -1}.get(what, 0)
        if own < 0:
            return stage == "unpaused" or "pause" not in acts
    return True


@pytest.mark.parametrize("stage", STAGES)
def test_what_an_operator_has_done_since_stays(stage: str) -> None:
    fault, ours = STAGES[stage]
    for acts in sequences():
        bench = killed(fault)
        guest = bench.host.simulated(bench.domid)
        guest.unread_request = stage == "asked, unread"
        suspended_by_us = guest.suspended
        ran = guest.cpu_time
        if not all(act(bench, what) for what in acts) or not is_told_apart(stage, acts):
            bench.end_jobs()
            continue
        has_run = guest.cpu_time != ran
        # What he wants: his own pauses, and his own suspend.
        pauses = guest.pauses if has_run else max(0, guest.pauses - ours)
        suspended = guest.suspended and (has_run or not suspended_by_us)
        bench.end_jobs()
        assert guest.pauses == pauses, (stage, acts)
        assert guest.suspended == suspended, (stage, acts)


@pytest.mark.parametrize("stage", STAGES)
def test_while_somebody_saves_the_guest_nothing_of_its_standing_is_changed(stage: str) -> None:
    fault, _ = STAGES[stage]
    bench = killed(fault)
    guest = bench.host.simulated(bench.domid)
    guest.somebody = "process 5 (xl save)"
    before = guest.suspended
    work = bench.work()
    work.recover()
    assert guest.suspended == before
    assert not bench.host.crashes


@pytest.mark.parametrize("pause", [True, False])
@pytest.mark.parametrize("failing", ["resume", "unpause"])
def test_a_guest_that_could_not_be_let_go_is_left_as_the_operator_has_it(
    failing: str,
    pause: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    bench = Bench.build()
    mfns = bench.mark(bench.layout.plain[0])
    xen = FaultyHypervisor(bench.host, Fault(method=failing, times=10))
    report = bench.exchange(mfns, xen)
    assert report.stuck is not None
    guest = bench.host.simulated(bench.domid)
    if guest.pauses:
        bench.host.unpause(bench.domid)
    bench.host.resume(bench.domid)
    if pause:
        bench.host.pause(bench.domid)
    bench.look_after([report])
    assert (guest.pauses, guest.suspended) == (int(pause), False)


def test_a_pause_of_a_guest_that_we_could_not_resume_is_not_taken_back() -> None:
    bench = Bench.build()
    mfns = bench.mark(bench.layout.plain[0])
    # Unpaused it was; so any pause that is there now is the operator's.
    report = bench.exchange(mfns, FaultyHypervisor(bench.host, Fault(method="resume", times=10)))
    bench.host.pause(bench.domid)
    bench.look_after([report])
    guest = bench.host.simulated(bench.domid)
    assert (guest.pauses, guest.suspended) == (1, False)


def test_a_pause_while_a_guest_may_follow_late_is_not_taken_back() -> None:
    bench = killed(Fault(method="suspend", moment=Moment.AFTER, kills=True))
    bench.host.pause(bench.domid)
    # It cannot be resumed at first.
    xen = FaultyHypervisor(bench.host, Fault(method="resume", times=10))
    reports = bench.end_jobs(xen)
    assert [report.stuck is not None for report in reports] == [True]
    guest = bench.host.simulated(bench.domid)
    assert (guest.pauses, guest.suspended) == (1, False)


def test_a_pause_in_the_moment_before_our_own_is_taken_for_ours() -> None:
    # Noted, not made yet: that lasts for microseconds, and a guest that nobody unpauses is worse.
    bench = killed(Fault(method="pause", moment=Moment.BEFORE, kills=True))
    bench.host.pause(bench.domid)
    bench.end_jobs()
    bench.assert_guest_runs_unharmed()


def test_a_guest_that_was_paused_by_somebody_and_of_whom_no_time_is_known_is_left_so() -> None:
    bench = killed(Fault(method="pause", moment=Moment.AFTER, kills=True))
    [kept] = bench.journal.kept.values()
    # As an earlier release left it: held, and its processor time not noted yet.
    assert kept.hold is not None
    kept.hold = type(kept.hold)(cpu_time=None)
    bench.host.unpause(bench.domid)
    bench.host.resume(bench.domid)
    bench.host.pause(bench.domid)
    [report] = bench.end_jobs()
    assert f"xl unpause {bench.domid}" in report.detail
    guest = bench.host.simulated(bench.domid)
    assert (guest.pauses, guest.shutdown) == (1, None)
