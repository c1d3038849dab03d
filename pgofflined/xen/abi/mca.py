"""``arch-x86/xen-mca.h``: fetching machine-check telemetry, and asking about the processors."""

from __future__ import annotations

import ctypes
from typing import ClassVar, Final

from pgofflined.xen.abi.structure import AbiStructure

VIRQ_MCA: Final = 16

XEN_MCA_INTERFACE_VERSION: Final = 0x01ECC003

XEN_MC_fetch: Final = 1
XEN_MC_physcpuinfo: Final = 3

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


class McPhyscpuinfo(AbiStructure):
    """``struct xen_mc_physcpuinfo``; ``info`` is the address of ``ncpus`` ``mcinfo_logical_cpu``.

    With ``info`` 0 only ``ncpus`` is answered.  Xen writes an entry for every processor that is
    online into a buffer of its own that has room for ``ncpus``: never ask for fewer.
    """

    c_name = "struct xen_mc_physcpuinfo"
    ncpus: int
    info: int
    _fields_: ClassVar = [
        ("ncpus", ctypes.c_uint32),
        ("_pad0", ctypes.c_uint32),
        ("info", ctypes.c_uint64),
    ]


class McMsr(AbiStructure):
    """``struct mcinfo_msr``."""

    c_name = "struct mcinfo_msr"
    reg: int
    value: int
    _fields_: ClassVar = [("reg", ctypes.c_uint64), ("value", ctypes.c_uint64)]


class McLogicalCpu(AbiStructure):
    """``struct mcinfo_logical_cpu``: ``mc_nmsrvals`` of the ``mc_msrvalues`` are valid."""

    c_name = "struct mcinfo_logical_cpu"
    mc_cpunr: int
    mc_nmsrvals: int
    mc_msrvalues: ctypes.Array[McMsr]
    _fields_: ClassVar = [
        ("mc_cpunr", ctypes.c_uint32),
        ("mc_chipid", ctypes.c_uint32),
        ("mc_coreid", ctypes.c_uint16),
        ("mc_threadid", ctypes.c_uint16),
        ("mc_apicid", ctypes.c_uint32),
        ("mc_clusterid", ctypes.c_uint32),
        ("mc_ncores", ctypes.c_uint32),
        ("mc_ncores_active", ctypes.c_uint32),
        ("mc_nthreads", ctypes.c_uint32),
        ("mc_cpuid_level", ctypes.c_int32),
        ("mc_family", ctypes.c_uint32),
        ("mc_vendor", ctypes.c_uint32),
        ("mc_model", ctypes.c_uint32),
        ("mc_step", ctypes.c_uint32),
        ("mc_vendorid", ctypes.c_char * 16),
        ("mc_brandid", ctypes.c_char * 64),
        ("mc_cpu_caps", ctypes.c_uint32 * 7),
        ("mc_cache_size", ctypes.c_uint32),
        ("mc_cache_alignment", ctypes.c_uint32),
        ("mc_nmsrvals", ctypes.c_int32),
        ("mc_msrvalues", McMsr * 8),
    ]


class McUnion(ctypes.Union):
    """The arguments of ``struct xen_mc``; the longest, ``xen_mc_msrinject``, sets its size."""

    mc_fetch: McFetch
    mc_physcpuinfo: McPhyscpuinfo
    _fields_: ClassVar = [
        ("mc_fetch", McFetch),
        ("mc_physcpuinfo", McPhyscpuinfo),
        ("_longest", ctypes.c_uint64 * 18),
    ]


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
