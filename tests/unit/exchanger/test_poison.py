"""Errors that are reported at any moment of an exchange: what has one is not read after that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest

from pgofflined.core.frames import Mfn
from pgofflined.core.outcomes import Exchanged, ExchangeReport, Refusal, RefusalReason
from pgofflined.core.policy import ExchangePolicy
from pgofflined.exchanger.survey import survey
from pgofflined.exchanging import Exchanging
from pgofflined.sim.errors import PoisonRead
from pgofflined.sim.faults import Fault, FaultyHypervisor, Killed, Moment
from tests.crash.killing import PAGES
from tests.unit.exchanger.conftest import Bench

# An error that strikes within a batch that is being read is one that nobody can know of.
READS = {"granted_frames", "read_frames", "window", "look"}
CASES = ["data", "batch", "l1", "l1-pinned"]


def itself(_bench: Bench, mfn: Mfn) -> Mfn:
    return mfn


def its_table(bench: Bench, mfn: Mfn) -> Mfn:
    [facts] = survey(bench.host, bench.host.domain(bench.domid), [mfn])
    return Mfn(int(facts.references.tables[-1]))


def its_shared_info(bench: Bench, _mfn: Mfn) -> Mfn:
    return bench.host.simulated(bench.domid).shared_info


@cache
def moments(name: str) -> tuple[int, ...]:
    """The calls of a good run, up to the commit, at which nothing is read."""
    bench = Bench.build()
    xen = FaultyHypervisor(bench.host)
    work(bench, xen, frozenset).run(bench.identity, tuple(bench.mark(*PAGES[name](bench.layout))))
    before = xen.trace.methods[: xen.trace.methods.index("exchange")]
    return tuple(nth for nth, method in enumerate(before, 1) if method not in READS)


def work(bench: Bench, xen: FaultyHypervisor, poisoned: Callable[[], frozenset[Mfn]]) -> Exchanging:
    return Exchanging(
        xen=xen,
        journal=bench.journal,
        clock=bench.host.clock,
        policy=ExchangePolicy,
        poisoned=poisoned,
    )


class Reported:
    """An error of a frame that is reported at some call."""

    def __init__(self, bench: Bench, bad: Mfn, fault: Fault) -> None:
        self.bench, self.bad = bench, bad
        self.poisoned: frozenset[Mfn] = frozenset()
        self.xen = FaultyHypervisor(bench.host, replace(fault, act=self.strike))
        self.work = work(bench, self.xen, lambda: self.poisoned)

    def strike(self) -> None:
        self.bench.host.poison(self.bad)
        self.poisoned = frozenset({self.bad})

    def run(self, mfns: list[Mfn]) -> ExchangeReport:
        return self.work.run(self.bench.identity, tuple(mfns))

    @property
    def touched(self) -> list[str]:
        calls = self.xen.trace.calls
        return [call.method for call in calls if isinstance(call.outcome, PoisonRead)]


@pytest.mark.parametrize("which", [itself, its_table, its_shared_info])
@pytest.mark.parametrize("name", CASES)
def test_a_frame_whose_error_is_reported_at_any_moment_is_not_read_after_that(
    name: str, which: Callable[[Bench, Mfn], Mfn]
) -> None:
    for nth in moments(name):
        bench = Bench.build()
        mfns = bench.mark(*PAGES[name](bench.layout))
        error = Reported(bench, which(bench, mfns[0]), Fault(nth=nth))
        report = error.run(mfns)
        assert error.poisoned
        assert error.touched == [], nth
        for result in report.results:
            assert isinstance(result, Exchanged) or (
                isinstance(result, Refusal) and result.reason is not RefusalReason.INTERNAL
            ), (nth, result)
        info = bench.host.domain(bench.domid)
        assert (info.shutdown, info.paused) == (None, False)
        assert bench.journal.kept == {}


def test_a_page_table_that_is_to_go_is_not_read_when_its_error_comes_during_the_survey() -> None:
    bench = Bench.build()
    mfns = bench.mark(*PAGES["l1"](bench.layout))
    error = Reported(bench, mfns[0], Fault(method="vcpu_frames"))
    [result] = error.run(mfns).results
    assert error.touched == []
    assert isinstance(result, Refusal)
    assert result.reason is RefusalReason.BROKEN


def test_what_a_killed_daemon_has_left_is_not_read_when_its_error_comes_during_recovery() -> None:
    bench = Bench.build()
    mfns = bench.mark(*PAGES["data"](bench.layout))
    table = its_table(bench, mfns[0])
    dying = FaultyHypervisor(bench.host, Fault(method="exchange", moment=Moment.AFTER, kills=True))
    with pytest.raises(Killed):
        bench.exchange(mfns, dying)
    error = Reported(bench, table, Fault(method="m2p_search"))
    error.work.recover()
    assert error.poisoned
    assert error.touched == []
    [(_, detail)] = error.work.left()
    assert f"{table:#x} has had an uncorrected error" in detail
