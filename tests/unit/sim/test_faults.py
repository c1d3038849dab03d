from __future__ import annotations

from errno import EAGAIN, EIO
from typing import TYPE_CHECKING

import numpy as np
import pytest

from pgofflined.core.domains import ShutdownReason
from pgofflined.core.errors import DomainGone, XenError
from pgofflined.core.frames import PAGE_SHIFT, WORDS_PER_PAGE, Mfn
from pgofflined.core.moves import PteWrite, PteWrites, frames_of, no_contents
from pgofflined.core.offline import OfflineState
from pgofflined.ports import Hypervisor, SuspendLimits
from pgofflined.sim.faults import Fault, FaultyHypervisor, Killed, Moment
from pgofflined.sim.layout import DIRECT_MAP
from pgofflined.sim.pagetables import walk
from pgofflined.sim.scenarios import SmallHost, small_host
from tests.single import set_ptes, write_words

if TYPE_CHECKING:
    from pgofflined.ports import FrameArray


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


def _plain(small: SmallHost, *places: int) -> FrameArray:
    guest = small.host.pv(small.pv)
    return frames_of([guest.mfn(guest.plain_pfns()[place]) for place in places])


def _slots(frames: FrameArray, index: int, word: int) -> PteWrites:
    return PteWrites(
        tables=frames,
        indexes=frames_of([index] * len(frames)),
        values=frames_of([word] * len(frames)),
    )


@pytest.mark.parametrize(
    ("moment", "written", "slots"),
    [(Moment.BEFORE, 0, 0), (Moment.HALFWAY, 2, 0), (Moment.AFTER, 4, 4)],
)
def test_frames_can_be_written_in_part(
    small: SmallHost, moment: Moment, written: int, slots: int
) -> None:
    hypervisor = faulty(small, Fault(method="write_frames", moment=moment))
    mfns, others = _plain(small, 0, 1, 2, 3), _plain(small, 4, 5, 6, 7)
    with pytest.raises(XenError):
        hypervisor.write_frames(small.pv, mfns, no_contents(4), _slots(others, 9, 0xABC))

    empty = [not words.any() for words in small.host.read_frames(small.pv, mfns)]
    told = [words[9] == 0xABC for words in small.host.read_frames(small.pv, others)]
    assert empty == [True] * written + [False] * (4 - written)
    assert told == [True] * slots + [False] * (4 - slots)


def test_page_can_be_written_half(small: SmallHost) -> None:
    hypervisor = faulty(small, Fault(method="write_frames", moment=Moment.HALFWAY, kills=True))
    mfns = _plain(small, 0)
    contents = np.ones((1, WORDS_PER_PAGE), dtype=np.uint64)
    with pytest.raises(Killed):
        hypervisor.write_frames(small.pv, mfns, contents, _slots(mfns, 9, 0xABC))

    words = small.host.read_frames(small.pv, mfns)[0]
    assert words[:256].tolist() == [1] * 256
    assert not words[256:].any()


def test_slots_alone_can_be_written_half(small: SmallHost) -> None:
    hypervisor = faulty(small, Fault(method="write_frames", moment=Moment.HALFWAY, kills=True))
    [mfn] = _plain(small, 0).tolist()
    with pytest.raises(Killed):
        write_words(hypervisor, small.pv, mfn, 0, np.zeros(512, dtype=np.uint64))

    words = small.host.read_frames(small.pv, frames_of([mfn]))[0]
    assert not words[:256].any()
    assert words[256:].all()


def test_something_else_can_happen_at_a_call(small: SmallHost) -> None:
    act = Fault(method="page_types", act=lambda: small.host.destroy(small.pv))
    hypervisor = faulty(small, act)

    with pytest.raises(DomainGone):
        hypervisor.page_types(small.pv, np.zeros(1, dtype=np.uint64))
