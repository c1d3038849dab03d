"""Finds out from Xen's records alone what became of pages that may have been exchanged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from pgofflined.core.frames import Domid, Mfn
from pgofflined.core.offline import OfflineState
from pgofflined.core.pages import PFINFO_TYPE_MASK, PFINFO_XTAB
from pgofflined.ports import Hypervisor

if TYPE_CHECKING:
    from pgofflined.core.moves import Chosen
    from pgofflined.ports import FrameArray

# A guest can have the M2P note one pfn for all its frames, and waits while each is asked for.  More
# than two for each of the pages of the largest job are nothing but that.
MAX_CANDIDATES: Final = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Ambiguous:
    """The frame that replaced a page cannot be told, and why."""

    why: str


def still_owned(xen: Hypervisor, domid: Domid, mfns: FrameArray) -> Chosen:
    """Which frames belong to a domain."""
    types = xen.page_types(domid, mfns)
    owned: Chosen = (types & np.uint32(PFINFO_TYPE_MASK)) != np.uint32(PFINFO_XTAB)
    return owned


def may_have_gone(xen: Hypervisor, domid: Domid, mfns: FrameArray, pfns: FrameArray) -> Chosen:
    """Which frames are not those of their pfns any more.

    A frame that was exchanged belongs to nobody, or to another.  One that was not marked may come
    back to the same domain, but at another pfn.  One that is marked and the domain's has never
    left it, whatever the domain has the M2P note for it.
    """
    gone: Chosen = ~still_owned(xen, domid, mfns)
    for row, (mfn, pfn) in enumerate(zip(mfns.tolist(), pfns.tolist(), strict=True)):
        if not gone[row] and xen.m2p(Mfn(mfn)) != pfn:
            gone[row] = not xen.query(Mfn(mfn)) & OfflineState.OFFLINE_PENDING
    return gone


def where_they_went(
    xen: Hypervisor, domid: Domid, pfns: FrameArray, olds: FrameArray
) -> list[Mfn | Ambiguous]:
    """The frames that replaced pages: of the domain, and noted by the M2P at the pages' pfns.

    Xen notes the pfn in the same breath in which it gives the new frame to the domain.  A guest
    can have the M2P note what it likes for its own frames, but a second frame at the same pfn only
    makes the answer ambiguous.
    """
    if not len(pfns):
        return []
    candidates = xen.m2p_search(pfns)
    candidates = candidates[still_owned(xen, domid, candidates)]
    if len(candidates) > MAX_CANDIDATES:
        why = f"Xen's M2P notes {len(candidates)} frames of it at {len(pfns)} pfns"
        return [Ambiguous(why=why)] * len(pfns)
    found: dict[int, list[Mfn]] = {int(pfn): [] for pfn in pfns.tolist()}
    for candidate in candidates.tolist():
        pfn = xen.m2p(Mfn(candidate))
        if pfn is not None and int(pfn) in found:
            found[int(pfn)].append(Mfn(candidate))
    return [
        _only(int(pfn), [mfn for mfn in found[int(pfn)] if mfn != old])
        for pfn, old in zip(pfns.tolist(), olds.tolist(), strict=True)
    ]


def _only(pfn: int, frames: list[Mfn]) -> Mfn | Ambiguous:
    match frames:
        case [frame]:
            return frame
        case []:
            return Ambiguous(why=f"Xen's M2P notes no frame of it at pfn {pfn:#x}")
        case _:
            return Ambiguous(why=f"Xen's M2P notes {len(frames)} frames of it at pfn {pfn:#x}")
