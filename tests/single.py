"""The ports' batches for tests that are about one frame, word or entry."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from pgofflined.core.frames import Domid, Mfn
from pgofflined.core.moves import PteWrite, PteWrites, frames_of, no_contents

if TYPE_CHECKING:
    from pgofflined.ports import ForeignMemory, FrameExchange, PageTableControl, Words


def set_ptes(xen: PageTableControl, domid: Domid, writes: Iterable[PteWrite]) -> None:
    """Set entries in order."""
    xen.update_ptes(domid, PteWrites.of(writes))


def swap(xen: FrameExchange, domid: Domid, mfn: int, pfn: int) -> Mfn:
    """Exchange one frame; the new one.  Raises what the answer tells."""
    answer = xen.exchange(domid, frames_of([mfn]), frames_of([pfn]))
    if answer.error is not None:
        raise answer.error
    [new] = answer.new.tolist()
    return Mfn(new)


def write_words(xen: ForeignMemory, domid: Domid, mfn: int, index: int, words: Words) -> None:
    """Write words that lie one after the other."""
    indexes = np.arange(index, index + len(words), dtype=np.int64).astype(np.uint64)
    slots = PteWrites(tables=frames_of([mfn] * len(words)), indexes=indexes, values=words)
    xen.write_frames(domid, frames_of([]), no_contents(0), slots)
