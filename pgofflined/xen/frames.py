"""State of host frames: version, memory figures, offline states, M2P."""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final, TypeVar

from pgofflined.core.errors import PortError, XenError
from pgofflined.core.frames import PAGE_SHIFT, PAGE_SIZE, Domid, Mfn, Pfn
from pgofflined.core.offline import (
    NOT_HANDLED,
    OfflineFlag,
    OfflineReply,
    OfflineState,
    OnlineFlag,
    decode_offline,
    decode_online,
    decode_query,
)
from pgofflined.core.xenversion import XenVersion
from pgofflined.xen.abi.memory import (
    MachphysMfnList,
    XENMEM_machphys_mfn_list,
    XENMEM_maximum_ram_page,
)
from pgofflined.xen.abi.sysctl import (
    PageOfflineOp,
    Physinfo,
    PhysinfoBefore417,
    XEN_SYSCTL_page_offline_op,
    XEN_SYSCTL_physinfo,
    sysctl_page_offline,
    sysctl_page_online,
    sysctl_query_page_offline,
)
from pgofflined.xen.abi.xen import DOMID_XEN, HYPERVISOR_memory_op
from pgofflined.xen.control import Control
from pgofflined.xen.libs import ForeignPages, XenCall
from pgofflined.xen.placement import Placement

if TYPE_CHECKING:
    from pgofflined.ports import FrameArray

_Answer = TypeVar("_Answer", OfflineState, OfflineReply, OnlineFlag)

_ENTRY: Final = 8
_CHUNK: Final = 2 << 20
# A pfn has at most 40 bits; INVALID_M2P_ENTRY (all ones), SHARED_M2P_ENTRY (all ones but the last
# bit) and fill patterns of debug builds lie above (arch/x86/include/asm/mm.h).
_PFN_LIMIT: Final = 1 << 40
# Frames that one call asks about; Xen allocates a word for each, and is not interrupted meanwhile.
_QUERIES: Final = 1024
# At most so many frames of a hole in the memory map are leapt over: 1 MiB, so that only an island
# of memory that is smaller could be missed.
_LEAP: Final = 256
# page_offline_op carries frames in 32 bits.
_MFN_LIMIT: Final = 1 << 32


class Frames:
    """``ports.FrameControl`` over sysctl, memory_op and the mapped M2P."""

    def __init__(
        self,
        *,
        call: XenCall,
        control: Control,
        pages: ForeignPages,
        placement: Placement,
        version: XenVersion,
    ) -> None:
        self._call = call
        self._control = control
        self._pages = pages
        self._placement = placement
        self._version = version
        self._m2p_chunks: tuple[int, ...] = ()

    def version(self) -> XenVersion:
        """Version of the running hypervisor, read at start."""
        return self._version

    def max_mfn(self) -> Mfn:
        """Highest frame of the host; Xen answers with the number after it (its ``max_page``)."""
        count = self._call.hypercall(
            HYPERVISOR_memory_op, XENMEM_maximum_ram_page, 0, op="maximum_ram_page"
        )
        return Mfn(count - 1)

    def physinfo(self) -> Physinfo | PhysinfoBefore417:
        """XEN_SYSCTL_physinfo as it came."""
        info = self._control.interface.physinfo()
        self._control.sysctl(XEN_SYSCTL_physinfo, info, op="physinfo")
        return info

    def total_frames(self) -> int:
        """Frames of memory that the host has."""
        return int(self.physinfo().total_pages)

    def free_frames(self) -> int:
        """Free frames less those claimed by domains being built, which an exchange cannot have."""
        info = self.physinfo()
        return max(0, info.free_pages - info.outstanding_pages)

    def query(self, mfn: Mfn) -> OfflineState:
        """Offline state of a frame.  Raises XenError (EINVAL: no conventional RAM of this host)."""
        word = self._page_op(sysctl_query_page_offline, mfn, op="query_page_offline")
        return _decode(decode_query, word, mfn)

    def held_back(self) -> Mapping[Mfn, OfflineState]:
        """Every frame that is marked, broken or out of use.

        Xen stops at the first frame of a call that is no memory (EINVAL), and gives the words of
        those before it (do_sysctl, xen/common/sysctl.c).
        """
        found: dict[Mfn, OfflineState] = {}
        start, last = 0, min(self.max_mfn(), _MFN_LIMIT - 1)
        # The last frame seen that is no memory, how far to leap from one to the next, and up to
        # where not to, for memory is known to begin somewhere before.
        hole, leap, careful = -1, 1, 0
        while start <= last:
            words = self._query_words(start, min(last, start + _QUERIES - 1))
            if not words:
                hole = start
                # Not over the last one, which is memory.
                start = start + 1 if start < careful else min(start + leap, max(last, start + 1))
                leap = min(2 * leap, _LEAP)
            elif start >= careful and start > hole + 1 and leap > 1:
                start, careful, leap = hole + 1, start, 1
            else:
                for mfn, word in enumerate(words, start):
                    if word:
                        found[Mfn(mfn)] = _decode(decode_query, word, Mfn(mfn))
                start, leap = start + len(words), 1
        return found

    def _query_words(self, first: int, last: int) -> list[int]:
        """Status words of frames in a row, up to one that is no memory."""
        count = last - first + 1
        with self._call.buffer(count * ctypes.sizeof(ctypes.c_uint32)) as address:
            words = (ctypes.c_uint32 * count).from_address(address)
            ctypes.memset(address, 0xFF, ctypes.sizeof(words))
            argument = PageOfflineOp(
                cmd=sysctl_query_page_offline, start=first, end=last, status=address
            )
            try:
                self._control.sysctl(
                    XEN_SYSCTL_page_offline_op, argument, op="query_page_offline", mfn=Mfn(first)
                )
            except XenError as error:
                if error.errno != errno.EINVAL:
                    raise
            told = list(words)
        return told[: told.index(NOT_HANDLED)] if NOT_HANDLED in told else told

    def offline(self, mfn: Mfn) -> OfflineReply:
        """Mark a frame for offlining; see ``ports.FrameControl.offline`` and ``placement.py``."""
        word = self._placement.run(
            lambda: self._page_op(sysctl_page_offline, mfn, op="page_offline"),
        )
        return _decode(decode_offline, word, mfn)

    def online(self, mfn: Mfn) -> OnlineFlag:
        """Take a mark back.  For a broken frame Xen's refusal is the answer, not an error."""
        word = self._page_op(sysctl_page_online, mfn, op="page_online")
        return _decode(decode_online, word, mfn)

    def _page_op(self, command: int, mfn: Mfn, *, op: str) -> int:
        """One frame's status word.

        Where Xen fails the call but has written a FAILED word, the word says more than the errno
        and is the answer.  A word that it did not write leaves the errno as an error.
        """
        if not 0 <= mfn < _MFN_LIMIT:
            raise XenError(errno.EINVAL, op=op, mfn=mfn)
        with self._call.buffer(ctypes.sizeof(ctypes.c_uint32)) as address:
            status = ctypes.c_uint32.from_address(address)
            status.value = NOT_HANDLED
            argument = PageOfflineOp(cmd=command, start=mfn, end=mfn, status=address)
            try:
                self._control.sysctl(XEN_SYSCTL_page_offline_op, argument, op=op, mfn=mfn)
            except XenError:
                explained = command != sysctl_query_page_offline and (
                    status.value != NOT_HANDLED and status.value & OfflineFlag.FAILED.value
                )
                if not explained:
                    raise
            if status.value == NOT_HANDLED:
                raise PortError(f"Xen reported success for {op} of mfn {mfn:#x} but no status")
            return status.value

    def m2p(self, mfn: Mfn) -> Pfn | None:
        """The M2P's entry for a frame, read afresh; None where it names no pfn or has a hole."""
        untrusted_offset = mfn * _ENTRY
        chunk, within = divmod(untrusted_offset, _CHUNK)
        first = self._m2p_chunk(chunk)
        if mfn < 0 or first is None:
            return None
        frame = first + (within >> PAGE_SHIFT)
        with self._pages.frames(Domid(DOMID_XEN), [frame]) as address:
            entry = ctypes.c_uint64.from_address(address + within % PAGE_SIZE).value
        return Pfn(entry) if entry < _PFN_LIMIT else None

    def m2p_search(self, pfns: FrameArray) -> FrameArray:
        """Frames whose M2P entry is one of ``pfns``, by reading the whole M2P."""
        import numpy as np

        found = [np.empty(0, dtype=np.uint64)]
        for chunk in range((self.max_mfn() * _ENTRY) // _CHUNK + 1):
            first = self._m2p_chunk(chunk)
            if first is None:
                continue
            frames = range(first, first + (_CHUNK >> PAGE_SHIFT))
            with self._pages.frames(Domid(DOMID_XEN), frames) as address:
                entries = np.frombuffer(ctypes.string_at(address, _CHUNK), dtype=np.uint64)
            mfns = np.flatnonzero(np.isin(entries, pfns)) + chunk * (_CHUNK // _ENTRY)
            found.append(mfns.astype(np.uint64))
        return np.concatenate(found)

    def _m2p_chunk(self, chunk: int) -> int | None:
        """First frame of a 2 MiB chunk of the M2P, None for a hole or beyond its end.

        The chunks never move; the list only grows, when memory is added to the host.
        """
        if chunk >= len(self._m2p_chunks):
            self._m2p_chunks = self._read_m2p_chunks()
        if not 0 <= chunk < len(self._m2p_chunks):
            return None
        first = self._m2p_chunks[chunk]
        # memory.h promises zero for a hole, but Xen repeats the chunk before it
        # (arch/x86/x86_64/mm.c, XENMEM_machphys_mfn_list); no two chunks share frames.
        if first == 0 or (chunk > 0 and first == self._m2p_chunks[chunk - 1]):
            return None
        return first

    def _read_m2p_chunks(self) -> tuple[int, ...]:
        chunks = (self.max_mfn() * _ENTRY) // _CHUNK + 1
        with (
            self._call.buffer(chunks * _ENTRY) as list_address,
            self._call.struct(MachphysMfnList) as request,
        ):
            request.max_extents = chunks
            request.extent_start = list_address
            self._call.hypercall(
                HYPERVISOR_memory_op,
                XENMEM_machphys_mfn_list,
                ctypes.addressof(request),
                op="machphys_mfn_list",
            )
            count = min(request.nr_extents, chunks)
            return tuple((ctypes.c_uint64 * count).from_address(list_address))


def _decode(decoder: Callable[[int], _Answer], word: int, mfn: Mfn) -> _Answer:
    try:
        return decoder(word)
    except ValueError as error:
        raise PortError(
            f"Xen answered {word:#x} about mfn {mfn:#x}, which is not understood: {error}"
        ) from error
