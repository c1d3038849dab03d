"""xenstore through libxenstore; every value read is untrusted bytes.

Prototypes are those of ``xenstore.h``.  A connection belongs to one thread and one operation: it is
opened for that and closed after it, so that none outlives a restart of the store.
"""

from __future__ import annotations

import ctypes
import errno
import select
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Final, Protocol

from pgofflined.core.errors import DomainGone, XenError
from pgofflined.core.frames import Domid
from pgofflined.xen.libs import Library, load_library

_HANDLE: Final = ctypes.c_void_p
_MEMORY: Final = ctypes.c_void_p  # malloc'ed by the library, to be freed by us

# Soname 4 since Xen 4.16, 3.0 before; all functions used are in both.
_SONAMES: Final = ("libxenstore.so.4", "libxenstore.so.3.0")
_XENSTORE: Final[dict[str, tuple[Any, list[Any]]]] = {
    "xs_open": (_HANDLE, [ctypes.c_ulong]),
    "xs_close": (None, [_HANDLE]),
    "xs_read": (
        _MEMORY,
        [_HANDLE, ctypes.c_uint32, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint)],
    ),
    "xs_write": (
        ctypes.c_bool,
        [_HANDLE, ctypes.c_uint32, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_uint],
    ),
    "xs_watch": (ctypes.c_bool, [_HANDLE, ctypes.c_char_p, ctypes.c_char_p]),
    "xs_fileno": (ctypes.c_int, [_HANDLE]),
    "xs_check_watch": (_MEMORY, [_HANDLE]),
    "xs_transaction_start": (ctypes.c_uint32, [_HANDLE]),
    "xs_transaction_end": (ctypes.c_bool, [_HANDLE, ctypes.c_uint32, ctypes.c_bool]),
    "xs_resume_domain": (ctypes.c_bool, [_HANDLE, ctypes.c_uint]),
}
_NO_TRANSACTION: Final = 0
_CONFLICTS: Final = 100


class StorePort(Protocol):
    """One connection to xenstore."""

    def read(self, path: str) -> bytes | None:
        """A node's value, None where there is no such node."""
        ...

    def replace(self, path: str, *, expected: frozenset[bytes], value: bytes) -> bytes:
        """Write a node if its value is an expected one, and give the value it had.

        A missing node counts as empty.  In one transaction: nobody changes it in between.
        """
        ...

    def watch(self, path: str) -> None:
        """Let ``wait`` return when the node changes, and once right away."""
        ...

    def wait(self, seconds: float) -> None:
        """Wait for a change of a watched node, at most so long."""
        ...

    def resume_domain(self, domid: Domid) -> None:
        """Tell xenstored that a domain runs again, so that it notices its next shutdown."""
        ...


StoreOpener = Callable[[], AbstractContextManager[StorePort]]


class Store:
    """``StorePort`` through libxenstore."""

    def __init__(self, library: Library = None) -> None:
        self._library = library or load_library(_SONAMES, _XENSTORE)
        self._libc = ctypes.CDLL(None)
        self._libc.free.argtypes = [ctypes.c_void_p]
        self._libc.free.restype = None
        handle: int | None = self._library.xs_open(0)
        if not handle:
            raise XenError(ctypes.get_errno() or errno.EIO, op="xs_open")
        self._handle = handle
        self._watching = False

    def close(self) -> None:
        """Close the connection; its watches end."""
        if self._handle:
            self._library.xs_close(self._handle)
            self._handle = 0

    def read(self, path: str) -> bytes | None:
        """A node's value, None where there is no such node.  Raises XenError."""
        return self._read(_NO_TRANSACTION, path)

    def _read(self, transaction: int, path: str) -> bytes | None:
        length = ctypes.c_uint()
        memory: int | None = self._library.xs_read(
            self._handle, transaction, path.encode(), ctypes.byref(length)
        )
        if not memory:
            code = ctypes.get_errno()
            if code == errno.ENOENT:
                return None
            raise XenError(code, op=f"xs_read {path}")
        try:
            return ctypes.string_at(memory, length.value)
        finally:
            self._libc.free(memory)

    def replace(self, path: str, *, expected: frozenset[bytes], value: bytes) -> bytes:
        """Write a node if its value is an expected one, and give the value it had.

        Raises XenError, EAGAIN when others kept changing the store.
        """
        for _ in range(_CONFLICTS):
            transaction: int = self._library.xs_transaction_start(self._handle)
            if not transaction:
                raise XenError(ctypes.get_errno(), op="xs_transaction_start")
            done = False
            try:
                before = self._read(transaction, path) or b""
                wanted = before in expected
                if wanted:
                    self._write(transaction, path, value)
                done = True
            finally:
                ended: bool = self._library.xs_transaction_end(
                    self._handle, transaction, not (done and wanted)
                )
                code = ctypes.get_errno()
            if ended:
                return before
            if code != errno.EAGAIN:
                raise XenError(code, op="xs_transaction_end")
        raise XenError(errno.EAGAIN, op=f"xs_transaction_end {path}")

    def _write(self, transaction: int, path: str, value: bytes) -> None:
        if not self._library.xs_write(self._handle, transaction, path.encode(), value, len(value)):
            raise XenError(ctypes.get_errno(), op=f"xs_write {path}")

    def watch(self, path: str) -> None:
        """Watch a node.  Raises XenError."""
        if not self._library.xs_watch(self._handle, path.encode(), b"pgofflined"):
            raise XenError(ctypes.get_errno(), op=f"xs_watch {path}")
        self._watching = True

    def wait(self, seconds: float) -> None:
        """Sleep until a watch fires or the time is over; takes every event that is there."""
        if not self._watching:
            raise ValueError("nothing is watched")
        poller = select.poll()
        poller.register(self.fileno(), select.POLLIN)
        poller.poll(max(0.0, seconds) * 1000)
        self.drain()

    def fileno(self) -> int:
        """Descriptor that is readable when a watch has fired."""
        return int(self._library.xs_fileno(self._handle))

    def drain(self) -> None:
        """Take every event that is there; does not wait.  Raises XenError."""
        while True:
            event: int | None = self._library.xs_check_watch(self._handle)
            if not event:
                code = ctypes.get_errno()
                if code == errno.EAGAIN:
                    return
                raise XenError(code, op="xs_check_watch")
            self._libc.free(event)

    def resume_domain(self, domid: Domid) -> None:
        """Tell xenstored that a domain runs again.  Raises XenError, DomainGone."""
        if not self._library.xs_resume_domain(self._handle, domid):
            code = ctypes.get_errno()
            if code == errno.ENOENT:
                raise DomainGone(domid)
            raise XenError(code, op="xs_resume_domain", domid=domid)


@contextmanager
def open_store() -> Iterator[StorePort]:
    """A connection for one operation.  Raises XenError when xenstored cannot be reached."""
    store = Store()
    try:
        yield store
    finally:
        store.close()
