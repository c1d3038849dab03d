from __future__ import annotations

from errno import ENOMEM

import numpy as np
import pytest

from pgofflined.sim.errors import Refused
from pgofflined.sim.frames import Frames, FrameState, split_misaligns


def heap(count: int, *, splits_safely: bool = True) -> Frames:
    return Frames(count, np.random.default_rng(1), splits_safely=splits_safely)


@pytest.mark.parametrize(("order", "harmful"), [(0, 0), (1, 0), (2, 1), (9, 502)])
def test_old_split_misaligns_all_but_a_few_positions(order: int, harmful: int) -> None:
    """The count that was measured for Xen's own loop: all but order + 1 positions."""
    assert sum(split_misaligns(order, offset) for offset in range(1 << order)) == harmful


def test_heap_gives_every_frame_once() -> None:
    frames = heap(16)

    assert sorted(frames.allocate() for _ in range(16)) == list(range(16))
    with pytest.raises(Refused) as caught:
        frames.allocate()
    assert caught.value.errno == ENOMEM


def test_released_frame_is_given_out_again() -> None:
    frames = heap(4)
    for _ in range(4):
        frames.allocate()
    frames.release(2, dirty=False)

    assert frames.allocate() == 2


def test_frame_taken_out_is_never_given_out() -> None:
    frames = heap(4)
    frames.take_out(1)

    assert sorted(frames.allocate() for _ in range(3)) == [0, 2, 3]
    assert frames.free_count == 0


def test_marked_frame_leaves_the_heap_when_released() -> None:
    frames = heap(4)
    mfn = frames.allocate()
    frames.state[mfn] = FrameState.OFFLINING
    frames.release(mfn, dirty=True)

    assert frames.state[mfn] == FrameState.OFFLINED
    assert frames.free_count == 3
    assert frames.dirty_taken_out == 1


def test_lone_frame_leaves_an_old_heap_sound() -> None:
    frames = heap(16, splits_safely=False)
    taken = [frames.allocate() for _ in range(16)]
    frames.state[taken[5]] = FrameState.OFFLINING
    frames.release(taken[5], dirty=False)

    assert frames.corrupted is None


def test_frame_inside_a_free_buddy_corrupts_an_old_heap() -> None:
    frames = heap(16, splits_safely=False)
    frames.take_out(0)

    assert frames.corrupted is not None
    assert "order 4" in frames.corrupted


def test_frame_inside_a_free_buddy_leaves_a_fixed_heap_sound() -> None:
    frames = heap(16)
    frames.take_out(0)

    assert frames.corrupted is None
