"""Puts errors into the machine-check banks of processors, through Xen: ... < ERRORS

ERRORS is a JSON list of [cpu, bank, status, address, misc].  Xen shows its next look at the bank
these values in place of the hardware's (XEN_MC_msrinject with MC_MSRINJ_F_INTERPOSE), raises no
machine check, and keeps at most 16 of them.  QEMU's monitor always raises one for an uncorrected
error.
"""

from __future__ import annotations

import ctypes
import json
import struct
import sys

from pgofflined.xen.abi.mca import XEN_MCA_INTERFACE_VERSION, Mc
from pgofflined.xen.abi.xen import HYPERVISOR_arch_0
from pgofflined.xen.libs import XenCall

# public/arch-x86/xen-mca.h: struct xen_mc with a struct xen_mc_msrinject in it, which has
# mcinj_cpunr, mcinj_flags, mcinj_count, mcinj_domid and its padding, then pairs of a register and
# its value.
_XEN_MC_MSRINJECT = 4
_INTERPOSE = 0x1
_HEAD = struct.Struct("<IIIIIHH")
_REGISTER = struct.Struct("<QQ")

# IA32_MC0_STATUS, _ADDR and _MISC; each bank has four registers (Intel SDM, volume 4).
_STATUS, _ADDR, _MISC = 0x401, 0x402, 0x403
_REGISTERS = 4


def inject(call: XenCall, cpu: int, bank: int, status: int, addr: int, misc: int) -> None:
    """Put one error into a bank."""
    values = {_STATUS: status, _ADDR: addr, _MISC: misc}
    request = _HEAD.pack(
        _XEN_MC_MSRINJECT, XEN_MCA_INTERFACE_VERSION, cpu, _INTERPOSE, len(values), 0, 0
    )
    for register, value in values.items():
        request += _REGISTER.pack(register + _REGISTERS * bank, value)
    with call.buffer(ctypes.sizeof(Mc)) as address:
        ctypes.memmove(address, request, len(request))
        call.hypercall(HYPERVISOR_arch_0, address, op="mca_msrinject")


def main() -> None:
    """Put all of them."""
    call = XenCall()
    for error in json.load(sys.stdin):
        inject(call, *error)


if __name__ == "__main__":
    main()
