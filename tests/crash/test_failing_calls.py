"""Every call of an exchange fails once: before it acts, halfway, or with its reply lost."""

from __future__ import annotations

import pytest

from pgofflined.core.errors import PortError
from pgofflined.core.frames import Mfn
from pgofflined.core.outcomes import Damaged, Exchanged, Refusal
from pgofflined.sim.faults import Fault, FaultyHypervisor, Moment
from pgofflined.sim.layout import DIRECT_MAP
from pgofflined.sim.pagetables import PageFault
from tests.unit.exchanger.conftest import Bench


def _pages(bench: Bench) -> list[Mfn]:
    return bench.mark(bench.layout.plain[0], bench.layout.user_pages[0], bench.layout.text[0])


def _calls_of_a_good_run() -> list[str]:
    bench = Bench.build()
    report, xen = bench.exchange_traced(_pages(bench))
    assert all(isinstance(result, Exchanged) for result in report.results)
    return xen.trace.methods


# A commit whose reply is lost has a test of its own.
FAILURES = [
    pytest.param(nth, moment, id=f"{nth}-{method}-{moment.name.lower()}")
    for nth, method in enumerate(_calls_of_a_good_run(), start=1)
    for moment in Moment
    if (method, moment) != ("exchange", Moment.AFTER)
]


@pytest.mark.parametrize(("nth", "moment"), FAILURES)
def test_one_failing_call_leaves_the_guest_running_with_its_memory(
    nth: int, moment: Moment
) -> None:
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


def test_a_commit_whose_reply_is_lost_is_told_from_one_that_did_not_happen() -> None:
    bench = Bench.build()
    mfns = _pages(bench)
    xen = FaultyHypervisor(bench.host, Fault(method="exchange", nth=2, moment=Moment.AFTER))
    results = bench.exchange(mfns, xen).results
    assert [type(result) for result in results] == [Exchanged, Damaged, Exchanged]
    info = bench.host.domain(bench.domid)
    assert info.shutdown is None
    assert not info.paused


def test_an_answer_that_contradicts_itself_does_not_hide_what_was_exchanged() -> None:
    bench = Bench.build()
    mfns = _pages(bench)
    fault = Fault(method="exchange", nth=2, error=PortError("memory_exchange counted 7 frames"))
    results = bench.exchange(mfns, FaultyHypervisor(bench.host, fault)).results
    assert [type(result) for result in results] == [Exchanged, Refusal, Exchanged]
    bench.assert_guest_runs_unharmed()


@pytest.mark.parametrize("method", ["write_words", "update_ptes", "read_frames"])
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


def test_a_page_whose_contents_are_lost_stays_unmapped_rather_than_wrong() -> None:
    bench = Bench.build()
    pfn = bench.layout.plain[0]
    mfns = bench.mark(pfn)
    xen = FaultyHypervisor(bench.host, Fault(method="write_words", times=10**6))
    [result] = bench.exchange(mfns, xen).results
    assert isinstance(result, Damaged)
    with pytest.raises(PageFault):
        bench.host.pv(bench.domid).write(DIRECT_MAP + (pfn << 12), 1)
