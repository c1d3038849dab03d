"""The daemon is killed at any call or record of an exchange, and another one ends the job.

Afterwards every page is where it was or exchanged, the guest runs with its memory, and nothing is
left of the job.
"""

from __future__ import annotations

import contextlib
import shutil
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from uuid import UUID

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pgofflined.core.domains import DomainIdentity
from pgofflined.core.errors import PortError
from pgofflined.core.frames import Domid, Mfn
from pgofflined.core.moves import Group, PteWrite, PteWrites, frames_of
from pgofflined.core.recovery import Recovered, RecoveryReport
from pgofflined.exchanger import exchange, recover
from pgofflined.exchanging import RECOVERY_SECONDS, RECOVERY_TRIES
from pgofflined.jobstore import JobStore
from pgofflined.ports import JobRecord, Journal, OpenJob, SuspendLimits, UnfinishedJob
from pgofflined.sim.faults import Fault, FaultyHypervisor, Killed, Moment
from pgofflined.sim.journal import MemoryJournal
from pgofflined.sim.layout import DIRECT_MAP, PvLayout
from tests.single import set_ptes
from tests.unit.exchanger.conftest import Bench

if TYPE_CHECKING:
    from pgofflined.ports import FrameArray, Words

T = TypeVar("T")
Pick = Callable[[PvLayout], Sequence[int]]

PAGES: dict[str, Pick] = {
    "data": lambda of: of.plain[:1],
    "shared": lambda of: of.user_pages[:1],
    "batch": lambda of: [*of.plain[:4], *of.user_pages[:2], of.text[0], of.p2m_list[0]],
    "l1": lambda of: [of.text_upper[2]],
    "l1-of-itself": lambda of: [of.direct_l1[0]],
    "l1-pinned": lambda of: [of.processes[0].upper[2]],
    "l2": lambda of: [of.direct_l2[0]],
    "l3": lambda of: [of.direct_l3],
    "l4": lambda of: [of.root],
    "mixed": lambda of: [of.plain[0], of.direct_l2[0], of.root],
}


# A process that is killed tidies nothing up, as Python does here with what nobody has any more.
LEFT_BY_THE_DEAD: deque[OpenJob] = deque(maxlen=8)


@dataclass
class MortalJournal:
    """The journal of a process that is killed at its n-th record, or at a call of ``xen``.

    ``groups`` are those that it was told to keep.
    """

    inner: Journal
    xen: FaultyHypervisor
    at: int = 0
    after: bool = False
    count: int = 0
    groups: list[Group] = field(default_factory=list)

    def open(self, record: JobRecord) -> OpenJob:
        job = _MortalJob(self, self.strike(lambda: self.inner.open(record)))
        LEFT_BY_THE_DEAD.append(job)
        return job

    def unfinished(self) -> Sequence[UnfinishedJob]:
        return self.inner.unfinished()

    def done_with(self, domain: DomainIdentity) -> None:
        self.inner.done_with(domain)

    def strike(self, act: Callable[[], T]) -> T:
        if self.xen.killed:
            raise Killed
        self.count += 1
        if self.count == self.at and not self.after:
            self._die()
        result = act()
        if self.count == self.at:
            self._die()
        return result

    def _die(self) -> None:
        self.xen.killed = True
        raise Killed


@dataclass
class _MortalJob:
    journal: MortalJournal
    inner: OpenJob

    def keep(self, group: Group) -> None:
        self.journal.groups.append(group)
        self.journal.strike(lambda: self.inner.keep(group))

    def hold(self, cpu_time: int | None) -> None:
        self.journal.strike(lambda: self.inner.hold(cpu_time))

    def begin(self) -> None:
        self.journal.strike(self.inner.begin)

    def settled(self) -> None:
        self.journal.strike(self.inner.settled)

    def leave(self, *, damaged: bool = False) -> None:
        self.journal.strike(lambda: self.inner.leave(damaged=damaged))

    def close(self) -> None:
        self.journal.strike(self.inner.close)

    def set_aside(self) -> None:
        self.journal.strike(self.inner.set_aside)


def run(
    bench: Bench,
    mfns: Sequence[Mfn],
    xen: FaultyHypervisor,
    journal: MortalJournal | None = None,
    *,
    marked: bool = True,
) -> None:
    """The job, in a process that may be killed."""
    exchange(
        bench.identity,
        mfns,
        xen=xen,
        journal=journal or MortalJournal(bench.journal, xen),
        clock=bench.host.clock,
        limits=SuspendLimits(),
        marked=marked,
    )


def killed(dying: Fault) -> Bench:
    """A job for one page, whose process was killed at a call."""
    bench = Bench.build()
    mfns = bench.mark(*PAGES["data"](bench.layout))
    with pytest.raises(Killed):
        run(bench, mfns, FaultyHypervisor(bench.host, dying))
    return bench


def mortal(unfinished: UnfinishedJob, xen: FaultyHypervisor) -> UnfinishedJob:
    """A record in the hands of a process that may be killed at a call of ``xen``."""
    job = _MortalJob(MortalJournal(MemoryJournal(), xen), unfinished.job)
    return replace(unfinished, job=job)


def calls_of_a_good_run(pick: Pick) -> list[str]:
    bench = Bench.build()
    _, xen = bench.exchange_traced(bench.mark(*pick(bench.layout)))
    return xen.trace.methods


def records_of_a_good_run(pick: Pick) -> int:
    bench = Bench.build()
    xen = FaultyHypervisor(bench.host)
    journal = MortalJournal(bench.journal, xen)
    run(bench, bench.mark(*pick(bench.layout)), xen, journal)
    return journal.count


def assert_ended_well(bench: Bench, pfns: Sequence[int], reports: list[RecoveryReport]) -> None:
    after = bench.assert_guest_runs_unharmed()
    assert set(bench.before.moved(after)) <= set(pfns)
    assert [r for r in reports if r.outcome is Recovered.LEFT_ALONE or r.stuck] == []
    assert bench.journal.kept == {}


KILLS = [
    pytest.param(name, nth, moment, id=f"{name}-{nth}-{method}-{moment.name.lower()}")
    for name, pick in PAGES.items()
    for nth, method in enumerate(calls_of_a_good_run(pick), start=1)
    for moment in Moment
]


@pytest.mark.parametrize(("name", "nth", "moment"), KILLS)
def test_a_job_that_is_killed_at_a_call_is_ended_by_another_process(
    name: str, nth: int, moment: Moment
) -> None:
    bench = Bench.build()
    pfns = PAGES[name](bench.layout)
    xen = FaultyHypervisor(bench.host, Fault(nth=nth, moment=moment, kills=True))
    with pytest.raises(Killed):
        run(bench, bench.mark(*pfns), xen)
    reports = bench.end_jobs()
    assert_ended_well(bench, pfns, reports)


RECORDS = [
    pytest.param(name, at, after, id=f"{name}-{at}-{'after' if after else 'before'}")
    for name, pick in PAGES.items()
    for at in range(1, records_of_a_good_run(pick) + 1)
    for after in (False, True)
]


@pytest.mark.parametrize(("name", "at", "after"), RECORDS)
def test_a_job_that_is_killed_at_a_record_is_ended_by_another_process(
    name: str,
    at: int,
    after: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    bench = Bench.build()
    pfns = PAGES[name](bench.layout)
    xen = FaultyHypervisor(bench.host)
    with pytest.raises(Killed):
        run(bench, bench.mark(*pfns), xen, MortalJournal(bench.journal, xen, at, after=after))
    reports = bench.end_jobs()
    assert_ended_well(bench, pfns, reports)


@given(
    name=st.sampled_from(sorted(PAGES)),
    first=st.integers(1, 40),
    further=st.lists(st.integers(1, 25), max_size=3),
    moments=st.lists(st.sampled_from(Moment), min_size=4, max_size=4),
)
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
def test_processes_that_are_killed_one_after_the_other_are_followed_by_one_that_ends_the_job(
    name: str, first: int, further: list[int], moments: list[Moment]
) -> None:
    bench = Bench.build()
    pfns = PAGES[name](bench.layout)
    mfns = bench.mark(*pfns)
    xen = FaultyHypervisor(bench.host, Fault(nth=first, moment=moments[0], kills=True))
    with contextlib.suppress(Killed):
        run(bench, mfns, xen)
    for nth, moment in zip(further, moments[1:], strict=False):
        dying = FaultyHypervisor(bench.host, Fault(nth=nth, moment=moment, kills=True))
        try:
            for unfinished in bench.journal.unfinished():
                recover(mortal(unfinished, dying), dying, now=bench.host.clock.monotonic())
        except Killed:
            continue
    reports = bench.end_jobs()
    assert_ended_well(bench, pfns, reports)


@pytest.mark.parametrize("name", sorted(PAGES))
@pytest.mark.parametrize("method", ["exchange", "update_ptes", "write_frames", "unpause"])
def test_a_record_in_a_file_is_as_good_as_one_in_memory(
    name: str, method: str, tmp_path: Path
) -> None:
    bench = Bench.build()
    pfns = PAGES[name](bench.layout)
    xen = FaultyHypervisor(bench.host, Fault(method=method, moment=Moment.AFTER, kills=True))
    with pytest.raises(Killed):
        run(bench, bench.mark(*pfns), xen, MortalJournal(JobStore(tmp_path / "left"), xen))
    # What another process finds: this one, which is not really dead, still holds its locks.
    found = tmp_path / "found"
    shutil.copytree(tmp_path / "left", found)
    reports = bench.end_jobs(journal=JobStore(found))
    assert len(reports) == 1
    assert_ended_well(bench, pfns, reports)
    assert list(found.iterdir()) == []


@pytest.mark.parametrize(("name", "at", "after"), RECORDS)
def test_what_a_job_that_is_killed_at_a_record_leaves_in_its_files_is_enough(
    name: str,
    at: int,
    after: bool,  # noqa: FBT001 - a parameter of the test
    tmp_path: Path,
) -> None:
    bench = Bench.build()
    pfns = PAGES[name](bench.layout)
    xen = FaultyHypervisor(bench.host)
    left, found = tmp_path / "left", tmp_path / "found"
    left.mkdir()
    with pytest.raises(Killed):
        run(bench, bench.mark(*pfns), xen, MortalJournal(JobStore(left), xen, at, after=after))
    shutil.copytree(left, found)
    reports = bench.end_jobs(journal=JobStore(found))
    assert_ended_well(bench, pfns, reports)
    assert list(found.iterdir()) == []


class DiesAmongTheSlots(FaultyHypervisor):
    """Is killed when it has written all contents, and some of the p2m slots."""

    def write_frames(
        self, domid: Domid, mfns: FrameArray, contents: Words, slots: PteWrites
    ) -> None:
        super().write_frames(domid, mfns, contents, slots[: len(slots) // 2])
        self.killed = True
        raise Killed


@pytest.mark.parametrize("name", sorted(PAGES))
def test_a_job_that_is_killed_between_contents_and_slots_is_ended_by_another_process(
    name: str,
) -> None:
    bench = Bench.build()
    pfns = PAGES[name](bench.layout)
    with pytest.raises(Killed):
        run(bench, bench.mark(*pfns), DiesAmongTheSlots(bench.host))
    reports = bench.end_jobs()
    assert_ended_well(bench, pfns, reports)


@pytest.mark.parametrize("name", sorted(PAGES))
def test_recovery_that_fails_at_any_call_leaves_a_guest_that_a_second_one_puts_right(
    name: str,
) -> None:
    def killed() -> tuple[Bench, Sequence[int]]:
        bench = Bench.build()
        pfns = PAGES[name](bench.layout)
        dying = Fault(method="exchange", moment=Moment.AFTER, kills=True)
        with pytest.raises(Killed):
            run(bench, bench.mark(*pfns), FaultyHypervisor(bench.host, dying))
        return bench, pfns

    bench, _ = killed()
    dry = FaultyHypervisor(bench.host)
    bench.end_jobs(dry)
    for nth in range(1, len(dry.trace.calls) + 1):
        for times in (1, 6):
            bench, pfns = killed()
            reports = bench.end_jobs(FaultyHypervisor(bench.host, Fault(nth=nth, times=times)))
            assert_ended_well(bench, pfns, reports)


@pytest.mark.parametrize("name", sorted(PAGES))
@pytest.mark.parametrize("moment", [Moment.HALFWAY, Moment.AFTER])
def test_a_frame_that_comes_back_at_once_is_not_taken_for_one_that_never_left(
    name: str, moment: Moment
) -> None:
    # Unmarked, the frame that a page has just left is free, and may be given for the next page.
    bench = Bench.build(reuses_first=True)
    pfns = PAGES[name](bench.layout)
    mfns = [bench.host.frame_of(bench.domid, pfn) for pfn in pfns]
    for dies in (False, True):
        xen = FaultyHypervisor(
            bench.host, Fault(method="exchange", moment=moment, kills=dies, error=LOST)
        )
        with contextlib.suppress(Killed):
            run(bench, mfns, xen, marked=False)
        reports = bench.end_jobs()
        assert_ended_well(bench, pfns, reports)


LOST = PortError("the reply was lost")


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
    assert set(xen.trace.methods) == {"condition"}
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
        "shared_info": replace(kept.record, shared_info=Mfn(kept.record.shared_info + 1)),
        "cpu_time": replace(kept.record, cpu_time=10**15),
        "uuid": replace(kept.record, domain=replace(kept.record.domain, uuid=UUID(int=3))),
    }[what]
    kept.record = other
    xen = FaultyHypervisor(bench.host)
    [report] = bench.work(xen).recover()
    assert report.outcome is Recovered.GONE
    assert xen.trace.methods == ["condition"]


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
