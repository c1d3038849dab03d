"""Exchanges on a Xen whose allocator must never see a marked page among free ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from errno import EIO

import pytest

from pgofflined.core.errors import OfflineCallUnsafe, XenError
from pgofflined.core.frames import Domid, Mfn
from pgofflined.core.offline import OfflineFlag, OfflineReply, OfflineState, OnlineFlag
from pgofflined.core.outcomes import Exchanged, Refusal, RefusalReason
from pgofflined.exchanger import exchange
from pgofflined.marks import may_join
from pgofflined.ports import SuspendLimits
from pgofflined.sim.faults import Fault, FaultyHypervisor, Moment
from pgofflined.sim.frames import FrameState
from tests.unit.exchanger.conftest import UNFIXED, Bench


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """On a host with the old allocator; afterwards no page is marked, and the guest can go."""
    monkeypatch.setattr(Bench, "version", UNFIXED)
    bench = Bench.build()
    yield bench
    bench.assert_heap_stays_sound()


def pages(bench: Bench, count: int = 3) -> list[Mfn]:
    return bench.mark(*bench.layout.plain[:count])


def refusals(bench: Bench, mfns: list[Mfn], xen: FaultyHypervisor) -> list[Refusal]:
    results = bench.exchange(mfns, xen).results
    bench.assert_guest_runs_unharmed()
    return [result for result in results if isinstance(result, Refusal)]


def test_pages_are_marked_while_the_guest_is_held_and_are_out_of_use_afterwards(
    bench: Bench,
) -> None:
    mfns = pages(bench)
    report, xen = bench.exchange_traced(mfns)
    assert [isinstance(result, Exchanged) and result.offlined for result in report.results] == [
        True
    ] * 3
    methods = xen.trace.methods
    assert methods.index("pause") < methods.index("offline") < methods.index("update_ptes")
    assert {bench.host.query(mfn) for mfn in mfns} == {OfflineState.OFFLINED}
    # A place off pCPU 0 is looked for once for all of them, and once before the guest is asked.
    assert methods.count("placed") == 2
    assert methods.index("placed") < methods.index("suspend")


def test_a_page_table_is_marked_in_the_same_way(bench: Bench) -> None:
    [mfn] = bench.mark(bench.layout.direct_l2[0])
    [result] = bench.exchange([mfn]).results
    assert isinstance(result, Exchanged)
    assert bench.host.query(mfn) is OfflineState.OFFLINED
    bench.assert_guest_runs_unharmed()


def free_its_neighbour(bench: Bench, mfn: Mfn) -> Callable[[], None]:
    """As if the neighbour's owner, another guest, had ended."""

    def act() -> None:
        bench.host.frames.m2p[mfn ^ 1] = (1 << 64) - 1

    return act


@pytest.mark.parametrize("method", ["suspend", "offline", "update_ptes", "close_window"])
def test_a_page_whose_neighbour_is_freed_meanwhile_stays_and_loses_its_mark(
    bench: Bench, method: str
) -> None:
    mfns = pages(bench)
    neighbour = Mfn(mfns[1] ^ 1)
    noted = bench.host.m2p(neighbour)
    fault = Fault(method=method, moment=Moment.AFTER, act=free_its_neighbour(bench, mfns[1]))
    results = bench.exchange(mfns, FaultyHypervisor(bench.host, fault)).results
    bench.host.set_m2p(neighbour, int(noted or 0))
    bench.assert_guest_runs_unharmed()
    assert [type(result) for result in results] == [Exchanged, Refusal, Exchanged]
    assert isinstance(results[1], Refusal)
    assert results[1].reason is RefusalReason.NEIGHBOUR_FREE
    assert bench.host.query(mfns[1]) is OfflineState.ONLINE


def test_no_guest_is_suspended_for_a_page_whose_neighbour_is_free(bench: Bench) -> None:
    mfns = pages(bench, 1)
    noted = bench.host.m2p(Mfn(mfns[0] ^ 1))
    free_its_neighbour(bench, mfns[0])()
    xen = FaultyHypervisor(bench.host)
    [result] = bench.exchange(mfns, xen).results
    bench.host.set_m2p(mfns[0] ^ 1, int(noted or 0))
    assert isinstance(result, Refusal)
    assert result.reason is RefusalReason.NEIGHBOUR_FREE
    assert "suspend" not in xen.trace.methods


def test_a_neighbour_that_is_out_of_use_is_none_to_join(bench: Bench) -> None:
    own = set(bench.host.pv(bench.domid).mfns().tolist())
    plain = [bench.host.frame_of(bench.domid, pfn) for pfn in bench.layout.plain]
    mfn = next(mfn for mfn in plain if mfn ^ 1 in plain and mfn ^ 1 in own)
    for each in (mfn, Mfn(mfn ^ 1)):
        [result] = bench.exchange([each]).results
        assert isinstance(result, Exchanged)
        assert result.offlined
    bench.assert_guest_runs_unharmed()


def test_a_free_neighbour_is_one_to_join_and_so_is_one_that_is_no_memory(bench: Bench) -> None:
    free = next(m for m, s in enumerate(bench.host.frames.state.tolist()) if s == FrameState.FREE)
    assert may_join(bench.host, Mfn(free ^ 1))
    assert may_join(bench.host, Mfn(bench.host.spec.frames))


class Answers(FaultyHypervisor):
    """Marks a page, and tells of it what it is told to."""

    reply: OfflineReply | XenError

    def offline(self, mfn: Mfn) -> OfflineReply:
        super().offline(mfn)
        if isinstance(self.reply, XenError):
            raise self.reply
        return self.reply


@pytest.mark.parametrize(
    "reply",
    [
        OfflineReply(flags=OfflineFlag.OWNED | OfflineFlag.PENDING, owner=Domid(77)),
        OfflineReply(flags=OfflineFlag.OWNED | OfflineFlag.AGAIN, owner=Domid(1)),
        OfflineReply(flags=OfflineFlag.ANONYMOUS | OfflineFlag.FAILED, owner=None),
        OfflineReply(flags=OfflineFlag.XENPAGE | OfflineFlag.PENDING, owner=None),
        OfflineReply(flags=OfflineFlag.OFFLINED, owner=None),
        XenError(EIO, op="page_offline"),
    ],
)
def test_a_page_whose_mark_is_answered_otherwise_stays_without_one(
    bench: Bench, reply: OfflineReply | XenError
) -> None:
    mfns = pages(bench)
    xen = Answers(bench.host)
    xen.reply = reply
    found = refusals(bench, mfns, xen)
    assert [refusal.mfn for refusal in found] == mfns
    wanted = RefusalReason.XEN_REFUSED if isinstance(reply, XenError) else RefusalReason.CANNOT_MARK
    assert {refusal.reason for refusal in found} == {wanted}
    assert "exchange" not in xen.trace.methods


def test_a_page_that_xen_breaks_meanwhile_gets_no_offline_call(bench: Bench) -> None:
    mfns = pages(bench, 1)
    xen = FaultyHypervisor(
        bench.host,
        # The second, after which nobody looks at its type any more.
        Fault(method="placed", nth=2, act=lambda: bench.host.poison(mfns[0], known=True)),
    )
    [result] = bench.exchange(mfns, xen).results
    assert isinstance(result, Refusal)
    assert result.reason is RefusalReason.BROKEN
    assert "offline" not in xen.trace.methods
    assert bench.host.crashes == {}
    bench.host.frames.broken[mfns[0]] = False


class Nowhere(FaultyHypervisor):
    """Has no place from which an offline call may be made, from the n-th time on."""

    first = 1

    @contextmanager
    def placed(self) -> Iterator[None]:
        with super().placed():
            if len(self.trace.of("placed")) >= self.first:
                raise OfflineCallUnsafe("no other pCPU")
            yield


@pytest.mark.parametrize("first", [1, 2])
def test_pages_stay_where_no_offline_call_can_be_made(bench: Bench, first: int) -> None:
    mfns = pages(bench)
    xen = Nowhere(bench.host)
    xen.first = first
    found = refusals(bench, mfns, xen)
    assert [refusal.reason for refusal in found] == [RefusalReason.CANNOT_MARK] * 3
    # Not every few minutes for nothing.
    assert ("suspend" in xen.trace.methods) is (first == 2)


@pytest.mark.parametrize("when", ["before", "pause"])
def test_no_page_is_marked_of_a_guest_in_which_xen_has_broken_one(bench: Bench, when: str) -> None:
    wedged = when == "before"

    def break_one() -> None:
        nonlocal wedged
        wedged = True

    mfns = pages(bench)
    xen = FaultyHypervisor(bench.host, Fault(method="pause", act=break_one))
    report = exchange(
        bench.identity,
        mfns,
        xen=xen,
        journal=bench.journal,
        clock=bench.host.clock,
        limits=SuspendLimits(),
        when=bench.when,
        wedged=lambda: wedged,
    )
    reasons = {result.reason for result in report.results if isinstance(result, Refusal)}
    assert reasons == {RefusalReason.CANNOT_MARK}
    assert "offline" not in xen.trace.methods
    assert ("suspend" in xen.trace.methods) is (when == "pause")
    bench.assert_guest_runs_unharmed()


def test_a_guest_is_not_let_go_before_the_mark_of_a_refused_page_is_taken_back(
    bench: Bench,
) -> None:
    mfns = pages(bench, 1)
    host = bench.host
    held: list[bool] = []

    class Watched(FaultyHypervisor):
        """Notes whether the guest stands still as the mark is taken back."""

        def online(self, mfn: Mfn) -> OnlineFlag:
            held.append(host.domain(bench.domid).paused)
            return super().online(mfn)

    host.hold(bench.domid, bench.layout.plain[0], why="dom0")
    xen = Watched(host, Fault(method="online", times=12))
    [refusal] = refusals(bench, mfns, xen)
    assert refusal.mfn == mfns[0]
    assert len(held) > 12
    assert all(held)
    assert host.query(mfns[0]) is OfflineState.ONLINE


def test_a_mark_that_cannot_be_taken_back_is_reported_with_the_command_that_does(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    [mfn] = pages(bench, 1)
    bench.host.hold(bench.domid, bench.layout.plain[0], why="dom0")
    xen = FaultyHypervisor(bench.host, Fault(method="online", times=10**6))
    report = bench.work(xen).run(bench.identity, (mfn,))
    assert isinstance(report.results[0], Refusal)
    assert f"xen-hptool mem-online {mfn:x}" in caplog.text
    # The guest runs all the same.
    assert bench.host.domain(bench.domid).shutdown is None
    bench.host.online(mfn)


def test_marks_that_pages_had_before_are_taken_back_from_those_that_stay(bench: Bench) -> None:
    [mfn] = pages(bench, 1)
    bench.host.offline(mfn)
    bench.host.grant(bench.domid, bench.layout.plain[0])
    report = bench.work().run(bench.identity, (mfn,))
    assert isinstance(report.results[0], Refusal)
    assert bench.host.query(mfn) is OfflineState.ONLINE
