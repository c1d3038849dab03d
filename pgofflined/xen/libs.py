"""Xen's stable libraries: loaded by soname, prototypes written out, one thin wrapper per call.

Only libraries with a stable interface are used (libxencall, libxenforeignmemory, libxenevtchn and,
in ``store.py``, libxenstore), so that one build of the project runs on every Xen it knows.
Prototypes are those of ``xencall.h``, ``xenforeignmemory.h`` and ``xenevtchn.h``.

A wrapper takes the library as an argument only so that tests can record what would be passed.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Final, Generic, TypeAlias, TypeVar

from pgofflined.core.errors import PortError, XenError
from pgofflined.core.frames import PAGE_SIZE, Domid, Mfn

_Kind = TypeVar("_Kind", bound=ctypes.Structure)
# A ctypes.CDLL, or in tests anything that has its functions.
Library: TypeAlias = Any
_Prototypes = dict[str, tuple[Any, list[Any]]]

_HANDLE: Final = ctypes.c_void_p
_ADDRESS: Final = ctypes.c_void_p
_U64: Final = ctypes.c_uint64
# More than one thread needs at a time.
_SPARE_BUFFERS: Final = 8

_XENCALL: Final[_Prototypes] = {
    "xencall_open": (_HANDLE, [ctypes.c_void_p, ctypes.c_uint]),
    "xencall_close": (ctypes.c_int, [_HANDLE]),
    "xencall1": (ctypes.c_int, [_HANDLE, ctypes.c_uint, _U64]),
    "xencall2": (ctypes.c_int, [_HANDLE, ctypes.c_uint, _U64, _U64]),
    "xencall3": (ctypes.c_int, [_HANDLE, ctypes.c_uint, _U64, _U64, _U64]),
    "xencall4": (ctypes.c_int, [_HANDLE, ctypes.c_uint, _U64, _U64, _U64, _U64]),
    "xencall_alloc_buffer": (_ADDRESS, [_HANDLE, ctypes.c_size_t]),
    "xencall_free_buffer": (None, [_HANDLE, _ADDRESS]),
}
# Since Xen 4.16 (VERS_1.3): the same with a result of 64 bits.
_XENCALL_LONG: Final[_Prototypes] = {
    "xencall2L": (ctypes.c_long, [_HANDLE, ctypes.c_uint, _U64, _U64]),
}
_FOREIGN_MEMORY: Final[_Prototypes] = {
    "xenforeignmemory_open": (_HANDLE, [ctypes.c_void_p, ctypes.c_uint]),
    "xenforeignmemory_close": (ctypes.c_int, [_HANDLE]),
    "xenforeignmemory_map": (
        _ADDRESS,
        [_HANDLE, ctypes.c_uint32, ctypes.c_int, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p],
    ),
    "xenforeignmemory_unmap": (ctypes.c_int, [_HANDLE, _ADDRESS, ctypes.c_size_t]),
    "xenforeignmemory_map_resource": (
        _HANDLE,
        [
            _HANDLE,
            ctypes.c_uint16,
            ctypes.c_uint,
            ctypes.c_uint,
            ctypes.c_ulong,
            ctypes.c_ulong,
            ctypes.POINTER(ctypes.c_void_p),
            ctypes.c_int,
            ctypes.c_int,
        ],
    ),
    "xenforeignmemory_unmap_resource": (ctypes.c_int, [_HANDLE, _HANDLE]),
}
_EVENT_CHANNELS: Final[_Prototypes] = {
    "xenevtchn_open": (_HANDLE, [ctypes.c_void_p, ctypes.c_uint]),
    "xenevtchn_close": (ctypes.c_int, [_HANDLE]),
    "xenevtchn_fd": (ctypes.c_int, [_HANDLE]),
    "xenevtchn_bind_virq": (ctypes.c_int, [_HANDLE, ctypes.c_uint]),
    "xenevtchn_pending": (ctypes.c_int, [_HANDLE]),
    "xenevtchn_unmask": (ctypes.c_int, [_HANDLE, ctypes.c_uint32]),
}
# Since Xen 4.15 (VERS_1.2).
_EVENT_CHANNELS_ADOPT: Final[_Prototypes] = {
    "xenevtchn_fdopen": (_HANDLE, [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint]),
}


def load_library(sonames: Sequence[str], prototypes: _Prototypes) -> Library:
    """Load the first library of ``sonames`` that is there and give its functions prototypes.

    Raises PortError when none is, or when it lacks a function.
    """
    reason = ""
    for soname in sonames:
        try:
            library = ctypes.CDLL(soname, use_errno=True)
        except OSError as error:
            reason = str(error)
            continue
        declare(library, prototypes)
        return library
    raise PortError(
        f"cannot load {' or '.join(sonames)} ({reason}): install Xen's libraries in dom0"
    )


def declare(library: Library, prototypes: _Prototypes) -> None:
    """Give a library's functions their prototypes.  Raises PortError when one is missing."""
    for name, (result, arguments) in prototypes.items():
        try:
            function = getattr(library, name)
        except AttributeError:
            raise PortError(f"this host's Xen libraries are too old: {name} is missing") from None
        function.restype = result
        function.argtypes = arguments


def _open(library: Library, prefix: str) -> int:
    handle: int | None = getattr(library, f"{prefix}_open")(None, 0)
    if not handle:
        raise XenError(ctypes.get_errno() or errno.EIO, op=f"{prefix}_open")
    return handle


class XenCall:
    """Hypercalls through libxencall.  Safe for use from several threads.

    Raises XenError when the privileged device cannot be opened (ENOENT: not a Xen host, or the
    driver is not loaded; EACCES: not root).
    """

    def __init__(self, library: Library = None) -> None:
        self._library = library or load_library(["libxencall.so.1"], _XENCALL)
        has_long = hasattr(self._library, "xencall2L")
        if library is None and has_long:
            declare(self._library, _XENCALL_LONG)
        # By the number of arguments.
        self._calls = [
            getattr(self._library, f"xencall{count}{'L' if count == 2 and has_long else ''}")
            for count in range(1, 5)
        ]
        self._spare: list[int] = []
        self._handle = _open(self._library, "xencall")

    def close(self) -> None:
        """Close the handle; no call may follow."""
        if self._handle:
            while self._spare:
                self._library.xencall_free_buffer(self._handle, self._spare.pop())
            self._library.xencall_close(self._handle)
            self._handle = 0

    def buffer(self, size: int) -> AbstractContextManager[int]:
        """Address of ``size`` zeroed bytes that a hypercall can read and write.

        Ordinary memory will not do: the kernel could move or copy it during the call.
        """
        return _Buffer(self, size)

    def struct(self, kind: type[_Kind]) -> AbstractContextManager[_Kind]:
        """One zeroed structure in such a buffer; it must not be used afterwards."""
        return _Struct(self, kind)

    def take(self, size: int) -> int:
        """A buffer as of ``buffer``, that is to be given back.  Raises XenError."""
        address: int | None = None
        if size <= PAGE_SIZE:
            # Of several threads each gets another.
            with suppress(IndexError):
                address = self._spare.pop()
        if address is None:
            whole = max(size, PAGE_SIZE)
            address = self._library.xencall_alloc_buffer(self._handle, whole)
        if not address:
            raise XenError(ctypes.get_errno() or errno.ENOMEM, op="xencall_alloc_buffer")
        ctypes.memset(address, 0, size)
        return address

    def give_back(self, address: int, size: int) -> None:
        """End of a buffer.  Small ones are kept: guests wait for what they are needed for."""
        if size <= PAGE_SIZE and len(self._spare) < _SPARE_BUFFERS:
            self._spare.append(address)
        else:
            self._library.xencall_free_buffer(self._handle, address)

    def hypercall(
        self,
        number: int,
        *arguments: int,
        op: str,
        domid: Domid | None = None,
        mfn: Mfn | None = None,
    ) -> int:
        """Make a hypercall of one to four arguments and give its result.

        Raises XenError with ``op``, ``domid`` and ``mfn`` when the result is negative.
        """
        result: int = self._calls[len(arguments) - 1](self._handle, number, *arguments)
        if result < 0:
            raise XenError(ctypes.get_errno(), op=op, domid=domid, mfn=mfn)
        return result


class _Buffer:
    """A class, and no generator, which takes twice as long."""

    __slots__ = ("_address", "_call", "_size")

    def __init__(self, call: XenCall, size: int) -> None:
        self._call = call
        self._size = size
        self._address = 0

    def __enter__(self) -> int:
        self._address = self._call.take(self._size)
        return self._address

    def __exit__(self, *_: object) -> None:
        self._call.give_back(self._address, self._size)


class _Struct(Generic[_Kind]):
    __slots__ = ("_address", "_call", "_kind", "_size")

    def __init__(self, call: XenCall, kind: type[_Kind]) -> None:
        self._call = call
        self._kind = kind
        self._size = ctypes.sizeof(kind)
        self._address = 0

    def __enter__(self) -> _Kind:
        self._address = self._call.take(self._size)
        return self._kind.from_address(self._address)

    def __exit__(self, *_: object) -> None:
        self._call.give_back(self._address, self._size)


class ForeignPages:
    """Mappings of other domains' frames through libxenforeignmemory; none outlives its block."""

    def __init__(self, library: Library = None) -> None:
        self._library = library or load_library(["libxenforeignmemory.so.1"], _FOREIGN_MEMORY)
        self._handle = _open(self._library, "xenforeignmemory")

    def close(self) -> None:
        """Close the handle; no call may follow."""
        if self._handle:
            self._library.xenforeignmemory_close(self._handle)
            self._handle = 0

    @contextmanager
    def frames(self, domid: Domid, mfns: Sequence[int], *, writable: bool = False) -> Iterator[int]:
        """Address at which the frames lie one after the other.

        Raises XenError that names the first frame which cannot be mapped; none is mapped then.
        """
        count = len(mfns)
        gfns = (ctypes.c_uint64 * count)(*mfns)
        errors = (ctypes.c_int * count)()
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        address: int | None = self._library.xenforeignmemory_map(
            self._handle, domid, protection, count, gfns, errors
        )
        if not address:
            code = ctypes.get_errno() or errno.EINVAL
            raise XenError(code, op="xenforeignmemory_map", domid=domid, mfn=Mfn(mfns[0]))
        try:
            # Touching a page of the mapping that failed would end the process with SIGBUS.
            if any(errors):
                mfn, code = next(pair for pair in zip(mfns, errors, strict=True) if pair[1])
                raise XenError(abs(code), op="xenforeignmemory_map", domid=domid, mfn=Mfn(mfn))
            yield address
        finally:
            self._unmap(address, count)

    def _unmap(self, address: int, count: int) -> None:
        if self._library.xenforeignmemory_unmap(self._handle, address, count) < 0:
            raise XenError(ctypes.get_errno(), op="xenforeignmemory_unmap")

    @contextmanager
    def resource(self, domid: Domid, kind: int, number: int, frames: int) -> Iterator[int]:
        """Address of the first ``frames`` pages of a resource (XENMEM_acquire_resource), read-only.

        Raises XenError, EOPNOTSUPP where dom0's kernel cannot map resources (before Linux 4.18).
        """
        address = ctypes.c_void_p()
        resource: int | None = self._library.xenforeignmemory_map_resource(
            self._handle,
            domid,
            kind,
            number,
            0,
            frames,
            ctypes.byref(address),
            mmap.PROT_READ,
            0,
        )
        if not resource or not address.value:
            code = ctypes.get_errno() or errno.EINVAL
            raise XenError(code, op="xenforeignmemory_map_resource", domid=domid)
        try:
            yield address.value
        finally:
            if self._library.xenforeignmemory_unmap_resource(self._handle, resource) < 0:
                raise XenError(ctypes.get_errno(), op="xenforeignmemory_unmap_resource")


class EventChannels:
    """One open event-channel device through libxenevtchn.

    With ``fd`` the descriptor, kept from an earlier run with its bindings, is taken over and
    closed by ``close``.
    """

    def __init__(self, library: Library = None, *, fd: int | None = None) -> None:
        self._library = library or load_library(["libxenevtchn.so.1"], _EVENT_CHANNELS)
        if fd is None:
            self._handle = _open(self._library, "xenevtchn")
            return
        if library is None:
            declare(self._library, _EVENT_CHANNELS_ADOPT)
        handle: int | None = self._library.xenevtchn_fdopen(None, fd, 0)
        if not handle:
            raise XenError(ctypes.get_errno() or errno.EIO, op="xenevtchn_fdopen")
        self._handle = handle

    def close(self) -> None:
        """Close the descriptor, which ends its bindings unless a copy is kept elsewhere."""
        if self._handle:
            self._library.xenevtchn_close(self._handle)
            self._handle = 0

    def fileno(self) -> int:
        """The descriptor, readable when a bound channel is pending."""
        return int(self._library.xenevtchn_fd(self._handle))

    def bind_virq(self, virq: int) -> int:
        """Bind a virtual interrupt and give its port.  Raises XenError, EEXIST when it is taken."""
        port: int = self._library.xenevtchn_bind_virq(self._handle, virq)
        if port < 0:
            raise XenError(ctypes.get_errno(), op="xenevtchn_bind_virq")
        return port

    def pending(self) -> int | None:
        """Take a pending port, which stays masked until ``unmask``; None when none is pending.

        Never blocks, provided that the descriptor is non-blocking.
        """
        port: int = self._library.xenevtchn_pending(self._handle)
        if port >= 0:
            return port
        code = ctypes.get_errno()
        if code in (errno.EAGAIN, errno.EINTR):
            return None
        raise XenError(code, op="xenevtchn_pending")

    def unmask(self, port: int) -> None:
        """Let the port fire again; harmless when it is not masked."""
        if self._library.xenevtchn_unmask(self._handle, port) < 0:
            raise XenError(ctypes.get_errno(), op="xenevtchn_unmask")
