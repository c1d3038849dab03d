"""The base of every mirrored structure."""

from __future__ import annotations

import ctypes
from typing import ClassVar


class AbiStructure(ctypes.Structure):
    """A C structure of a public header; fields bear the header's names.

    ``c_name`` is what the compiler calls it; the ABI test compares size and offsets through it.
    A trailing underscore stands where C's name is a Python keyword, a leading ``_pad`` marks
    padding that the header leaves to the compiler.
    """

    c_name: ClassVar[str]
