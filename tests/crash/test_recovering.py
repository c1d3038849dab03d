"""What the next process finds of a job that was killed, and whom it leaves alone.

A guest that has not run since it was held is put right and let go however long ago that was; one
that has is never touched.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

import pytest

from pgofflined.core.frames import Mfn
from pgofflined.core.moves import PteWrite, frames_of
from pgofflined.core.recovery import Recovered
from pgofflined.exchanger import recover
from pgofflined.exchanging import RECOVERY_SECONDS, RECOVERY_TRIES
from pgofflined.jobstore import JobStore
from pgofflined.ports import SuspendLimits
from pgofflined.sim.faults import Fault, FaultyHypervisor, Killed, Moment
from pgofflined.sim.layout import DIRECT_MAP
from tests.single import set_ptes
from tests.unit.exchanger.conftest import Bench

if TYPE_CHECKING:
    pass

from tests.crash.killing import (
    PAGES,
    MortalJournal,
    assert_ended_well,
    killed,
    records_of_a_good_run,
    run,
)

# What concerns Xen and xenstored alone: a mark that was set for the exchange is taken back from
# whosever it is.
ONLY_MARKS = {"condition", "version", "query", "online", "tell_resumed"}


def test_a_guest_that_stays_beyond_help_is_let_go_and_its_record_kept_for_a_person() -> None:
    bench = Bench.build()
    dying = Fault(method="exchange", moment=Moment.AFTER, kills=True)
    with pytest.raises(Killed):
        run(bench, bench.mark(*PAGES["data"](bench.layout)), FaultyHypervisor(bench.host, dying))
    broken = Fault(method="write_frames", times=10**6)
    reports = bench.end_jobs(FaultyHypervisor(bench.host, broken))
    assert [report.outcome for report in reports] == [Recovered.LEFT_ALONE]
    info = bench.host.domain(bench.domid)
    assert info.shutdown is None
    assert not info.paused
    assert bench.journal.kept == {}
    [kept] = bench.journal.aside
    assert kept.group is not None


@pytest.mark.parametrize("paused", [False, True])
@pytest.mark.parametrize("what", ["an entry", "a broken table"])
def test_a_guest_that_is_not_as_it_was_left_is_held_for_a_while_and_then_let_go(
    what: str,
    paused: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    bench = killed(Fault(method="update_ptes", moment=Moment.AFTER, kills=True))
    [kept] = bench.journal.kept.values()
    assert kept.group is not None
    table, index = int(kept.group.references.tables[0]), int(kept.group.references.indexes[0])
    if what == "an entry":
        other = bench.host.frame_of(bench.domid, bench.layout.plain[9])
        write = PteWrite(table=Mfn(table), index=index, value=other << 12 | 0x25)
        set_ptes(bench.host, bench.domid, [write])
    else:
        bench.host.poison(table, known=True)
    if not paused:
        bench.host.unpause(bench.domid)
    xen = FaultyHypervisor(bench.host)
    reports = bench.end_jobs(xen)
    assert [report.outcome for report in reports] == [Recovered.LEFT_ALONE]
    assert not {"update_ptes", "exchange", "write_frames"} & set(xen.trace.methods)
    info = bench.host.domain(bench.domid)
    assert (info.shutdown, info.paused) == (None, False)
    assert len(bench.journal.aside) == 1


@pytest.mark.parametrize("stops", [False, True])
@pytest.mark.parametrize("method", ["update_ptes", "exchange", "write_frames"])
def test_a_guest_that_has_run_in_the_middle_of_a_change_is_left_as_it_is(
    method: str,
    stops: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    bench = Bench.build()
    dying = Fault(method=method, moment=Moment.AFTER, kills=True)
    with pytest.raises(Killed):
        run(bench, bench.mark(*PAGES["data"](bench.layout)), FaultyHypervisor(bench.host, dying))
    bench.host.unpause(bench.domid)
    bench.host.resume(bench.domid)
    if stops:
        bench.host.suspend(bench.domid, SuspendLimits())
    xen = FaultyHypervisor(bench.host)
    [report] = bench.end_jobs(xen)
    assert report.outcome is Recovered.LEFT_ALONE
    assert "let go by somebody else" in report.detail
    assert set(xen.trace.methods) <= ONLY_MARKS
    [aside] = bench.journal.aside
    assert aside.group is not None


def test_what_a_guest_has_written_since_it_was_let_go_is_not_written_over() -> None:
    bench = Bench.build()
    [pfn] = PAGES["data"](bench.layout)
    xen = FaultyHypervisor(bench.host)
    mfns = bench.mark(pfn)
    settled = records_of_a_good_run(PAGES["data"]) - 1
    with pytest.raises(Killed):
        run(bench, mfns, xen, MortalJournal(bench.journal, xen, settled))
    assert next(iter(bench.journal.kept.values())).group is not None
    bench.host.unpause(bench.domid)
    bench.host.resume(bench.domid)
    address = DIRECT_MAP + (pfn << 12)
    bench.host.pv(bench.domid).write(address, 0xBEEF)
    bench.host.suspend(bench.domid, SuspendLimits())
    bench.end_jobs()
    home = frames_of([bench.host.frame_of(bench.domid, pfn)])
    assert int(bench.host.read_frames(bench.domid, home)[0, 0]) == 0xBEEF


@pytest.mark.parametrize("name", sorted(PAGES))
@pytest.mark.parametrize("method", ["pause", "update_ptes", "exchange", "write_frames", "unpause"])
def test_a_guest_that_somebody_has_resumed_and_that_only_our_pause_keeps_is_put_right(
    name: str, method: str
) -> None:
    # What xl does when a save fails.
    bench = Bench.build()
    pfns = PAGES[name](bench.layout)
    dying = Fault(method=method, moment=Moment.BEFORE, kills=True)
    if method == "pause":
        dying = replace(dying, moment=Moment.AFTER)
    with pytest.raises(Killed):
        run(bench, bench.mark(*pfns), FaultyHypervisor(bench.host, dying))
    bench.host.resume(bench.domid)
    reports = bench.end_jobs()
    assert [report.outcome for report in reports] == [Recovered.FINISHED]
    assert_ended_well(bench, pfns, reports)


@pytest.mark.parametrize("seconds", [0, 3600, 10**6])
@pytest.mark.parametrize("method", ["pause", "update_ptes", "exchange", "unpause", "resume"])
def test_a_guest_that_was_held_is_let_go_however_long_ago_that_was(
    method: str, seconds: int
) -> None:
    bench = killed(Fault(method=method, kills=True))
    bench.host.clock.wait(seconds)
    reports = bench.end_jobs()
    assert [report.outcome for report in reports] == [Recovered.FINISHED]
    assert_ended_well(bench, PAGES["data"](bench.layout), reports)


def test_a_guest_that_could_not_be_let_go_is_by_the_next_process_however_late() -> None:
    bench = Bench.build()
    mfns = bench.mark(*PAGES["data"](bench.layout))
    report = bench.exchange(mfns, FaultyHypervisor(bench.host, Fault(method="resume", times=10**6)))
    assert report.stuck is not None
    bench.host.clock.wait(10_000)
    assert [each.outcome for each in bench.end_jobs()] == [Recovered.FINISHED]
    bench.assert_guest_runs_unharmed()


def test_a_guest_that_follows_late_is_resumed_by_whichever_process_is_there() -> None:
    bench = killed(Fault(method="suspend", moment=Moment.BEFORE, kills=True))
    bench.host.simulated(bench.domid).suspends_at = bench.host.clock.monotonic() + 20
    # A process that finds it running, and is killed before it stands still.
    [first] = bench.work().recover()
    assert first.may_suspend_late
    bench.host.clock.wait(30)
    assert bench.host.domain(bench.domid).shutdown is not None
    [second] = bench.end_jobs()
    assert second.outcome is Recovered.FINISHED
    assert_ended_well(bench, [], [second])


@pytest.mark.parametrize("what", ["shared_info", "cpu_time", "uuid"])
def test_a_record_of_another_domain_with_the_same_domid_is_not_followed(what: str) -> None:
    bench = killed(Fault(method="exchange", kills=True))
    [kept] = bench.journal.kept.values()
    other = {
        "shared_info": replace(kept.record, shared_info=Mfn((kept.record.shared_info or 0) + 1)),
        "cpu_time": replace(kept.record, cpu_time=10**15),
        "uuid": replace(kept.record, domain=replace(kept.record.domain, uuid=UUID(int=3))),
    }[what]
    kept.record = other
    xen = FaultyHypervisor(bench.host)
    [report] = bench.work(xen).recover()
    assert report.outcome is Recovered.GONE
    assert set(xen.trace.methods) <= ONLY_MARKS


def test_a_process_that_is_killed_while_it_gives_up_has_not_lost_the_record() -> None:
    bench = killed(Fault(method="exchange", moment=Moment.AFTER, kills=True))
    broken = Fault(method="write_frames", times=10**6)
    with pytest.raises(Killed):
        bench.end_jobs(FaultyHypervisor(bench.host, broken, Fault(method="unpause", kills=True)))
    reports = bench.end_jobs()
    assert [report.outcome for report in reports] == [Recovered.FINISHED]
    assert_ended_well(bench, PAGES["data"](bench.layout), reports)


@pytest.mark.parametrize("method", ["exchange", "unpause"])
def test_giving_up_does_not_resume_a_guest_that_has_run_and_is_suspended_for_another(
    method: str,
) -> None:
    bench = killed(Fault(method=method, moment=Moment.BEFORE, kills=True))
    bench.host.unpause(bench.domid)
    bench.host.resume(bench.domid)
    bench.host.suspend(bench.domid, SuspendLimits())
    xen = FaultyHypervisor(bench.host, Fault(method="somebody_at", times=10**6))
    bench.end_jobs(xen)
    assert not {"unpause", "resume"} & set(xen.trace.methods)


def test_giving_up_does_not_resume_a_guest_that_somebody_saves() -> None:
    bench = killed(Fault(method="exchange", moment=Moment.AFTER, kills=True))
    guest = bench.host.simulated(bench.domid)
    guest.somebody = "process 5 (xl save)"
    xen = FaultyHypervisor(bench.host, Fault(method="write_frames", times=10**6))
    work = bench.work(xen)
    work.recover()
    for _ in range(2 * RECOVERY_TRIES):
        bench.host.clock.wait(RECOVERY_SECONDS)
        assert work.recover_rest() == ()
    assert not {"unpause", "resume"} & set(xen.trace.methods)
    guest.somebody = None
    bench.host.clock.wait(RECOVERY_SECONDS)
    [report] = work.recover_rest()
    assert report.outcome is Recovered.LEFT_ALONE
    assert bench.host.domain(bench.domid).shutdown is None


def test_a_record_of_a_guest_that_cannot_be_let_go_is_put_aside_when_it_is() -> None:
    bench = killed(Fault(method="exchange", moment=Moment.AFTER, kills=True))
    broken = Fault(method="write_frames", times=10**6), Fault(method="resume", times=10)
    [report] = bench.end_jobs(FaultyHypervisor(bench.host, *broken))
    assert report.outcome is Recovered.LEFT_ALONE
    assert report.stuck is not None
    # Aftercare has let it go.
    assert bench.host.domain(bench.domid).shutdown is None
    assert bench.journal.kept == {}
    [aside] = bench.journal.aside
    assert aside.group is not None


def test_a_record_of_a_guest_that_ends_while_it_is_given_up_is_removed() -> None:
    bench = killed(Fault(method="exchange", moment=Moment.AFTER, kills=True))
    broken = Fault(method="write_frames", times=10**6)
    last = Fault(
        method="condition",
        nth=RECOVERY_TRIES + 4,
        act=lambda: bench.host.destroy(bench.domid),
    )
    reports = bench.end_jobs(FaultyHypervisor(bench.host, broken, last))
    assert [report.outcome for report in reports] == [Recovered.GONE]
    assert bench.journal.kept == {}


def test_a_pause_before_ours_was_noted_is_not_taken_back() -> None:
    bench = killed(Fault(method="suspend", moment=Moment.AFTER, kills=True))
    bench.host.pause(bench.domid)
    [report] = bench.end_jobs()
    assert report.outcome is Recovered.FINISHED
    info = bench.host.domain(bench.domid)
    assert (info.shutdown, info.paused) == (None, True)


def test_giving_up_does_not_take_back_a_pause_that_is_not_ours() -> None:
    bench = killed(Fault(method="suspend", moment=Moment.BEFORE, kills=True))
    bench.host.pause(bench.domid)
    xen = FaultyHypervisor(bench.host, Fault(method="withdraw_suspend", times=10**6))
    bench.end_jobs(xen)
    assert bench.host.domain(bench.domid).paused


def test_a_record_whose_removal_was_cut_off_is_none(tmp_path: Path) -> None:
    bench = killed(Fault(method="unpause", kills=True))
    [kept] = bench.journal.kept.values()
    store = JobStore(tmp_path / "jobs")
    job = store.open(kept.record)
    job.hold(0)
    for path in sorted((tmp_path / "jobs").iterdir(), key=lambda path: len(path.name))[:1]:
        path.unlink()
    assert JobStore(tmp_path / "jobs").unfinished() == []
    assert list((tmp_path / "jobs").iterdir()) == []


def test_memory_is_put_right_before_it_is_asked_whether_somebody_else_is_at_it() -> None:
    bench = killed(Fault(method="exchange", moment=Moment.AFTER, kills=True))
    deaf = Fault(method="somebody_at", times=10**6)
    [report] = bench.end_jobs(FaultyHypervisor(bench.host, deaf))
    assert report.outcome is Recovered.LEFT_ALONE
    bench.assert_guest_runs_unharmed()


def test_a_guest_that_stands_still_long_after_our_request_is_left_to_the_operator() -> None:
    bench = Bench.build()
    dying = Fault(method="suspend", kills=True)
    with pytest.raises(Killed):
        run(bench, bench.mark(*PAGES["data"](bench.layout)), FaultyHypervisor(bench.host, dying))
    bench.host.clock.wait(3600)
    # Somebody saves the guest.
    bench.host.suspend(bench.domid, SuspendLimits())
    xen = FaultyHypervisor(bench.host)
    reports = bench.end_jobs(xen)
    assert [report.outcome for report in reports] == [Recovered.STANDS_STILL]
    assert f"xl resume {bench.domid}" in reports[0].detail
    assert "resume" not in xen.trace.methods
    assert bench.journal.kept == {}


def test_giving_up_does_not_let_a_guest_go_whose_record_cannot_be_read() -> None:
    bench = killed(Fault(method="exchange", moment=Moment.AFTER, kills=True))
    [left] = bench.journal.unfinished()
    left = replace(left, group=None, unreadable="it is of format 9")
    xen = FaultyHypervisor(bench.host, Fault(method="condition"))
    report = recover(left, xen, now=bench.host.clock.monotonic(), last_try=True)
    assert report.outcome is Recovered.NOT_YET
    assert not {"unpause", "resume"} & set(xen.trace.methods)
    report = recover(left, xen, now=bench.host.clock.monotonic(), last_try=True)
    assert report.outcome is Recovered.HELD
    assert bench.host.domain(bench.domid).paused
