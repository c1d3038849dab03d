from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgofflined.sim.contents import Contents, digest_words


@pytest.fixture
def contents() -> Contents:
    return Contents(256, np.random.default_rng(1))


def mfns(*numbers: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    return np.array(numbers, dtype=np.uint64)


def test_untouched_frames_all_differ(contents: Contents) -> None:
    digests = contents.digests(np.arange(256, dtype=np.uint64))

    assert len(set(digests.tolist())) == 256


def test_digest_of_an_untouched_frame_is_that_of_its_words(contents: Contents) -> None:
    frames = mfns(3, 200)

    assert np.array_equal(contents.digests(frames), digest_words(contents.read(frames)))


def test_written_frame_keeps_its_other_words(contents: Contents) -> None:
    before = contents.read(mfns(7))[0]
    contents.write(7, 100, mfns(1, 2, 3))
    after = contents.read(mfns(7))[0]

    assert after[100:103].tolist() == [1, 2, 3]
    assert np.array_equal(np.delete(after, range(100, 103)), np.delete(before, range(100, 103)))
    assert contents.word(7, 101) == 2


def test_word_of_an_untouched_frame_is_that_of_the_whole(contents: Contents) -> None:
    assert contents.word(9, 511) == int(contents.read(mfns(9))[0, 511])


def test_frame_filled_with_zero_reads_as_zeroes(contents: Contents) -> None:
    contents.fill(mfns(5), mfns(0))

    assert not contents.read(mfns(5)).any()
    assert contents.word(5, 3) == 0
    assert contents.digests(mfns(5)).tolist() == digest_words(np.zeros((1, 512), "u8")).tolist()


def test_more_frames_are_written_than_there_was_room_for(contents: Contents) -> None:
    for mfn in range(256):
        contents.write(mfn, 0, mfns(mfn))

    read = contents.read(np.arange(256, dtype=np.uint64))
    assert read[:, 0].tolist() == list(range(256))


def test_moved_frames_hold_the_same(contents: Contents) -> None:
    contents.write(1, 4, mfns(42))
    sources, targets = mfns(1, 2), mfns(11, 12)
    contents.move(sources, targets)

    assert np.array_equal(contents.read(sources), contents.read(targets))


def test_scrambled_frame_does_not_keep_what_it_held(contents: Contents) -> None:
    before = contents.read(mfns(4))
    contents.scramble(4)

    assert not np.array_equal(contents.read(mfns(4)), before)


@given(index=st.integers(0, 511), flip=st.integers(1, 2**64 - 1))
def test_one_changed_word_changes_the_digest(index: int, flip: int) -> None:
    words = np.zeros((2, 512), dtype=np.uint64)
    words[1, index] = flip

    first, second = digest_words(words).tolist()
    assert first != second
