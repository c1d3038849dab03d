"""Word of ended domains, from a libxenstore that the test plays."""

from __future__ import annotations

import ctypes
import errno
from typing import Any

import pytest

from pgofflined.core.errors import XenError
from pgofflined.xen.ends import XenstoreEnds
from pgofflined.xen.store import Store

DESCRIPTOR = 7
HANDLE = 0x1000


class Library:
    """What libxenstore does, as far as watches go; events are malloc'ed as its own are."""

    def __init__(self) -> None:
        self.watched: list[bytes] = []
        self.events = 0
        self.error = errno.EAGAIN
        self.is_closed = False
        self._libc = ctypes.CDLL(None)
        self._libc.malloc.restype = ctypes.c_void_p

    def xs_open(self, flags: int) -> int:
        assert flags == 0
        return HANDLE

    def xs_close(self, handle: int) -> None:
        assert handle == HANDLE
        self.is_closed = True

    def xs_watch(self, handle: int, path: bytes, token: bytes) -> bool:
        assert (handle, bool(token)) == (HANDLE, True)
        if self.error != errno.EAGAIN:
            ctypes.set_errno(self.error)
            return False
        self.watched.append(path)
        return True

    def xs_fileno(self, handle: int) -> int:
        assert handle == HANDLE
        return DESCRIPTOR

    def xs_check_watch(self, handle: int) -> Any:  # noqa: ANN401 - a pointer, as ctypes has it
        assert handle == HANDLE
        if self.events:
            self.events -= 1
            return self._libc.malloc(16)
        ctypes.set_errno(self.error)
        return None


def test_all_events_that_are_there_are_taken() -> None:
    library = Library()
    ends = XenstoreEnds(Store(library))
    assert library.watched == [b"@releaseDomain"]
    assert ends.fileno() == DESCRIPTOR
    library.events = 3
    ends.drain()
    assert library.events == 0
    ends.drain()
    ends.close()
    assert library.is_closed


def test_a_lost_connection_is_an_error() -> None:
    library = Library()
    ends = XenstoreEnds(Store(library))
    library.error = errno.EBADF
    with pytest.raises(XenError, match="xs_check_watch"):
        ends.drain()


def test_what_cannot_be_watched_is_closed() -> None:
    library = Library()
    library.error = errno.EIO
    with pytest.raises(XenError, match="@releaseDomain"):
        XenstoreEnds(Store(library))
    assert library.is_closed
