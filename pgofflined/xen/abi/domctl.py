"""``domctl.h``: control of one domain, tied to an interface version."""

from __future__ import annotations

import ctypes
from typing import Any, ClassVar, Final

from pgofflined.xen.abi.structure import AbiStructure
from pgofflined.xen.abi.xen import XenctlBitmap

XEN_DOMCTL_pausedomain: Final = 3
XEN_DOMCTL_unpausedomain: Final = 4
XEN_DOMCTL_getdomaininfo: Final = 5
XEN_DOMCTL_setvcpuaffinity: Final = 9
XEN_DOMCTL_setvcpucontext: Final = 12
XEN_DOMCTL_getvcpucontext: Final = 13
XEN_DOMCTL_getvcpuinfo: Final = 14
XEN_DOMCTL_getvcpuaffinity: Final = 25
XEN_DOMCTL_resumedomain: Final = 27
XEN_DOMCTL_get_address_size: Final = 36
XEN_DOMCTL_getpageframeinfo3: Final = 61

XEN_VCPUAFFINITY_HARD: Final = 1

XEN_INVALID_MAX_VCPU_ID: Final = 0xFFFFFFFF

# getpageframeinfo3 refuses longer arrays (arch/x86/domctl.c).
GETPAGEFRAMEINFO3_MAX: Final = 1024


class Domctl(AbiStructure):
    """``struct xen_domctl``; ``u`` takes one of the arguments below."""

    c_name = "struct xen_domctl"
    cmd: int
    interface_version: int
    domain: int
    _fields_: ClassVar = [
        ("cmd", ctypes.c_uint32),
        ("interface_version", ctypes.c_uint32),
        ("domain", ctypes.c_uint16),
        ("_pad", ctypes.c_uint16 * 3),
        ("u", ctypes.c_uint64 * 16),
    ]


class ArchDomainConfig(AbiStructure):
    """``struct xen_arch_domainconfig`` of x86 (``arch-x86/xen.h``); 4.14 has no ``misc_flags``."""

    c_name = "struct xen_arch_domainconfig"
    emulation_flags: int
    _fields_: ClassVar = [("emulation_flags", ctypes.c_uint32), ("misc_flags", ctypes.c_uint32)]


_INFO_UP_TO_CPUPOOL: Final[list[tuple[str, Any]]] = [
    ("domain", ctypes.c_uint16),
    ("_pad1", ctypes.c_uint16),
    ("flags", ctypes.c_uint32),
    ("tot_pages", ctypes.c_uint64),
    ("max_pages", ctypes.c_uint64),
    ("outstanding_pages", ctypes.c_uint64),
    ("shr_pages", ctypes.c_uint64),
    ("paged_pages", ctypes.c_uint64),
    ("shared_info_frame", ctypes.c_uint64),
    ("cpu_time", ctypes.c_uint64),
    ("nr_online_vcpus", ctypes.c_uint32),
    ("max_vcpu_id", ctypes.c_uint32),
    ("ssidref", ctypes.c_uint32),
    ("handle", ctypes.c_uint8 * 16),
    ("cpupool", ctypes.c_uint32),
]


class GetDomainInfo(AbiStructure):
    """``struct xen_domctl_getdomaininfo`` since interface 0x14 (Xen 4.16), 112 bytes."""

    c_name = "struct xen_domctl_getdomaininfo"
    domain: int
    flags: int
    tot_pages: int
    max_pages: int
    shared_info_frame: int
    cpu_time: int
    max_vcpu_id: int
    handle: ctypes.Array[ctypes.c_uint8]
    arch_config: ArchDomainConfig
    _fields_: ClassVar = [
        *_INFO_UP_TO_CPUPOOL,
        ("gpaddr_bits", ctypes.c_uint8),
        ("_pad2", ctypes.c_uint8 * 7),
        ("arch_config", ArchDomainConfig),
    ]


class GetDomainInfoBefore416(AbiStructure):
    """``struct xen_domctl_getdomaininfo`` up to interface 0x13 (Xen 4.14, 4.15), 104 bytes.

    4.14 has no ``misc_flags`` and four bytes of padding in their place.
    """

    c_name = "struct xen_domctl_getdomaininfo"
    domain: int
    flags: int
    tot_pages: int
    max_pages: int
    shared_info_frame: int
    cpu_time: int
    max_vcpu_id: int
    handle: ctypes.Array[ctypes.c_uint8]
    arch_config: ArchDomainConfig
    _fields_: ClassVar = [*_INFO_UP_TO_CPUPOOL, ("arch_config", ArchDomainConfig)]


class VcpuAffinity(AbiStructure):
    """``struct xen_domctl_vcpuaffinity``."""

    c_name = "struct xen_domctl_vcpuaffinity"
    vcpu: int
    flags: int
    cpumap_hard: XenctlBitmap
    cpumap_soft: XenctlBitmap
    _fields_: ClassVar = [
        ("vcpu", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("cpumap_hard", XenctlBitmap),
        ("cpumap_soft", XenctlBitmap),
    ]


class GetVcpuInfo(AbiStructure):
    """``struct xen_domctl_getvcpuinfo``: ``cpu`` is the pCPU that the vCPU runs or last ran on."""

    c_name = "struct xen_domctl_getvcpuinfo"
    vcpu: int
    online: int
    blocked: int
    running: int
    cpu: int
    _fields_: ClassVar = [
        ("vcpu", ctypes.c_uint32),
        ("online", ctypes.c_uint8),
        ("blocked", ctypes.c_uint8),
        ("running", ctypes.c_uint8),
        ("cpu_time", ctypes.c_uint64),
        ("cpu", ctypes.c_uint32),
    ]


class VcpuContext(AbiStructure):
    """``struct xen_domctl_vcpucontext``: ``ctxt`` is the address of a vcpu_guest_context."""

    c_name = "struct xen_domctl_vcpucontext"
    vcpu: int
    ctxt: int
    _fields_: ClassVar = [("vcpu", ctypes.c_uint32), ("ctxt", ctypes.c_uint64)]


class AddressSize(AbiStructure):
    """``struct xen_domctl_address_size``: 32 or 64."""

    c_name = "struct xen_domctl_address_size"
    size: int
    _fields_: ClassVar = [("size", ctypes.c_uint32)]


class GetPageFrameInfo3(AbiStructure):
    """``struct xen_domctl_getpageframeinfo3``: gfns in, XEN_DOMCTL_PFINFO_* words out."""

    c_name = "struct xen_domctl_getpageframeinfo3"
    num: int
    array: int
    _fields_: ClassVar = [("num", ctypes.c_uint64), ("array", ctypes.c_uint64)]
