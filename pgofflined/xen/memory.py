"""Contents, types and grants of a domain's frames.  Loads numpy; imported only when needed."""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Final

import numpy as np

from pgofflined.core.errors import PortError, XenError
from pgofflined.core.frames import PAGE_SIZE, WORDS_PER_PAGE, Domid, Mfn
from pgofflined.core.moves import differing
from pgofflined.xen.abi.domctl import (
    GETPAGEFRAMEINFO3_MAX,
    GetPageFrameInfo3,
    XEN_DOMCTL_getdomaininfo,
    XEN_DOMCTL_getpageframeinfo3,
)
from pgofflined.xen.abi.grant_table import (
    GNTST_okay,
    GnttabGetVersion,
    GNTTABOP_get_version,
    GNTTABOP_query_size,
    GnttabQuerySize,
    GTF_invalid,
    GTF_reading,
    GTF_transitive,
    GTF_type_mask,
    GTF_writing,
)
from pgofflined.xen.abi.memory import (
    MemAcquireResource,
    XENMEM_acquire_resource,
    XENMEM_resource_grant_table,
    XENMEM_resource_grant_table_id_shared,
    XENMEM_resource_grant_table_id_status,
)
from pgofflined.xen.abi.xen import HYPERVISOR_grant_table_op, HYPERVISOR_memory_op
from pgofflined.xen.control import Control
from pgofflined.xen.libs import ForeignPages, XenCall

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pgofflined.core.moves import Chosen, PteWrites
    from pgofflined.ports import FrameArray, TypeArray, Words

_MEMCMP: Final = ctypes.CDLL(None).memcmp
_MEMCMP.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
_COMPARED_AT_ONCE: Final = 64
# 8 MiB mapped at a time.
_MAP_BATCH: Final = 2048
_V1_ENTRY: Final = np.dtype([("flags", "<u2"), ("domid", "<u2"), ("frame", "<u4")])
_V2_ENTRY: Final = np.dtype(
    [("flags", "<u2"), ("domid", "<u2"), ("other", "<u4"), ("frame", "<u8")]
)
_IN_USE: Final = GTF_reading | GTF_writing
# Up to 4.14 Xen gives no more frames of a resource in one call (common/memory.c).
_RESOURCE_BATCH: Final = 32
# grant_status_t: one 16-bit word for each entry of a version 2 table.
_STATUS: Final = np.dtype("<u2")


def _at(address: int, frames: int) -> Words:
    """The frames mapped at an address, as rows of words; valid as long as the mapping."""
    area = (ctypes.c_char * (frames * PAGE_SIZE)).from_address(address)
    words: Words = np.frombuffer(memoryview(area), dtype=np.uint64)
    return words.reshape(frames, WORDS_PER_PAGE)


def _differing(mapped: Words, wanted: Words) -> Chosen:
    """``core.moves.differing``, in a quarter of its time where nothing differs, which is usual."""
    found = np.zeros(len(wanted), dtype=np.bool_)
    if not (mapped.flags.c_contiguous and wanted.flags.c_contiguous):
        return differing(mapped, wanted)
    for start in range(0, len(wanted), _COMPARED_AT_ONCE):
        one, other = (rows[start : start + _COMPARED_AT_ONCE] for rows in (mapped, wanted))
        if _MEMCMP(one.ctypes.data, other.ctypes.data, other.nbytes):
            found[start : start + _COMPARED_AT_ONCE] = differing(one, other)
    return found


def _fill(domid: Domid, mfns: FrameArray, mapped: Words, contents: Words) -> None:
    """Write the contents of some frames to where they are mapped.  Raises PortError."""
    count = len(mfns)
    source = contents[:count]
    ctypes.memmove(mapped.ctypes.data, source.ctypes.data, source.nbytes)
    wrong = np.flatnonzero(_differing(mapped[:count], source))
    if len(wrong):
        mfn = int(mfns[wrong[0]])
        raise PortError(f"mfn {mfn:#x} of d{domid} does not hold what was written to it")


def _in_one_piece(rows: NDArray[np.intp]) -> slice | NDArray[np.intp]:
    """Rows that follow one another as a slice, which is not copied before it is looked at."""
    if len(rows) and bool((np.diff(rows) == 1).all()):
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return rows


class Window:
    """``ports.FrameWindow`` over mappings of up to ``_MAP_BATCH`` frames each."""

    def __init__(self, parts: list[Words]) -> None:
        self._parts = parts

    def read(self, rows: NDArray[np.intp]) -> Words:
        """Copies of frames."""
        copies = np.empty((len(rows), WORDS_PER_PAGE), dtype=np.uint64)
        for chosen, part, inside in self._split(rows):
            copies[chosen] = part[inside]
        return copies

    def words(self, rows: NDArray[np.intp], indexes: FrameArray) -> Words:
        """Single words."""
        words = np.empty(len(rows), dtype=np.uint64)
        for chosen, part, inside in self._split(rows):
            words[chosen] = part[inside, indexes[chosen]]
        return words

    def differing(self, rows: NDArray[np.intp], contents: Words) -> Chosen:
        """Which frames do not hold what they are thought to hold."""
        found = np.empty(len(rows), dtype=np.bool_)
        for chosen, part, inside in self._split(rows):
            found[chosen] = _differing(part[_in_one_piece(inside)], contents[chosen])
        return found

    def _split(
        self, rows: NDArray[np.intp]
    ) -> Iterator[tuple[slice | Chosen, Words, NDArray[np.intp]]]:
        """For each mapping: which of the rows lie in it, the frames that it maps, and where."""
        if len(self._parts) == 1:
            yield slice(None), self._parts[0], rows
            return
        for number, part in enumerate(self._parts):
            chosen = rows // _MAP_BATCH == number
            yield chosen, part, rows[chosen] - number * _MAP_BATCH

    def close(self) -> None:
        """Nothing can be read any more: what would, would end the process."""
        self._parts = []


class Memory:
    """``ports.ForeignMemory``; every mapping ends before the call returns."""

    def __init__(self, *, call: XenCall, control: Control, pages: ForeignPages) -> None:
        self._call = call
        self._control = control
        self._pages = pages

    def read_frames(self, domid: Domid, mfns: FrameArray) -> Words:
        """Copies of frames, in order.  Raises XenError naming the first that cannot be mapped.

        The caller has seen that none is broken: reading poison ends in a machine check.
        """
        contents = np.empty((len(mfns), WORDS_PER_PAGE), dtype=np.uint64)
        for start in range(0, len(mfns), _MAP_BATCH):
            batch = mfns[start : start + _MAP_BATCH].tolist()
            with self._pages.frames(domid, batch) as address:
                target = contents[start : start + len(batch)]
                ctypes.memmove(target.ctypes.data, address, len(batch) * PAGE_SIZE)
        return contents

    @contextmanager
    def window(self, domid: Domid, mfns: FrameArray) -> Iterator[Window]:
        """Map frames for several looks.  Raises XenError naming the first that cannot be mapped."""
        with ExitStack() as mappings:
            window = Window([part for _, part in self._map(mappings, domid, mfns)])
            try:
                yield window
            finally:
                window.close()

    def write_frames(
        self, domid: Domid, mfns: FrameArray, contents: Words, slots: PteWrites
    ) -> None:
        """Write whole frames, then single words, through one mapping.

        Raises XenError, EINVAL where a word would not lie within a frame; PortError where contents
        read back differently.
        """
        outside = np.flatnonzero(slots.indexes >= np.uint64(WORDS_PER_PAGE))
        if len(outside):
            mfn = Mfn(int(slots.tables[outside[0]]))
            raise XenError(errno.EINVAL, op="write_frames", domid=domid, mfn=mfn)
        # Those that get contents first and in their order, so that they can be copied in one piece.
        others = sorted({*slots.tables.tolist()}.difference(mfns.tolist()))
        frames = np.concatenate([mfns, np.array(others, dtype=np.uint64)])
        order = np.argsort(frames)
        rows = order[np.searchsorted(frames, slots.tables, sorter=order)]
        source = np.ascontiguousarray(contents, dtype=np.uint64)
        with ExitStack() as mappings:
            parts = self._map(mappings, domid, frames, writable=True)
            for start, part in parts:
                _fill(domid, mfns[start : start + len(part)], part, source[start:])
            for start, part in parts:
                inside = (rows >= start) & (rows < start + len(part))
                part[rows[inside] - start, slots.indexes[inside]] = slots.values[inside]

    def _map(
        self, mappings: ExitStack, domid: Domid, mfns: FrameArray, *, writable: bool = False
    ) -> list[tuple[int, Words]]:
        """Map frames, some at a time; each part with the place of its first among them all."""
        parts: list[tuple[int, Words]] = []
        for start in range(0, len(mfns), _MAP_BATCH):
            batch = mfns[start : start + _MAP_BATCH].tolist()
            address = mappings.enter_context(self._pages.frames(domid, batch, writable=writable))
            parts.append((start, _at(address, len(batch))))
        return parts

    def page_types(self, domid: Domid, mfns: FrameArray) -> TypeArray:
        """XEN_DOMCTL_PFINFO_* words of a PV domain's frames, in order, 1024 in a call.

        Not for looking for a domain's frames among others': for each that is not its own Xen logs a
        line at guest level (get_page in arch/x86/mm.c), which on a serial console takes a while.
        """
        types = np.empty(len(mfns), dtype=np.uint32)
        for start in range(0, len(mfns), GETPAGEFRAMEINFO3_MAX):
            batch = np.ascontiguousarray(
                mfns[start : start + GETPAGEFRAMEINFO3_MAX], dtype=np.uint64
            )
            with self._call.buffer(batch.nbytes) as address:
                ctypes.memmove(address, batch.ctypes.data, batch.nbytes)
                argument = GetPageFrameInfo3(num=len(batch), array=address)
                self._control.domctl(
                    XEN_DOMCTL_getpageframeinfo3, domid, argument, op="getpageframeinfo3"
                )
                words = np.frombuffer(ctypes.string_at(address, batch.nbytes), dtype=np.uint64)
            if (words >> np.uint64(32)).any():
                raise PortError(f"getpageframeinfo3 gave types of d{domid} that are not understood")
            types[start : start + len(batch)] = words.astype(np.uint32)
        return types

    def granted_frames(self, domid: Domid) -> FrameArray:
        """Frames that the domain's grant table offers or another domain still uses, sorted.

        An entry counts when it is valid, or when its in-use bits are set although the guest has
        taken it back.  Transitive entries of version 2 name a grant of a third domain and no frame
        of this one.  A mapped grant whose frame the guest has overwritten is not seen here; the
        reference it holds makes Xen refuse an exchange.

        Raises XenError, EPERM for dom0: Xen maps no domain's own table for it in this way.
        """
        frames = self._table_size(domid)
        if frames == 0:
            return np.empty(0, dtype=np.uint64)
        match self._table_version(domid):
            case 1:
                entries = np.frombuffer(self._table(domid, frames), dtype=_V1_ENTRY)
                wanted = (entries["flags"] & (GTF_type_mask | _IN_USE)) != GTF_invalid
            case 2:
                entries = np.frombuffer(self._table(domid, frames), dtype=_V2_ENTRY)
                kind = entries["flags"] & GTF_type_mask
                in_use = (self._status(domid, len(entries)) & _IN_USE) != 0
                wanted = (kind != GTF_transitive) & ((kind != GTF_invalid) | in_use)
            case version:
                raise PortError(f"d{domid} has a grant table of unknown version {version}")
        granted: FrameArray = np.unique(entries["frame"][wanted].astype(np.uint64))
        return granted

    def shared_frames(self, domid: Domid) -> FrameArray:
        """Frames of Xen's heap that the domain may map: shared_info and its grant table."""
        info = self._control.interface.domain_info()
        self._control.domctl(XEN_DOMCTL_getdomaininfo, domid, info, op="getdomaininfo")
        frames = [info.shared_info_frame]
        size = self._table_size(domid)
        if size:
            frames += self._resource_frames(domid, XENMEM_resource_grant_table_id_shared, size)
            if self._table_version(domid) == 2:
                entries = size * PAGE_SIZE // _V2_ENTRY.itemsize
                pages = -(-entries * _STATUS.itemsize // PAGE_SIZE)
                frames += self._resource_frames(domid, XENMEM_resource_grant_table_id_status, pages)
        return np.unique(np.array(frames, dtype=np.uint64))

    def _resource_frames(self, domid: Domid, number: int, frames: int) -> list[int]:
        """Machine frames of a resource; Xen gives them to a PV caller."""
        found: list[int] = []
        for start in range(0, frames, _RESOURCE_BATCH):
            count = min(_RESOURCE_BATCH, frames - start)
            with (
                self._call.buffer(count * 8) as address,
                self._call.struct(MemAcquireResource) as request,
            ):
                request.domid = domid
                request.type = XENMEM_resource_grant_table
                request.id = number
                request.nr_frames = count
                request.frame = start
                request.frame_list = address
                self._call.hypercall(
                    HYPERVISOR_memory_op,
                    XENMEM_acquire_resource,
                    ctypes.addressof(request),
                    op="acquire_resource",
                    domid=domid,
                )
                found += (ctypes.c_uint64 * count).from_address(address)
        return found

    def _table_size(self, domid: Domid) -> int:
        """Pages that the grant table has; asking the resource for more would make it grow."""
        with self._call.struct(GnttabQuerySize) as query:
            query.dom = domid
            self._grant_op(GNTTABOP_query_size, query, "gnttab_query_size", domid)
            if query.status != GNTST_okay:
                raise PortError(f"gnttab_query_size of d{domid} answered {query.status}")
            return query.nr_frames

    def _table_version(self, domid: Domid) -> int:
        with self._call.struct(GnttabGetVersion) as query:
            query.dom = domid
            self._grant_op(GNTTABOP_get_version, query, "gnttab_get_version", domid)
            return query.version

    def _grant_op(self, command: int, query: ctypes.Structure, op: str, domid: Domid) -> None:
        self._call.hypercall(
            HYPERVISOR_grant_table_op, command, ctypes.addressof(query), 1, op=op, domid=domid
        )

    def _table(self, domid: Domid, frames: int) -> bytes:
        return self._resource(domid, XENMEM_resource_grant_table_id_shared, frames)

    def _status(self, domid: Domid, entries: int) -> FrameArray:
        """In-use bits of a version 2 table's entries; Xen has allocated a word for each of them."""
        frames = -(-entries * _STATUS.itemsize // PAGE_SIZE)
        status = self._resource(domid, XENMEM_resource_grant_table_id_status, frames)
        return np.frombuffer(status, dtype=_STATUS)[:entries].astype(np.uint64)

    def _resource(self, domid: Domid, number: int, frames: int) -> bytes:
        with self._pages.resource(domid, XENMEM_resource_grant_table, number, frames) as address:
            return ctypes.string_at(address, frames * PAGE_SIZE)
