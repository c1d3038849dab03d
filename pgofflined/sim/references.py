"""Reference and type counts, and the validation of page tables that they rest on.

Follows get_page(), get_page_type(), promote_l*_table() and mod_l*_entry() of
xen/arch/x86/mm.c: a table of level n holds one reference to every frame that it names while it is
validated, a writable one where an L1 entry allows writing, and a frame is a table or writable,
never both.
"""

from __future__ import annotations

from errno import EBUSY, EINVAL, EPERM, ERESTART
from typing import TYPE_CHECKING, Final

import numpy as np

from pgofflined.core.frames import DOM0, PAGE_SHIFT
from pgofflined.core.pages import L4_XEN_SLOTS, PTE_ADDR_MASK, PTE_PRESENT, PTE_PSE, PTE_RW
from pgofflined.sim.errors import Refused
from pgofflined.sim.frames import Frames, FrameType

if TYPE_CHECKING:
    from collections.abc import Callable

    from pgofflined.ports import Words

PTE_USER: Final = 1 << 2
PTE_ACCESSED: Final = 1 << 5
PTE_DIRTY: Final = 1 << 6
PTE_GLOBAL: Final = 1 << 8
# _PAGE_GUEST_KERNEL, asm/x86_64/page.h: Xen's note that a guest's kernel entry had no USER bit.
PTE_GUEST_KERNEL: Final = 1 << 52
PTE_NX: Final = 1 << 63

# base_disallow_mask of init (xen/arch/x86/mm.c): PWT, PCD, PSE/PAT and GLOBAL; L1 may be GLOBAL.
_DISALLOW_UPPER: Final = 0x198
_DISALLOW_L1: Final = _DISALLOW_UPPER & ~PTE_GLOBAL
# __PAGE_HYPERVISOR_RW with NX, as in slot 258 of every L4.
_XEN_SLOT_FLAGS: Final = PTE_NX | PTE_DIRTY | PTE_ACCESSED | PTE_RW | PTE_PRESENT
_SELF_MAP_SLOT: Final = 258
# FASTPATH_FLAG_WHITELIST: NX, the software bits, GLOBAL, DIRTY, ACCESSED and USER.
_UNCHECKED_FLAGS: Final = (
    PTE_NX | 0x7FF << 52 | 0xE00 | PTE_GLOBAL | PTE_DIRTY | PTE_ACCESSED | PTE_USER
)

_PRESENT = np.uint64(PTE_PRESENT)
_RW = np.uint64(PTE_RW)
_ADDR = np.uint64(PTE_ADDR_MASK)
_SHIFT = np.uint64(PAGE_SHIFT)


def target_of(entry: int) -> int:
    """The frame that an entry names."""
    return (entry & PTE_ADDR_MASK) >> PAGE_SHIFT


def adjust_l1(entries: Words) -> Words:
    """What Xen makes of a 64-bit guest's L1 entries (adjust_guest_l1e, xen/arch/x86/pv/mm.h)."""
    present = (entries & _PRESENT) != 0
    kernel = present & ((entries & np.uint64(PTE_USER)) == 0)
    adjusted: Words = np.where(kernel, entries | np.uint64(PTE_USER | PTE_GUEST_KERNEL), entries)
    user = present & ((adjusted & np.uint64(PTE_GUEST_KERNEL)) == 0)
    return np.where(user, adjusted | np.uint64(PTE_GLOBAL), adjusted)


def adjust_entry(entry: int, level: int) -> int:
    """``adjust_l1`` for one entry of any level; upper ones only gain USER."""
    if not entry & PTE_PRESENT:
        return entry
    if level > 1:
        return entry | PTE_USER
    return int(adjust_l1(np.array([entry], dtype=np.uint64))[0])


def check_flags(entry: int, level: int) -> None:
    """Refuse the flags that no present entry of a guest may have."""
    if entry & (_DISALLOW_L1 if level == 1 else _DISALLOW_UPPER):
        raise Refused(EINVAL)


def needs_no_check(old: int, new: int) -> bool:
    """Whether Xen takes a changed entry as it is (the fast path of mod_l*_entry).

    So an entry that maps another domain's frame by grant can be written again as it was, although
    it could not be made anew.
    """
    return bool(old & new & PTE_PRESENT) and not (old ^ new) & ~_UNCHECKED_FLAGS


class References:
    """Takes and drops references; ``crash`` is called with a domid and the reason."""

    def __init__(self, frames: Frames, *, l1tf: bool, crash: Callable[[int, str], None]) -> None:
        self._frames = frames
        self._l1tf = l1tf
        self._crash = crash
        self.external: set[int] = set()
        self.dying: set[int] = set()

    def get(self, mfn: int, owner: int) -> None:
        """Take a reference to a frame of ``owner``.  Refuses with EINVAL."""
        frames = self._frames
        if not frames.valid(mfn) or frames.owner[mfn] != owner or frames.refs[mfn] == 0:
            raise Refused(EINVAL)
        frames.refs[mfn] += 1

    def put(self, mfn: int) -> None:
        """Drop a reference; the last one frees the frame.

        free_domheap_pages() leaves the frame unscrubbed while its owner lives.
        """
        frames = self._frames
        frames.refs[mfn] -= 1
        if frames.refs[mfn] == 0:
            frames.release(mfn, dirty=int(frames.owner[mfn]) in self.dying)

    def get_type(self, mfn: int, wanted: FrameType) -> None:
        """Take a type reference, validating a table first.  Refuses with EINVAL or its reason."""
        frames = self._frames
        if frames.type_refs[mfn] > 0:
            if frames.type[mfn] != wanted:
                raise Refused(EINVAL)
            frames.type_refs[mfn] += 1
            return
        frames.type[mfn] = wanted
        frames.type_refs[mfn] = 1
        try:
            if wanted.is_table:
                self._promote(mfn, int(wanted))
        except Refused:
            frames.type_refs[mfn] = 0
            frames.type[mfn] = FrameType.NONE
            frames.validated[mfn] = False
            raise
        frames.validated[mfn] = True

    def put_type(self, mfn: int) -> None:
        """Drop a type reference; a table that loses its last one lets go of what it names."""
        frames = self._frames
        frames.type_refs[mfn] -= 1
        kind = FrameType(int(frames.type[mfn]))
        if frames.type_refs[mfn] == 0 and kind.is_table:
            frames.validated[mfn] = False
            self._demote(mfn, int(kind))

    def get_both(self, mfn: int, owner: int, wanted: FrameType) -> None:
        """Take a reference and a type reference."""
        self.get(mfn, owner)
        try:
            self.get_type(mfn, wanted)
        except Refused:
            self.put(mfn)
            raise

    def put_both(self, mfn: int) -> None:
        """Drop a type reference and a reference."""
        self.put_type(mfn)
        self.put(mfn)

    def pin(self, mfn: int, owner: int, level: int) -> None:
        """MMUEXT_PIN_L*_TABLE."""
        if self._frames.pinned[mfn]:
            raise Refused(EINVAL)
        self.get_both(mfn, owner, FrameType(level))
        self._frames.pinned[mfn] = True

    def unpin(self, mfn: int) -> None:
        """MMUEXT_UNPIN_TABLE."""
        if not self._frames.pinned[mfn]:
            raise Refused(EINVAL)
        self._frames.pinned[mfn] = False
        self.put_both(mfn)

    def take_entry(self, entry: int, level: int, domid: int) -> None:
        """Take what a present entry of a validated table refers to."""
        check_flags(entry, level)
        mfn = target_of(entry)
        if level > 1:
            self.get_both(mfn, domid, FrameType(level - 1))
            return
        frames = self._frames
        if not frames.valid(mfn) or not frames.ram[mfn]:
            # get_page_from_l1e(): the domains here have no I/O memory.
            raise Refused(EPERM)
        try:
            self.get(mfn, domid)
            if entry & PTE_RW:
                self._get_writable_or_put(mfn)
        except Refused:
            # "could_not_pin" of get_page_from_l1e().
            raise Refused(EBUSY) from None

    def drop_entry(self, entry: int, level: int, domid: int) -> None:
        """Let go of what a present entry of a validated table refers to."""
        mfn = target_of(entry)
        if level > 1 or (entry & PTE_RW and not self._foreign_external(mfn, domid)):
            self.put_both(mfn)
        else:
            self.put(mfn)

    def check_l1tf(self, entries: Words, level: int, domid: int) -> None:
        """pv_l1tf_check_pte() without shadow paging: an unsafe non-present entry is fatal."""
        if not self._l1tf or domid == DOM0:
            return
        absent = entries[(entries & _PRESENT) == 0]
        address = absent & _ADDR
        unsafe = (address != 0) & (address < np.uint64(self._frames.count << PAGE_SHIFT))
        if level > 1:
            unsafe |= (absent & np.uint64(PTE_PSE)) != 0
        if unsafe.any():
            entry = int(absent[unsafe][0])
            self._crash(domid, f"L1TF-vulnerable L{level}e {entry:#018x}")
            raise Refused(ERESTART)

    def _foreign_external(self, mfn: int, domid: int) -> bool:
        # get_page_from_l1e(): foreign writable mappings of HVM memory take no type.
        owner = int(self._frames.owner[mfn])
        return owner != domid and owner in self.external

    def _get_writable_or_put(self, mfn: int) -> None:
        try:
            self.get_type(mfn, FrameType.WRITABLE)
        except Refused:
            self.put(mfn)
            raise

    def _promote(self, mfn: int, level: int) -> None:
        if level == 1:
            self._promote_l1(mfn)
            return
        domid = int(self._frames.owner[mfn])
        entries = self._frames.contents.page(mfn).copy()
        guest = np.ones(len(entries), dtype=np.bool_)
        if level == FrameType.L4:
            guest[L4_XEN_SLOTS.start : L4_XEN_SLOTS.stop] = False
        self.check_l1tf(entries[guest], level, domid)
        taken: list[int] = []
        try:
            for index in np.flatnonzero(guest & ((entries & _PRESENT) != 0)).tolist():
                entry = adjust_entry(int(entries[index]), level)
                self.take_entry(entry, level, domid)
                taken.append(entry)
                entries[index] = entry
        except Refused:
            for entry in taken:
                self.drop_entry(entry, level, domid)
            raise
        if level == FrameType.L4:
            self._set_xen_slots(mfn, entries)
        self._frames.contents.write(mfn, 0, entries)

    def _set_xen_slots(self, mfn: int, entries: Words) -> None:
        """init_xen_l4_slots(): Xen's own tables (frames of its image here) and the self map."""
        image = np.flatnonzero(self._frames.image)
        for slot in L4_XEN_SLOTS:
            target = mfn
            if slot != _SELF_MAP_SLOT:
                target = int(image[slot % len(image)]) if len(image) else 0
            entries[slot] = np.uint64(target << PAGE_SHIFT | _XEN_SLOT_FLAGS)

    def _promote_l1(self, mfn: int) -> None:
        frames = self._frames
        domid = int(frames.owner[mfn])
        entries = frames.contents.page(mfn)
        self.check_l1tf(entries, 1, domid)
        present = entries[(entries & _PRESENT) != 0]
        if (present & np.uint64(_DISALLOW_L1)).any():
            raise Refused(EINVAL)
        targets = ((present & _ADDR) >> _SHIFT).astype(np.int64)
        if (targets >= frames.count).any() or not frames.ram[targets].all():
            raise Refused(EPERM)
        writable = targets[(present & _RW) != 0]
        if (
            (frames.owner[targets] != domid).any()
            or (frames.refs[targets] == 0).any()
            or (
                (frames.type_refs[writable] > 0) & (frames.type[writable] != FrameType.WRITABLE)
            ).any()
        ):
            raise Refused(EBUSY)
        np.add.at(frames.refs, targets, 1)
        np.add.at(frames.type_refs, writable, 1)
        frames.type[writable] = FrameType.WRITABLE
        frames.validated[writable] = True
        entries[:] = adjust_l1(entries)

    def _demote(self, mfn: int, level: int) -> None:
        frames = self._frames
        domid = int(frames.owner[mfn])
        entries = frames.contents.page(mfn)
        present = (entries & _PRESENT) != 0
        if level == FrameType.L4:
            present[L4_XEN_SLOTS.start : L4_XEN_SLOTS.stop] = False
        chosen = entries[present]
        if level == 1:
            own = frames.owner[((chosen & _ADDR) >> _SHIFT).astype(np.int64)] == domid
            self._drop_own_l1(chosen[own])
            chosen = chosen[~own]
        for entry in chosen.tolist():
            self.drop_entry(entry, level, domid)

    def _drop_own_l1(self, entries: Words) -> None:
        frames = self._frames
        targets = ((entries & _ADDR) >> _SHIFT).astype(np.int64)
        np.subtract.at(frames.type_refs, targets[(entries & _RW) != 0], 1)
        np.subtract.at(frames.refs, targets, 1)
        for mfn in np.unique(targets[frames.refs[targets] == 0]).tolist():
            frames.release(mfn, dirty=int(frames.owner[mfn]) in self.dying)
