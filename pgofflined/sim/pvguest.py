"""A simulated PV guest at work: what it sees of its memory, and what it does around a suspend."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from pgofflined.core.frames import PAGE_SHIFT, WORDS_PER_PAGE, Mfn, Pfn
from pgofflined.core.pages import MFN_BITS, PTE_RW
from pgofflined.sim import linux
from pgofflined.sim.frames import FrameType
from pgofflined.sim.layout import P2M_MISSING, VMALLOC, Process, PvLayout
from pgofflined.sim.pagetables import mapped_frames, walk
from pgofflined.sim.references import target_of

if TYPE_CHECKING:
    from pgofflined.ports import FrameArray
    from pgofflined.sim.frames import Frames
    from pgofflined.sim.guests import SimulatedDomain
    from pgofflined.sim.references import References

_MFN_LIMIT: Final = np.uint64(1 << MFN_BITS)


class PvGuest:
    """The kernel of one PV guest.  All it knows it reads from its own memory, as a guest does."""

    def __init__(
        self, *, layout: PvLayout, frames: Frames, references: References, domain: SimulatedDomain
    ) -> None:
        self.layout = layout
        self._frames = frames
        self._references = references
        self._domain = domain
        self._pinned_for_suspend: list[Process] = []

    @property
    def root(self) -> Mfn:
        """The L4 in vCPU 0's CR3: what its kernel accesses go through."""
        return next(hold.mfn for hold in self._domain.holds if hold.why == linux.VCPU0_ROOT)

    def p2m(self) -> FrameArray:
        """The whole p2m list as the guest reads it: raw entries by pfn."""
        # By variables of its own (xen_p2m_addr, xen_max_p2m_pfn), whatever it has published.
        number = self.layout.max_pfn // WORDS_PER_PAGE
        pages = mapped_frames(self._frames.contents, self.root, VMALLOC, number)
        return self._frames.contents.read(pages).reshape(-1)

    def mfns(self) -> FrameArray:
        """Frames by pfn, ~0 where the p2m has no frame of the guest's own."""
        entries = self.p2m()
        entries[entries >= _MFN_LIMIT] = P2M_MISSING
        return entries

    def mfn(self, pfn: int) -> Mfn:
        """The frame of one pfn."""
        return Mfn(int(self.p2m()[pfn]))

    def write(self, address: int, word: int) -> None:
        """Store a word at a virtual address of the kernel.  Raises PageFault."""
        slot = walk(self._frames.contents, self.root, address)
        self._frames.contents.write(
            target_of(slot.entry), (address & 0xFFF) // 8, np.array([word], dtype=np.uint64)
        )

    def before_suspend(self) -> None:
        """xen_pre_suspend and xen_mm_pin_all of Linux: every table pinned, start_info with pfns."""
        mfns = self.mfns()
        domid = int(self._domain.domid)
        for process in self.layout.processes:
            if self._frames.pinned[int(mfns[process.kernel_root])]:
                continue
            self._pinned_for_suspend.append(process)
            for pfn in process.tables:
                self._protect(pfn, mfns)
            self._references.pin(int(mfns[process.upper[2]]), domid, 1)
            self._references.pin(int(mfns[process.kernel_root]), domid, 4)
            self._references.pin(int(mfns[process.user_root]), domid, 4)
        start = self._frames.contents.page(int(mfns[self.layout.start_info]))
        for word in (linux.START_INFO_STORE, linux.START_INFO_CONSOLE):
            start[word] = self._frames.m2p[int(start[word])]

    def after_resume(self) -> None:
        """xen_post_suspend and xen_mm_unpin_all of Linux after a cancelled suspend."""
        mfns = self.mfns()
        while self._pinned_for_suspend:
            process = self._pinned_for_suspend.pop()
            for root in (process.upper[2], process.kernel_root, process.user_root):
                self._references.unpin(int(mfns[root]))
            for pfn in process.tables:
                self._unprotect(pfn, mfns)
        start = self._frames.contents.page(int(mfns[self.layout.start_info]))
        for word in (linux.START_INFO_STORE, linux.START_INFO_CONSOLE):
            start[word] = mfns[int(start[word])]
        linux.write_frame_lists(self._frames, self.layout, mfns)
        shared = self._frames.contents.page(self._domain.shared_info)
        shared[linux.ARCH_FRAME_LIST_LIST] = mfns[self.layout.p2m_top]
        shared[linux.ARCH_P2M_CR3] = int(mfns[self.layout.root]) << PAGE_SHIFT

    def lie(self, pfn: int, entry: int) -> None:
        """Put any value into the p2m list, as a hostile guest may."""
        vaddr = VMALLOC + (pfn // WORDS_PER_PAGE << PAGE_SHIFT)
        page = int(mapped_frames(self._frames.contents, self.root, vaddr, 1)[0])
        self._frames.contents.write(page, pfn % WORDS_PER_PAGE, np.array([entry], dtype=np.uint64))

    def set_shared_info(self, word: int, value: int) -> None:
        """Put any value into shared_info, as a hostile guest may; ``word`` is a linux.ARCH_*."""
        self._frames.contents.page(self._domain.shared_info)[word] = value

    def plain_pfns(self) -> tuple[Pfn, ...]:
        """Ordinary kernel data that nothing but the direct map refers to."""
        return tuple(Pfn(pfn) for pfn in self.layout.plain)

    def _protect(self, pfn: int, mfns: FrameArray) -> None:
        """Make a future table read-only in the direct map."""
        table = int(mfns[self.layout.direct_l1[pfn // WORDS_PER_PAGE]])
        page = self._frames.contents.page(table)
        entry = int(page[pfn % WORDS_PER_PAGE])
        if entry & PTE_RW:
            page[pfn % WORDS_PER_PAGE] = entry & ~PTE_RW
            self._references.put_type(target_of(entry))

    def _unprotect(self, pfn: int, mfns: FrameArray) -> None:
        """Make a page that is no table any more writable again in the direct map."""
        table = int(mfns[self.layout.direct_l1[pfn // WORDS_PER_PAGE]])
        page = self._frames.contents.page(table)
        entry = int(page[pfn % WORDS_PER_PAGE])
        self._references.get_type(target_of(entry), FrameType.WRITABLE)
        page[pfn % WORDS_PER_PAGE] = entry | PTE_RW
