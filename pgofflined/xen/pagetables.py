"""Changing a PV domain's page tables through Xen's checks.  Loads numpy; imported when needed."""

from __future__ import annotations

import ctypes
import errno
from typing import TYPE_CHECKING, Final

import numpy as np

from pgofflined.core.errors import XenError
from pgofflined.core.frames import PAGE_SHIFT, WORDS_PER_PAGE, Domid, Mfn
from pgofflined.core.moves import PteWrites
from pgofflined.xen.abi.xen import (
    MMU_NORMAL_PT_UPDATE,
    MMUEXT_PIN_L1_TABLE,
    MMUEXT_UNPIN_TABLE,
    HYPERVISOR_mmu_update,
    HYPERVISOR_mmuext_op,
)
from pgofflined.xen.libs import XenCall

if TYPE_CHECKING:
    from pgofflined.ports import FrameArray

# 64 KiB of requests.  Xen looks after each whether something more urgent has come up.
_BATCH: Final = 4096
# Bits 31:16 of mmu_update's foreigndom name the page table's owner plus one; 0 would mean the
# caller (do_mmu_update in arch/x86/mm.c, since c6b8bdfe3b, 2009).
_PT_OWNER_SHIFT: Final = 16
_ENTRY_SHIFT: Final = np.uint64(3)


class PageTables:
    """``ports.PageTableControl`` over mmu_update and mmuext_op."""

    def __init__(self, call: XenCall) -> None:
        self._call = call

    def update_ptes(self, domid: Domid, writes: PteWrites) -> None:
        """Set entries in order; the tables and the frames they name are the domain's.

        The caller has paused the domain, since nothing flushes stale translations of a running
        one, and has seen that each table is one: into a frame that is no page table Xen writes the
        value as plain data (seen on 4.20), and that is no error.

        Raises XenError with ``done``, and with the table whose entry was refused.
        """
        outside = np.flatnonzero(writes.indexes >= np.uint64(WORDS_PER_PAGE))
        if len(outside):
            table = Mfn(int(writes.tables[outside[0]]))
            raise XenError(errno.EINVAL, op="mmu_update", domid=domid, mfn=table)
        for start in range(0, len(writes), _BATCH):
            self._update(domid, writes[start : start + _BATCH], before=start)

    def _update(self, domid: Domid, writes: PteWrites, *, before: int) -> None:
        # An array of struct mmu_update: pairs of ptr and val.
        requests = np.empty((len(writes), 2), dtype=np.uint64)
        requests[:, 0] = (
            (writes.tables << np.uint64(PAGE_SHIFT))
            | (writes.indexes << _ENTRY_SHIFT)
            | np.uint64(MMU_NORMAL_PT_UPDATE)
        )
        requests[:, 1] = writes.values
        with self._call.buffer(requests.nbytes) as address, self._call.buffer(4) as done_address:
            ctypes.memmove(address, requests.ctypes.data, requests.nbytes)
            done = ctypes.c_uint32.from_address(done_address)
            try:
                self._call.hypercall(
                    HYPERVISOR_mmu_update,
                    address,
                    len(writes),
                    done_address,
                    domid | (domid + 1) << _PT_OWNER_SHIFT,
                    op="mmu_update",
                    domid=domid,
                )
            except XenError as error:
                count = min(done.value, len(writes) - 1)
                raise XenError(
                    error.errno,
                    op=error.op,
                    domid=domid,
                    mfn=Mfn(int(writes.tables[count])),
                    done=before + count,
                ) from error

    def pin_tables(self, domid: Domid, mfns: FrameArray, level: int) -> None:
        """Pin page tables of a level.  Raises XenError, EINVAL where one does not validate."""
        self._extended(domid, mfns, MMUEXT_PIN_L1_TABLE + level - 1, "mmuext_op(pin)")

    def unpin_tables(self, domid: Domid, mfns: FrameArray) -> None:
        """Unpin page tables.  Raises XenError, EINVAL where one is not pinned."""
        self._extended(domid, mfns, MMUEXT_UNPIN_TABLE, "mmuext_op(unpin)")

    def _extended(self, domid: Domid, mfns: FrameArray, command: int, op: str) -> None:
        if not len(mfns):
            return
        # An array of struct mmuext_op: cmd with padding, the frame, and what is not used.
        requests = np.zeros((len(mfns), 3), dtype=np.uint64)
        requests[:, 0] = command
        requests[:, 1] = mfns
        with self._call.buffer(requests.nbytes) as address, self._call.buffer(4) as done_address:
            ctypes.memmove(address, requests.ctypes.data, requests.nbytes)
            done = ctypes.c_uint32.from_address(done_address)
            try:
                self._call.hypercall(
                    HYPERVISOR_mmuext_op,
                    address,
                    len(mfns),
                    done_address,
                    # Unlike mmu_update it has one owner only, of the tables.
                    domid,
                    op=op,
                    domid=domid,
                )
            except XenError as error:
                count = min(done.value, len(mfns) - 1)
                mfn = Mfn(int(mfns[count]))
                raise XenError(error.errno, op=op, domid=domid, mfn=mfn, done=count) from error
