from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgofflined.core.frames import Mfn
from pgofflined.core.history import History, PageHits

HOUR = 3600.0
DAY = 24 * HOUR
PAGE = Mfn(0x1000)


def history(*, window: float = DAY, threshold: int = 10, max_pages: int = 100) -> History:
    return History(window=window, threshold=threshold, max_pages=max_pages)


def test_hits_on_both_sides_of_midnight_count_together() -> None:
    tracked = history(threshold=10)
    late = [DAY - HOUR + minute * 60 for minute in range(9)]
    early = [DAY + minute * 60 for minute in range(9)]
    counts = [tracked.record(PAGE, when, 1) for when in late + early]
    assert counts[:9] == list(range(1, 10))
    assert all(count >= 10 for count in counts[9:])


def test_hit_counts_for_exactly_the_window() -> None:
    tracked = history(window=100.0)
    tracked.record(PAGE, 1000.0, 1)
    assert tracked.hits(PAGE, 1099.999) == 1
    assert tracked.hits(PAGE, 1100.0) == 0
    assert tracked.record(PAGE, 1100.0, 1) == 1


def test_weights_add_up() -> None:
    tracked = history()
    assert tracked.record(PAGE, 1.0, 3) == 3
    assert tracked.record(PAGE, 2.0, 4) == 7


def test_pages_are_counted_apart() -> None:
    tracked = history()
    tracked.record(PAGE, 1.0, 1)
    assert tracked.record(Mfn(PAGE + 1), 1.0, 1) == 1


def test_forgotten_page_starts_anew() -> None:
    tracked = history()
    tracked.record(PAGE, 1.0, 5)
    tracked.forget(PAGE)
    tracked.forget(PAGE)
    assert tracked.record(PAGE, 2.0, 1) == 1


def test_page_hit_longest_ago_makes_room_and_is_counted() -> None:
    tracked = history(max_pages=2)
    first, second, third = Mfn(1), Mfn(2), Mfn(3)
    tracked.record(first, 1.0, 1)
    tracked.record(second, 2.0, 1)
    tracked.record(first, 3.0, 1)
    tracked.record(third, 4.0, 1)
    assert (len(tracked), tracked.evicted) == (2, 1)
    assert [tracked.hits(page, 5.0) for page in (first, second, third)] == [2, 0, 1]
    tracked.record(second, 6.0, 1)
    assert tracked.evicted == 2


def test_storm_on_one_page_takes_bounded_memory() -> None:
    tracked = history(threshold=3)
    for second in range(10_000):
        tracked.record(PAGE, float(second), 1)
    [page] = tracked.dump()
    assert [when for when, _ in page.hits] == [9997.0, 9998.0, 9999.0]


def test_clock_set_back_loses_no_hit() -> None:
    tracked = history(window=100.0)
    tracked.record(PAGE, 5000.0, 1)
    assert tracked.record(PAGE, 10.0, 1) == 2


def test_hit_from_a_wrong_future_does_not_outlive_its_window() -> None:
    tracked = history(window=100.0)
    tracked.record(PAGE, 1e9, 1)
    tracked.record(PAGE, 10.0, 1)
    assert tracked.hits(PAGE, 109.0) == 2
    assert tracked.record(PAGE, 110.0, 1) == 1


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(1, 4)), max_size=60),
    st.integers(1, 40),
    st.integers(1, 8),
)
def test_threshold_is_reached_exactly_when_the_window_holds_enough(
    steps: list[tuple[int, int]], window: int, threshold: int
) -> None:
    tracked = history(window=float(window), threshold=threshold)
    now = 0
    everything: list[tuple[int, int]] = []
    for step, weight in steps:
        now += step
        everything.append((now, weight))
        exact = sum(count for when, count in everything if now - when < window)
        counted = tracked.record(PAGE, float(now), weight)
        assert (counted >= threshold) == (exact >= threshold)
        assert counted <= exact
        if exact < threshold:
            assert counted == exact


@given(
    st.lists(st.tuples(st.integers(0, 8), st.floats(-1e12, 1e12), st.integers(1, 3)), max_size=80)
)
def test_bounds_hold_whatever_the_clock_does(hits: list[tuple[int, float, int]]) -> None:
    tracked = history(window=50.0, threshold=4, max_pages=5)
    for number, when, weight in hits:
        assert tracked.record(Mfn(number), when, weight) >= weight
    assert len(tracked) <= 5
    assert all(1 <= len(page.hits) <= 4 for page in tracked.dump())
    for page in tracked.dump():
        # Set right again, the clock lets every hit age.
        latest = page.hits[-1][0]
        assert tracked.record(page.mfn, latest + 51.0, 1) == 1


def test_loaded_history_goes_on_as_the_dumped_one_would() -> None:
    tracked = history(max_pages=3)
    for number in range(5):
        tracked.record(Mfn(number), float(number), 1)
    restored = history(max_pages=3)
    restored.load(tracked.dump())
    assert restored.dump() == tracked.dump()
    for each in (tracked, restored):
        each.record(Mfn(9), 9.0, 2)
    assert restored.dump() == tracked.dump()


def test_load_keeps_the_bounds_of_the_present_policy() -> None:
    hits = tuple((float(when), 1) for when in range(5))
    restored = history(threshold=2, max_pages=1)
    restored.load(PageHits(mfn=Mfn(number), hits=hits) for number in range(3))
    assert restored.dump() == (PageHits(mfn=Mfn(2), hits=((3.0, 1), (4.0, 1))),)


@pytest.mark.parametrize(
    "page",
    [
        PageHits(mfn=Mfn(1), hits=((float("nan"), 1),)),
        PageHits(mfn=Mfn(1), hits=((float("inf"), 1),)),
        PageHits(mfn=Mfn(1), hits=((1.0, 0),)),
        PageHits(mfn=Mfn(-1), hits=((1.0, 1),)),
    ],
)
def test_impossible_hits_are_not_loaded(page: PageHits) -> None:
    restored = history()
    restored.record(PAGE, 1.0, 1)
    with pytest.raises(ValueError, match="mfn"):
        restored.load([page])
    assert restored.hits(PAGE, 1.0) == 1


def test_new_policy_keeps_what_it_allows() -> None:
    tracked = history(window=10.0, max_pages=3)
    for number in range(3):
        tracked.record(Mfn(number), 1.0, 1)
    tracked.adapt(window=100.0, threshold=1, max_pages=2)
    assert (len(tracked), tracked.evicted) == (2, 1)
    assert tracked.record(Mfn(2), 50.0, 1) == 2


@pytest.mark.parametrize("wrong", [(0.0, 1, 1), (1.0, 0, 1), (1.0, 1, 0)])
def test_bounds_must_be_positive(wrong: tuple[float, int, int]) -> None:
    window, threshold, max_pages = wrong
    with pytest.raises(ValueError, match="positive"):
        History(window=window, threshold=threshold, max_pages=max_pages)


def test_pages_that_have_reached_the_threshold_are_found_again() -> None:
    history = History(window=100.0, threshold=2, max_pages=10)
    history.record(Mfn(1), 0.0, 1)
    history.record(Mfn(1), 10.0, 1)
    history.record(Mfn(2), 20.0, 1)
    history.record(Mfn(3), 30.0, 2)
    assert history.reached(50.0) == ((Mfn(1), 2), (Mfn(3), 2))
    assert history.reached(100.0) == ((Mfn(3), 2),)
    history.adapt(window=100.0, threshold=1, max_pages=10)
    assert [mfn for mfn, _ in history.reached(100.0)] == [1, 2, 3]
