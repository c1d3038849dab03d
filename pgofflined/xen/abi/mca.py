"""``arch-x86/xen-mca.h``: fetching machine-check telemetry."""

from __future__ import annotations

import ctypes
from typing import ClassVar, Final

from pgofflined.xen.abi.structure import AbiStructure

VIRQ_MCA: Final = 16

XEN_MCA_INTERFACE_VERSION: Final = 0x01ECC003

XEN_MC_fetch: Final = 1

# Flags of a fetch: which queue, and whether it acknowledges.
XEN_MC_NONURGENT: Final = 1
XEN_MC_URGENT: Final = 2
XEN_MC_ACK: Final = 4

# Flags that a fetch answers with.
XEN_MC_OK: Final = 0
XEN_MC_FETCHFAILED: Final = 1
XEN_MC_NODATA: Final = 2


class McFetch(AbiStructure):
    """``struct xen_mc_fetch``; ``data`` is the address of an ``mc_info``."""

    c_name = "struct xen_mc_fetch"
    flags: int
    fetch_id: int
    data: int
    _fields_: ClassVar = [
        ("flags", ctypes.c_uint32),
        ("_pad0", ctypes.c_uint32),
        ("fetch_id", ctypes.c_uint64),
        ("data", ctypes.c_uint64),
    ]


class McUnion(ctypes.Union):
    """The arguments of ``struct xen_mc``; the longest, ``xen_mc_msrinject``, sets its size."""

    mc_fetch: McFetch
    _fields_: ClassVar = [("mc_fetch", McFetch), ("_longest", ctypes.c_uint64 * 18)]


class Mc(AbiStructure):
    """``struct xen_mc``."""

    c_name = "struct xen_mc"
    cmd: int
    interface_version: int
    u: McUnion
    _fields_: ClassVar = [
        ("cmd", ctypes.c_uint32),
        ("interface_version", ctypes.c_uint32),
        ("u", McUnion),
    ]


class McInfo(AbiStructure):
    """``struct mc_info``: one record, decoded by the core from its bytes."""

    c_name = "struct mc_info"
    _fields_: ClassVar = [
        ("mi_nentries", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("mi_data", ctypes.c_uint64 * 95),
    ]
