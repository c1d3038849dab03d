"""What becomes of each page of a group, whatever happened to it first."""

from __future__ import annotations

import numpy as np
import pytest

from pgofflined.core.frames import Mfn, Pfn
from pgofflined.core.moves import Group, References, frames_of, no_contents
from pgofflined.core.outcomes import Damaged, Exchanged, Refusal, RefusalReason
from pgofflined.core.pages import PageKind
from pgofflined.core.progress import Progress

# The first page is mapped by two entries, the second by one, the third by none.
MFNS, PFNS = (10, 11, 12), (100, 101, 102)
UNREACHED = "the exchange was not reached; nothing was changed"


@pytest.fixture
def progress() -> Progress:
    return Progress(
        Group(
            kind=PageKind.DATA,
            pinned=False,
            mfns=frames_of(MFNS),
            pfns=frames_of(PFNS),
            slot_frames=frames_of([50, 50, 50]),
            slot_indexes=frames_of([0, 1, 2]),
            references=References(
                pages=np.array([0, 1, 0], dtype=np.intp),
                levels=np.ones(3, dtype=np.uint8),
                tables=frames_of([60, 60, 61]),
                indexes=frames_of([0, 1, 2]),
                values=frames_of([0xA_001, 0xB_001, 0xA_001]),
            ),
            contents=no_contents(3),
            props=frames_of([]),
        )
    )


def rows(*numbers: int) -> np.ndarray[tuple[int], np.dtype[np.intp]]:
    return np.array(numbers, dtype=np.intp)


def refused(mfn: int, reason: RefusalReason, detail: str) -> Refusal:
    return Refusal(mfn=Mfn(mfn), reason=reason, detail=detail)


def test_of_pages_that_nothing_happened_to_it_is_said_that_nothing_was_changed(
    progress: Progress,
) -> None:
    assert list(progress.results()) == [
        refused(mfn, RefusalReason.XEN_REFUSED, UNREACHED) for mfn in MFNS
    ]
    assert progress.open().tolist() == [True, True, True]
    assert not progress.is_damaged
    assert list(progress.refusals) == []
    assert [frames.tolist() for frames in progress.moved()] == [[], []]


def test_an_exchanged_page_names_both_frames_and_the_entries_that_map_it(
    progress: Progress,
) -> None:
    progress.commit(rows(0, 2), frames_of([20, 22]))
    first, second, third = progress.results()
    assert first == Exchanged(old=Mfn(10), new=Mfn(20), pfn=Pfn(100), references=2, offlined=False)
    assert second == refused(11, RefusalReason.XEN_REFUSED, UNREACHED)
    assert third == Exchanged(old=Mfn(12), new=Mfn(22), pfn=Pfn(102), references=0, offlined=False)
    assert progress.homes.tolist() == [20, 11, 22]
    assert [frames.tolist() for frames in progress.moved()] == [[10, 12], [20, 22]]
    assert progress.open().tolist() == [False, True, False]
    # The group itself is what was found, for whoever has to undo it.
    assert progress.group.mfns.tolist() == list(MFNS)


def test_the_first_reason_of_a_refusal_is_kept(progress: Progress) -> None:
    progress.refuse(1, RefusalReason.GRANTED, "first")
    progress.refuse_all(RefusalReason.NO_SUSPEND, "then")
    expected = [
        refused(10, RefusalReason.NO_SUSPEND, "then"),
        refused(11, RefusalReason.GRANTED, "first"),
        refused(12, RefusalReason.NO_SUSPEND, "then"),
    ]
    assert list(progress.results()) == expected
    assert sorted(progress.refusals, key=lambda refusal: refusal.mfn) == expected
    assert progress.open().tolist() == [False, False, False]


def test_a_page_that_was_exchanged_counts_as_that_whatever_was_refused_later(
    progress: Progress,
) -> None:
    progress.commit(rows(0), frames_of([20]))
    progress.refuse(0, RefusalReason.INTERNAL, "too late")
    assert isinstance(next(iter(progress.results())), Exchanged)


def test_damage_counts_before_all_else_and_names_where_the_page_is_now(
    progress: Progress,
) -> None:
    progress.commit(rows(1), frames_of([21]))
    progress.refuse(1, RefusalReason.INTERNAL, "one thing")
    progress.damage(1, "its contents are lost")
    progress.damage(2, "never left")
    _, second, third = progress.results()
    assert second == Damaged(old=Mfn(11), new=Mfn(21), pfn=Pfn(101), detail="its contents are lost")
    assert third == Damaged(old=Mfn(12), new=Mfn(12), pfn=Pfn(102), detail="never left")
    assert progress.is_damaged
    assert progress.undamaged().tolist() == [True, False, False]
    assert progress.open().tolist() == [True, False, False]


def test_with_the_domain_all_is_gone_whatever_was_said_before(progress: Progress) -> None:
    progress.commit(rows(0), frames_of([20]))
    progress.damage(1, "lost")
    progress.refuse(2, RefusalReason.GRANTED, "granted")
    progress.end("d7 is gone")
    assert list(progress.results()) == [
        refused(mfn, RefusalReason.DOMAIN_GONE, "d7 is gone") for mfn in MFNS
    ]
