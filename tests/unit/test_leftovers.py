"""What an earlier daemon left of exchanges, where there will be no service to look after it."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest

from pgofflined.aftercare import Aftercare, CareTimes
from pgofflined.core.domains import ShutdownReason
from pgofflined.core.frames import Domid
from pgofflined.core.suspending import SuspendSupport
from pgofflined.exchanging import RECOVERY_TRIES
from pgofflined.guestcare import GuestCare
from pgofflined.leftovers import Leftovers
from pgofflined.ports import Hypervisor, SuspendLimits, nothing
from pgofflined.sim.faults import Fault, FaultyHypervisor, Killed, Moment
from tests.crash.killing import PAGES, run
from tests.unit.exchanger.conftest import Bench


@pytest.fixture
def bench() -> Bench:
    return Bench.build()


def killed(bench: Bench, method: str, moment: Moment) -> None:
    mfns = bench.mark(*PAGES["data"](bench.layout))
    dying = FaultyHypervisor(bench.host, Fault(method=method, moment=moment, kills=True))
    with pytest.raises(Killed):
        run(bench, mfns, dying)


def leftovers(bench: Bench, xen: Hypervisor | None = None) -> Leftovers:
    return Leftovers(xen or bench.host, bench.journal, bench.host.clock, frozenset)


def test_it_does_not_end_while_a_guest_is_held(bench: Bench) -> None:
    killed(bench, "exchange", Moment.AFTER)
    failing = FaultyHypervisor(bench.host, Fault(method="condition", times=3))
    left = leftovers(bench, failing)
    left.recover()
    assert bench.host.domain(bench.domid).shutdown is ShutdownReason.SUSPEND
    left.see_out(sleep=bench.host.clock.wait)
    bench.assert_guest_runs_unharmed()


def test_it_does_not_end_while_somebody_saves_the_guest(bench: Bench) -> None:
    killed(bench, "exchange", Moment.AFTER)
    guest = bench.host.simulated(bench.domid)
    guest.somebody = "process 5 (xl save)"
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        bench.host.clock.wait(seconds)
        waits.append(seconds)
        if len(waits) == 2 * RECOVERY_TRIES:
            guest.somebody = None

    left = leftovers(bench)
    left.recover()
    left.see_out(sleep=sleep)
    assert len(waits) == 2 * RECOVERY_TRIES
    bench.assert_guest_runs_unharmed()


def test_a_guest_that_follows_the_request_late_is_waited_for(bench: Bench) -> None:
    killed(bench, "suspend", Moment.BEFORE)
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        bench.host.clock.wait(seconds)
        waits.append(seconds)
        if len(waits) == 2:
            bench.host.suspend(bench.domid, SuspendLimits())

    left = leftovers(bench)
    left.recover()
    left.see_out(sleep=sleep)
    assert len(waits) == 2
    bench.assert_guest_runs_unharmed()


def test_a_guest_that_was_given_up_before_it_followed_the_request_is_waited_for(
    bench: Bench,
) -> None:
    killed(bench, "suspend", Moment.BEFORE)
    failing = Fault(method="withdraw_suspend", times=RECOVERY_TRIES + 1)
    left = leftovers(bench, FaultyHypervisor(bench.host, failing))
    left.recover()
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        bench.host.clock.wait(seconds)
        waits.append(seconds)
        if len(waits) == RECOVERY_TRIES + 2:
            bench.host.suspend(bench.domid, SuspendLimits())

    left.see_out(sleep=sleep)
    assert len(waits) >= RECOVERY_TRIES + 2
    bench.assert_guest_runs_unharmed()


def test_without_anything_left_it_ends_at_once(bench: Bench) -> None:
    left = leftovers(bench)
    left.recover()
    left.see_out(sleep=lambda _: pytest.fail("nothing is waited for"))


def test_a_service_that_could_not_be_started_leaves_no_guest_that_was_handed_to_it(
    bench: Bench,
) -> None:
    killed(bench, "exchange", Moment.AFTER)
    guest = bench.host.simulated(bench.domid)
    guest.somebody = "process 5 (xl save)"
    left = leftovers(bench)
    left.recover()
    work = bench.work()
    left.hand_over(GuestCare(work, aftercare(bench)))
    assert work.has_rest

    def sleep(seconds: float) -> None:
        bench.host.clock.wait(seconds)
        guest.somebody = None

    left.see_out(sleep=sleep)
    assert work.recover_rest() == ()
    bench.assert_guest_runs_unharmed()
    assert bench.journal.kept == {}


def test_the_service_watches_guests_that_may_follow_late(bench: Bench) -> None:
    killed(bench, "suspend", Moment.BEFORE)
    left = leftovers(bench)
    left.recover()
    care = aftercare(bench)
    left.hand_over(GuestCare(bench.work(), care))
    bench.host.suspend(bench.domid, SuspendLimits())
    care.look()
    bench.assert_guest_runs_unharmed()


def test_the_service_knows_of_a_guest_that_crashed_when_an_earlier_daemon_had_asked_it(
    bench: Bench,
) -> None:
    killed(bench, "suspend", Moment.AFTER)
    bench.host.crash(bench.domid, "it cannot suspend itself")
    left = leftovers(bench)
    left.recover()
    work = bench.work()
    left.hand_over(GuestCare(work, aftercare(bench)))
    told = work.objection(bench.host.domain(bench.domid), SuspendSupport.ANNOUNCED)
    assert told is not None
    assert "has ended before" in told.detail


def test_a_signal_to_stop_waits_until_a_guest_is_whole(bench: Bench) -> None:
    killed(bench, "exchange", Moment.AFTER)
    came: list[bool] = []

    class Stopped(FaultyHypervisor):
        def resume(self, domid: Domid, before: Callable[[], None] = nothing) -> None:
            signal.raise_signal(signal.SIGTERM)
            assert came == []
            super().resume(domid, before)

    before = signal.signal(signal.SIGTERM, lambda *_: came.append(True))
    try:
        leftovers(bench, Stopped(bench.host)).recover()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert came == [True]
    bench.assert_guest_runs_unharmed()


def aftercare(bench: Bench) -> Aftercare:
    return Aftercare(bench.host, bench.host.clock, times=CareTimes(), ended=bench.journal.done_with)
