"""Every call of an exchange fails once: before it acts, halfway, or with its reply lost."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from errno import EBUSY, EIO
from typing import TYPE_CHECKING

import numpy as np
import pytest

from pgofflined.core.errors import PortError, SuspendShared, XenError
from pgofflined.core.frames import Domid, Mfn
from pgofflined.core.outcomes import Damaged, Exchanged, Refusal, RefusalReason
from pgofflined.core.recovery import Recovered, RecoveryReport
from pgofflined.core.xenversion import XenVersion
from pgofflined.exchanger import locate
from pgofflined.exchanging import RECOVERY_SECONDS
from pgofflined.ports import JobRecord, OpenJob, SuspendLimits
from pgofflined.sim.faults import Fault, FaultyHypervisor, Killed, Moment
from pgofflined.sim.journal import MemoryJournal
from pgofflined.sim.layout import DIRECT_MAP
from pgofflined.sim.pagetables import PageFault
from tests.crash.killing import VERSIONS, hosts_of
from tests.unit.exchanger.conftest import Bench

if TYPE_CHECKING:
    from _pytest.mark.structures import ParameterSet

    from pgofflined.core.moves import PteWrites
    from pgofflined.ports import FrameArray, Words


def _pages(bench: Bench) -> list[Mfn]:
    return bench.mark(bench.layout.plain[0], bench.layout.user_pages[0], bench.layout.text[0])


def _calls_of_a_good_run() -> list[str]:
    bench = Bench.build()
    report, xen = bench.exchange_traced(_pages(bench))
    assert all(isinstance(result, Exchanged) for result in report.results)
    return xen.trace.methods


def _failures() -> Iterator[ParameterSet]:
    for xen, version in VERSIONS.items():
        with hosts_of(version):
            methods = _calls_of_a_good_run()
        for nth, method in enumerate(methods, start=1):
            for moment in Moment:
                told = f"{xen}-{nth}-{method}-{moment.name.lower()}"
                yield pytest.param(version, nth, moment, id=told)


@pytest.mark.parametrize(("version", "nth", "moment"), [*_failures()])
def test_one_failing_call_leaves_the_guest_running_with_its_memory(
    version: XenVersion, nth: int, moment: Moment
) -> None:
    assert Bench.version == version
    bench = Bench.build()
    mfns = _pages(bench)
    xen = FaultyHypervisor(bench.host, Fault(nth=nth, moment=moment))
    report = bench.exchange(mfns, xen)
    assert report.stuck is None
    after = bench.assert_guest_runs_unharmed()
    moved = {result.old for result in report.results if isinstance(result, Exchanged)}
    kept = {result.mfn for result in report.results if isinstance(result, Refusal)}
    assert moved | kept == set(mfns)
    assert bench.before.moved(after) == sorted(
        result.pfn for result in report.results if isinstance(result, Exchanged)
    )


@pytest.mark.parametrize("moment", [Moment.HALFWAY, Moment.AFTER])
def test_what_was_exchanged_although_the_reply_is_lost_is_found_out_from_xen(
    moment: Moment,
) -> None:
    bench = Bench.build()
    mfns = bench.mark(*bench.layout.plain[:3])
    xen = FaultyHypervisor(bench.host, Fault(method="exchange", moment=moment))
    results = bench.exchange(mfns, xen).results
    moved = [isinstance(result, Exchanged) for result in results]
    # Of three pages the first is a half; the second is refused for the fault, the third goes on.
    assert moved == ([True] * 3 if moment is Moment.AFTER else [True, False, True])
    bench.assert_guest_runs_unharmed()


def test_an_answer_that_contradicts_itself_does_not_hide_what_was_exchanged() -> None:
    bench = Bench.build()
    mfns = bench.mark(*bench.layout.plain[:3])
    error = PortError("memory_exchange counted 7 frames")
    fault = Fault(method="exchange", moment=Moment.AFTER, error=error)
    results = bench.exchange(mfns, FaultyHypervisor(bench.host, fault)).results
    assert [type(result) for result in results] == [Exchanged] * 3
    bench.assert_guest_runs_unharmed()


def test_a_guest_whose_m2p_names_two_frames_for_a_lost_page_keeps_it_unmapped() -> None:
    bench = Bench.build()
    pfn, other = bench.layout.plain[:2]
    mfns = bench.mark(pfn)
    bench.host.set_m2p(bench.host.frame_of(bench.domid, other), pfn)
    xen = FaultyHypervisor(bench.host, Fault(method="exchange", moment=Moment.AFTER))
    [result] = bench.exchange(mfns, xen).results
    assert isinstance(result, Damaged)
    assert "2 frames" in result.detail
    with pytest.raises(PageFault):
        bench.host.pv(bench.domid).write(DIRECT_MAP + (pfn << 12), 1)


def test_a_guest_whose_m2p_names_all_its_frames_for_a_lost_page_is_not_asked_for_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(locate, "MAX_CANDIDATES", 32)
    bench = Bench.build()
    pfn = bench.layout.plain[0]
    mfns = bench.mark(pfn)
    for mfn in bench.host.pv(bench.domid).mfns().tolist():
        if mfn < bench.host.frames.count and mfn != mfns[0] ^ 1:
            bench.host.set_m2p(mfn, pfn)
    xen = FaultyHypervisor(bench.host, Fault(method="exchange", moment=Moment.AFTER))
    [result] = bench.exchange(mfns, xen).results
    assert isinstance(result, Damaged)
    assert len(xen.trace.of("m2p")) < 100


@pytest.mark.parametrize("dies", [False, True])
def test_a_page_that_never_left_is_not_taken_for_one_that_did_because_the_m2p_lies(
    dies: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    bench = Bench.build()
    pfn, other = bench.layout.plain[:2]
    [mfn] = bench.mark(pfn)

    def lie() -> None:
        # Its last act: it is found where it was, but the M2P has another frame at its pfn.
        bench.host.set_m2p(mfn, pfn + 1000)
        bench.host.set_m2p(bench.host.frame_of(bench.domid, other), pfn)

    failing = Fault(method="exchange", moment=Moment.BEFORE, kills=dies)
    xen = FaultyHypervisor(bench.host, Fault(method="suspend", act=lie), failing)
    with contextlib.suppress(Killed):
        [result] = bench.exchange([mfn], xen).results
        assert isinstance(result, Refusal)
    bench.end_jobs()
    assert bench.host.frame_of(bench.domid, pfn) == mfn
    bench.host.set_m2p(mfn, pfn)
    bench.host.set_m2p(bench.host.frame_of(bench.domid, other), other)
    bench.assert_guest_runs_unharmed()


@pytest.mark.parametrize("method", ["write_frames", "update_ptes"])
def test_what_never_works_again_after_the_commit_is_reported_and_the_guest_let_go(
    method: str,
) -> None:
    rehearsal = Bench.build()
    _, dry = rehearsal.exchange_traced(_pages(rehearsal)[:1])
    methods = dry.trace.methods
    after_commit = methods[: methods.index("exchange")].count(method) + 1
    bench = Bench.build()
    mfns = _pages(bench)[:1]
    xen = FaultyHypervisor(bench.host, Fault(method=method, nth=after_commit, times=10**6))
    [result] = bench.exchange(mfns, xen).results
    assert isinstance(result, Damaged)
    info = bench.host.domain(bench.domid)
    assert info.shutdown is None
    assert not info.paused


@pytest.mark.parametrize("moment", Moment)
def test_a_page_whose_contents_are_lost_stays_unmapped_rather_than_wrong(moment: Moment) -> None:
    bench = Bench.build()
    pfn = bench.layout.plain[0]
    mfns = bench.mark(pfn)
    xen = FaultyHypervisor(bench.host, Fault(method="write_frames", times=10**6, moment=moment))
    [result] = bench.exchange(mfns, xen).results
    assert isinstance(result, Damaged)
    with pytest.raises(PageFault):
        bench.host.pv(bench.domid).write(DIRECT_MAP + (pfn << 12), 1)


def test_a_guest_that_can_neither_be_put_right_nor_let_go_is_left_to_the_next_process() -> None:
    bench = Bench.build()
    mfns = _pages(bench)[:1]
    xen = FaultyHypervisor(
        bench.host,
        Fault(method="write_frames", times=10**6),
        Fault(method="resume", times=10**6),
    )
    report = bench.exchange(mfns, xen)
    assert [type(result) for result in report.results] == [Damaged]
    assert report.stuck is None
    bench.look_after([report])
    assert bench.host.domain(bench.domid).shutdown is not None
    [ended] = bench.end_jobs()
    assert ended.outcome is Recovered.FINISHED
    assert [type(result) for result in ended.results] == [Exchanged]
    bench.assert_guest_runs_unharmed()


@pytest.mark.parametrize("error", [XenError(EIO, op="getdomaininfo"), OSError(EIO, "listdir")])
@pytest.mark.parametrize("after", [-1.0, 0.5, 250.0])
def test_a_guest_that_has_read_the_request_is_let_go_whatever_fails_then(
    after: float, error: Exception
) -> None:
    bench = Bench.build()

    class FailsWhileWaiting(FaultyHypervisor):
        """Cannot tell whether the guest stands still."""

        def suspend(self, domid: Domid, limits: SuspendLimits) -> None:
            del limits
            bench.host.simulated(domid).suspends_at = bench.host.clock.monotonic() + after
            raise error

    mfns = _pages(bench)
    report = bench.exchange(mfns, FailsWhileWaiting(bench.host))
    assert report.may_suspend_late
    assert {type(result) for result in report.results} == {Refusal}
    bench.look_after([report])
    bench.assert_guest_runs_unharmed()
    assert bench.journal.kept == {}
    assert bench.host.simulated(bench.domid).suspends_at is None


def test_a_guest_that_has_read_a_request_of_two_is_left_to_the_other_and_looked_after() -> None:
    bench = Bench.build()

    class Shared(FaultyHypervisor):
        """Finds that somebody has come; the guest suspends all the same."""

        def suspend(self, domid: Domid, limits: SuspendLimits) -> None:
            del limits
            bench.host.simulated(domid).suspends_at = bench.host.clock.monotonic() + 1
            raise SuspendShared(EBUSY, op="suspend", domid=domid)

    xen = Shared(bench.host)
    report = bench.exchange(_pages(bench), xen)
    assert "resume" not in xen.trace.methods
    # He was stopped before he had begun.
    bench.look_after([report])
    bench.assert_guest_runs_unharmed()
    assert bench.journal.kept == {}


def test_a_guest_that_was_held_so_long_that_a_save_has_begun_is_not_resumed_in_it() -> None:
    bench = Bench.build()
    guest = bench.host.simulated(bench.domid)

    def comes() -> None:
        bench.host.clock.wait(61)
        guest.somebody = "process 5 (xl save)"

    xen = FaultyHypervisor(bench.host, Fault(method="exchange", act=comes))
    report = bench.exchange(_pages(bench), xen)
    assert "resume" not in xen.trace.methods
    assert report.may_suspend_late
    assert not bench.host.domain(bench.domid).paused
    guest.somebody = None
    bench.look_after([report])
    bench.assert_guest_runs_unharmed()


def test_a_guest_that_is_neither_whole_nor_let_go_is_taken_up_by_one_alone() -> None:
    bench = Bench.build()
    guest = bench.host.simulated(bench.domid)

    def comes() -> None:
        bench.host.clock.wait(61)
        guest.somebody = "process 5 (xl save)"

    broken = Fault(method="write_frames", times=10**6)
    xen = FaultyHypervisor(bench.host, Fault(method="exchange", act=comes), broken)
    work = bench.work(xen)
    report = work.run(bench.identity, tuple(_pages(bench)[:1]))
    # Those who only resume would let it run as it is, and so would he when he gives up.
    assert (report.stuck, report.may_suspend_late) == (None, False)
    assert bench.host.domain(bench.domid).paused
    assert work.has_rest


def test_a_hold_that_cannot_be_noted_lets_the_guest_go_and_takes_no_pause_back() -> None:
    bench = Bench.build()

    class Full(MemoryJournal):
        """Takes no word of a guest that stands still."""

        def open(self, record: JobRecord) -> OpenJob:
            job = super().open(record)

            def hold(cpu_time: int | None) -> None:
                bench.host.pause(bench.domid)  # by an admin
                raise PortError(f"no room for {cpu_time}")

            object.__setattr__(job, "hold", hold)
            return job

    bench.journal = Full()
    report = bench.exchange(_pages(bench))
    reasons = {result.reason for result in report.results if isinstance(result, Refusal)}
    assert reasons == {RefusalReason.NOT_KEPT}
    info = bench.host.domain(bench.domid)
    assert (info.shutdown, info.paused) == (None, True)
    assert bench.journal.kept == {}


def test_a_shortage_that_passes_costs_time_and_no_page() -> None:
    bench = Bench.build()
    xen = FaultyHypervisor(bench.host, Fault(method="write_frames", times=12))
    report = bench.exchange(bench.mark(*bench.layout.plain[:3]), xen)
    assert {type(result) for result in report.results} == {Exchanged}
    bench.assert_guest_runs_unharmed()


def test_a_guest_that_can_neither_be_put_right_nor_let_go_is_tried_again_by_the_same_process() -> (
    None
):
    bench = Bench.build()
    mfns = bench.mark(*bench.layout.plain[:2])
    broken = Fault(method="write_frames", times=200), Fault(method="resume", times=10)
    work = bench.work(FaultyHypervisor(bench.host, *broken))
    report = work.run(bench.identity, tuple(mfns[:1]))
    assert [type(result) for result in report.results] == [Damaged]
    # No other job takes the place of its record.
    [busy] = work.run(bench.identity, tuple(mfns[1:])).results
    assert isinstance(busy, Refusal)
    assert busy.reason is RefusalReason.DOMAIN_BUSY
    reports: list[RecoveryReport] = []
    while work.has_rest:
        bench.host.clock.wait(RECOVERY_SECONDS)
        reports += work.recover_rest()
    assert [report.outcome for report in reports] == [Recovered.FINISHED]
    bench.assert_guest_runs_unharmed()
    assert [type(each) for each in work.run(bench.identity, tuple(mfns[1:])).results] == [Exchanged]


def test_one_page_that_cannot_be_written_does_not_harm_its_batch() -> None:
    bench = Bench.build()
    mfns = _pages(bench)
    calls = 0

    class Picky(FaultyHypervisor):
        """Refuses every write that has the second page's contents in it."""

        def write_frames(
            self, domid: Domid, mfns: FrameArray, contents: Words, slots: PteWrites
        ) -> None:
            nonlocal calls
            calls += 1
            if any(np.array_equal(row, second) for row in contents):
                raise PortError("no")
            super().write_frames(domid, mfns, contents, slots)

    second = bench.host.read_frames(bench.domid, np.array([mfns[1]], dtype=np.uint64))[0]
    results = bench.exchange(mfns, Picky(bench.host)).results
    assert [type(result) for result in results] == [Exchanged, Damaged, Exchanged]
    assert calls > 3


def test_after_damage_no_other_group_takes_the_place_of_the_record() -> None:
    bench = Bench.build()
    mfns = bench.mark(bench.layout.plain[0], bench.layout.direct_l2[0])
    xen = FaultyHypervisor(bench.host, Fault(method="write_frames", times=10**6))
    report = bench.exchange(mfns, xen)
    assert [type(result) for result in report.results] == [Damaged, Refusal]
    [aside] = bench.journal.aside
    assert aside.group is not None
    assert aside.group.frames() == mfns[:1]


@pytest.mark.parametrize("moment", Moment)
def test_pages_of_the_p2m_that_are_written_one_by_one_keep_what_is_written_of_others(
    moment: Moment,
) -> None:
    bench = Bench.build()
    # Their own slots, and those of the pages before and after them, lie in one another.
    mfns = bench.mark(*bench.layout.plain[:2], *bench.layout.p2m_list, *bench.layout.plain[2:4])

    class OneByOne(FaultyHypervisor):
        """Does no write of several frames to its end."""

        def write_frames(
            self, domid: Domid, mfns: FrameArray, contents: Words, slots: PteWrites
        ) -> None:
            if len(mfns) == 1:
                super().write_frames(domid, mfns, contents, slots)
                return
            if moment is not Moment.BEFORE:
                done = slots[: len(slots) // 2] if moment is Moment.HALFWAY else slots
                super().write_frames(domid, mfns, contents, done)
            raise PortError("no")

    results = bench.exchange(mfns, OneByOne(bench.host)).results
    assert [type(result) for result in results] == [Exchanged] * len(mfns)
    bench.assert_guest_runs_unharmed()


def test_a_page_whose_entries_xen_refuses_to_clear_does_not_keep_its_batch_from_going() -> None:
    bench = Bench.build()
    mfns = _pages(bench)
    xen = FaultyHypervisor(bench.host, Fault(method="update_ptes", moment=Moment.HALFWAY))
    results = bench.exchange(mfns, xen).results
    kinds = [type(result) for result in results]
    assert kinds.count(Refusal) == 1
    assert kinds.count(Exchanged) == 2
    bench.assert_guest_runs_unharmed()
