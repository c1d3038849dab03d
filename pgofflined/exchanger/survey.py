"""Reads what an exchange has to know of a PV guest.

Everything read here lies in the guest's own memory or is told by it: shared_info, the p2m, the
page tables.  It is believed only as far as Xen's own records confirm it (M2P, page types,
ownership), and any contradiction ends in ``GuestLayoutError``, which becomes a refusal.

The guest may run meanwhile.  What was found is then out of date at once, and serves for choosing
what to look at again when it stands still (see ``transfer.check``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from pgofflined.core.domains import DomainInfo
from pgofflined.core.errors import XenError
from pgofflined.core.frames import PAGE_SHIFT, WORDS_PER_PAGE, Domid, Mfn, Pfn
from pgofflined.core.moves import Entries
from pgofflined.core.offline import OfflineState
from pgofflined.core.pages import (
    L4_XEN_SLOTS,
    MFN_BITS,
    PTE_ADDR_MASK,
    PTE_PRESENT,
    PTE_PSE,
    PageKind,
    PageType,
    decode_page_type,
)
from pgofflined.exchanger.poison import NO_POISON, Poison
from pgofflined.exchanger.scan import TooManyTables, find_entries
from pgofflined.ports import Hypervisor, VcpuFrames

if TYPE_CHECKING:
    from pgofflined.ports import FrameArray, Words

# struct arch_shared_info inside struct shared_info of a 64-bit guest, in 64-bit words:
# xen/include/public/arch-x86/xen.h; vcpu_info[32], evtchn_pending, evtchn_mask and wc come first.
_ARCH_WORD = 3088 // 8
_MAX_PFN, _FRAME_LIST_LIST, _P2M_CR3, _P2M_VADDR, _P2M_GENERATION = 0, 1, 3, 4, 5
_UNSET = (0, (1 << 64) - 1)

# A p2m may span holes (an e820 of the host's, hotplug room): so many pfns beyond the domain's
# maximum are believed, the rest of a larger claim would only make us allocate.
_HOLE_PFNS = 1 << 24
_TABLE_BATCH = 1024
# Frames of the p2m list; with what is computed from their entries some 30 MiB.
_P2M_BATCH = 2048
_P2M_LIST = "its p2m list"


class GuestLayoutError(Exception):
    """The guest's own records are missing or contradict themselves or Xen's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class P2mSlot:
    """Where the guest keeps the mfn of one pfn: a frame of its own, and the word in it."""

    frame: Mfn
    index: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PageFacts:
    """What is known of one page that is to be exchanged.

    ``is_shared`` says that it is Xen's own and lent to the guest, ``in_gdt`` that a vCPU has it in
    its GDT, ``is_root`` that it is an L4 table in a vCPU's control registers, ``maps_others`` that
    it is an L1 table with entries for frames that are not the guest's.  ``too_many`` says that more
    entries map it than are dealt with; ``references`` has none of them then.
    """

    mfn: Mfn
    state: OfflineState
    pfn: Pfn | None
    slot: P2mSlot | None
    p2m_mfn: Mfn | None
    type: PageType
    granted: bool
    is_shared: bool = False
    in_gdt: bool = False
    is_root: bool = False
    maps_others: bool = False
    references: Entries
    too_many: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class P2m:
    """The guest's list of ``max_pfn`` entries, and the frames that hold it, 512 entries each.

    It is read part by part when it is wanted: that of a guest of 1 TiB has 2 GiB.
    """

    max_pfn: int
    leaf_mfns: FrameArray
    believed: _Believed

    def parts(self) -> Iterator[FrameArray]:
        """All entries by pfn, some at a time.  Raises GuestLayoutError."""
        for start in range(0, len(self.leaf_mfns), _P2M_BATCH):
            pages = self.believed.read(self.leaf_mfns[start : start + _P2M_BATCH], _P2M_LIST)
            yield pages.reshape(-1)[: self.max_pfn - start * WORDS_PER_PAGE]

    def at(self, pfns: Sequence[int]) -> FrameArray:
        """The entries of some pfns.  Raises GuestLayoutError."""
        wanted = np.array(pfns, dtype=np.intp)
        leaves, rows = np.unique(wanted // WORDS_PER_PAGE, return_inverse=True)
        pages = self.believed.read(self.leaf_mfns[leaves], _P2M_LIST)
        return pages[rows, wanted % WORDS_PER_PAGE]

    @property
    def entries(self) -> FrameArray:
        """The whole of it."""
        return np.concatenate([*self.parts()])


def survey(
    xen: Hypervisor,
    domain: DomainInfo,
    mfns: Sequence[Mfn],
    poison: Poison = NO_POISON,
    moved: Mapping[int, int] = MappingProxyType({}),
) -> tuple[PageFacts, ...]:
    """Facts of each of ``mfns``, all from one scan of the guest.

    Page tables with ``poison`` are passed over; what they map has then a reference that we do not
    know, and Xen refuses to exchange it.  Pages with it are as those that Xen has broken.
    ``moved`` leads from frames to those that they were exchanged for in this suspend: the guest
    publishes the new ones only when it runs again.

    Raises GuestLayoutError, XenError; of a guest that runs also where it has just changed
    something.
    """
    p2m = read_p2m(xen, domain, poison, moved)
    wanted = np.array(mfns, dtype=np.uint64)
    try:
        found = find_entries(xen, domain.domid, p2m.parts(), wanted, poison)
    except TooManyTables as error:
        raise GuestLayoutError(str(error)) from error
    types = xen.page_types(domain.domid, wanted)
    granted = np.isin(wanted, poison.granted_frames(xen, domain.domid))
    shared = xen.shared_frames(domain.domid)
    loaded = xen.vcpu_frames(domain.domid)
    pfns = {mfn: pfn for mfn in mfns if (pfn := xen.m2p(mfn)) is not None}
    inside = [mfn for mfn in pfns if pfns[mfn] < p2m.max_pfn]
    entries = p2m.at([pfns[mfn] for mfn in inside]).tolist()
    p2m_mfns = dict(zip(inside, map(Mfn, entries), strict=True))
    return tuple(
        _facts(
            xen,
            domain.domid,
            p2m,
            mfn,
            decode_page_type(int(types[position])),
            shared,
            loaded,
            poison,
            pfn=pfns.get(mfn),
            p2m_mfn=p2m_mfns.get(mfn),
            granted=bool(granted[position]),
            references=found.entries[mfn],
            too_many=mfn in found.beyond,
        )
        for position, mfn in enumerate(mfns)
    )


def _facts(
    xen: Hypervisor,
    domid: Domid,
    p2m: P2m,
    mfn: Mfn,
    kind: PageType,
    shared: FrameArray,
    loaded: VcpuFrames,
    poison: Poison,
    *,
    pfn: Pfn | None,
    p2m_mfn: Mfn | None,
    granted: bool,
    references: Entries,
    too_many: bool,
) -> PageFacts:
    state = xen.query(mfn)
    if mfn in poison:
        # Of most of them Xen knows nothing.
        state |= OfflineState.BROKEN
    maps_others = False
    if kind.kind is PageKind.L1 and not state & OfflineState.BROKEN:
        words = poison.read(xen, domid, np.array([mfn], dtype=np.uint64))
        maps_others = has_frames_of_others(xen, domid, words[0], shared)
    return PageFacts(
        mfn=mfn,
        state=state,
        pfn=pfn,
        slot=_slot(p2m, pfn) if pfn is not None and p2m_mfn is not None else None,
        p2m_mfn=p2m_mfn,
        type=kind,
        granted=granted,
        is_shared=bool(np.isin(np.uint64(mfn), shared)),
        in_gdt=mfn in loaded.tables,
        is_root=mfn in loaded.roots,
        maps_others=maps_others,
        references=references,
        too_many=too_many,
    )


def has_frames_of_others(xen: Hypervisor, domid: Domid, table: Words, shared: FrameArray) -> bool:
    """Whether an L1 table has entries that Xen would not take if they were made anew.

    Frames that another domain has granted are mapped through the grant table only, and I/O memory
    is checked against rights.  The guest's own frames and those in ``shared`` can be mapped again.
    """
    targets = frames_below(PageKind.L1, table)
    targets = targets[~np.isin(targets, shared)]
    kinds = [decode_page_type(int(word)).kind for word in xen.page_types(domid, targets)]
    return PageKind.NOT_THE_DOMAINS in kinds


def frames_below(kind: PageKind, table: Words) -> FrameArray:
    """The frames that the guest's entries of a page table name."""
    present = (table & np.uint64(PTE_PRESENT)) != 0
    if kind is PageKind.L4:
        present[L4_XEN_SLOTS.start : L4_XEN_SLOTS.stop] = False
    targets: FrameArray = np.unique(
        (table[present] & np.uint64(PTE_ADDR_MASK)) >> np.uint64(PAGE_SHIFT)
    )
    return targets


def _slot(p2m: P2m, pfn: Pfn) -> P2mSlot:
    return P2mSlot(frame=Mfn(int(p2m.leaf_mfns[pfn // WORDS_PER_PAGE])), index=pfn % WORDS_PER_PAGE)


def read_p2m(
    xen: Hypervisor,
    domain: DomainInfo,
    poison: Poison = NO_POISON,
    moved: Mapping[int, int] = MappingProxyType({}),
) -> P2m:
    """The guest's p2m as it publishes it.  Raises GuestLayoutError, XenError."""
    frame = np.array([domain.shared_info], dtype=np.uint64)
    shared = poison.read(xen, domain.domid, frame)[0]
    arch = shared[_ARCH_WORD : _ARCH_WORD + 6]
    max_pfn = int(arch[_MAX_PFN])
    if not 0 < max_pfn <= domain.max_pages + _HOLE_PFNS:
        raise GuestLayoutError(
            f"its p2m claims {max_pfn} pfns, its memory is limited to {domain.max_pages} pages"
        )
    if int(arch[_P2M_GENERATION]) & 1:
        raise GuestLayoutError("it was suspended while changing its p2m")
    leaves = -(-max_pfn // WORDS_PER_PAGE)
    believed = _Believed(xen, domain.domid, poison)
    if int(arch[_P2M_CR3]) not in _UNSET:
        root, vaddr = int(arch[_P2M_CR3]) >> PAGE_SHIFT, int(arch[_P2M_VADDR])
        leaf_mfns = _walk(believed, moved.get(root, root), vaddr, leaves)
    elif int(arch[_FRAME_LIST_LIST]) not in _UNSET:
        top = int(arch[_FRAME_LIST_LIST])
        leaf_mfns = _frame_lists(believed, moved.get(top, top), leaves)
    else:
        raise GuestLayoutError("it publishes no p2m (neither p2m_cr3 nor a frame list)")
    return P2m(max_pfn=max_pfn, leaf_mfns=leaf_mfns, believed=believed)


@dataclass(frozen=True, slots=True)
class _Believed:
    """Reads frames that the guest named: that they are not its own is its lie, not our error."""

    xen: Hypervisor
    domid: Domid
    poison: Poison

    def read(self, mfns: FrameArray, what: str) -> Words:
        """Contents of frames.  Raises GuestLayoutError."""
        if np.any(mfns >= np.uint64(1 << MFN_BITS)):
            raise GuestLayoutError(f"{what}: it names a frame that no host has")
        contents = np.empty((len(mfns), WORDS_PER_PAGE), dtype=np.uint64)
        try:
            for start, part in zip(range(0, len(mfns), _TABLE_BATCH), _batches(mfns), strict=True):
                if self.poison.among(part).any():
                    raise GuestLayoutError(f"{what}: a frame of it has had an uncorrected error")
                contents[start : start + len(part)] = self.xen.read_frames(self.domid, part)
        except XenError as error:
            raise GuestLayoutError(f"{what} cannot be read: {error}") from error
        return contents


def _walk(believed: _Believed, root: int, vaddr: int, leaves: int) -> FrameArray:
    """Frames of the virtually contiguous p2m list, in the address space of an L4 table."""
    if vaddr & 0xFFF:
        raise GuestLayoutError(f"its p2m list starts at {vaddr:#x}, within a page")
    with np.errstate(over="ignore"):
        addresses = np.uint64(vaddr) + (np.arange(leaves, dtype=np.uint64) << np.uint64(12))
    frames = np.full(leaves, root, dtype=np.uint64)
    for shift in (39, 30, 21, 12):
        tables, rows = np.unique(frames, return_inverse=True)
        contents = believed.read(tables, "its p2m's page tables")
        entries = contents[rows, (addresses >> np.uint64(shift)) & np.uint64(511)]
        if not np.all(entries & np.uint64(PTE_PRESENT)):
            raise GuestLayoutError("its p2m list is not mapped from end to end")
        if shift > 12 and np.any(entries & np.uint64(PTE_PSE)):
            raise GuestLayoutError("its p2m list claims to be mapped by superpages")
        frames = (entries & np.uint64(PTE_ADDR_MASK)) >> np.uint64(12)
    return frames


def _frame_lists(believed: _Believed, top: int, leaves: int) -> FrameArray:
    """Frames of the p2m list as the older three-level frame list names them."""
    lists = -(-leaves // WORDS_PER_PAGE)
    if lists > WORDS_PER_PAGE:
        raise GuestLayoutError("its p2m is larger than a frame list can name")
    words = believed.read(np.array([top], dtype=np.uint64), "its frame list")
    inner = believed.read(words[0, :lists], "its frame lists")
    return inner.reshape(-1)[:leaves]


def _batches(mfns: FrameArray) -> Iterator[FrameArray]:
    for start in range(0, len(mfns), _TABLE_BATCH):
        yield mfns[start : start + _TABLE_BATCH]
