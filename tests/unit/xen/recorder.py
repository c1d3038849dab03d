"""A libxencall that records what a hypervisor would be asked, and answers as a test says."""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Callable
from dataclasses import dataclass, field

from pgofflined.core.frames import Domid
from pgofflined.xen.abi.domctl import Domctl, GetDomainInfo
from pgofflined.xen.abi.interface import Interface
from pgofflined.xen.abi.sysctl import Sysctl
from pgofflined.xen.control import Control
from pgofflined.xen.libs import XenCall

# The hypercall's number and arguments to its result; OSError stands for a failed call.
Answer = Callable[[int, tuple[int, ...]], int]

INTERFACE = Interface(domctl=0x17, sysctl=0x15)


@dataclass
class FakeXenCall:
    """What libxencall exports, as far as ``libs.XenCall`` uses it."""

    answer: Answer
    calls: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    buffers: dict[int, ctypes.Array[ctypes.c_char]] = field(default_factory=dict)

    def xencall_open(self, _logger: None, _flags: int) -> int:
        return 1

    def xencall_close(self, _handle: int) -> int:
        return 0

    def xencall_alloc_buffer(self, _handle: int, size: int) -> int:
        buffer = ctypes.create_string_buffer(size)
        # What is there before a call is not zero in real life either.
        ctypes.memset(buffer, 0xA5, size)
        self.buffers[ctypes.addressof(buffer)] = buffer
        return ctypes.addressof(buffer)

    def xencall_free_buffer(self, _handle: int, address: int) -> None:
        del self.buffers[address]

    def _call(self, _handle: int, number: int, *arguments: int) -> int:
        self.calls.append((number, arguments))
        try:
            return self.answer(number, arguments)
        except OSError as error:
            ctypes.set_errno(error.errno or errno.EIO)
            return -1

    xencall1 = xencall2 = xencall3 = xencall4 = _call


def calling(answer: Answer) -> tuple[XenCall, FakeXenCall]:
    """Hypercalls that a test answers, and what was asked."""
    fake = FakeXenCall(answer)
    return XenCall(fake), fake


def control(answer: Answer) -> Control:
    """Domctl and sysctl that a test answers."""
    return Control(calling(answer)[0], INTERFACE)


def failing(code: int) -> OSError:
    return OSError(code, "from the test")


def domctl_at(address: int) -> tuple[Domctl, int]:
    """A domctl request, and the address of its argument."""
    return Domctl.from_address(address), address + Domctl.u.offset


def sysctl_at(address: int) -> tuple[Sysctl, int]:
    """A sysctl request, and the address of its argument."""
    return Sysctl.from_address(address), address + Sysctl.u.offset


def put(address: int, value: ctypes.Structure) -> None:
    ctypes.memmove(address, ctypes.addressof(value), ctypes.sizeof(value))


def domain_info(domid: int, *, flags: int = 0) -> GetDomainInfo:
    return GetDomainInfo(domain=Domid(domid), flags=flags, max_vcpu_id=1, tot_pages=32768)
