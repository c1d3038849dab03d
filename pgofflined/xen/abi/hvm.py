"""``hvm/hvm_op.h`` and ``hvm/params.h``: parameters of HVM-class domains."""

from __future__ import annotations

import ctypes
from typing import ClassVar, Final

from pgofflined.xen.abi.structure import AbiStructure

HVMOP_get_param: Final = 1
HVM_PARAM_CALLBACK_IRQ: Final = 0


class HvmParam(AbiStructure):
    """``struct xen_hvm_param``."""

    c_name = "struct xen_hvm_param"
    domid: int
    index: int
    value: int
    _fields_: ClassVar = [
        ("domid", ctypes.c_uint16),
        ("pad", ctypes.c_uint16),
        ("index", ctypes.c_uint32),
        ("value", ctypes.c_uint64),
    ]
