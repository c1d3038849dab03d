"""``xen.h``: hypercall numbers, page-table updates, sentinel values."""

from __future__ import annotations

import ctypes
from typing import ClassVar, Final

from pgofflined.xen.abi.structure import AbiStructure

# __HYPERVISOR_*; the two leading underscores would be mangled inside classes.
HYPERVISOR_mmu_update: Final = 1
HYPERVISOR_memory_op: Final = 12
HYPERVISOR_xen_version: Final = 17
HYPERVISOR_grant_table_op: Final = 20
HYPERVISOR_mmuext_op: Final = 26
HYPERVISOR_hvm_op: Final = 34
HYPERVISOR_sysctl: Final = 35
HYPERVISOR_domctl: Final = 36
HYPERVISOR_arch_0: Final = 48

VIRQ_ARCH_0: Final = 16

# Sub-command in bits 1:0 of mmu_update.ptr.
MMU_NORMAL_PT_UPDATE: Final = 0

# Commands of mmuext_op; L2 to L4 follow L1.
MMUEXT_PIN_L1_TABLE: Final = 0
MMUEXT_PIN_L4_TABLE: Final = 3
MMUEXT_UNPIN_TABLE: Final = 4

# Reserved domids.
DOMID_FIRST_RESERVED: Final = 0x7FF0
DOMID_SELF: Final = 0x7FF0
DOMID_IO: Final = 0x7FF1
DOMID_XEN: Final = 0x7FF2
DOMID_COW: Final = 0x7FF3
DOMID_INVALID: Final = 0x7FF4


class MmuUpdate(AbiStructure):
    """``struct mmu_update``: machine address of an entry with the sub-command, and its value."""

    c_name = "struct mmu_update"
    ptr: int
    val: int
    _fields_: ClassVar = [("ptr", ctypes.c_uint64), ("val", ctypes.c_uint64)]


class MmuextOp(AbiStructure):
    """``struct mmuext_op``: a command and, for pins, the table's frame; the rest is not used."""

    c_name = "struct mmuext_op"
    cmd: int
    arg1: int
    arg2: int
    _fields_: ClassVar = [
        ("cmd", ctypes.c_uint32),
        ("arg1", ctypes.c_uint64),
        ("arg2", ctypes.c_uint64),
    ]


class XenctlBitmap(AbiStructure):
    """``struct xenctl_bitmap``: address of the bytes and how many bits they hold."""

    c_name = "struct xenctl_bitmap"
    bitmap: int
    nr_bits: int
    _fields_: ClassVar = [("bitmap", ctypes.c_uint64), ("nr_bits", ctypes.c_uint32)]
