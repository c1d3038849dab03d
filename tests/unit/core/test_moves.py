from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pgofflined.core.moves import among, chosen_rows, frames_of

FRAMES = st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 8), max_size=20)


@given(values=FRAMES, members=FRAMES)
def test_frames_are_found_among_those_that_are_sorted(
    values: list[int], members: list[int]
) -> None:
    found = among(frames_of(values), frames_of(sorted(members)))
    assert found.tolist() == [value in members for value in values]


def test_all_rows_are_the_same_array() -> None:
    contents = np.arange(6, dtype=np.uint64).reshape(3, 2)
    assert chosen_rows(contents, [0, 1, 2]) is contents
    assert chosen_rows(contents, [0, 2]).tolist() == [[0, 1], [4, 5]]
