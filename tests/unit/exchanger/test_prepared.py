"""What is mapped and kept while the guest still runs, and what has changed when it stands still."""

from __future__ import annotations

import gc
import shutil
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from pgofflined.core.errors import PortError
from pgofflined.core.frames import Mfn
from pgofflined.core.moves import Group, frames_of
from pgofflined.core.outcomes import Exchanged, Refusal, RefusalReason
from pgofflined.core.pages import PTE_ADDR_MASK, PTE_DIRTY
from pgofflined.exchanger import exchange
from pgofflined.exchanger.check import check, look_at
from pgofflined.exchanger.plan import make_plan
from pgofflined.exchanger.survey import survey
from pgofflined.jobstore import JobStore
from pgofflined.ports import JobRecord, Journal, OpenJob, SuspendLimits
from pgofflined.sim.faults import Fault, FaultyHypervisor, Killed, Moment
from pgofflined.sim.guests import Answer, SuspendBehaviour
from pgofflined.sim.layout import DIRECT_MAP
from tests.crash.killing import MortalJournal
from tests.unit.exchanger.conftest import Bench

PAGES = 5


def writes(bench: Bench, pfn: int, word: int) -> Fault:
    """The guest writes to one of its pages just before it follows the request to suspend."""

    def write() -> None:
        bench.host.pv(bench.domid).write(DIRECT_MAP + (pfn << 12) + 8 * 7, word)

    return Fault(method="suspend", act=write)


def held_words(bench: Bench, pfns: list[int]) -> list[int]:
    mfns = frames_of([bench.host.frame_of(bench.domid, pfn) for pfn in pfns])
    words: list[int] = bench.host.read_frames(bench.domid, mfns)[:, 7].tolist()
    return words


def test_frames_are_mapped_once_and_before_the_guest_is_asked_to_suspend(bench: Bench) -> None:
    _, xen = bench.exchange_traced(bench.mark(*bench.layout.plain[:PAGES]))
    methods = xen.trace.methods
    assert methods.count("window") == 1
    assert methods.index("window") < methods.index("suspend")
    assert methods.index("suspend") < methods.index("close_window") < methods.index("exchange")


def test_a_page_that_is_written_to_before_the_suspend_keeps_what_was_written(bench: Bench) -> None:
    pfns = list(bench.layout.plain[:PAGES])
    before = held_words(bench, pfns)
    xen = FaultyHypervisor(bench.host, writes(bench, pfns[2], 0xFEED))
    report = bench.exchange(bench.mark(*pfns), xen)
    assert [type(result) for result in report.results] == [Exchanged] * PAGES
    assert held_words(bench, pfns) == [*before[:2], 0xFEED, *before[3:]]


@pytest.mark.parametrize("method", ["exchange", "write_frames", "update_ptes"])
@pytest.mark.parametrize("moment", Moment)
def test_a_page_that_is_written_to_before_the_suspend_keeps_that_through_a_kill(
    bench: Bench, method: str, moment: Moment, tmp_path: Path
) -> None:
    pfns = list(bench.layout.plain[:PAGES])
    before = held_words(bench, pfns)
    dying = Fault(method=method, moment=moment, kills=True)
    xen = FaultyHypervisor(bench.host, writes(bench, pfns[2], 0xFEED), dying)
    left, found = tmp_path / "left", tmp_path / "found"
    with pytest.raises(Killed):
        run(bench, bench.mark(*pfns), xen, MortalJournal(JobStore(left), xen))
    shutil.copytree(left, found)
    [report] = bench.end_jobs(journal=JobStore(found))
    assert len(report.results) == PAGES
    assert held_words(bench, pfns) == [*before[:2], 0xFEED, *before[3:]]
    assert bench.host.domain(bench.domid).shutdown is None


def run(bench: Bench, mfns: list[Mfn], xen: FaultyHypervisor, journal: Journal) -> None:
    exchange(
        bench.identity,
        mfns,
        xen=xen,
        journal=journal,
        clock=bench.host.clock,
        limits=SuspendLimits(),
    )


@pytest.mark.parametrize("error", [None, PortError("no"), MemoryError()])
def test_no_garbage_is_looked_for_while_the_guest_stands_still(
    bench: Bench, error: Exception | None
) -> None:
    seen: list[bool] = []

    def look() -> None:
        seen.append(gc.isenabled())
        if error is not None:
            raise error

    xen = FaultyHypervisor(bench.host, Fault(method="exchange", act=look))
    bench.exchange(bench.mark(bench.layout.plain[0]), xen)
    assert seen == [False]
    assert gc.isenabled()


def test_garbage_is_looked_for_again_when_the_last_of_several_guests_runs() -> None:
    first, second, outer = Bench.build(), Bench.build(), []

    def whole_other_job() -> None:
        second.exchange(second.mark(second.layout.plain[0]))
        outer.append(gc.isenabled())

    xen = FaultyHypervisor(first.host, Fault(method="exchange", act=whole_other_job))
    first.exchange(first.mark(first.layout.plain[0]), xen)
    assert outer == [False]
    assert gc.isenabled()


def test_nothing_stays_mapped_or_kept_where_the_guest_does_not_suspend(bench: Bench) -> None:
    mfns = bench.mark(*bench.layout.plain[:PAGES])
    bench.host.simulated(bench.domid).behaviour = SuspendBehaviour(answer=Answer.IGNORES)
    report, xen = bench.exchange_traced(mfns)
    assert {type(result) for result in report.results} == {Refusal}
    assert xen.trace.methods.count("window") == xen.trace.methods.count("close_window") == 1
    assert not [hold for hold in bench.host.simulated(bench.domid).holds if hold.of_ours]
    assert bench.journal.kept == {}


def test_a_guest_is_not_suspended_for_what_cannot_be_kept(bench: Bench, tmp_path: Path) -> None:
    class Full(JobStore):
        """Takes the job, and none of its pages."""

        def open(self, record: JobRecord) -> OpenJob:
            job = super().open(record)
            job._connection.execute("DROP TABLE page")  # type: ignore[attr-defined]
            return job

    mfns = bench.mark(*bench.layout.plain[:PAGES])
    xen = FaultyHypervisor(bench.host)
    report = exchange(
        bench.identity,
        mfns,
        xen=xen,
        journal=Full(tmp_path / "jobs"),
        clock=bench.host.clock,
        limits=SuspendLimits(),
    )
    reasons = {result.reason for result in report.results if isinstance(result, Refusal)}
    assert reasons == {RefusalReason.NOT_KEPT}
    assert "suspend" not in xen.trace.methods
    assert list((tmp_path / "jobs").iterdir()) == []
    bench.assert_guest_runs_unharmed()


@pytest.mark.parametrize("method", ["page_types", "window", "look"])
def test_what_cannot_be_looked_at_while_the_guest_runs_is_looked_at_when_it_stands_still(
    bench: Bench, method: str
) -> None:
    rehearsal = Bench.build()
    _, dry = rehearsal.exchange_traced(rehearsal.mark(rehearsal.layout.plain[0]))
    methods = dry.trace.methods
    last = methods[: methods.index("suspend")].count(method)
    xen = FaultyHypervisor(bench.host, Fault(method=method, nth=last))
    [result] = bench.exchange(bench.mark(bench.layout.plain[0]), xen).results
    assert isinstance(result, Exchanged)
    assert not [hold for hold in bench.host.simulated(bench.domid).holds if hold.of_ours]
    bench.assert_guest_runs_unharmed()


def group_of(bench: Bench, *pfns: int) -> Group:
    facts = survey(bench.host, bench.host.domain(bench.domid), bench.mark(*pfns))
    [group] = make_plan(facts).groups
    return group


def test_a_look_that_has_all_that_is_needed_is_used(bench: Bench) -> None:
    group = group_of(bench, *bench.layout.plain[:3])
    seen = look_at(bench.host, bench.domid, group)
    assert seen is not None
    with ExitStack() as looks:
        checked = check(bench.host, bench.domid, seen.group, looks, seen.look)
        assert checked.look is seen.look
        assert checked.group.contents is seen.group.contents
    assert not [hold for hold in bench.host.simulated(bench.domid).holds if hold.of_ours]


def test_a_look_that_lacks_a_frame_is_closed_and_another_taken(bench: Bench) -> None:
    group = group_of(bench, *bench.layout.plain[:3])
    seen = look_at(bench.host, bench.domid, group.only(np.array([True, False, True])))
    assert seen is not None
    xen = FaultyHypervisor(bench.host)
    with ExitStack() as looks:
        checked = check(xen, bench.domid, group, looks, seen.look)
        assert checked.look is not None
        assert checked.look is not seen.look
        assert len(checked.group) == 3
        # Each frame is mapped by the one only.
        held = [hold.mfn for hold in bench.host.simulated(bench.domid).holds if hold.of_ours]
        assert len(held) == len(set(held))
        expected = bench.host.read_frames(bench.domid, group.mfns)
        assert np.array_equal(checked.group.contents, expected)
    assert xen.trace.methods.count("window") == 1
    assert not [hold for hold in bench.host.simulated(bench.domid).holds if hold.of_ours]


def test_a_look_is_closed_where_nothing_is_left_to_move(bench: Bench) -> None:
    pfn = bench.layout.plain[0]
    group = group_of(bench, pfn)
    seen = look_at(bench.host, bench.domid, group)
    assert seen is not None
    bench.host.grant(bench.domid, pfn)
    with ExitStack() as looks:
        checked = check(bench.host, bench.domid, seen.group, looks, seen.look)
        assert [refusal.reason for refusal in checked.refusals] == [RefusalReason.GRANTED]
    assert not [hold for hold in bench.host.simulated(bench.domid).holds if hold.of_ours]


def test_what_xen_knows_to_be_broken_is_not_read_beforehand(bench: Bench) -> None:
    group = group_of(bench, *bench.layout.plain[:3])
    # Reading poison raises in the simulation, as it would raise #MC on a host.
    bench.host.poison(Mfn(int(group.references.tables[0])), known=True)
    assert look_at(bench.host, bench.domid, group) is None


def test_contents_of_pages_that_did_not_change_are_not_copied_again(bench: Bench) -> None:
    group = group_of(bench, *bench.layout.plain[:3])
    seen = look_at(bench.host, bench.domid, group)
    assert seen is not None
    known = seen.group.contents
    stale = known.copy()
    stale[1, 5] ^= np.uint64(1)
    with ExitStack() as looks:
        looks.callback(seen.look.close)
        assert seen.look.refreshed(group.mfns, known) is known
        assert np.array_equal(seen.look.refreshed(group.mfns, stale), known)
        assert seen.look.differing(group.mfns, stale).tolist() == [False, True, False]
        word = np.array([0xFEED], dtype=np.uint64)
        bench.host.frames.contents.write(int(group.mfns[2]), 7, word)
        # Of the stale one again, which is not what the look has a copy of; then of that.
        now = bench.host.read_frames(bench.domid, group.mfns)
        assert np.array_equal(seen.look.refreshed(group.mfns, stale), now)
        fresh = seen.look.refreshed(group.mfns, known)
        assert np.array_equal(fresh, now)
        assert fresh is not known
        assert known[2, 7] != 0xFEED


def test_a_group_is_kept_anew_where_an_entry_was_used_meanwhile(bench: Bench) -> None:
    pfn = bench.layout.plain[0]
    group = group_of(bench, pfn)
    table, index = int(group.references.tables[0]), int(group.references.indexes[0])
    value = int(group.references.values[0])
    dirty = value ^ PTE_DIRTY

    def use() -> None:
        bench.host.frames.contents.write(table, index, frames_of([dirty]))

    xen = FaultyHypervisor(bench.host, Fault(method="suspend", act=use))
    journal = MortalJournal(bench.journal, xen)
    run(bench, group.frames(), xen, journal)
    assert [int(of.references.values[0]) for of in journal.groups] == [value, dirty]
    # And back it comes as it was last, naming the new frame.
    new = bench.host.frame_of(bench.domid, pfn)
    left = bench.host.frames.contents.word(table, index)
    assert left == (dirty & ~PTE_ADDR_MASK) | new << 12
