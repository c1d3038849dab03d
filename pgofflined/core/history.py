"""Corrected errors per page in an exact sliding window, in bounded memory."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from pgofflined.core.frames import Mfn

Hit = tuple[float, int]
"""When (seconds by any one clock), and how many errors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PageHits:
    """The hits that are remembered of one page, oldest first."""

    mfn: Mfn
    hits: tuple[Hit, ...]


class History:
    """Who was hit when.

    Of each page the last ``threshold`` hits are kept: each weighs at least 1, so older ones
    cannot change whether the threshold is reached.  Of pages the ``max_pages`` last hit are
    kept; the others are forgotten and counted in ``evicted``.

    The window slides: a hit counts for exactly ``window`` seconds, wherever day or hour begin.
    Where the clock is set back, hits that lie in the future then count as having happened now:
    none is lost by it, and none outlives its window.
    """

    def __init__(self, *, window: float, threshold: int, max_pages: int) -> None:
        self.evicted = 0
        self._pages: OrderedDict[Mfn, tuple[Hit, ...]] = OrderedDict()
        self._window = 0.0
        self._threshold = 0
        self._max_pages = 0
        self.adapt(window=window, threshold=threshold, max_pages=max_pages)

    def __len__(self) -> int:
        """Number of pages of which something is remembered."""
        return len(self._pages)

    def adapt(self, *, window: float, threshold: int, max_pages: int) -> None:
        """Follow a new policy, keeping what is remembered as far as it allows."""
        if not (window > 0 and threshold > 0 and max_pages > 0):
            raise ValueError("window, threshold and number of pages must be positive")
        self._window = window
        self._threshold = threshold
        self._max_pages = max_pages
        self._evict()

    def record(self, mfn: Mfn, when: float, weight: int) -> int:
        """Note a hit; the sum of the page's hits within the window that ends now."""
        since = when - self._window
        kept = [
            (min(time, when), count) for time, count in self._pages.pop(mfn, ()) if time > since
        ]
        kept.append((when, weight))
        self._pages[mfn] = tuple(kept[-self._threshold :])
        self._evict()
        return sum(count for _, count in kept)

    def hits(self, mfn: Mfn, now: float) -> int:
        """The sum of a page's hits within the window that ends now; notes nothing."""
        since = now - self._window
        return sum(count for time, count in self._pages.get(mfn, ()) if time > since)

    def reached(self, now: float) -> tuple[tuple[Mfn, int], ...]:
        """Pages whose sum within the window is the threshold or more, each with its sum."""
        sums = ((mfn, self.hits(mfn, now)) for mfn in self._pages)
        return tuple((mfn, hits) for mfn, hits in sums if hits >= self._threshold)

    def forget(self, mfn: Mfn) -> None:
        """Drop what is remembered of a page, as after it was retired."""
        self._pages.pop(mfn, None)

    def dump(self) -> tuple[PageHits, ...]:
        """Everything remembered, the page hit longest ago first."""
        return tuple(PageHits(mfn=mfn, hits=hits) for mfn, hits in self._pages.items())

    def load(self, pages: Iterable[PageHits]) -> None:
        """Replace everything by what ``dump`` gave, the bounds kept.

        Raises ValueError for hits that cannot have been; nothing is replaced then.
        """
        loaded: OrderedDict[Mfn, tuple[Hit, ...]] = OrderedDict()
        for page in pages:
            for time, weight in page.hits:
                if not math.isfinite(time) or weight < 1:
                    raise ValueError(f"mfn {page.mfn:#x} cannot have been hit {weight} x at {time}")
            if page.mfn < 0:
                raise ValueError(f"there is no mfn {page.mfn}")
            if page.hits:
                loaded[page.mfn] = page.hits[-self._threshold :]
        self._pages = loaded
        self._evict()

    def _evict(self) -> None:
        while len(self._pages) > self._max_pages:
            self._pages.popitem(last=False)
            self.evicted += 1
