"""``sysctl.h``: host-wide control, tied to an interface version."""

from __future__ import annotations

import ctypes
from typing import ClassVar, Final

from pgofflined.xen.abi.structure import AbiStructure

XEN_SYSCTL_physinfo: Final = 3
XEN_SYSCTL_getdomaininfolist: Final = 6
XEN_SYSCTL_page_offline_op: Final = 14

# Sub-commands of page_offline_op.
sysctl_page_offline: Final = 1
sysctl_page_online: Final = 2
sysctl_query_page_offline: Final = 3


class Sysctl(AbiStructure):
    """``struct xen_sysctl``; ``u`` takes one of the arguments below."""

    c_name = "struct xen_sysctl"
    cmd: int
    interface_version: int
    _fields_: ClassVar = [
        ("cmd", ctypes.c_uint32),
        ("interface_version", ctypes.c_uint32),
        ("u", ctypes.c_uint64 * 16),
    ]


class Physinfo(AbiStructure):
    """``struct xen_sysctl_physinfo`` since interface 0x15 (Xen 4.17)."""

    c_name = "struct xen_sysctl_physinfo"
    nr_cpus: int
    max_cpu_id: int
    free_pages: int
    outstanding_pages: int
    _fields_: ClassVar = [
        ("threads_per_core", ctypes.c_uint32),
        ("cores_per_socket", ctypes.c_uint32),
        ("nr_cpus", ctypes.c_uint32),
        ("max_cpu_id", ctypes.c_uint32),
        ("nr_nodes", ctypes.c_uint32),
        ("max_node_id", ctypes.c_uint32),
        ("cpu_khz", ctypes.c_uint32),
        ("capabilities", ctypes.c_uint32),
        ("arch_capabilities", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
        ("total_pages", ctypes.c_uint64),
        ("free_pages", ctypes.c_uint64),
        ("scrub_pages", ctypes.c_uint64),
        ("outstanding_pages", ctypes.c_uint64),
        ("max_mfn", ctypes.c_uint64),
        ("hw_cap", ctypes.c_uint32 * 8),
    ]


class PhysinfoBefore417(AbiStructure):
    """``struct xen_sysctl_physinfo`` up to interface 0x14 (Xen 4.14 to 4.16)."""

    c_name = "struct xen_sysctl_physinfo"
    nr_cpus: int
    max_cpu_id: int
    free_pages: int
    outstanding_pages: int
    _fields_: ClassVar = [
        ("threads_per_core", ctypes.c_uint32),
        ("cores_per_socket", ctypes.c_uint32),
        ("nr_cpus", ctypes.c_uint32),
        ("max_cpu_id", ctypes.c_uint32),
        ("nr_nodes", ctypes.c_uint32),
        ("max_node_id", ctypes.c_uint32),
        ("cpu_khz", ctypes.c_uint32),
        ("capabilities", ctypes.c_uint32),
        ("total_pages", ctypes.c_uint64),
        ("free_pages", ctypes.c_uint64),
        ("scrub_pages", ctypes.c_uint64),
        ("outstanding_pages", ctypes.c_uint64),
        ("max_mfn", ctypes.c_uint64),
        ("hw_cap", ctypes.c_uint32 * 8),
    ]


class GetDomainInfoList(AbiStructure):
    """``struct xen_sysctl_getdomaininfolist``: domains from ``first_domain`` on."""

    c_name = "struct xen_sysctl_getdomaininfolist"
    first_domain: int
    max_domains: int
    buffer: int
    num_domains: int
    _fields_: ClassVar = [
        ("first_domain", ctypes.c_uint16),
        ("max_domains", ctypes.c_uint32),
        ("buffer", ctypes.c_uint64),
        ("num_domains", ctypes.c_uint32),
    ]


class PageOfflineOp(AbiStructure):
    """``struct xen_sysctl_page_offline_op``: frames ``start`` to ``end``, a word for each."""

    c_name = "struct xen_sysctl_page_offline_op"
    cmd: int
    start: int
    end: int
    status: int
    _fields_: ClassVar = [
        ("cmd", ctypes.c_uint32),
        ("start", ctypes.c_uint32),
        ("end", ctypes.c_uint32),
        ("status", ctypes.c_uint64),
    ]
