from __future__ import annotations

from errno import EAGAIN, EIO

import numpy as np
import pytest

from pgofflined.core.domains import ShutdownReason
from pgofflined.core.errors import DomainGone, XenError
from pgofflined.core.frames import PAGE_SHIFT, Mfn
from pgofflined.core.moves import PteWrite
from pgofflined.core.offline import OfflineState
from pgofflined.ports import Hypervisor, SuspendLimits
from pgofflined.sim.faults import Fault, FaultyHypervisor, Killed, Moment
from pgofflined.sim.layout import DIRECT_MAP
from pgofflined.sim.pagetables import walk
from pgofflined.sim.scenarios import SmallHost, small_host
from tests.single import set_ptes, write_words


@pytest.fixture
def small() -> SmallHost:
    return small_host()


def faulty(small: SmallHost, *plan: Fault) -> FaultyHypervisor:
    return FaultyHypervisor(small.host, *plan)


def test_calls_are_passed_on_and_traced(small: SmallHost) -> None:
    wrapped = faulty(small)
    hypervisor: Hypervisor = wrapped
    mfn = small.host.frame_of(small.pv, 9)

    assert hypervisor.domain(small.pv) == small.host.domain(small.pv)
    assert hypervisor.m2p(mfn) == 9
    assert wrapped.trace.methods == ["domain", "m2p"]
    assert wrapped.trace.of("m2p")[0].args == (mfn,)
    assert wrapped.trace.of("m2p")[0].outcome == 9


def test_fault_before_a_call_leaves_everything(small: SmallHost) -> None:
    hypervisor = faulty(small, Fault(method="pause"))
    with pytest.raises(XenError) as caught:
        hypervisor.pause(small.pv)

    assert caught.value.errno == EIO
    assert not small.host.domain(small.pv).paused


def test_lost_reply_comes_after_the_effect(small: SmallHost) -> None:
    hypervisor = faulty(small, Fault(method="pause", moment=Moment.AFTER, errno=EAGAIN))
    with pytest.raises(XenError) as caught:
        hypervisor.pause(small.pv)

    assert caught.value.errno == EAGAIN
    assert small.host.domain(small.pv).paused


def test_fault_strikes_the_call_that_was_meant(small: SmallHost) -> None:
    hypervisor = faulty(small, Fault(method="query", nth=2, times=2))
    hypervisor.query(Mfn(100))
    for _ in range(2):
        with pytest.raises(XenError):
            hypervisor.query(Mfn(100))

    assert hypervisor.query(Mfn(100)) == OfflineState.ONLINE


def test_fault_without_a_method_counts_all_calls(small: SmallHost) -> None:
    hypervisor = faulty(small, Fault(nth=2))
    hypervisor.max_mfn()

    with pytest.raises(XenError):
        hypervisor.free_frames()


def test_chosen_error_is_raised(small: SmallHost) -> None:
    hypervisor = faulty(small, Fault(method="resume", error=DomainGone(small.pv)))

    with pytest.raises(DomainGone):
        hypervisor.resume(small.pv)


def test_killed_process_makes_no_further_call(small: SmallHost) -> None:
    hypervisor = faulty(small, Fault(method="suspend", moment=Moment.AFTER, kills=True))
    with pytest.raises(Killed):
        hypervisor.suspend(small.pv, SuspendLimits())
    with pytest.raises(Killed):
        hypervisor.resume(small.pv)

    assert small.host.domain(small.pv).shutdown is ShutdownReason.SUSPEND
    assert hypervisor.trace.methods == ["suspend"]


def test_batch_can_fail_half_way(small: SmallHost) -> None:
    hypervisor = faulty(small, Fault(method="update_ptes", moment=Moment.HALFWAY))
    root = small.host.pv(small.pv).root
    slots = [
        walk(small.host.frames.contents, root, DIRECT_MAP + (pfn << PAGE_SHIFT))
        for pfn in small.host.pv(small.pv).plain_pfns()[:4]
    ]
    hypervisor.pause(small.pv)
    with pytest.raises(XenError) as caught:
        set_ptes(
            hypervisor,
            small.pv,
            [PteWrite(table=Mfn(s.table), index=s.index, value=0) for s in slots],
        )

    left = [small.host.frames.contents.word(slot.table, slot.index) for slot in slots]
    assert caught.value.done == 2
    assert [bool(entry) for entry in left] == [False, False, True, True]


def test_page_can_be_written_half(small: SmallHost) -> None:
    hypervisor = faulty(small, Fault(method="write_entries", moment=Moment.HALFWAY, kills=True))
    mfn = small.host.pv(small.pv).mfn(small.host.pv(small.pv).plain_pfns()[0])
    with pytest.raises(Killed):
        write_words(hypervisor, small.pv, mfn, 0, np.zeros(512, dtype=np.uint64))

    words = small.host.read_frames(small.pv, np.array([mfn], dtype=np.uint64))[0]
    assert not words[:256].any()
    assert words[256:].all()


def test_something_else_can_happen_at_a_call(small: SmallHost) -> None:
    act = Fault(method="page_types", act=lambda: small.host.destroy(small.pv))
    hypervisor = faulty(small, act)

    with pytest.raises(DomainGone):
        hypervisor.page_types(small.pv, np.zeros(1, dtype=np.uint64))
