"""A memory module that goes bad: where its corrected errors strike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np

from pgofflined.core.frames import PAGE_SIZE, Maddr, Mfn, maddr_of

# A DRAM row of one rank is spread over this many neighbouring frames here.
_ROW_FRAMES: Final = 4
_LINE: Final = 64


class FailingDimm:
    """Corrected errors that cluster in a few weak rows, the weakest far ahead of the rest.

    ``frames`` are those that lie on the module.  Now and then an error strikes anywhere on it
    (a particle, not a defect): such a page is not to be retired for one error.
    """

    def __init__(
        self, frames: Sequence[Mfn], *, rows: int = 3, stray: float = 0.1, seed: int = 1
    ) -> None:
        self._rng = np.random.default_rng(seed)
        self._frames = list(frames)
        starts = self._rng.choice(len(self._frames), size=rows, replace=False).tolist()
        self.rows: list[list[Mfn]] = [self._frames[at : at + _ROW_FRAMES] for at in starts]
        weights = 0.5 ** np.arange(rows)
        self._weights = weights / weights.sum()
        self._stray = stray

    def addresses(self) -> Iterator[Maddr]:
        """Addresses of one error after the other, without end."""
        while True:
            row = self._frames
            if self._rng.random() >= self._stray:
                row = self.rows[int(self._rng.choice(len(self.rows), p=self._weights))]
            mfn = row[int(self._rng.integers(len(row)))]
            offset = int(self._rng.integers(PAGE_SIZE // _LINE)) * _LINE
            yield Maddr(maddr_of(mfn) + offset)
