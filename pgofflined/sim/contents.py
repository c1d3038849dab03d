"""What the frames of a simulated host hold.

A frame that nobody has written to holds a sequence that one seed word defines; only frames that
were written take 4 KiB.  So a host of many GiB costs a few MiB, and digests of untouched frames
come from a formula.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from pgofflined.core.frames import WORDS_PER_PAGE

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pgofflined.ports import FrameArray, Words

_STEP: Final = np.uint64(0x9E37_79B9_7F4A_7C15)
_INDEX: Final = np.arange(WORDS_PER_PAGE, dtype=np.uint64)
_RAMP: Final = _INDEX * _STEP
# Odd, hence invertible: two pages that differ in one word never have the same digest.
_WEIGHTS: Final = np.random.default_rng(0x5EED).integers(
    0, 2**63, WORDS_PER_PAGE, dtype=np.uint64
) * np.uint64(2) + np.uint64(1)
_WEIGHT_SUM: Final = _WEIGHTS.sum(dtype=np.uint64, keepdims=True)
_RAMP_DIGEST: Final = (_RAMP * _WEIGHTS).sum(dtype=np.uint64, keepdims=True)


def digest_words(words: Words) -> NDArray[np.uint64]:
    """One digest for each row of 512 words."""
    weighted: NDArray[np.uint64] = words * _WEIGHTS
    digests: NDArray[np.uint64] = weighted.sum(axis=1, dtype=np.uint64)
    return digests


class Contents:
    """Contents of ``frames`` frames, all garbage at first."""

    def __init__(self, frames: int, rng: np.random.Generator) -> None:
        self._rng = rng
        self._seed = rng.integers(1, 2**64, frames, dtype=np.uint64)
        self._slot = np.full(frames, -1, dtype=np.int32)
        self._pool = np.zeros((64, WORDS_PER_PAGE), dtype=np.uint64)
        self._unused: list[int] = list(range(63, -1, -1))

    def read(self, mfns: FrameArray) -> Words:
        """Copies of frames, one row each."""
        index = mfns.astype(np.int64)
        seeds = self._seed[index]
        words: Words = seeds[:, None] + _RAMP
        words[seeds == 0] = 0
        slots = self._slot[index]
        backed = slots >= 0
        if backed.any():
            words[backed] = self._pool[slots[backed]]
        return words

    def word(self, mfn: int, index: int) -> int:
        """One word of a frame."""
        slot = int(self._slot[mfn])
        if slot >= 0:
            return int(self._pool[slot, index])
        seed = int(self._seed[mfn])
        return (seed + int(_RAMP[index])) & 0xFFFF_FFFF_FFFF_FFFF if seed else 0

    def page(self, mfn: int) -> Words:
        """The words of one frame for reading and writing, valid until the next frame is written."""
        slot = int(self._slot[mfn])
        if slot < 0:
            words = self.read(np.array([mfn], dtype=np.uint64))[0]
            if not self._unused:
                self._grow()
            slot = self._unused.pop()
            self._pool[slot] = words
            self._slot[mfn] = slot
        row: Words = self._pool[slot]
        return row

    def write(self, mfn: int, index: int, words: NDArray[np.uint64]) -> None:
        """Write words into a frame."""
        self.page(mfn)[index : index + len(words)] = words

    def fill(self, mfns: FrameArray, seeds: NDArray[np.uint64]) -> None:
        """Give frames the sequences that ``seeds`` define; 0 makes a frame of zeroes."""
        index = mfns.astype(np.int64)
        slots = self._slot[index]
        self._unused.extend(slots[slots >= 0].tolist())
        self._slot[index] = -1
        self._seed[index] = seeds

    def scramble(self, mfn: int) -> None:
        """Put garbage into a frame."""
        self.fill(
            np.array([mfn], dtype=np.uint64),
            self._rng.integers(1, 2**64, 1, dtype=np.uint64),
        )

    def move(self, sources: FrameArray, targets: FrameArray) -> None:
        """Copy whole frames."""
        backed = self._slot[sources.astype(np.int64)] >= 0
        self.fill(targets, self._seed[sources.astype(np.int64)])
        for source, target in zip(sources[backed].tolist(), targets[backed].tolist(), strict=True):
            words = self.page(source).copy()
            self.page(target)[:] = words

    def digests(self, mfns: FrameArray) -> NDArray[np.uint64]:
        """One word for each frame that tells its contents from others."""
        index = mfns.astype(np.int64)
        digests = self.pattern_digests(self._seed[index])
        slots = self._slot[index]
        backed = slots >= 0
        if backed.any():
            digests[backed] = digest_words(self._pool[slots[backed]])
        return digests

    def pattern_digests(self, seeds: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """The digests of frames that were filled from ``seeds``."""
        digests: NDArray[np.uint64] = seeds * _WEIGHT_SUM + _RAMP_DIGEST
        digests[seeds == 0] = 0
        return digests

    def _grow(self) -> None:
        size = len(self._pool)
        pool = np.zeros((2 * size, WORDS_PER_PAGE), dtype=np.uint64)
        pool[:size] = self._pool
        self._pool = pool
        self._unused.extend(range(2 * size - 1, size - 1, -1))
