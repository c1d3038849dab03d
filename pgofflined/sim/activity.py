"""A guest at work: a memory checker that writes and verifies its pages while it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pgofflined.core.frames import PAGE_SHIFT, Domid
from pgofflined.sim.layout import DIRECT_MAP
from pgofflined.sim.pagetables import mapped_frames

if TYPE_CHECKING:
    from pgofflined.sim.host import HostState


class MemoryChecker:
    """Fills a PV guest's ordinary pages with known patterns and looks at a few at every step.

    Goes through the guest's page tables, so a page without its entry crashes the guest, and one
    with another's contents is noted in ``mismatches`` by its pfn.  Takes effect when it is the
    domain's ``activity``; ``start`` does both.
    """

    def __init__(self, host: HostState, domid: Domid, *, pages_per_step: int = 4) -> None:
        self._host = host
        self._guest = host.pv(domid)
        self._rng = np.random.default_rng(int(domid))
        self._pfns = np.array(self._guest.plain_pfns(), dtype=np.int64)
        self._seeds = self._rng.integers(1, 2**64, len(self._pfns), dtype=np.uint64)
        self._per_step = min(pages_per_step, len(self._pfns))
        self.mismatches: list[int] = []
        mfns = self._guest.mfns()[self._pfns]
        host.frames.contents.fill(mfns, self._seeds)

    @classmethod
    def start(cls, host: HostState, domid: Domid, *, pages_per_step: int = 4) -> MemoryChecker:
        """Make one and let the guest run it."""
        checker = cls(host, domid, pages_per_step=pages_per_step)
        host.simulated(domid).activity = checker.step
        return checker

    def step(self) -> None:
        """Verify some pages, then give them new patterns.  Raises PageFault."""
        chosen = self._rng.choice(len(self._pfns), self._per_step, replace=False)
        mfns = self._verify(chosen)
        self._seeds[chosen] = self._rng.integers(1, 2**64, len(chosen), dtype=np.uint64)
        self._host.frames.contents.fill(mfns, self._seeds[chosen])

    def verify_all(self) -> list[int]:
        """Verify every page once; gives the pfns of all mismatches so far."""
        with self._host.lock:
            self._verify(np.arange(len(self._pfns)))
        return self.mismatches

    def _verify(
        self, chosen: np.ndarray[tuple[int], np.dtype[np.int64]]
    ) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
        contents = self._host.frames.contents
        root = self._guest.root
        mfns = np.concatenate(
            [
                mapped_frames(contents, root, DIRECT_MAP + (pfn << PAGE_SHIFT), 1)
                for pfn in self._pfns[chosen].tolist()
            ]
        )
        wrong = contents.digests(mfns) != contents.pattern_digests(self._seeds[chosen])
        self.mismatches += self._pfns[chosen][wrong].tolist()
        return mfns
