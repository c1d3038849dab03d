from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgofflined.core.book import NOT_RAM, Book, Cause, PageEntry, Phase
from pgofflined.core.frames import Mfn

LEFT = PageEntry(mfn=Mfn(1), cause=Cause.CORRECTED, phase=Phase.LEFT, since=1.0)


def left(mfn: int, **changes: object) -> PageEntry:
    return replace(LEFT, mfn=Mfn(mfn), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("phase", "marked", "counted"),
    [
        (Phase.TRIAGE, False, True),
        (Phase.EXCHANGE, False, True),
        (Phase.RELOCATION, True, True),
        (Phase.WAITING, False, True),
        (Phase.OFFLINED, True, True),
        (Phase.LEFT, True, True),
        (Phase.LEFT, False, False),
    ],
)
def test_a_page_counts_from_when_it_is_taken_in_hand(
    *, phase: Phase, marked: bool, counted: bool
) -> None:
    for cause in (Cause.CORRECTED, Cause.OPERATOR):
        entry = left(1, phase=phase, marked=marked, cause=cause)
        assert entry.is_counted is counted
        assert Book([entry]).counted() == counted
    assert Book([left(1, phase=phase, marked=marked, cause=Cause.UNCORRECTED)]).counted() == 0


def test_of_pages_that_stay_unmarked_the_oldest_are_surplus() -> None:
    book = Book([left(number) for number in range(5)], max_forgettable=3)
    assert book.surplus() == (0, 1)
    book.put(left(0, since=9.0))
    assert book.surplus() == (1, 2), "it has become so again"
    for mfn in book.surplus():
        book.remove(mfn)
    assert book.surplus() == ()
    assert [entry.mfn for entry in book] == [0, 3, 4]


@pytest.mark.parametrize(
    ("changes", "is_lost"),
    [
        ({"marked": True}, True),
        ({"phase": Phase.OFFLINED, "marked": True}, True),
        ({"phase": Phase.WAITING}, True),
        ({"cause": Cause.UNCORRECTED}, True),
        ({"cause": Cause.UNCORRECTED, "marked": True}, True),
        ({"cause": Cause.UNCORRECTED, "reason": NOT_RAM}, False),
        ({"cause": Cause.UNCORRECTED, "phase": Phase.OFFLINED}, False),
        ({}, False),
    ],
)
def test_nothing_is_forgotten_that_only_the_book_explains(
    *, changes: dict[str, object], is_lost: bool
) -> None:
    book = Book([left(1, **changes)], max_forgettable=0)
    assert bool(book.surplus()) is not is_lost


ENTRIES = st.builds(
    PageEntry,
    mfn=st.integers(0, 5).map(Mfn),
    cause=st.sampled_from(Cause),
    phase=st.sampled_from(Phase),
    since=st.floats(0, 100),
    marked=st.booleans(),
)


@given(st.lists(st.one_of(ENTRIES, st.integers(0, 5))))
def test_what_is_summed_up_is_what_the_entries_say(changes: list[PageEntry | int]) -> None:
    book = Book()
    for change in changes:
        if isinstance(change, PageEntry):
            book.put(change)
        else:
            book.remove(Mfn(change))
    entries = list(book)
    assert book.marked() == sum(entry.marked for entry in entries)
    assert book.counted() == sum(entry.is_counted for entry in entries)
    for phase in Phase:
        there = {entry.mfn for entry in entries if entry.phase is phase}
        assert {entry.mfn for entry in book.in_phase(phase)} == there
        assert book.by_phase()[phase] == len(there)
    unfinished = [entry for entry in entries if not entry.phase.is_final]
    assert {entry.mfn for entry in book.unfinished()} == {entry.mfn for entry in unfinished}


def test_a_page_is_in_the_book_until_it_is_removed() -> None:
    book = Book([left(1)])
    assert Mfn(1) in book
    assert Mfn(2) not in book
    book.remove(Mfn(1))
    book.remove(Mfn(1))
    assert Mfn(1) not in book
    assert (len(book), book.get(Mfn(1))) == (0, None)
