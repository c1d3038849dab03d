"""XENMEM_exchange of a single frame."""

from __future__ import annotations

import ctypes

from pgofflined.core.errors import DomainGone, PortError
from pgofflined.core.frames import Domid, Mfn, Pfn
from pgofflined.xen.abi.memory import MemoryExchange, MemoryReservation, XENMEM_exchange
from pgofflined.xen.abi.xen import HYPERVISOR_memory_op
from pgofflined.xen.libs import XenCall


class Exchange:
    """``ports.FrameExchange`` over memory_op."""

    def __init__(self, call: XenCall) -> None:
        self._call = call

    def exchange(self, domid: Domid, mfn: Mfn, pfn: Pfn) -> Mfn:
        """Swap a frame of a PV domain for a fresh one, which the M2P then notes at ``pfn``.

        Raises XenError: EINVAL when anything but the allocation itself refers to the frame, ENOMEM
        when no frame is free.  Nothing has changed then, save that after ENOMEM Xen may have
        forgotten the offline mark (it hands the frame back with its flags reset), so query again.
        Raises DomainGone when the domain was dying; its frame went with it.  Raises PortError when
        the answer contradicts itself: whether the exchange happened is then to be found out by
        asking (page type, M2P), not to be assumed.
        """
        with (
            self._call.buffer(8) as in_address,
            self._call.buffer(8) as out_address,
            self._call.struct(MemoryExchange) as request,
        ):
            frame_in = ctypes.c_uint64.from_address(in_address)
            frame_out = ctypes.c_uint64.from_address(out_address)
            frame_in.value = mfn
            # An input as well: what the M2P will say of the new frame (memory.h, XENMEM_exchange).
            frame_out.value = pfn
            _fill(request.in_, in_address, domid)
            _fill(request.out, out_address, domid)
            self._call.hypercall(
                HYPERVISOR_memory_op,
                XENMEM_exchange,
                ctypes.addressof(request),
                op="memory_exchange",
                domid=domid,
                mfn=mfn,
            )
            if request.nr_exchanged == 0:
                # Success without an exchange: the new frame could not be given to a dying domain
                # (memory_exchange in common/memory.c, label dying).
                raise DomainGone(domid)
            if request.nr_exchanged != 1 or int(frame_out.value) == mfn:
                raise PortError(
                    f"memory_exchange of mfn {mfn:#x} of d{domid} counted {request.nr_exchanged} "
                    f"frames and gave {frame_out.value:#x}"
                )
            return Mfn(frame_out.value)


def _fill(reservation: MemoryReservation, address: int, domid: Domid) -> None:
    reservation.extent_start = address
    reservation.nr_extents = 1
    reservation.extent_order = 0
    reservation.domid = domid
