"""Builds a Linux-like PV guest: contents of its page tables, p2m list and special pages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from pgofflined.core.frames import DOM0, PAGE_SHIFT, WORDS_PER_PAGE, Mfn, Pfn
from pgofflined.core.pages import PTE_PRESENT, PTE_RW
from pgofflined.sim.frames import FrameType
from pgofflined.sim.guests import Grant, Hold, SimulatedDomain
from pgofflined.sim.layout import (
    DIRECT_MAP,
    FIXMAP,
    KERNEL_TEXT,
    P2M_FOREIGN,
    P2M_IDENTITY,
    P2M_MISSING,
    USER,
    VMALLOC,
    Process,
    PvLayout,
)
from pgofflined.sim.pagetables import table_index
from pgofflined.sim.references import PTE_ACCESSED, PTE_DIRTY, PTE_NX, PTE_USER, adjust_l1

if TYPE_CHECKING:
    from pgofflined.ports import FrameArray, Words
    from pgofflined.sim.frames import Frames
    from pgofflined.sim.references import References

_READ: Final = PTE_PRESENT | PTE_ACCESSED
_WRITE: Final = _READ | PTE_RW | PTE_DIRTY
_TABLE: Final = _WRITE | PTE_USER
_KERNEL_RW: Final = _WRITE | PTE_NX
_KERNEL_RO: Final = _READ | PTE_NX
_USER_RW: Final = _WRITE | PTE_USER | PTE_NX
_USER_RO: Final = _READ | PTE_USER | PTE_NX

# struct start_info, xen/include/public/xen.h, in words.
START_INFO_NR_PAGES: Final = 4
START_INFO_SHARED_INFO: Final = 5
START_INFO_STORE: Final = 7
START_INFO_CONSOLE: Final = 9
# struct arch_shared_info at byte 3088 of shared_info, in words.
ARCH_MAX_PFN: Final = 3088 // 8
ARCH_FRAME_LIST_LIST: Final = ARCH_MAX_PFN + 1
ARCH_P2M_CR3: Final = ARCH_MAX_PFN + 3
ARCH_P2M_VADDR: Final = ARCH_MAX_PFN + 4
ARCH_P2M_GENERATION: Final = ARCH_MAX_PFN + 5

VCPU0_ROOT: Final = "vcpu 0 guest_table"


class LinuxBuilder:
    """Writes one guest into frames that it owns already; ``mfns`` gives its frames by pfn.

    ``mfns`` has ~0 where nothing is.  ``foreign`` are frames of another domain that the guest
    has mapped by grant at its foreign pfns.
    """

    def __init__(
        self,
        *,
        layout: PvLayout,
        mfns: FrameArray,
        foreign: FrameArray,
        frames: Frames,
        references: References,
        domain: SimulatedDomain,
    ) -> None:
        self._layout = layout
        self._mfns = mfns
        self._foreign = foreign
        self._frames = frames
        self._references = references
        self._domain = domain

    def build(self) -> None:
        """Write everything, then have Xen validate and pin as a booted Linux does."""
        self._write_p2m()
        self._write_direct_map()
        self._write_list_map()
        self._write_text_map()
        kernel = self._kernel_slots()
        self._frames.contents.write(self._mfn(self._layout.root), 0, kernel)
        for process in self._layout.processes:
            self._write_process(process, kernel)
        self._write_special_pages()
        self._validate()
        self._map_foreign()
        self._hold()
        self._grant()

    def _mfn(self, pfn: int) -> int:
        return int(self._mfns[pfn])

    def _entries(self, pfns: tuple[int, ...], flags: int) -> Words:
        mfns = self._mfns[np.array(pfns, dtype=np.int64)]
        return (mfns << np.uint64(PAGE_SHIFT)) | np.uint64(flags)

    def _put(self, table: int, index: int, pfn: int, flags: int = _TABLE) -> None:
        self._frames.contents.write(self._mfn(table), index, self._entries((pfn,), flags))

    def _clear(self, *tables: int) -> None:
        mfns = self._mfns[np.array(tables, dtype=np.int64)]
        self._frames.contents.fill(mfns, np.zeros(len(mfns), dtype=np.uint64))

    def _write_p2m(self) -> None:
        layout, contents = self._layout, self._frames.contents
        entries = self._mfns.copy()
        for pfn in layout.identity:
            entries[pfn] = pfn | P2M_IDENTITY
        for pfn, mfn in zip(layout.foreign, self._foreign.tolist(), strict=True):
            entries[pfn] = mfn | P2M_FOREIGN
        lists = entries.reshape(-1, WORDS_PER_PAGE)
        for chunk, pfn in enumerate(layout.p2m_list):
            contents.write(self._mfn(pfn), 0, lists[chunk])
        # The two shared pages at the end: p2m_missing and p2m_identity of Linux.
        missing, identity = layout.p2m_list[-2:]
        contents.write(self._mfn(missing), 0, np.full(512, P2M_MISSING, dtype=np.uint64))
        contents.write(
            self._mfn(identity),
            0,
            np.arange(512, dtype=np.uint64) | np.uint64(P2M_IDENTITY),
        )
        write_frame_lists(self._frames, layout, self._mfns)

    def _write_direct_map(self) -> None:
        layout = self._layout
        self._clear(layout.direct_l3, *layout.direct_l2, *layout.direct_l1)
        # Linux maps page tables, the GDT and its text read-only in the direct map.
        late = layout.processes[-1:] if layout.spec.late_process else ()
        writable_tables = {pfn for process in late for pfn in process.tables}
        read_only = {*layout.all_tables, *layout.gdt, *layout.text} - writable_tables
        flags = np.full(len(self._mfns), _KERNEL_RW, dtype=np.uint64)
        flags[sorted(read_only)] = _KERNEL_RO
        words = (self._mfns << np.uint64(PAGE_SHIFT)) | flags
        words[self._mfns == np.uint64(P2M_MISSING)] = 0
        for chunk, table in enumerate(layout.direct_l1):
            page = words[chunk * WORDS_PER_PAGE : (chunk + 1) * WORDS_PER_PAGE]
            self._frames.contents.write(self._mfn(table), 0, page)
            self._put(layout.direct_l2[chunk // WORDS_PER_PAGE], chunk % WORDS_PER_PAGE, table)
        for index, table in enumerate(layout.direct_l2):
            self._put(layout.direct_l3, index, table)

    def _write_list_map(self) -> None:
        layout = self._layout
        third, second = layout.list_upper
        self._clear(third, second, *layout.list_l1)
        self._put(third, table_index(VMALLOC, 3), second)
        for chunk, pfn in enumerate(layout.p2m_list):
            shared = chunk >= len(layout.p2m_list) - 2
            table = layout.list_l1[chunk // WORDS_PER_PAGE]
            self._put(table, chunk % WORDS_PER_PAGE, pfn, _KERNEL_RO if shared else _KERNEL_RW)
        for index, table in enumerate(layout.list_l1):
            self._put(second, table_index(VMALLOC, 2) + index, table)

    def _write_text_map(self) -> None:
        layout = self._layout
        third, second, first = layout.text_upper
        self._clear(third, second, first, layout.fixmap_l1)
        self._put(third, table_index(KERNEL_TEXT, 3), second)
        self._put(second, table_index(KERNEL_TEXT, 2), first)
        self._put(second, table_index(FIXMAP, 2), layout.fixmap_l1)
        contents = self._frames.contents
        contents.write(self._mfn(first), 0, self._entries(layout.text, _READ))
        shared_info = np.array(
            [(self._domain.shared_info << PAGE_SHIFT) | _KERNEL_RW], dtype=np.uint64
        )
        contents.write(self._mfn(layout.fixmap_l1), table_index(FIXMAP, 1), shared_info)

    def _kernel_slots(self) -> Words:
        layout = self._layout
        slots = np.zeros(WORDS_PER_PAGE, dtype=np.uint64)
        for address, third in (
            (DIRECT_MAP, layout.direct_l3),
            (VMALLOC, layout.list_upper[0]),
            (KERNEL_TEXT, layout.text_upper[0]),
        ):
            slots[table_index(address, 4)] = self._entries((third,), _TABLE)[0]
        return slots

    def _write_process(self, process: Process, kernel: Words) -> None:
        contents = self._frames.contents
        third, second, first = process.upper
        self._clear(process.user_root, third, second, first)
        contents.write(self._mfn(process.kernel_root), 0, kernel)
        for root in (process.kernel_root, process.user_root):
            self._put(root, table_index(USER, 4), third)
        self._put(third, table_index(USER, 3), second)
        self._put(second, table_index(USER, 2), first)
        # Pages that processes share are copy-on-write: read-only in each.
        number = min(4, len(process.pages))
        shared, own = process.pages[:number], process.pages[number:]
        table = self._mfn(first)
        index = table_index(USER, 1)
        contents.write(table, index, adjust_l1(self._entries(shared, _USER_RO)))
        contents.write(table, index + number, adjust_l1(self._entries(own, _USER_RW)))

    def _write_special_pages(self) -> None:
        layout, contents = self._layout, self._frames.contents
        start = contents.page(self._mfn(layout.start_info))
        start[:] = 0
        start[START_INFO_NR_PAGES] = len(layout.populated)
        start[START_INFO_SHARED_INFO] = self._domain.shared_info << PAGE_SHIFT
        start[START_INFO_STORE] = self._mfn(layout.xenstore)
        start[START_INFO_CONSOLE] = self._mfn(layout.console)
        shared = contents.page(self._domain.shared_info)
        shared[:] = 0
        shared[ARCH_MAX_PFN] = layout.max_pfn
        shared[ARCH_FRAME_LIST_LIST] = self._mfn(layout.p2m_top)
        shared[ARCH_P2M_CR3] = self._mfn(layout.root) << PAGE_SHIFT
        shared[ARCH_P2M_VADDR] = VMALLOC

    def _validate(self) -> None:
        layout, domid = self._layout, int(self._domain.domid)
        self._references.pin(self._mfn(layout.root), domid, 4)
        late = 1 if layout.spec.late_process else 0
        for process in layout.processes[: len(layout.processes) - late]:
            # With split page-table locks Linux pins the L1s on their own as well (xen_pin_page).
            self._references.pin(self._mfn(process.upper[2]), domid, 1)
            self._references.pin(self._mfn(process.kernel_root), domid, 4)
            self._references.pin(self._mfn(process.user_root), domid, 4)

    def _map_foreign(self) -> None:
        """GNTTABOP_map_grant_ref at the direct map's entries of the foreign pfns."""
        layout = self._layout
        for pfn, mfn in zip(layout.foreign, self._foreign.tolist(), strict=True):
            owner = int(self._frames.owner[mfn])
            self._references.get_both(mfn, owner, FrameType.WRITABLE)
            entry = (mfn << PAGE_SHIFT) | _KERNEL_RW | PTE_USER | (1 << 52)
            table = self._mfn(layout.direct_l1[pfn // WORDS_PER_PAGE])
            word = np.array([entry], dtype=np.uint64)
            self._frames.contents.write(table, pfn % WORDS_PER_PAGE, word)

    def _hold(self) -> None:
        layout, domain = self._layout, self._domain
        # Linux runs the init process's tables on vCPUs without a process of their own.
        pinned = layout.processes[: len(layout.processes) - int(layout.spec.late_process)]
        for vcpu in range(layout.spec.vcpus):
            roots = {"guest_table": layout.root}
            if pinned:
                process = pinned[vcpu % len(pinned)]
                roots = {
                    "guest_table": process.kernel_root,
                    "guest_table_user": process.user_root,
                }
            for why, root in roots.items():
                self._add_hold(root, f"vcpu {vcpu} {why}", FrameType.L4)
            self._add_hold(layout.gdt[vcpu], f"vcpu {vcpu} GDT", FrameType.SEG_DESC)
            self._add_hold(layout.vcpu_info[vcpu], f"vcpu {vcpu} vcpu_info", FrameType.WRITABLE)
        domain.tot_pages = len(layout.populated)

    def _grant(self) -> None:
        for pfn, user in ((self._layout.console, "console"), (self._layout.xenstore, "xenstore")):
            hold = self._add_hold(pfn, f"{user} ring mapped by d0", FrameType.WRITABLE)
            self._domain.grants.append(Grant(pfn=Pfn(pfn), to=DOM0, mapping=hold))

    def _add_hold(self, pfn: int, why: str, kind: FrameType) -> Hold:
        mfn = self._mfn(pfn)
        self._references.get_both(mfn, int(self._domain.domid), kind)
        hold = Hold(mfn=Mfn(mfn), why=why, kind=kind)
        self._domain.holds.append(hold)
        return hold


def write_frame_lists(frames: Frames, layout: PvLayout, mfns: FrameArray) -> None:
    """The three-level frame list that tools may use instead of the mapped p2m list.

    Linux rebuilds it after every resume (xen_build_mfn_list_list, arch/x86/xen/p2m.c).
    """
    lists = mfns[np.array(layout.p2m_list, dtype=np.int64)]
    for index, pfn in enumerate(layout.p2m_mid):
        part = lists[index * WORDS_PER_PAGE : (index + 1) * WORDS_PER_PAGE]
        page = frames.contents.page(int(mfns[pfn]))
        page[:] = mfns[layout.p2m_list[-2]]
        page[: len(part)] = part
    top = frames.contents.page(int(mfns[layout.p2m_top]))
    top[:] = mfns[layout.p2m_mid[-1]]
    top[: len(layout.p2m_mid)] = mfns[np.array(layout.p2m_mid, dtype=np.int64)]
