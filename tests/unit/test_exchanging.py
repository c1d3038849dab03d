"""Exchange jobs as the workers run them, and the end of those that were cut off."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import uuid4

import pytest

from pgofflined.core.domains import DomainIdentity, DomainInfo, ShutdownReason
from pgofflined.core.errors import PortError
from pgofflined.core.events import Event
from pgofflined.core.frames import Domid, Mfn
from pgofflined.core.outcomes import Exchanged, ExchangeReport, Refusal, RefusalReason, Standing
from pgofflined.core.policy import ExchangePolicy
from pgofflined.core.recovery import Recovered, RecoveryReport
from pgofflined.core.suspending import SuspendSupport
from pgofflined.exchanging import RECOVERY_SECONDS, RECOVERY_TRIES, Exchanging
from pgofflined.ports import Hold, Hypervisor, JobRecord, Journal, OpenJob, UnfinishedJob
from pgofflined.sim.faults import Fault, FaultyHypervisor, Killed, Moment
from pgofflined.sim.guests import Answer, SuspendBehaviour
from tests.crash.killing import PAGES, hosts_of, run
from tests.unit.exchanger.conftest import UNFIXED, Bench
from tests.unit.whole_pages import fields, told

FOR_EVER = 10**6
DENIED = "domains.deny names it"


@pytest.fixture
def bench() -> Bench:
    return Bench.build()


def broken() -> None:
    raise RuntimeError("a fault of our own")


def working(
    bench: Bench,
    xen: Hypervisor | None = None,
    journal: Journal | None = None,
    **others: Any,  # noqa: ANN401 - what Exchanging is made with, each of another type
) -> Exchanging:
    return Exchanging(
        xen=xen or bench.host,
        journal=journal or bench.journal,
        clock=bench.host.clock,
        **{"policy": ExchangePolicy, "poisoned": frozenset, **others},
    )


def page(bench: Bench) -> tuple[Mfn, ...]:
    return tuple(bench.mark(bench.layout.plain[0]))


def refusal(report: ExchangeReport) -> Refusal:
    [result] = report.results
    assert isinstance(result, Refusal)
    return result


def is_moved(report: ExchangeReport) -> bool:
    [result] = report.results
    return isinstance(result, Exchanged)


@dataclass
class Records:
    """Records that an earlier process has left, of whichever kind."""

    bench: Bench
    jobs: list[UnfinishedJob] = field(default_factory=list)
    asked: int = 0

    def left(
        self,
        *,
        hold: Hold | None = None,
        unreadable: str | None = None,
        ago: float = 1.0,
    ) -> UnfinishedJob:
        info = self.bench.host.domain(self.bench.domid)
        record = JobRecord(
            domain=info.identity,
            shared_info=info.shared_info,
            cpu_time=info.cpu_time,
            began=self.bench.host.clock.monotonic() - ago,
        )
        job = self.bench.journal.open(record)
        unfinished = UnfinishedJob(
            record=record, hold=hold, group=None, job=job, unreadable=unreadable
        )
        self.jobs.append(unfinished)
        return unfinished

    def open(self, record: JobRecord) -> OpenJob:
        return self.bench.journal.open(record)

    def unfinished(self) -> Sequence[UnfinishedJob]:
        self.asked += 1
        return self.jobs

    def done_with(self, domain: DomainIdentity) -> None:
        self.bench.journal.done_with(domain)


class Full(Records):
    """Where nothing more can be kept."""

    def open(self, record: JobRecord) -> OpenJob:
        raise PortError(f"no room for d{record.domain.domid}")


# Jobs.


def test_no_job_begins_in_a_guest_that_is_looked_after(bench: Bench) -> None:
    xen = FaultyHypervisor(bench.host)
    work = working(bench, xen)
    mfns = page(bench)
    work.hold_off(bench.identity)
    refused = refusal(work.run(bench.identity, mfns))
    assert refused.reason is RefusalReason.DOMAIN_BUSY
    assert refused.mfn == mfns[0]
    assert refused.detail == f"what was left of an earlier exchange in d{bench.domid} comes first"
    assert xen.trace.methods == []
    assert not work.is_under_way(bench.identity)
    work.done_with(bench.identity)
    assert is_moved(work.run(bench.identity, mfns))


def test_other_guests_have_their_jobs_meanwhile(bench: Bench) -> None:
    work = working(bench)
    work.hold_off(replace(bench.identity, uuid=uuid4()))
    assert is_moved(work.run(bench.identity, page(bench)))


@pytest.mark.parametrize("act", [lambda: None, broken])
def test_a_job_is_under_way_until_it_has_ended_however(
    bench: Bench, act: Callable[[], None]
) -> None:
    seen: list[bool] = []

    def look() -> None:
        seen.append(work.is_under_way(bench.identity))
        act()

    work = working(bench, FaultyHypervisor(bench.host, Fault(method="suspend_support", act=look)))
    assert not work.is_under_way(bench.identity)
    work.run(bench.identity, page(bench))
    assert seen == [True]
    assert not work.is_under_way(bench.identity)


def test_a_fault_of_our_own_is_told_and_costs_its_job_alone(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    work = working(bench, FaultyHypervisor(bench.host, Fault(method="suspend_support", act=broken)))
    mfns = page(bench)
    report = work.run(bench.identity, mfns)
    assert (report.domain, report.blackout) == (bench.identity, None)
    refused = refusal(report)
    assert (refused.mfn, refused.reason) == (mfns[0], RefusalReason.INTERNAL)
    assert refused.detail == "a fault of our own, which the journal tells; please report it"
    [record] = caplog.records
    assert f"d{bench.domid} failed by a fault of our own" in record.getMessage()
    assert record.exc_info
    assert is_moved(work.run(bench.identity, mfns))


def test_a_guest_is_asked_with_the_times_of_the_policy_as_it_is_then(bench: Bench) -> None:
    policies = [
        ExchangePolicy(acknowledge_timeout=3.0, suspend_timeout=4.0, max_blackout=5.0),
        ExchangePolicy(acknowledge_timeout=6.0, suspend_timeout=7.0, max_blackout=8.0),
    ]
    xen = FaultyHypervisor(bench.host)
    work = working(bench, xen, policy=lambda: policies[0])
    for _ in range(2):
        assert is_moved(work.run(bench.identity, page(bench)))
        policies.reverse()
    limits = [call.args[1] for call in xen.trace.of("suspend")]
    times = [(one.acknowledge, one.suspend, one.blackout) for one in limits]  # type: ignore[attr-defined]
    assert times == [(3.0, 4.0, 5.0), (6.0, 7.0, 8.0)]


def test_a_guest_that_must_not_be_suspended_is_not(bench: Bench) -> None:
    asked: list[Domid] = []

    def denial(domain: DomainInfo) -> str:
        asked.append(domain.domid)
        return DENIED

    refused = refusal(working(bench, denial=denial).run(bench.identity, page(bench)))
    assert refused.reason is RefusalReason.DENIED
    assert DENIED in refused.detail
    assert set(asked) == {bench.domid}


def test_no_page_of_a_guest_that_xen_has_hit_is_marked() -> None:
    with hosts_of(UNFIXED):
        bench = Bench.build()
    asked: list[DomainIdentity] = []

    def wedged(domain: DomainIdentity) -> bool:
        asked.append(domain)
        return True

    xen = FaultyHypervisor(bench.host)
    assert not is_moved(working(bench, xen, wedged=wedged).run(bench.identity, page(bench)))
    assert set(asked) == {bench.identity}
    assert not {"exchange", "offline"} & set(xen.trace.methods)


@pytest.mark.parametrize("restored", [True, False])
def test_a_silent_guest_is_asked_only_if_it_came_of_one_that_was_moved(
    bench: Bench, *, restored: bool
) -> None:
    bench.host.simulated(bench.domid).suspend_support = SuspendSupport.SILENT
    work = working(bench, was_restored=lambda domain: restored and domain == bench.identity)
    assert is_moved(work.run(bench.identity, page(bench))) is restored


def test_a_silent_guest_is_asked_if_the_policy_names_it(bench: Bench) -> None:
    bench.host.simulated(bench.domid).suspend_support = SuspendSupport.SILENT
    named = ExchangePolicy(ask_unannounced=(bench.host.domain(bench.domid).name,))
    assert is_moved(working(bench, policy=lambda: named).run(bench.identity, page(bench)))


def test_a_guest_that_has_ended_is_not_asked_again_under_another_domid(bench: Bench) -> None:
    bench.host.simulated(bench.domid).behaviour = SuspendBehaviour(answer=Answer.CRASHES)
    work = working(bench)
    assert work.run(bench.identity, page(bench)).ended is not None
    again = replace(bench.host.domain(bench.domid), domid=Domid(77))
    objection = work.objection(again, SuspendSupport.ANNOUNCED)
    assert objection is not None
    assert "d77 now has ended before" in objection.detail
    other = replace(again, uuid=uuid4())
    assert work.objection(other, SuspendSupport.ANNOUNCED) is None


def test_no_job_begins_in_a_guest_that_may_suspend_late(bench: Bench) -> None:
    bench.host.simulated(bench.domid).behaviour = SuspendBehaviour(answer=Answer.STALLS)
    work = working(bench)
    mfns = page(bench)
    assert work.run(bench.identity, mfns).may_suspend_late
    assert refusal(work.run(bench.identity, mfns)).reason is RefusalReason.DOMAIN_BUSY


def test_no_job_begins_in_a_guest_that_could_not_be_let_go(bench: Bench) -> None:
    failing = FaultyHypervisor(bench.host, Fault(method="resume", times=FOR_EVER))
    work = working(bench, failing)
    mfns = page(bench)
    assert work.run(bench.identity, mfns).stuck is not None
    assert refusal(work.run(bench.identity, mfns)).reason is RefusalReason.DOMAIN_BUSY


# Guests that may follow a request that was no exchange's.


def test_of_a_guest_that_may_follow_late_there_is_a_record(bench: Bench) -> None:
    info = bench.host.domain(bench.domid)
    bench.host.clock.wait(9.0)
    work = working(bench)
    assert work.keep_asked(info)
    kept = bench.journal.kept[bench.identity]
    assert kept.record == JobRecord(
        domain=info.identity,
        shared_info=info.shared_info,
        cpu_time=info.cpu_time,
        began=bench.host.clock.monotonic(),
    )
    work.done_with(bench.identity)
    assert bench.journal.kept == {}


def test_the_record_of_a_job_that_is_not_ended_is_not_replaced(bench: Bench) -> None:
    records = Records(bench)
    records.left(hold=Hold(cpu_time=None))
    bench.host.simulated(bench.domid).somebody = "process 5 (xl save)"
    work = working(bench, journal=records)
    work.recover()
    before = bench.journal.kept[bench.identity]
    assert work.keep_asked(bench.host.domain(bench.domid))
    assert bench.journal.kept[bench.identity] is before
    assert work.is_under_way(bench.identity)


def test_that_there_is_no_record_of_a_guest_is_said_once(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    work = working(bench, journal=Full(bench))
    info = bench.host.domain(bench.domid)
    assert [work.keep_asked(info), work.keep_asked(info)] == [False, False]
    [record] = caplog.records
    assert record.levelno == logging.ERROR
    assert f"nobody looks after d{bench.domid}: no room for" in record.getMessage()
    other = replace(info, uuid=uuid4())
    assert not work.keep_asked(other)
    assert len(caplog.records) == 2


# Jobs that were cut off.


def cut_off(bench: Bench, method: str = "exchange", moment: Moment = Moment.AFTER) -> None:
    mfns = bench.mark(*PAGES["data"](bench.layout))
    dying = FaultyHypervisor(bench.host, Fault(method=method, moment=moment, kills=True))
    with pytest.raises(Killed):
        run(bench, mfns, dying)


def is_tried_again(work: Exchanging) -> tuple[bool, bool]:
    """Whether there is anything to try again, and whether a stop waits for it."""
    return work.has_rest, work.holds_up_a_stop


def test_a_job_that_cannot_be_ended_is_tried_again_in_its_time(bench: Bench) -> None:
    cut_off(bench)
    xen = FaultyHypervisor(bench.host, Fault(method="condition"))
    work = working(bench, xen)
    assert work.recover() == ()
    assert is_tried_again(work) == (True, True)
    [(domain, detail)] = work.left()
    assert domain == bench.identity
    assert f"d{bench.domid} may stand still because of us: condition (injected)" in detail
    # Until then nothing is asked, and the guest is nobody else's.
    calls = len(xen.trace.calls)
    bench.host.clock.wait(RECOVERY_SECONDS - 0.1)
    assert work.recover_rest() == ()
    assert len(xen.trace.calls) == calls
    assert work.is_under_way(bench.identity)
    bench.host.clock.wait(0.1)
    [report] = work.recover_rest()
    assert report.outcome is Recovered.FINISHED
    assert is_tried_again(work) == (False, False)
    assert not work.is_under_way(bench.identity)
    assert work.left() == []
    bench.assert_guest_runs_unharmed()


def test_each_job_is_tried_so_often_and_then_left(bench: Bench) -> None:
    records = Records(bench)
    records.left()
    failing = FaultyHypervisor(bench.host, Fault(method="withdraw_suspend", times=FOR_EVER))
    noted: list[RecoveryReport] = []
    work = working(bench, failing, records, noted=noted.append)
    reports = [*work.recover()]
    tries = 1
    while work.has_rest:
        assert reports == []
        bench.host.clock.wait(RECOVERY_SECONDS)
        reports += work.recover_rest()
        tries += 1
    assert tries == RECOVERY_TRIES + 1
    assert [report.domain for report in reports] == [bench.identity]
    assert work.take_not_recovered() == noted
    assert [report.domain for report in noted] == [bench.identity]
    assert work.take_not_recovered() == []


def test_a_guest_has_all_its_tries_again_when_the_last_ones_came_to_an_end(bench: Bench) -> None:
    failing = FaultyHypervisor(bench.host)
    records = Records(bench)
    work = working(bench, failing, records)
    for _ in range(2):
        records.jobs.clear()
        records.left()
        failing.plan[:] = [
            Fault(
                method="condition",
                nth=1 + len(failing.trace.of("condition")),
                times=RECOVERY_TRIES - 1,
            )
        ]
        ended = [*work.recover()]
        while work.has_rest:
            bench.host.clock.wait(RECOVERY_SECONDS)
            ended += work.recover_rest()
        assert [report.outcome for report in ended] == [Recovered.NOTHING_TO_DO]


def test_a_guest_that_somebody_saves_is_told_of_once_for_each_of_them(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    cut_off(bench, "pause")
    guest = bench.host.simulated(bench.domid)
    guest.somebody = "process 5 (xl save)"
    work = working(bench)
    assert work.recover() == ()
    for somebody in ("process 5 (xl save)", "process 6 (xl save)", "process 6 (xl save)"):
        guest.somebody = somebody
        bench.host.clock.wait(RECOVERY_SECONDS)
        assert work.recover_rest() == ()
    assert work.holds_up_a_stop
    said = [one.getMessage() for one in caplog.records if one.name == "pgofflined.recoverylog"]
    assert [("process 5" in line, "process 6" in line) for line in said] == [
        (True, False),
        (False, True),
    ]
    guest.somebody = None
    bench.host.clock.wait(RECOVERY_SECONDS)
    [report] = work.recover_rest()
    assert report.outcome is Recovered.FINISHED
    bench.assert_guest_runs_unharmed()


def test_a_guest_that_only_a_person_can_help_is_told_of_once_and_holds_up_no_stop(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    records = Records(bench)
    bench.host.simulated(bench.domid).shutdown = ShutdownReason.SUSPEND
    cpu_time = bench.host.domain(bench.domid).cpu_time
    records.left(hold=Hold(cpu_time=cpu_time), unreadable="it is of version 9")
    work = working(bench, journal=records)
    [report] = work.recover()
    assert report.outcome is Recovered.HELD
    bench.host.clock.wait(RECOVERY_SECONDS)
    assert work.recover_rest() == ()
    assert len(told(caplog, Event.JOB_NOT_RECOVERED)) == 1
    assert work.has_rest
    assert not work.holds_up_a_stop
    assert work.left() == [(bench.identity, report.detail)]


def test_one_job_that_may_be_helped_holds_up_a_stop_beside_one_that_may_not(bench: Bench) -> None:
    records = Records(bench)
    other = bench.host.add_pv()
    bench.host.simulated(bench.domid).shutdown = ShutdownReason.SUSPEND
    cpu_time = bench.host.domain(bench.domid).cpu_time
    records.left(hold=Hold(cpu_time=cpu_time), unreadable="it is of version 9")
    bench.domid = other
    records.left()
    bench.host.simulated(other).somebody = "process 5 (xl save)"
    work = working(bench, journal=records)
    work.recover()
    assert {domain.domid for domain, _ in work.left()} == {
        other,
        records.jobs[0].record.domain.domid,
    }
    assert work.holds_up_a_stop


def test_a_guest_that_has_crashed_since_it_was_asked_is_not_asked_again(bench: Bench) -> None:
    records = Records(bench)
    records.left()
    bench.host.crash(bench.domid, "so")
    work = working(bench, journal=records)
    [report] = work.recover()
    assert report.outcome is Recovered.CRASHED
    assert work.objection(bench.host.domain(bench.domid), SuspendSupport.ANNOUNCED) is not None


def test_no_job_begins_in_a_guest_that_may_follow_an_earlier_request(bench: Bench) -> None:
    cut_off(bench, "suspend", Moment.BEFORE)
    guest = bench.host.simulated(bench.domid)
    guest.unread_request = False
    work = working(bench)
    [report] = work.recover()
    assert report.may_suspend_late
    assert refusal(work.run(bench.identity, page(bench))).reason is RefusalReason.DOMAIN_BUSY
    work.done_with(bench.identity)
    assert is_moved(work.run(bench.identity, page(bench)))


def test_a_crash_after_our_request_is_told_noted_and_remembered(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    noted: list[RecoveryReport] = []
    work = working(bench, noted=noted.append)
    work.has_crashed(bench.identity)
    [report] = work.take_not_recovered()
    assert noted == [report]
    assert (report.domain, report.outcome) == (bench.identity, Recovered.CRASHED)
    assert report.detail.startswith(f"d{bench.domid} has crashed since pgofflined asked it")
    [record] = told(caplog, Event.GUEST_ENDED)
    assert fields(record)["DOMID"] == str(bench.domid)
    assert work.objection(bench.host.domain(bench.domid), SuspendSupport.ANNOUNCED) is not None


def test_what_cannot_be_noted_is_told_and_given_all_the_same(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    def noted(report: RecoveryReport) -> None:
        raise OSError(f"no room for d{report.domain.domid}")

    work = working(bench, noted=noted)
    work.has_crashed(bench.identity)
    assert len(work.take_not_recovered()) == 1
    [record] = [one for one in caplog.records if one.name == "pgofflined.exchanging"]
    assert record.getMessage() == f"what d{bench.domid} needs could not be noted"
    assert record.exc_info


def test_what_was_put_right_while_somebody_saved_the_guest_is_not_looked_at_again(
    bench: Bench,
) -> None:
    cut_off(bench)
    guest = bench.host.simulated(bench.domid)
    guest.somebody = "process 5 (xl save)"
    xen = FaultyHypervisor(bench.host)
    work = working(bench, xen)
    assert work.recover() == ()
    assert "update_ptes" in xen.trace.methods
    # It has let the guest run: now nothing may be changed any more, and nothing is missing.
    bench.host.unpause(bench.domid)
    bench.host.resume(bench.domid)
    guest.cpu_time += 1
    guest.somebody = None
    calls = len(xen.trace.of("update_ptes"))
    bench.host.clock.wait(RECOVERY_SECONDS)
    [report] = work.recover_rest()
    assert report.outcome is Recovered.NOTHING_TO_DO
    assert len(xen.trace.of("update_ptes")) == calls


def test_a_mark_that_a_job_could_not_take_back_is_told_with_what_to_do(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with hosts_of(UNFIXED):
        bench = Bench.build()
    mfn = bench.host.frame_of(bench.domid, bench.layout.plain[0])
    bench.host.offline(mfn)
    failing = FaultyHypervisor(bench.host, Fault(method="online", times=FOR_EVER))
    assert not is_moved(
        working(bench, failing, denial=lambda _: DENIED).run(bench.identity, (mfn,))
    )
    [record] = [one for one in caplog.records if one.levelno == logging.CRITICAL]
    assert record.getMessage().startswith(f"the mark of mfn {mfn:#x} could not be taken back (")
    assert record.getMessage().endswith(f"`xen-hptool mem-online {mfn:x}`")


# Faults of our own in ending a job.


def ends_by_faults(bench: Bench, records: Records) -> tuple[Exchanging, list[RecoveryReport]]:
    failing = FaultyHypervisor(bench.host, Fault(method="condition", times=FOR_EVER, act=broken))
    work = working(bench, failing, records)
    reports = [*work.recover()]
    for _ in range(RECOVERY_TRIES):
        assert reports == []
        assert work.holds_up_a_stop
        bench.host.clock.wait(RECOVERY_SECONDS)
        reports += work.recover_rest()
    return work, reports


@pytest.mark.parametrize(
    ("hold", "standing", "late"),
    [
        (None, Standing(paused=False, cpu_time=None), True),
        (Hold(cpu_time=None), Standing(paused=False, cpu_time=None), False),
        (Hold(cpu_time=7), Standing(paused=True, cpu_time=7), False),
    ],
)
def test_a_guest_whose_job_meets_our_own_fault_to_the_last_is_only_let_go(
    bench: Bench,
    hold: Hold | None,
    standing: Standing,
    caplog: pytest.LogCaptureFixture,
    *,
    late: bool,
) -> None:
    records = Records(bench)
    records.left(hold=hold)
    work, [report] = ends_by_faults(bench, records)
    assert (report.domain, report.outcome) == (bench.identity, Recovered.LEFT_ALONE)
    assert f"a fault of our own in ending the job of d{bench.domid}" in report.detail
    assert report.stuck == (None if hold is None else report.detail)
    assert (report.may_suspend_late, report.standing) == (late, standing)
    assert work.take_not_recovered() == [report]
    assert not work.has_rest
    # Its record stays for whatever runs next, until it has been let go.
    assert set(bench.journal.kept) == {bench.identity}
    assert refusal(work.run(bench.identity, page(bench))).reason is RefusalReason.DOMAIN_BUSY
    work.done_with(bench.identity)
    assert (bench.journal.kept, bench.journal.aside) == ({}, [])
    faults = [one for one in caplog.records if one.exc_info]
    assert {one.getMessage() for one in faults} == {f"the job of d{bench.domid} could not be ended"}
    assert len(faults) == RECOVERY_TRIES + 1


def test_the_record_of_what_was_left_changed_is_put_aside(bench: Bench) -> None:
    cut_off(bench)
    failing = FaultyHypervisor(bench.host, Fault(method="condition", times=FOR_EVER, act=broken))
    work = working(bench, failing)
    work.recover()
    while work.has_rest:
        bench.host.clock.wait(RECOVERY_SECONDS)
        work.recover_rest()
    work.done_with(bench.identity)
    assert len(bench.journal.aside) == 1


def test_a_guest_of_a_record_that_cannot_be_read_is_held_whatever_fault_there_is(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    records = Records(bench)
    records.left(hold=Hold(cpu_time=7), unreadable="it is of version 9")
    work, [report] = ends_by_faults(bench, records)
    assert (report.domain, report.outcome) == (bench.identity, Recovered.HELD)
    assert report.detail.startswith(
        f"a fault of our own in ending the job of d{bench.domid}; please report it; it is held"
    )
    assert report.detail.endswith("; it is held, and it is of version 9")
    assert work.has_rest
    assert not work.holds_up_a_stop
    # It is tried on and on, and said no more.
    said = len(caplog.records)
    bench.host.clock.wait(RECOVERY_SECONDS)
    assert work.recover_rest() == ()
    assert len(caplog.records) == said


# Another of this process goes on.


def test_who_takes_over_goes_on_with_the_jobs_that_were_not_ended(bench: Bench) -> None:
    records = Records(bench)
    records.left()
    failing = Fault(method="condition", times=FOR_EVER)
    earlier = working(bench, FaultyHypervisor(bench.host, failing), records)
    earlier.recover()
    xen = FaultyHypervisor(bench.host)
    work = working(bench, xen, records)
    work.take_over(earlier)
    assert work.has_rest
    assert work.is_under_way(bench.identity)
    assert [domain for domain, _ in work.left()] == [bench.identity]
    assert refusal(work.run(bench.identity, page(bench))).reason is RefusalReason.DOMAIN_BUSY
    # It is not yet time to try again, and the records are not asked for once more.
    assert work.recover() == ()
    assert xen.trace.methods == []
    bench.host.clock.wait(RECOVERY_SECONDS)
    [report] = work.recover()
    assert report.outcome is Recovered.NOTHING_TO_DO
    assert records.asked == 1


def test_who_takes_over_knows_how_often_a_job_was_tried(bench: Bench) -> None:
    records = Records(bench)
    records.left()
    failing = FaultyHypervisor(bench.host, Fault(method="withdraw_suspend", times=FOR_EVER))
    earlier = working(bench, failing, records)
    earlier.recover()
    for _ in range(RECOVERY_TRIES - 1):
        bench.host.clock.wait(RECOVERY_SECONDS)
        earlier.recover_rest()
    work = working(bench, failing, records)
    work.take_over(earlier)
    bench.host.clock.wait(RECOVERY_SECONDS)
    work.recover()
    assert not work.has_rest


def test_who_takes_over_knows_what_else_was_learned(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    full = Full(bench)
    info = bench.host.domain(bench.domid)
    earlier = working(bench, journal=full)
    earlier.hold_off(bench.identity)
    earlier.has_crashed(bench.identity)
    earlier.keep_asked(info)
    work = working(bench, journal=full)
    work.take_over(earlier)
    assert refusal(work.run(bench.identity, page(bench))).reason is RefusalReason.DOMAIN_BUSY
    assert work.objection(info, SuspendSupport.ANNOUNCED) is not None
    assert [report.outcome for report in work.take_not_recovered()] == [Recovered.CRASHED]
    said = len(caplog.records)
    work.keep_asked(info)
    assert len(caplog.records) == said


def test_a_job_of_this_process_that_could_not_be_ended_holds_up_a_stop_until_it_is(
    bench: Bench,
) -> None:
    # Neither its pages nor the guest itself can be helped at first.
    faults = Fault(method="write_frames", times=200), Fault(method="resume", times=10)
    work = working(bench, FaultyHypervisor(bench.host, *faults))
    work.run(bench.identity, page(bench))
    assert is_tried_again(work) == (True, True)
    assert work.is_under_way(bench.identity)
    while work.has_rest:
        bench.host.clock.wait(RECOVERY_SECONDS)
        work.recover_rest()
    assert is_tried_again(work) == (False, False)
    assert not work.is_under_way(bench.identity)
    bench.assert_guest_runs_unharmed()
