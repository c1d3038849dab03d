"""What this process asks of the kernel for itself."""

from __future__ import annotations

import ctypes
import logging
import os
from typing import Final

_LOG = logging.getLogger(__name__)

# include/uapi/linux/prctl.h
_PR_SET_DUMPABLE: Final = 4


def leave_no_core() -> None:
    """Have the kernel write no core of this process, which would hold pages of guests.

    A limit of 0 on its size is not enough: where core_pattern names a program, that is given the
    core whatever the limit is (core(5)).  Lasts until the process becomes another program; a child
    made by fork alone has it as well.  What it cannot do is told: it is not worth an exchange.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_DUMPABLE, *(ctypes.c_ulong(0) for _ in range(4))) != 0:
        why = os.strerror(ctypes.get_errno())
        _LOG.warning(
            "a core of this process, should there be one, may hold pages of guests: %s", why
        )
