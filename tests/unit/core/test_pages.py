import numpy as np
import pytest

from pgofflined.core.pages import PageKind, decode_page_type
from pgofflined.core.pagetable import Search, find_references, guest_frames, table_levels


@pytest.mark.parametrize(
    ("word", "kind", "pinned"),
    [
        (0x00000000, PageKind.DATA, False),
        (0x10000000, PageKind.L1, False),
        (0x20000000, PageKind.L2, False),
        (0xB0000000, PageKind.L3, True),
        (0xC0000000, PageKind.L4, True),
        (0xD0000000, PageKind.BROKEN, False),
        (0xE0000000, PageKind.NOT_THE_DOMAINS, False),
        (0xF0000000, PageKind.NOT_THE_DOMAINS, False),
    ],
)
def test_page_types_are_told_apart(word: int, kind: PageKind, pinned: bool) -> None:  # noqa: FBT001
    decoded = decode_page_type(word)
    assert (decoded.kind, decoded.pinned) == (kind, pinned)


@pytest.mark.parametrize("word", [0x50000000, 0x60000000, 0x70000000, 0x80000000])
def test_unknown_page_types_are_refused(word: int) -> None:
    with pytest.raises(ValueError, match="unknown page type"):
        decode_page_type(word)


def test_no_broken_or_foreign_page_counts_as_a_table() -> None:
    fields = [0x0, 0x1, 0x2, 0x3, 0x4, 0xB, 0xC, 0xD, 0xE, 0xF]
    words = np.array([field << 28 for field in fields], dtype=np.uint32)
    levels = table_levels(words)
    assert levels.tolist() == [0, 1, 2, 3, 4, 3, 4, 0, 0, 0]
    assert levels.dtype == np.uint8, "one for each page of a guest"


def _tables(
    entries: dict[tuple[int, int], int], count: int
) -> np.ndarray[tuple[int, ...], np.dtype[np.uint64]]:
    tables = np.zeros((count, 512), dtype=np.uint64)
    for place, value in entries.items():
        tables[place] = value
    return tables


def test_present_entries_of_the_wanted_frames_are_found() -> None:
    tables = _tables(
        {(0, 3): 0x123 << 12 | 0x67, (1, 511): 0x124 << 12 | 0x25, (1, 0): 0x125 << 12 | 1}, 2
    )
    rows, columns = find_references(
        tables, np.array([1, 1], dtype=np.uint8), np.array([0x123, 0x124], dtype=np.uint64)
    )
    assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == [(0, 3), (1, 511)]


def test_entries_that_are_not_present_are_no_references() -> None:
    tables = _tables({(0, 3): 0x123 << 12 | 0x66}, 1)
    rows, _ = find_references(
        tables, np.array([1], dtype=np.uint8), np.array([0x123], dtype=np.uint64)
    )
    assert rows.size == 0


def test_the_flags_above_the_address_do_not_hide_a_reference() -> None:
    tables = _tables({(0, 9): 1 << 63 | 0x7FF << 52 | 0x123 << 12 | 1}, 1)
    rows, columns = find_references(
        tables, np.array([1], dtype=np.uint8), np.array([0x123], dtype=np.uint64)
    )
    assert (rows.tolist(), columns.tolist()) == ([0], [9])


def test_frames_that_agree_in_their_low_bits_only_are_told_apart() -> None:
    tables = _tables({(0, 9): 0x5_0123 << 12 | 1}, 1)
    rows, _ = find_references(
        tables, np.array([1], dtype=np.uint8), np.array([0x6_0123], dtype=np.uint64)
    )
    assert rows.size == 0


def test_xens_own_slots_are_passed_over_in_an_l4_only() -> None:
    tables = _tables(
        {(0, 258): 0x123 << 12 | 1, (1, 258): 0x123 << 12 | 1, (0, 272): 0x123 << 12 | 1}, 2
    )
    rows, columns = find_references(
        tables, np.array([4, 3], dtype=np.uint8), np.array([0x123], dtype=np.uint64)
    )
    assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == [(0, 272), (1, 258)]


@pytest.mark.parametrize("frames", [0, 1, 12, 13, 64])
@pytest.mark.parametrize("count", [0, 1, 128, 300])
def test_many_tables_and_frames_are_searched_as_one_by_one(count: int, frames: int) -> None:
    # Both ways of telling candidates, one block and several, the last one cut short.
    chance = np.random.default_rng(count * 100 + frames)
    wanted = chance.choice(1 << 20, size=frames, replace=False).astype(np.uint64)
    tables = chance.integers(0, 1 << 20, size=(count, 512), dtype=np.uint64)
    if frames:
        planted = chance.random(tables.shape) < 0.01
        tables[planted] = chance.choice(wanted, size=int(planted.sum()))
    tables = tables << np.uint64(12) | chance.integers(0, 2, size=tables.shape, dtype=np.uint64)
    levels = chance.integers(1, 5, size=count).astype(np.uint8)
    members = set(wanted.tolist())
    expected = [
        (row, column)
        for row, table in enumerate(tables.tolist())
        for column, entry in enumerate(table)
        if entry & 1 and entry >> 12 in members
        if levels[row] != 4 or not 256 <= column < 272
    ]
    rows, columns = find_references(tables, levels, wanted)
    assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == expected


def test_the_last_entry_of_the_last_table_is_seen() -> None:
    tables = _tables({(299, 511): 0x123 << 12 | 1}, 300)
    rows, columns = find_references(
        tables, np.ones(300, dtype=np.uint8), np.array([0x123], dtype=np.uint64)
    )
    assert (rows.tolist(), columns.tolist()) == ([299], [511])


@pytest.mark.parametrize("frames", [1, 64])
def test_each_block_of_a_search_is_looked_through_from_its_first_entry_to_its_last(
    frames: int,
) -> None:
    # A block is as many entries as 512 tables have; the last one here is a single table.
    places = [(0, 0), (300, 7), (511, 511), (512, 0), (1023, 511), (1024, 0), (1024, 511)]
    wanted = np.arange(0x100, 0x100 + frames, dtype=np.uint64)
    levels = np.ones(1025, dtype=np.uint8)
    search = Search(wanted)
    for some in (places, places[2:5], [], places[:1], places[-1:]):
        tables = _tables(dict.fromkeys(some, 0x100 << 12 | 1), 1025)
        rows, columns = search.find(tables, levels)
        assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == some
        # What was found in more tables is not found again in fewer.
        few = [place for place in some if place[0] == 0]
        rows, columns = search.find(tables[:1], levels[:1])
        assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == few


@pytest.mark.parametrize("frames", [1, 64])
@pytest.mark.parametrize("count", [1, 2, 3, 31, 32, 33, 34, 100, 512])
def test_entries_that_follow_one_another_are_all_found(count: int, frames: int) -> None:
    # Few candidates are found in another way than many.
    places = [(0, column) for column in range(count)]
    wanted = np.arange(0x100, 0x100 + frames, dtype=np.uint64)
    tables = _tables(dict.fromkeys(places, 0x100 << 12 | 1), 2)
    rows, columns = find_references(tables, np.ones(2, dtype=np.uint8), wanted)
    assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == places


def test_missing_identity_and_foreign_entries_of_a_p2m_are_not_the_guests_frames() -> None:
    p2m = np.array([0x123, (1 << 64) - 1, 1 << 62 | 5, 1 << 63 | 5, 1 << 40], dtype=np.uint64)
    assert guest_frames(p2m).tolist() == [True, False, False, False, False]
