from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgofflined.core.frames import Mfn
from pgofflined.core.moves import (
    Entries,
    PteWrite,
    PteWrites,
    References,
    among,
    chosen_rows,
    differing,
    frames_of,
    no_contents,
)

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


@pytest.mark.parametrize("pages", [0, 1, 2, 63, 64, 65, 128, 130, 200])
def test_every_page_that_differs_is_found_and_no_other(pages: int) -> None:
    one = no_contents(pages)
    assert differing(one, one.copy()).tolist() == [False] * pages
    for row in range(pages):
        for column in (0, 511):
            other = one.copy()
            other[row, column] = 1
            assert np.flatnonzero(differing(one, other)).tolist() == [row]


def test_entries_to_be_set_keep_all_their_bits() -> None:
    entry = 1 << 63 | 0x123 << 12 | 0x67
    writes = PteWrites.of(
        [
            PteWrite(table=Mfn(5), index=511, value=entry),
            PteWrite(table=Mfn(1 << 39), index=0, value=1),
        ]
    )
    assert writes.tables.tolist() == [5, 1 << 39]
    assert writes.indexes.tolist() == [511, 0]
    assert writes.values.tolist() == [entry, 1]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_writes_are_unsigned_words_however_many_there_are(count: int) -> None:
    writes = PteWrites.of([PteWrite(table=Mfn(5), index=3, value=1)] * count)
    assert len(writes) == count
    for array in (writes.tables, writes.indexes, writes.values):
        assert array.dtype == np.uint64


def entries(*levels: int, first: int = 0) -> Entries:
    """Entries of tables of these levels, told apart by their tables' numbers."""
    numbers = np.arange(first, first + len(levels), dtype=np.uint64)
    return Entries(
        levels=np.array(levels, dtype=np.uint8), tables=numbers, indexes=numbers, values=numbers
    )


def places(references: References) -> list[tuple[int, int]]:
    return list(zip(references.levels.tolist(), references.tables.tolist(), strict=True))


@pytest.mark.parametrize("levels", [(1, 4, 2, 1, 3), tuple(range(1, 5)) * 30, (4, 3, 2, 1) * 30])
def test_entries_are_cleared_upwards_and_set_downwards(levels: Sequence[int]) -> None:
    references = References.of([entries(*levels)])
    placed = places(references)
    # Those of one level stay as they were.
    assert places(references.upwards()) == sorted(placed, key=lambda place: place[0])
    assert places(references.downwards()) == sorted(placed, key=lambda place: -place[0])


@pytest.mark.parametrize("levels", [(), (1,), (1, 1), (3, 3, 3)])
def test_entries_of_one_level_are_not_put_in_order_while_a_guest_waits(
    levels: Sequence[int],
) -> None:
    references = References.of([entries(*levels)])
    assert references.upwards() is references
    assert references.downwards() is references


def test_some_entries_are_chosen_in_any_order_and_all_are_not_copied() -> None:
    references = References.of([entries(1, 1), entries(1, first=2)])
    assert references.pages.tolist() == [0, 0, 1]
    assert references.chosen(np.array([True, True, True])) is references
    assert places(references.chosen(np.array([True, False, True]))) == [(1, 0), (1, 2)]
    assert places(references.chosen(np.array([2, 1]))) == [(1, 2), (1, 1)]


def test_parts_of_references_follow_one_another_in_their_own_types() -> None:
    first, second = References.of([entries(4, 1)]), References.of([entries(2, first=2)])
    joined = References.joined([first, second])
    assert places(joined) == [(4, 0), (1, 1), (2, 2)]
    for one in (joined, References.joined([])):
        assert one.pages.dtype == np.intp
        assert one.levels.dtype == np.uint8
        assert {array.dtype for array in (one.tables, one.indexes, one.values)} == {
            np.dtype(np.uint64)
        }
    assert len(References.joined([])) == 0
