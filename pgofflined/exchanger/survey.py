"""Reads what an exchange has to know of a suspended and paused PV guest.

Everything read here lies in the guest's own memory or is told by it: shared_info, the p2m, the
page tables.  It is believed only as far as Xen's own records confirm it (M2P, page types,
ownership), and any contradiction ends in ``GuestLayoutError``, which becomes a refusal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pgofflined.core.domains import DomainInfo
from pgofflined.core.errors import XenError
from pgofflined.core.frames import WORDS_PER_PAGE, Domid, Mfn, Pfn
from pgofflined.core.offline import OfflineState
from pgofflined.core.pages import (
    MFN_BITS,
    PTE_ADDR_MASK,
    PTE_PRESENT,
    PTE_PSE,
    PageType,
    decode_page_type,
)
from pgofflined.core.pagetable import find_references, guest_frames, table_levels
from pgofflined.ports import Hypervisor

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


class GuestLayoutError(Exception):
    """The guest's own records are missing or contradict themselves or Xen's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class P2mSlot:
    """Where the guest keeps the mfn of one pfn: a frame of its own, and the word in it."""

    frame: Mfn
    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PteReference:
    """One present entry that maps a page, with its whole original value."""

    table: Mfn
    index: int
    value: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PageFacts:
    """What is known of one page that is to be exchanged."""

    mfn: Mfn
    state: OfflineState
    pfn: Pfn | None
    slot: P2mSlot | None
    p2m_mfn: Mfn | None
    type: PageType
    granted: bool
    holds_p2m: bool
    references: tuple[PteReference, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class P2m:
    """The guest's list: ``entries`` by pfn, and the frames that hold it, 512 entries each."""

    entries: FrameArray
    leaf_mfns: FrameArray


def survey(xen: Hypervisor, domain: DomainInfo, mfns: Sequence[Mfn]) -> tuple[PageFacts, ...]:
    """Facts of each of ``mfns``, all from one scan of the guest.

    The guest has to be suspended and paused.  Raises GuestLayoutError, XenError.
    """
    p2m = read_p2m(xen, domain)
    references = _scan_tables(xen, domain.domid, p2m, mfns)
    wanted = np.array(mfns, dtype=np.uint64)
    types = xen.page_types(domain.domid, wanted)
    granted = np.isin(wanted, xen.granted_frames(domain.domid))
    holds_p2m = np.isin(wanted, p2m.leaf_mfns)
    facts = []
    for position, mfn in enumerate(mfns):
        pfn = xen.m2p(mfn)
        inside = pfn is not None and pfn < len(p2m.entries)
        facts.append(
            PageFacts(
                mfn=mfn,
                state=xen.query(mfn),
                pfn=pfn,
                slot=_slot(p2m, pfn) if inside and pfn is not None else None,
                p2m_mfn=Mfn(int(p2m.entries[pfn])) if inside else None,
                type=decode_page_type(int(types[position])),
                granted=bool(granted[position]),
                holds_p2m=bool(holds_p2m[position]),
                references=references.get(mfn, ()),
            )
        )
    return tuple(facts)


def _slot(p2m: P2m, pfn: Pfn) -> P2mSlot:
    return P2mSlot(frame=Mfn(int(p2m.leaf_mfns[pfn // WORDS_PER_PAGE])), index=pfn % WORDS_PER_PAGE)


def read_p2m(xen: Hypervisor, domain: DomainInfo) -> P2m:
    """The guest's p2m as it publishes it.  Raises GuestLayoutError, XenError."""
    shared = xen.read_frames(domain.domid, np.array([domain.shared_info], dtype=np.uint64))[0]
    arch = shared[_ARCH_WORD : _ARCH_WORD + 6]
    max_pfn = int(arch[_MAX_PFN])
    if not 0 < max_pfn <= domain.max_pages + _HOLE_PFNS:
        raise GuestLayoutError(
            f"its p2m claims {max_pfn} pfns, its memory is limited to {domain.max_pages} pages"
        )
    if int(arch[_P2M_GENERATION]) & 1:
        raise GuestLayoutError("it was suspended while changing its p2m")
    leaves = -(-max_pfn // WORDS_PER_PAGE)
    if int(arch[_P2M_CR3]) not in _UNSET:
        leaf_mfns = _walk(xen, domain.domid, int(arch[_P2M_CR3]), int(arch[_P2M_VADDR]), leaves)
    elif int(arch[_FRAME_LIST_LIST]) not in _UNSET:
        leaf_mfns = _frame_lists(xen, domain.domid, int(arch[_FRAME_LIST_LIST]), leaves)
    else:
        raise GuestLayoutError("it publishes no p2m (neither p2m_cr3 nor a frame list)")
    pages = [xen.read_frames(domain.domid, part) for part in _batches(leaf_mfns)]
    return P2m(entries=np.concatenate(pages).reshape(-1)[:max_pfn], leaf_mfns=leaf_mfns)


def _walk(xen: Hypervisor, domid: Domid, cr3: int, vaddr: int, leaves: int) -> FrameArray:
    """Frames of the virtually contiguous p2m list, from its own address space.

    ``cr3`` has the form of the register: for 64-bit guests the root's maddr.
    """
    if vaddr & 0xFFF:
        raise GuestLayoutError(f"its p2m list starts at {vaddr:#x}, within a page")
    with np.errstate(over="ignore"):
        addresses = np.uint64(vaddr) + (np.arange(leaves, dtype=np.uint64) << np.uint64(12))
    frames = np.full(leaves, cr3 >> 12, dtype=np.uint64)
    for shift in (39, 30, 21, 12):
        tables, rows = np.unique(frames, return_inverse=True)
        contents = _read_believed(xen, domid, tables, "its p2m's page tables")
        entries = contents[rows, (addresses >> np.uint64(shift)) & np.uint64(511)]
        if not np.all(entries & np.uint64(PTE_PRESENT)):
            raise GuestLayoutError("its p2m list is not mapped from end to end")
        if shift > 12 and np.any(entries & np.uint64(PTE_PSE)):
            raise GuestLayoutError("its p2m list claims to be mapped by superpages")
        frames = (entries & np.uint64(PTE_ADDR_MASK)) >> np.uint64(12)
    return frames


def _frame_lists(xen: Hypervisor, domid: Domid, top: int, leaves: int) -> FrameArray:
    """Frames of the p2m list as the older three-level frame list names them."""
    lists = -(-leaves // WORDS_PER_PAGE)
    if lists > WORDS_PER_PAGE:
        raise GuestLayoutError("its p2m is larger than a frame list can name")
    words = _read_believed(xen, domid, np.array([top], dtype=np.uint64), "its frame list")
    inner = _read_believed(xen, domid, words[0, :lists], "its frame lists")
    return inner.reshape(-1)[:leaves]


def _read_believed(xen: Hypervisor, domid: Domid, mfns: FrameArray, what: str) -> Words:
    """Read frames that the guest named; frames that are not its own are its lie, not our error."""
    if np.any(mfns >= np.uint64(1 << MFN_BITS)):
        raise GuestLayoutError(f"{what} name a frame that no host has")
    try:
        return np.concatenate([xen.read_frames(domid, part) for part in _batches(mfns)])
    except XenError as error:
        raise GuestLayoutError(f"{what} cannot be read: {error}") from error


def _scan_tables(
    xen: Hypervisor, domid: Domid, p2m: P2m, mfns: Sequence[Mfn]
) -> dict[Mfn, tuple[PteReference, ...]]:
    """Every present entry of every page table of the domain that maps one of ``mfns``."""
    own = np.unique(p2m.entries[guest_frames(p2m.entries)])
    types = xen.page_types(domid, own)
    levels = table_levels(types)
    tables, levels = own[levels > 0], levels[levels > 0]
    wanted = np.array(mfns, dtype=np.uint64)
    found: dict[Mfn, list[PteReference]] = {}
    for start in range(0, len(tables), _TABLE_BATCH):
        part = slice(start, start + _TABLE_BATCH)
        contents = xen.read_frames(domid, tables[part])
        rows, columns = find_references(contents, levels[part], wanted)
        for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
            value = int(contents[row, column])
            reference = PteReference(table=Mfn(int(tables[part][row])), index=column, value=value)
            found.setdefault(Mfn((value & PTE_ADDR_MASK) >> 12), []).append(reference)
    return {mfn: tuple(references) for mfn, references in found.items()}


def _batches(mfns: FrameArray) -> Iterator[FrameArray]:
    for start in range(0, len(mfns), _TABLE_BATCH):
        yield mfns[start : start + _TABLE_BATCH]
