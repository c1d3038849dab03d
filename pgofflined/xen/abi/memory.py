"""``memory.h``: exchange of frames, the list of M2P chunks, resources."""

from __future__ import annotations

import ctypes
from typing import ClassVar, Final

from pgofflined.xen.abi.structure import AbiStructure

XENMEM_maximum_ram_page: Final = 2
XENMEM_machphys_mfn_list: Final = 5
XENMEM_exchange: Final = 11
XENMEM_acquire_resource: Final = 28

XENMEM_resource_grant_table: Final = 1
XENMEM_resource_grant_table_id_shared: Final = 0
XENMEM_resource_grant_table_id_status: Final = 1


class MemoryReservation(AbiStructure):
    """``struct xen_memory_reservation``: a list of extents of one domain."""

    c_name = "struct xen_memory_reservation"
    extent_start: int
    nr_extents: int
    extent_order: int
    mem_flags: int
    domid: int
    _fields_: ClassVar = [
        ("extent_start", ctypes.c_uint64),
        ("nr_extents", ctypes.c_uint64),
        ("extent_order", ctypes.c_uint32),
        ("mem_flags", ctypes.c_uint32),
        ("domid", ctypes.c_uint16),
    ]


class MemoryExchange(AbiStructure):
    """``struct xen_memory_exchange``; ``nr_exchanged`` must be zero when the call is made.

    ``out.extent_start`` is read as well as written: it holds the pfns that the new frames are to
    have, and receives the new frames.
    """

    c_name = "struct xen_memory_exchange"
    in_: MemoryReservation
    out: MemoryReservation
    nr_exchanged: int
    _fields_: ClassVar = [
        ("in_", MemoryReservation),
        ("out", MemoryReservation),
        ("nr_exchanged", ctypes.c_uint64),
    ]


class MachphysMfnList(AbiStructure):
    """``struct xen_machphys_mfn_list``: first frames of the M2P's 2 MiB chunks."""

    c_name = "struct xen_machphys_mfn_list"
    max_extents: int
    extent_start: int
    nr_extents: int
    _fields_: ClassVar = [
        ("max_extents", ctypes.c_uint32),
        ("extent_start", ctypes.c_uint64),
        ("nr_extents", ctypes.c_uint32),
    ]


class MemAcquireResource(AbiStructure):
    """``struct xen_mem_acquire_resource``: for a PV caller the list receives machine frames."""

    c_name = "struct xen_mem_acquire_resource"
    domid: int
    type: int
    id: int
    nr_frames: int
    frame: int
    frame_list: int
    _fields_: ClassVar = [
        ("domid", ctypes.c_uint16),
        ("type", ctypes.c_uint16),
        ("id", ctypes.c_uint32),
        ("nr_frames", ctypes.c_uint32),
        ("_pad0", ctypes.c_uint32),
        ("frame", ctypes.c_uint64),
        ("frame_list", ctypes.c_uint64),
    ]
