"""The books of a simulated host, counted again from first principles."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from pgofflined.core.frames import PAGE_SHIFT, Domid
from pgofflined.core.pages import L4_XEN_SLOTS, PTE_ADDR_MASK, PTE_PRESENT, PTE_RW
from pgofflined.sim.errors import InvariantViolation
from pgofflined.sim.frames import INVALID_M2P, NOBODY, FrameState, FrameType
from pgofflined.sim.layout import P2M_MISSING

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pgofflined.sim.host import HostState

_PRESENT: Final = np.uint64(PTE_PRESENT)
_RW: Final = np.uint64(PTE_RW)
_ADDR: Final = np.uint64(PTE_ADDR_MASK)
_SHIFT: Final = np.uint64(PAGE_SHIFT)


def check_invariants(host: HostState) -> None:
    """Raise InvariantViolation unless counts, types, M2P and p2m all agree."""
    with host.lock:
        _check_counts(host)
        _check_heap(host)
        for domid, domain in host.by_domid.items():
            if domain.pv is not None:
                _check_p2m(host, domid)


def _check_counts(host: HostState) -> None:
    frames = host.frames
    refs = frames.allocated.astype(np.int64)
    types = np.zeros(frames.count, dtype=np.int64)
    fixed = np.isin(frames.owner, (0x7FF1, 0x7FF2)) | (frames.special & (frames.owner == NOBODY))
    refs[fixed] = 1
    for level in (1, 2, 3, 4):
        tables = np.flatnonzero((frames.type == level) & frames.validated)
        for part in np.array_split(tables, max(1, len(tables) // 1024)):
            _count_entries(host, part, level, refs, types)
    refs += frames.pinned
    types += frames.pinned
    holds = [hold for domain in host.by_domid.values() for hold in domain.holds]
    for hold in holds + host.lasting_holds:
        refs[hold.mfn] += 1
        types[hold.mfn] += hold.kind is not FrameType.NONE
    _demand("references", frames.refs, refs)
    _demand("type references", frames.type_refs, types)


def _count_entries(
    host: HostState,
    tables: NDArray[np.int64],
    level: int,
    refs: NDArray[np.int64],
    types: NDArray[np.int64],
) -> None:
    frames = host.frames
    words = frames.contents.read(tables.astype(np.uint64))
    present = (words & _PRESENT) != 0
    if level == FrameType.L4:
        present[:, L4_XEN_SLOTS.start : L4_XEN_SLOTS.stop] = False
    entries = words[present]
    targets = ((entries & _ADDR) >> _SHIFT).astype(np.int64)
    np.add.at(refs, targets, 1)
    typed = targets if level > 1 else targets[(entries & _RW) != 0]
    np.add.at(types, typed, 1)
    wanted = level - 1 if level > 1 else int(FrameType.WRITABLE)
    wrong = typed[frames.type[typed] != wanted]
    if len(wrong):
        raise InvariantViolation(f"mfn {int(wrong[0]):#x} is not what an L{level} entry makes it")


def _demand(what: str, have: NDArray[np.int32], want: NDArray[np.int64]) -> None:
    wrong = np.flatnonzero(have != want)
    if len(wrong):
        mfn = int(wrong[0])
        raise InvariantViolation(
            f"mfn {mfn:#x} has {int(have[mfn])} {what}, {int(want[mfn])} are accounted for "
            f"({len(wrong)} such frames)"
        )


def _check_heap(host: HostState) -> None:
    frames = host.frames
    out = np.isin(frames.state, (FrameState.FREE, FrameState.OFFLINED))
    used = out & ((frames.refs != 0) | (frames.owner != NOBODY) | (frames.m2p != INVALID_M2P))
    if used.any():
        raise InvariantViolation(f"mfn {int(np.flatnonzero(used)[0]):#x} is free and in use")
    if int((frames.state == FrameState.FREE).sum()) != frames.free_count:
        raise InvariantViolation("the number of free frames is wrong")


def _check_p2m(host: HostState, domid: Domid) -> None:
    frames, guest = host.frames, host.pv(domid)
    mfns = guest.mfns()
    pfns = np.flatnonzero(mfns != np.uint64(P2M_MISSING))
    index = mfns[pfns].astype(np.int64)
    if (index >= frames.count).any():
        raise InvariantViolation(f"the p2m of d{domid} names frames beyond the host's last")
    wrong = (frames.owner[index] != domid) | (frames.m2p[index] != pfns.astype(np.uint64))
    if wrong.any():
        pfn = int(pfns[wrong][0])
        raise InvariantViolation(
            f"pfn {pfn:#x} of d{domid} names mfn {int(mfns[pfn]):#x}, whose owner is "
            f"d{int(frames.owner[int(mfns[pfn])])} and whose M2P entry is "
            f"{int(frames.m2p[int(mfns[pfn])]):#x}"
        )
    owned = int(((frames.owner == domid) & frames.allocated & ~frames.special).sum())
    if owned != len(pfns):
        raise InvariantViolation(f"d{domid} owns {owned} frames and knows of {len(pfns)}")
