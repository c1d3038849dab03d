"""The daemon is killed while it exchanges pages of a guest that somebody else saves or has saved.

Nothing is resumed in the middle of that, and nothing is left standing still by us after it.
"""

from __future__ import annotations

import pytest

from pgofflined.core.domains import ShutdownReason
from pgofflined.core.outcomes import Exchanged, Refusal, RefusalReason
from pgofflined.core.recovery import Recovered, RecoveryReport
from pgofflined.exchanging import RECOVERY_SECONDS, RECOVERY_TRIES
from pgofflined.ports import SuspendLimits
from pgofflined.sim.faults import Fault, FaultyHypervisor, Killed, Moment
from tests.crash.killing import PAGES, assert_ended_well, run
from tests.unit.exchanger.conftest import Bench


def killed_asking(*, moment: Moment) -> Bench:
    """A guest that a process had asked to suspend, or was just about to, when it was killed."""
    bench = Bench.build()
    dying = Fault(method="suspend", moment=moment, kills=True)
    with pytest.raises(Killed):
        run(bench, bench.mark(*PAGES["data"](bench.layout)), FaultyHypervisor(bench.host, dying))
    return bench


def test_a_guest_that_suspends_with_our_request_unread_does_so_for_somebody_else() -> None:
    bench = killed_asking(moment=Moment.BEFORE)
    bench.host.suspend(bench.domid, SuspendLimits())
    bench.host.simulated(bench.domid).unread_request = True
    xen = FaultyHypervisor(bench.host)
    [report] = bench.end_jobs(xen)
    assert (report.outcome, report.may_suspend_late) == (Recovered.NOTHING_TO_DO, False)
    assert "somebody else" in report.detail
    assert not {"resume", "unpause"} & set(xen.trace.methods)
    assert bench.host.domain(bench.domid).shutdown is ShutdownReason.SUSPEND
    assert not bench.host.simulated(bench.domid).unread_request
    assert bench.journal.kept == {}


@pytest.mark.parametrize("unread", [True, False])
def test_only_a_request_that_was_read_may_still_be_followed(unread: bool) -> None:  # noqa: FBT001
    bench = killed_asking(moment=Moment.BEFORE)
    bench.host.simulated(bench.domid).unread_request = unread
    [report] = bench.end_jobs()
    assert (report.outcome, report.may_suspend_late) == (Recovered.NOTHING_TO_DO, not unread)


@pytest.mark.parametrize("method", ["suspend", "exchange", "update_ptes"])
def test_a_guest_that_somebody_saves_is_left_to_him_and_helped_when_he_has_ended(
    method: str, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench.build()
    dying = Fault(method=method, moment=Moment.AFTER, kills=True)
    with pytest.raises(Killed):
        run(bench, bench.mark(*PAGES["data"](bench.layout)), FaultyHypervisor(bench.host, dying))
    guest = bench.host.simulated(bench.domid)
    # It waits for the guest to read its request, which one that stands still does not do.
    guest.somebody, guest.unread_request = "process 5 (xl save)", True
    xen = FaultyHypervisor(bench.host)
    work = bench.work(xen)
    assert work.recover() == ()
    for _ in range(2 * RECOVERY_TRIES):
        bench.host.clock.wait(RECOVERY_SECONDS)
        assert work.recover_rest() == ()
    # Its memory is put right, but it is not let go, and the request is not touched.
    assert not {"unpause", "resume", "withdraw_suspend"} & set(xen.trace.methods)
    assert all(kept.group is None for kept in bench.journal.kept.values())
    # Once, and before that how far what he saves can be trusted, where memory was put right.
    assert caplog.text.count("process 5 (xl save)") == (1 if method == "suspend" else 2)
    assert ("do not trust what it has saved" in caplog.text) is (method != "suspend")
    # It has given up, and taken its request back.
    guest.somebody, guest.unread_request = None, False
    bench.host.clock.wait(RECOVERY_SECONDS)
    [report] = work.recover_rest()
    assert report.outcome is Recovered.FINISHED
    assert_ended_well(bench, PAGES["data"](bench.layout), [report])


def test_tries_are_counted_only_where_something_was_tried() -> None:
    bench = Bench.build()
    dying = Fault(method="exchange", moment=Moment.AFTER, kills=True)
    with pytest.raises(Killed):
        run(bench, bench.mark(*PAGES["data"](bench.layout)), FaultyHypervisor(bench.host, dying))
    guest = bench.host.simulated(bench.domid)
    guest.somebody = "process 5 (xl save)"
    work = bench.work(FaultyHypervisor(bench.host, Fault(method="write_frames", times=6)))
    work.recover()
    for _ in range(RECOVERY_TRIES):
        bench.host.clock.wait(RECOVERY_SECONDS)
        work.recover_rest()
    guest.somebody = None
    reports: list[RecoveryReport] = []
    while work.has_rest:
        bench.host.clock.wait(RECOVERY_SECONDS)
        reports += work.recover_rest()
    assert [report.outcome for report in reports] == [Recovered.FINISHED]
    assert_ended_well(bench, PAGES["data"](bench.layout), reports)


def test_no_exchange_begins_in_a_guest_before_what_was_left_of_another_is_ended() -> None:
    bench = killed_asking(moment=Moment.BEFORE)
    guest = bench.host.simulated(bench.domid)
    guest.somebody = "process 5 (xl save)"
    [mfn] = bench.mark(bench.layout.plain[7])
    xen = FaultyHypervisor(bench.host)
    work = bench.work(xen)
    work.recover()
    # The process ends, and a retry of a page comes before the next look at what was left.
    guest.somebody = None
    [refusal] = work.run(bench.identity, (mfn,)).results
    assert isinstance(refusal, Refusal)
    assert refusal.reason is RefusalReason.DOMAIN_BUSY
    assert "suspend" not in xen.trace.methods
    bench.host.clock.wait(RECOVERY_SECONDS)
    reports = work.recover_rest()
    # Nor before it is over that the guest may follow the request that it had read.
    [refusal] = work.run(bench.identity, (mfn,)).results
    assert isinstance(refusal, Refusal)
    bench.look_after(reports, ended=work.done_with)
    [moved] = work.run(bench.identity, (mfn,)).results
    assert isinstance(moved, Exchanged)
    bench.assert_guest_runs_unharmed()
