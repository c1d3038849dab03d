"""XENMEM_exchange.  Loads numpy; imported when needed."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import numpy as np

from pgofflined.core.errors import DomainGone, PortError, XenError
from pgofflined.core.frames import Domid, Mfn
from pgofflined.ports import Swapped
from pgofflined.xen.abi.memory import MemoryExchange, MemoryReservation, XENMEM_exchange
from pgofflined.xen.abi.xen import HYPERVISOR_memory_op
from pgofflined.xen.libs import XenCall

if TYPE_CHECKING:
    from pgofflined.ports import FrameArray


class Exchange:
    """``ports.FrameExchange`` over memory_op."""

    def __init__(self, call: XenCall) -> None:
        self._call = call

    def exchange(self, domid: Domid, mfns: FrameArray, pfns: FrameArray) -> Swapped:
        """Swap frames of a PV domain for fresh ones, which the M2P then notes at ``pfns``.

        Xen takes them one after the other (extents of one frame) and stops at the first that it
        refuses.  Errors of the answer: XenError with EINVAL when anything but the allocation itself
        refers to the frame, ENOMEM when no frame is free.  The frame has not changed then, save
        that after ENOMEM Xen may have forgotten the offline mark (it hands the frame back with its
        flags reset), so query again.  DomainGone when the domain was dying; its frame went with it.
        PortError when the answer contradicts itself: whether the exchange happened is then to be
        found out by asking (page type, M2P), not to be assumed.
        """
        if not len(mfns):
            return Swapped(new=np.empty(0, dtype=np.uint64))
        with (
            self._call.buffer(mfns.nbytes) as in_address,
            self._call.buffer(pfns.nbytes) as out_address,
            self._call.struct(MemoryExchange) as request,
        ):
            _put(in_address, mfns)
            # An input as well: what the M2P will say of the new frames (memory.h, XENMEM_exchange).
            _put(out_address, pfns)
            _fill(request.in_, in_address, len(mfns), domid)
            _fill(request.out, out_address, len(mfns), domid)
            refused: XenError | None = None
            try:
                self._call.hypercall(
                    HYPERVISOR_memory_op,
                    XENMEM_exchange,
                    ctypes.addressof(request),
                    op="memory_exchange",
                    domid=domid,
                )
            except XenError as error:
                refused = error
            done = request.nr_exchanged
            answer = np.frombuffer(ctypes.string_at(out_address, mfns.nbytes), dtype=np.uint64)
        return _answer(domid, mfns, answer, done, refused)


def _answer(
    domid: Domid, mfns: FrameArray, answer: FrameArray, done: int, refused: XenError | None
) -> Swapped:
    if done > len(mfns) or (refused is not None and done == len(mfns)):
        contradiction = PortError(
            f"memory_exchange of {len(mfns)} frames of d{domid} from mfn {int(mfns[0]):#x} on "
            f"counted {done}"
        )
        return Swapped(new=answer[:0], error=contradiction)
    new = answer[:done].copy()
    same = np.flatnonzero(new == mfns[:done])
    if len(same):
        first = int(same[0])
        error = PortError(f"memory_exchange gave mfn {int(new[first]):#x} of d{domid} for itself")
        return Swapped(new=new[:first], error=error)
    if done == len(mfns):
        return Swapped(new=new)
    if refused is None:
        # Success without an exchange: the new frame could not be given to a dying domain
        # (memory_exchange in common/memory.c, label dying).
        return Swapped(new=new, error=DomainGone(domid))
    mfn = Mfn(int(mfns[done]))
    return Swapped(
        new=new, error=XenError(refused.errno, op=refused.op, domid=domid, mfn=mfn, done=done)
    )


def _put(address: int, frames: FrameArray) -> None:
    plain = np.ascontiguousarray(frames, dtype=np.uint64)
    ctypes.memmove(address, plain.ctypes.data, plain.nbytes)


def _fill(reservation: MemoryReservation, address: int, extents: int, domid: Domid) -> None:
    reservation.extent_start = address
    reservation.nr_extents = extents
    reservation.extent_order = 0
    reservation.domid = domid
