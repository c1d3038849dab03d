"""A PV guest's records full of lies, written from dom0: ... DOMID VICTIM.

For each lie: it is written into the guest's memory, an exchange of a data page of the guest is
tried, and what was there is written back.  Prints one JSON object for each lie: what became of the
page, and whether the guest runs.  VICTIM is another PV guest, whose frames are named.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from pgofflined.core.frames import DOM0, Domid, Mfn
from pgofflined.core.moves import PteWrites, Words, frames_of, no_contents
from pgofflined.core.offline import OfflineFlag, OfflineState
from pgofflined.core.outcomes import Exchanged, Refusal
from pgofflined.core.pagetable import guest_frames
from pgofflined.exchanger.survey import read_p2m
from pgofflined.xen.hypervisor import XenHypervisor

from .exchange_pages import run_job
from .pages import of_pv_guest

# struct arch_shared_info, 3088 bytes into shared_info (public/arch-x86/xen.h), in words.
_MAX_PFN, _LISTS, _CR3, _VADDR, _GENERATION = (3088 // 8 + word for word in (0, 1, 3, 4, 5))
_EVERYTHING = (1 << 64) - 1
_SHIFT = 12


@dataclass(frozen=True)
class Lie:
    """Words of a frame of the guest."""

    name: str
    frame: int
    words: dict[int, int]


def lies(xen: XenHypervisor, domid: Domid, victim: Domid) -> Iterator[Lie]:
    """What a hostile guest might tell of itself."""
    info = xen.domain(domid)
    shared = info.shared_info
    p2m = read_p2m(xen, info)
    data = of_pv_guest(xen, domid, "data")[0][1]
    theirs = of_pv_guest(xen, victim, "data")[0][1]
    xens = xen.domain(victim).shared_info
    for name, root in {
        "a data page": data,
        "a page of another guest": theirs,
        "a page of Xen's": xens,
        "no frame at all": int(xen.max_mfn()) + 5,
        "a frame of no machine": _EVERYTHING >> _SHIFT,
    }.items():
        yield Lie(f"the p2m's root is {name}", shared, {_CR3: root << _SHIFT})
        yield Lie(f"the frame list is {name}", shared, {_CR3: 0, _LISTS: root})
    yield Lie("the p2m is endless", shared, {_MAX_PFN: _EVERYTHING})
    yield Lie("the p2m is empty", shared, {_MAX_PFN: 0})
    yield Lie("the p2m is longer than the guest", shared, {_MAX_PFN: info.max_pages + (1 << 20)})
    yield Lie("the p2m is elsewhere", shared, {_VADDR: 0x1000})
    yield Lie("the p2m begins within a page", shared, {_VADDR: 0xFFFF_C900_0000_0008})
    yield Lie("the p2m is in Xen's part", shared, {_VADDR: 0xFFFF_8000_0000_0000})
    yield Lie("the p2m is being changed", shared, {_GENERATION: 1})
    yield Lie("there is no p2m", shared, {_CR3: 0, _LISTS: 0})
    # pfns that the guest has no memory at: it does not look there.
    holes = np.flatnonzero(~guest_frames(p2m.entries))
    if len(holes):
        hole = int(holes[0])
        leaf, index = int(p2m.leaf_mfns[hole // 512]), hole % 512
        for name, mfn in {"another guest's": theirs, "Xen's": xens, "its own twice": data}.items():
            yield Lie(f"the p2m names a page, {name}", leaf, {index: mfn})


@contextmanager
def told(xen: XenHypervisor, domid: Domid, lie: Lie) -> Iterator[None]:
    """The lie is in the guest's memory; what was there comes back."""
    frames = np.full(len(lie.words), lie.frame, dtype=np.uint64)
    indexes = np.array(list(lie.words), dtype=np.uint64)
    truth = xen.read_frames(domid, frames[:1])[0][indexes]

    def tell(words: Words) -> None:
        slots = PteWrites(tables=frames, indexes=indexes, values=words)
        xen.write_frames(domid, frames_of([]), no_contents(0), slots)

    tell(np.array(list(lie.words.values()), dtype=np.uint64))
    try:
        yield
    finally:
        tell(truth)


def _mark(xen: XenHypervisor, pages: list[tuple[int, int]]) -> Mfn:
    while True:
        mfn = Mfn(random.choice(pages)[1])  # noqa: S311 - no secret hangs on it
        if xen.query(mfn) is not OfflineState.ONLINE:
            continue
        if xen.offline(mfn).flags & OfflineFlag.PENDING:
            return mfn


def main(domid: Domid, victim: Domid) -> None:
    """Tell every lie."""
    xen = XenHypervisor()
    for lie in list(lies(xen, domid, victim)):
        mfn = _mark(xen, of_pv_guest(xen, domid, "data"))
        with told(xen, domid, lie):
            report = run_job(xen, domid, [mfn])
        [result] = report.results
        if isinstance(result, Refusal):
            xen.online(mfn)
        info = xen.condition(domid)
        row = {
            "lie": lie.name,
            "outcome": result.reason.value if isinstance(result, Refusal) else "exchanged",
            "detail": result.detail if isinstance(result, Refusal) else "",
            "well": isinstance(result, Refusal | Exchanged) and report.stuck is None,
            "suspended": report.blackout is not None,
            "runs": info.shutdown is None and not info.paused,
        }
        print(json.dumps(row), flush=True)
    assert xen.condition(DOM0).shutdown is None


if __name__ == "__main__":
    main(Domid(int(sys.argv[1])), Domid(int(sys.argv[2])))
