"""Changing a PV domain's page tables through Xen's checks."""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Sequence
from typing import Final

from pgofflined.core.errors import XenError
from pgofflined.core.frames import PAGE_SHIFT, WORDS_PER_PAGE, Domid, Mfn
from pgofflined.ports import PteWrite
from pgofflined.xen.abi.xen import MMU_NORMAL_PT_UPDATE, HYPERVISOR_mmu_update, MmuUpdate
from pgofflined.xen.libs import XenCall

# 8 KiB of requests: two pages of buffer, and a short hypercall.
_BATCH: Final = 512
# Bits 31:16 of mmu_update's foreigndom name the page table's owner plus one; 0 would mean the
# caller (do_mmu_update in arch/x86/mm.c, since c6b8bdfe3b, 2009).
_PT_OWNER_SHIFT: Final = 16


class PageTables:
    """``ports.PageTableControl`` over mmu_update."""

    def __init__(self, call: XenCall) -> None:
        self._call = call

    def update_ptes(self, domid: Domid, writes: Sequence[PteWrite]) -> None:
        """Set entries in order; the tables and the frames they name are the domain's.

        The caller has paused the domain, since nothing flushes stale translations of a running
        one, and has seen that each table is one: into a frame that is no page table Xen writes the
        value as plain data (seen on 4.20), and that is no error.

        Raises XenError with ``done``, and with the table whose entry was refused.
        """
        for write in writes:
            if not 0 <= write.index < WORDS_PER_PAGE:
                raise XenError(errno.EINVAL, op="mmu_update", domid=domid, mfn=write.table)
        for start in range(0, len(writes), _BATCH):
            self._update(domid, writes[start : start + _BATCH], before=start)

    def _update(self, domid: Domid, writes: Sequence[PteWrite], *, before: int) -> None:
        size = ctypes.sizeof(MmuUpdate) * len(writes)
        with self._call.buffer(size) as address, self._call.buffer(4) as done_address:
            requests = (MmuUpdate * len(writes)).from_address(address)
            for request, write in zip(requests, writes, strict=True):
                request.ptr = (write.table << PAGE_SHIFT) | write.index * 8 | MMU_NORMAL_PT_UPDATE
                request.val = write.value
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
                    mfn=Mfn(writes[count].table),
                    done=before + count,
                ) from error
