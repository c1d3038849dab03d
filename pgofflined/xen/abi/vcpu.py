"""``arch-x86/xen.h`` and ``arch-x86/xen-x86_64.h``: the registers of a 64-bit vCPU."""

from __future__ import annotations

import ctypes
from typing import ClassVar

from pgofflined.xen.abi.structure import AbiStructure


class CpuUserRegs(AbiStructure):
    """``struct cpu_user_regs``."""

    c_name = "struct cpu_user_regs"
    rax: int
    _fields_: ClassVar = [
        *[(name, ctypes.c_uint64) for name in ("r15", "r14", "r13", "r12", "rbp", "rbx")],
        *[(name, ctypes.c_uint64) for name in ("r11", "r10", "r9", "r8", "rax", "rcx")],
        *[(name, ctypes.c_uint64) for name in ("rdx", "rsi", "rdi")],
        ("error_code", ctypes.c_uint32),
        ("entry_vector", ctypes.c_uint32),
        ("rip", ctypes.c_uint64),
        ("cs", ctypes.c_uint16),
        ("_pad0", ctypes.c_uint16),
        ("saved_upcall_mask", ctypes.c_uint8),
        ("_pad1", ctypes.c_uint8 * 3),
        ("rflags", ctypes.c_uint64),
        ("rsp", ctypes.c_uint64),
        ("ss", ctypes.c_uint16),
        ("_pad2", ctypes.c_uint16 * 3),
        ("es", ctypes.c_uint16),
        ("_pad3", ctypes.c_uint16 * 3),
        ("ds", ctypes.c_uint16),
        ("_pad4", ctypes.c_uint16 * 3),
        ("fs", ctypes.c_uint16),
        ("_pad5", ctypes.c_uint16 * 3),
        ("gs", ctypes.c_uint16),
        ("_pad6", ctypes.c_uint16 * 3),
    ]


class TrapInfo(AbiStructure):
    """``struct trap_info``."""

    c_name = "struct trap_info"
    _fields_: ClassVar = [
        ("vector", ctypes.c_uint8),
        ("flags", ctypes.c_uint8),
        ("cs", ctypes.c_uint16),
        ("address", ctypes.c_uint64),
    ]


class VcpuGuestContext(AbiStructure):
    """``struct vcpu_guest_context``."""

    c_name = "struct vcpu_guest_context"
    user_regs: CpuUserRegs
    gdt_frames: ctypes.Array[ctypes.c_uint64]
    gdt_ents: int
    ctrlreg: ctypes.Array[ctypes.c_uint64]
    _fields_: ClassVar = [
        ("fpu_ctxt", ctypes.c_uint8 * 512),
        ("flags", ctypes.c_uint64),
        ("user_regs", CpuUserRegs),
        ("trap_ctxt", TrapInfo * 256),
        ("ldt_base", ctypes.c_uint64),
        ("ldt_ents", ctypes.c_uint64),
        ("gdt_frames", ctypes.c_uint64 * 16),
        ("gdt_ents", ctypes.c_uint64),
        ("kernel_ss", ctypes.c_uint64),
        ("kernel_sp", ctypes.c_uint64),
        ("ctrlreg", ctypes.c_uint64 * 8),
        ("debugreg", ctypes.c_uint64 * 8),
        ("event_callback_eip", ctypes.c_uint64),
        ("failsafe_callback_eip", ctypes.c_uint64),
        ("syscall_callback_eip", ctypes.c_uint64),
        ("vm_assist", ctypes.c_uint64),
        ("fs_base", ctypes.c_uint64),
        ("gs_base_kernel", ctypes.c_uint64),
        ("gs_base_user", ctypes.c_uint64),
    ]
