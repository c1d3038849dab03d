"""What a guest sees of its memory, for comparing before and after.

Frame numbers are not part of what a guest's programs see: entries of page tables and of the p2m
are read through the M2P, so that an exchanged page shows the same view and a lost or misplaced
one does not.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np

from pgofflined.core.frames import PAGE_SHIFT, Domid
from pgofflined.core.pages import L4_XEN_SLOTS, PTE_ADDR_MASK, PTE_PRESENT
from pgofflined.sim import linux
from pgofflined.sim.contents import digest_words
from pgofflined.sim.layout import P2M_MISSING
from pgofflined.sim.pagetables import all_mappings

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pgofflined.ports import FrameArray, Words
    from pgofflined.sim.host import HostState
    from pgofflined.sim.pvguest import PvGuest

_PRESENT: Final = np.uint64(PTE_PRESENT)
_ADDR: Final = np.uint64(PTE_ADDR_MASK)
_SHIFT: Final = np.uint64(PAGE_SHIFT)
# Set in a pfn that stands for the frame behind it; no frame number and no p2m entry has it.
_TRANSLATED: Final = np.uint64(1 << 50)


@dataclass(frozen=True, slots=True, kw_only=True)
class AddressSpace:
    """Every mapping under one root: addresses, flags, and the pfns that they reach."""

    addresses: NDArray[np.uint64]
    flags: NDArray[np.uint64]
    pfns: NDArray[np.uint64]


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestView:
    """A guest's memory at one moment; ``mfns`` is not part of the view but of its backing."""

    digests: NDArray[np.uint64]
    spaces: dict[int, AddressSpace] = field(default_factory=dict)
    mfns: FrameArray

    def differences(self, other: GuestView) -> list[str]:
        """What differs in words; empty when the guest cannot tell the two apart."""
        found: list[str] = []
        if len(self.digests) != len(other.digests):
            return ["the guest has another number of pages"]
        changed = np.flatnonzero(self.digests != other.digests).tolist()
        found += [f"contents of pfn {pfn:#x}" for pfn in changed]
        if self.spaces.keys() != other.spaces.keys():
            return [*found, "the guest has other address spaces"]
        for root, mine in self.spaces.items():
            theirs = other.spaces[root]
            if not np.array_equal(mine.addresses, theirs.addresses):
                gone = np.setxor1d(mine.addresses, theirs.addresses).tolist()
                found += [f"root pfn {root:#x}: only one maps {va:#014x}" for va in gone]
                continue
            wrong = (mine.pfns != theirs.pfns) | (mine.flags != theirs.flags)
            found += [
                f"root pfn {root:#x}: {va:#014x} maps otherwise"
                for va in mine.addresses[wrong].tolist()
            ]
        return found

    def moved(self, other: GuestView) -> list[int]:
        """Pfns that another host frame backs in the other view."""
        return np.flatnonzero(self.mfns != other.mfns).tolist()


def guest_view(host: HostState, domid: Domid) -> GuestView:
    """What a guest sees now: contents by pfn, and for PV every virtual mapping."""
    with host.lock:
        domain = host.simulated(domid)
        if domain.pv is not None:
            return _pv_view(host, domid, domain.pv)
        gfns = domain.guest_frames
        return GuestView(digests=host.frames.contents.digests(gfns), mfns=gfns.copy())


def _pv_view(host: HostState, domid: Domid, guest: PvGuest) -> GuestView:
    mfns = guest.mfns()
    present = np.flatnonzero(mfns != np.uint64(P2M_MISSING))
    digests = np.zeros(len(mfns), dtype=np.uint64)
    digests[present] = host.frames.contents.digests(mfns[present])
    reader = _Reader(host, domid)
    layout = guest.layout
    for pfn, level in layout.all_tables.items():
        words = reader.page(int(mfns[pfn]))
        digests[pfn] = digest_words(reader.entries(words, level)[None, :])[0]
    for pfn in (*layout.p2m_list, *layout.p2m_mid, layout.p2m_top):
        words = reader.page(int(mfns[pfn]))
        digests[pfn] = digest_words(reader.frames(words)[None, :])[0]
    start = reader.page(int(mfns[layout.start_info]))
    links = [linux.START_INFO_STORE, linux.START_INFO_CONSOLE]
    start[links] = reader.frames(start[links])
    digests[layout.start_info] = digest_words(start[None, :])[0]
    roots = {layout.root}
    for process in layout.processes:
        roots |= {process.kernel_root, process.user_root}
    spaces = {root: reader.space(int(mfns[root])) for root in sorted(roots)}
    return GuestView(digests=digests, spaces=spaces, mfns=mfns)


class _Reader:
    """Reads a guest's frames with frame numbers turned into pfns."""

    def __init__(self, host: HostState, domid: Domid) -> None:
        self._frames = host.frames
        self._domid = domid

    def page(self, mfn: int) -> Words:
        """A copy of one frame."""
        words: Words = self._frames.contents.read(np.array([mfn], dtype=np.uint64))[0]
        return words

    def frames(self, mfns: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """The pfns of the guest's own frames; other numbers stay."""
        inside = mfns < np.uint64(self._frames.count)
        index = np.where(inside, mfns, 0).astype(np.int64)
        own = inside & (self._frames.owner[index] == self._domid) & ~self._frames.special[index]
        result: NDArray[np.uint64] = np.where(own, self._frames.m2p[index] | _TRANSLATED, mfns)
        return result

    def entries(self, words: Words, level: int) -> Words:
        """A table with the pfns of its targets, without Xen's own slots."""
        translated: Words = words.copy()
        present = (words & _PRESENT) != 0
        targets = self.frames((words[present] & _ADDR) >> _SHIFT)
        translated[present] = (words[present] & ~_ADDR) ^ (targets << _SHIFT)
        if level == 4:
            translated[L4_XEN_SLOTS.start : L4_XEN_SLOTS.stop] = 0
        return translated

    def space(self, root: int) -> AddressSpace:
        """All mappings under a root."""
        addresses, entries = all_mappings(self._frames.contents, root)
        return AddressSpace(
            addresses=addresses,
            flags=entries & ~_ADDR,
            pfns=self.frames((entries & _ADDR) >> _SHIFT),
        )
