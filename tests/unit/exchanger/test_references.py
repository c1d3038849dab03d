"""A guest maps a page as often as it likes: that costs us little, and it no blackout."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from typing import cast

import numpy as np
import pytest

from bench.sparse import DOMID, SparseGuest
from pgofflined.core.frames import Mfn, Pfn
from pgofflined.core.outcomes import Exchanged, ExchangeReport, Refusal, RefusalReason
from pgofflined.exchanger import exchange, scan
from pgofflined.exchanger.plan import make_plan, seconds_for
from pgofflined.exchanger.scan import MAX_REFERENCES, MAX_TOGETHER
from pgofflined.exchanger.survey import PageFacts, survey
from pgofflined.ports import Hypervisor, SuspendLimits
from pgofflined.sim.faults import Fault, FaultyHypervisor
from tests.unit.exchanger.conftest import Bench

MIB = 1 << 20


def surveyed(guest: SparseGuest, pfns: Sequence[int]) -> tuple[PageFacts, ...]:
    mfns = [guest.mfn(Pfn(pfn)) for pfn in pfns]
    return survey(cast("Hypervisor", guest), guest.domain(DOMID), mfns)


def peak_of(guest: SparseGuest, pfns: Sequence[int]) -> tuple[tuple[PageFacts, ...], int]:
    """The facts, and the bytes that were in use at most for finding them."""
    tracemalloc.start()
    try:
        facts = surveyed(guest, pfns)
        return facts, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_million_mappings_of_a_page_cost_little_more_memory_than_one() -> None:
    plain, many = SparseGuest(2), SparseGuest(2, mappings=1 << 20)
    other = plain.data_page() - 1
    _, usual = peak_of(plain, [plain.data_page(), other])
    (most, least), _ = peak_of(many, [many.data_page(), other])
    assert most.too_many
    assert len(most.references) == 0
    # The other page is found all the same.
    assert (least.too_many, len(least.references)) == (False, 1)
    for times in (1, 4, 16):
        guest = SparseGuest(2, mappings=times << 20)
        _, peak = peak_of(guest, [guest.data_page(), other])
        # What it holds of one batch of tables that name nothing else; 250 MiB for each million
        # once.
        assert peak < usual + 48 * MIB


@pytest.mark.parametrize(("over", "too_many"), [(0, False), (1, True)])
def test_as_many_mappings_as_can_be_dealt_with_are_and_no_more(
    over: int,
    too_many: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    # One more is the direct map's.
    guest = SparseGuest(2, mappings=MAX_REFERENCES - 1 + over)
    (facts,) = surveyed(guest, [guest.data_page()])
    assert facts.too_many is too_many
    assert len(facts.references) == (0 if too_many else MAX_REFERENCES)
    pairs = facts.references.tables * np.uint64(512) + facts.references.indexes
    assert len(np.unique(pairs)) == len(pairs)


def test_the_pages_of_a_job_have_no_more_mappings_together_than_are_dealt_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    guest = SparseGuest(1, mappings=1 << 12)
    wanted = [guest.data_page(), *range(guest.data_page() - 40, guest.data_page())]
    assert not any(facts.too_many for facts in surveyed(guest, wanted))
    monkeypatch.setattr(scan, "MAX_TOGETHER", 1 << 12)
    most, *others = surveyed(guest, wanted)
    assert most.too_many
    assert [len(facts.references) for facts in others] == [1] * 40


def test_what_is_kept_of_a_guest_is_bounded_in_all() -> None:
    # Each entry is 33 bytes: level, table, index, value, and the page that it maps.
    assert 33 * MAX_TOGETHER < 16 * MIB
    assert seconds_for(1, MAX_REFERENCES) < SuspendLimits().blackout


def _run(bench: Bench, mfns: list[Mfn], xen: Hypervisor, blackout: float) -> ExchangeReport:
    report = exchange(
        bench.identity,
        mfns,
        xen=xen,
        journal=bench.journal,
        clock=bench.host.clock,
        limits=SuspendLimits(blackout=blackout),
    )
    bench.assert_guest_runs_unharmed()
    return report


def reasons(report: ExchangeReport) -> list[RefusalReason | None]:
    return [getattr(result, "reason", None) for result in report.results]


def test_no_guest_is_suspended_for_a_page_that_it_maps_too_often(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "MAX_REFERENCES", 1)
    xen = FaultyHypervisor(bench.host)
    report = _run(bench, bench.mark(bench.layout.text[0]), xen, 1.0)
    assert reasons(report) == [RefusalReason.TOO_MANY_REFERENCES]
    assert "suspend" not in xen.trace.methods


def test_no_guest_is_suspended_for_a_page_that_alone_would_keep_it_too_long(bench: Bench) -> None:
    xen = FaultyHypervisor(bench.host)
    report = _run(bench, bench.mark(bench.layout.plain[0]), xen, seconds_for(1, 1) / 2)
    assert reasons(report) == [RefusalReason.BLACKOUT_LIMIT]
    [refusal] = report.results
    assert isinstance(refusal, Refusal)
    assert "exchange.max_blackout" in refusal.detail
    assert "suspend" not in xen.trace.methods


def test_pages_that_together_would_keep_the_guest_too_long_go_in_groups(bench: Bench) -> None:
    mfns = bench.mark(*bench.layout.plain[:5])
    facts = survey(bench.host, bench.host.domain(bench.domid), mfns)
    groups = make_plan(facts, blackout=seconds_for(2, 2)).groups
    assert [len(group) for group in groups] == [2, 2, 1]
    assert [mfn for group in groups for mfn in group.frames()] == mfns
    xen = FaultyHypervisor(bench.host)
    report = _run(bench, mfns, xen, seconds_for(2, 2))
    # No time passes here.
    assert [type(result) for result in report.results] == [Exchanged] * 5
    assert xen.trace.methods.count("suspend") == 1


def test_a_group_that_would_keep_the_guest_too_long_after_others_is_put_off(bench: Bench) -> None:
    mfns = bench.mark(*bench.layout.plain[:3])
    blackout = seconds_for(2, 2)
    slow = Fault(method="exchange", act=lambda: bench.host.clock.wait(blackout * 0.9))
    report = _run(bench, mfns, FaultyHypervisor(bench.host, slow), blackout)
    assert reasons(report) == [None, None, RefusalReason.BLACKOUT_LIMIT]


def test_groups_are_cut_where_they_have_too_many_mappings(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pgofflined.exchanger.plan.MAX_REFERENCES", 3)
    mfns = bench.mark(*bench.layout.plain[:4])
    facts = survey(bench.host, bench.host.domain(bench.domid), mfns)
    assert [len(group) for group in make_plan(facts).groups] == [3, 1]


def test_a_table_that_the_guest_names_twice_is_searched_as_one(bench: Bench) -> None:
    [mfn] = bench.mark(bench.layout.plain[0])
    info = bench.host.domain(bench.domid)
    [before] = survey(bench.host, info, [mfn])
    table = bench.host.frame_of(bench.domid, bench.layout.direct_l1[0])
    for pfn in bench.layout.missing:
        bench.host.pv(bench.domid).lie(pfn, table)
    [after] = survey(bench.host, info, [mfn])
    assert len(after.references) == len(before.references) == 1


def test_a_guest_that_claims_too_many_page_tables_is_not_searched_through(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "MAX_TABLES", 4)
    xen = FaultyHypervisor(bench.host)
    report = _run(bench, bench.mark(bench.layout.plain[0]), xen, 1.0)
    assert reasons(report) == [RefusalReason.GUEST_LAYOUT]
    assert "suspend" not in xen.trace.methods
