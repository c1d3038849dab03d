"""A PV guest's memory seen through the ports alone: written apart from the exchanger's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pgofflined.core.frames import PAGE_SHIFT, WORDS_PER_PAGE, Domid, Mfn, Pfn
from pgofflined.core.moves import PteWrite
from pgofflined.core.pages import (
    MFN_BITS,
    PFINFO_LTAB_TYPE_MASK,
    PFINFO_XTAB,
    PTE_ADDR_MASK,
    PTE_PRESENT,
    PTE_RW,
)
from pgofflined.ports import Hypervisor, SuspendLimits
from tests.single import write_words

if TYPE_CHECKING:
    from pgofflined.ports import FrameArray, Words

# struct arch_shared_info, 3088 bytes into shared_info (public/arch-x86/xen.h).
_ARCH = 3088 // 8
_CANDIDATES = 64


@dataclass(frozen=True, kw_only=True)
class DataPage:
    """An ordinary page of a guest, and every L1 entry that maps it."""

    mfn: Mfn
    pfn: Pfn
    entries: tuple[PteWrite, ...]

    @property
    def cleared(self) -> list[PteWrite]:
        """The writes that take all its entries away."""
        return [PteWrite(table=e.table, index=e.index, value=0) for e in self.entries]

    def moved_to(self, mfn: Mfn) -> list[PteWrite]:
        """The writes that let its entries name another frame."""
        return [
            PteWrite(
                table=e.table, index=e.index, value=e.value & ~PTE_ADDR_MASK | mfn << PAGE_SHIFT
            )
            for e in self.entries
        ]


class GuestMemory:
    """Reads the p2m, the page types and the page tables of a PV guest."""

    def __init__(self, hypervisor: Hypervisor, domid: Domid) -> None:
        self._hypervisor = hypervisor
        self.domid = domid

    def read(self, mfn: int) -> Words:
        """One frame."""
        words: Words = self._hypervisor.read_frames(self.domid, np.array([mfn], dtype=np.uint64))[0]
        return words

    def shared_info(self) -> Words:
        """The arch part of shared_info: max_pfn, frame lists, nmi, p2m_cr3, p2m_vaddr, ..."""
        info = self._hypervisor.domain(self.domid)
        return self.read(info.shared_info)[_ARCH : _ARCH + 6]

    def p2m_frames(self) -> FrameArray:
        """The frames of the p2m list, by a walk through the guest's page tables."""
        arch = self.shared_info()
        max_pfn, cr3, vaddr = int(arch[0]), int(arch[3]), int(arch[4])
        pages = -(-max_pfn // WORDS_PER_PAGE)
        known: dict[int, Words] = {}
        found = []
        for page in range(pages):
            address = vaddr + (page << PAGE_SHIFT)
            table = cr3 >> PAGE_SHIFT
            for shift in (39, 30, 21, 12):
                if table not in known:
                    known[table] = self.read(table)
                entry = int(known[table][(address >> shift) & 511])
                assert entry & PTE_PRESENT
                table = (entry & PTE_ADDR_MASK) >> PAGE_SHIFT
            found.append(table)
        return np.array(found, dtype=np.uint64)

    def p2m(self) -> FrameArray:
        """Raw entries by pfn."""
        max_pfn = int(self.shared_info()[0])
        frames = self.p2m_frames()
        entries: FrameArray = self._hypervisor.read_frames(self.domid, frames).reshape(-1)
        return entries[:max_pfn]

    def own_frames(self) -> FrameArray:
        """Every frame that the p2m names as the guest's own."""
        entries = self.p2m()
        return np.unique(entries[(entries < np.uint64(1 << MFN_BITS)) & (entries != 0)])

    def tables(self, level: int) -> FrameArray:
        """Frames that are page tables of a level."""
        own = self.own_frames()
        types = self._hypervisor.page_types(self.domid, own)
        # BROKEN, XALLOC and XTAB have the bits of levels as well.
        is_level = (types & np.uint32(PFINFO_LTAB_TYPE_MASK)) == np.uint32(level << 28)
        tables: FrameArray = own[is_level & (types < np.uint32(0xD << 28))]
        return tables

    def data_pages(self) -> list[DataPage]:
        """Ordinary pages with a writable entry: neither granted, nor part of the p2m list."""
        entries = self.p2m()
        own = (entries < np.uint64(1 << MFN_BITS)) & (entries != 0)
        pfns = np.flatnonzero(own)
        mfns = entries[own]
        types = self._hypervisor.page_types(self.domid, mfns)
        out = np.concatenate([self._hypervisor.granted_frames(self.domid), self.p2m_frames()])
        ordinary = (types == 0) & ~np.isin(mfns, out)
        chosen = np.random.default_rng(7).permutation(np.flatnonzero(ordinary))[:_CANDIDATES]
        mapped = self.entries_of(mfns[chosen])
        pages = [
            DataPage(mfn=Mfn(mfn), pfn=Pfn(pfn), entries=tuple(mapped.get(mfn, ())))
            for mfn, pfn in zip(mfns[chosen].tolist(), pfns[chosen].tolist(), strict=True)
        ]
        return [page for page in pages if any(e.value & PTE_RW for e in page.entries)]

    def entries_of(self, mfns: FrameArray) -> dict[int, list[PteWrite]]:
        """Every L1 entry that maps one of these frames."""
        found: dict[int, list[PteWrite]] = {}
        for table in self.tables(1).tolist():
            words = self.read(table)
            targets = (words & np.uint64(PTE_ADDR_MASK)) >> np.uint64(PAGE_SHIFT)
            hits = np.isin(targets, mfns) & ((words & np.uint64(PTE_PRESENT)) != 0)
            for index in np.flatnonzero(hits).tolist():
                found.setdefault(int(targets[index]), []).append(
                    PteWrite(table=Mfn(table), index=index, value=int(words[index]))
                )
        return found

    def set_p2m(self, pfn: Pfn, mfn: Mfn) -> None:
        """Write one entry of the p2m list."""
        frame = Mfn(int(self.p2m_frames()[pfn // WORDS_PER_PAGE]))
        word = np.array([mfn], dtype=np.uint64)
        write_words(self._hypervisor, self.domid, frame, pfn % WORDS_PER_PAGE, word)


def not_the_domains(types: int) -> bool:
    """Whether a page type says that the frame is not the domain's."""
    return types == PFINFO_XTAB


@contextmanager
def paused(hypervisor: Hypervisor, domid: Domid) -> Iterator[None]:
    """Keep a guest paused."""
    hypervisor.pause(domid)
    try:
        yield
    finally:
        hypervisor.unpause(domid)


@contextmanager
def standing_still(hypervisor: Hypervisor, domid: Domid) -> Iterator[None]:
    """Keep a guest suspended and paused; it runs on afterwards whatever happens."""
    hypervisor.suspend(domid, SuspendLimits())
    try:
        with paused(hypervisor, domid):
            yield
    finally:
        hypervisor.resume(domid)
        hypervisor.tell_resumed(domid)


def assert_runs(hypervisor: Hypervisor, domid: Domid) -> None:
    """The guest is neither paused nor suspended nor ending."""
    info = hypervisor.domain(domid)
    assert not info.paused
    assert not info.dying
    assert info.shutdown is None
