"""Listening sockets on asyncio: bounded in connections, and idle while nobody connects."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import stat
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Final, NoReturn, Self, assert_never

from pgofflined.core.policy import TcpAddress, UnixAddress

_log = logging.getLogger(__name__)

_BACKLOG: Final = 16
# accept(2) fails with these while descriptors or memory are short, and the connection stays.
_SHORTAGE: Final = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))
_SHORTAGE_PAUSE: Final = 1.0

# What a connection may still take once its handler is done.
_FAREWELL: Final = 5.0
_MOST_DISCARDED: Final = 1 << 20

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class CannotListen(Exception):
    """An address cannot be had; the message says which, why and what to do."""


class Listener:
    """A bound and listening socket; closing it removes its file, if it has one."""

    def __init__(self, sock: socket.socket, *, path: Path | None = None) -> None:
        self._socket = sock
        self._path = path
        self._file = None if path is None else path.stat()

    @classmethod
    def open(cls, address: TcpAddress | UnixAddress, *, mode: int, setting: str) -> Self:
        """Listen at an address.

        ``mode`` is that of a unix socket's file; one that a killed daemon left is replaced.
        ``setting`` is named in the message of CannotListen.
        """
        try:
            match address:
                case TcpAddress():
                    return cls(_listen_tcp(address))
                case UnixAddress(path=path):
                    return cls(_listen_unix(Path(path), mode), path=Path(path))
                case _:
                    assert_never(address)
        except OSError as error:
            hint = _HINTS.get(error.errno or 0, "give another address")
            reason = error.strerror or str(error)
            raise CannotListen(
                f"cannot listen at {address}: {reason}; {hint} ({setting})"
            ) from error

    @property
    def port(self) -> int:
        """The TCP port, as it was chosen where 0 was asked for; 0 for a unix socket."""
        return 0 if self._path else int(self._socket.getsockname()[1])

    async def serve(self, handle: Handler, *, most: int, limit: int, name: str) -> NoReturn:
        """Give each connection to ``handle`` in a task of its own, for ever.

        At most ``most`` at a time: further ones wait in the kernel's backlog.  ``limit`` bounds
        what is read ahead of one.  A connection is closed when its handler returns; what a
        handler raises is logged and costs that connection only.
        """
        loop = asyncio.get_running_loop()
        free = asyncio.Semaphore(most)
        async with asyncio.TaskGroup() as connections:
            while True:
                await free.acquire()
                try:
                    accepted, _ = await loop.sock_accept(self._socket)
                except OSError as error:
                    free.release()
                    if error.errno in _SHORTAGE:
                        _log.error("no connection can be taken (%s): %s", name, error)
                        await asyncio.sleep(_SHORTAGE_PAUSE)
                    continue
                task = connections.create_task(_attend(accepted, handle, limit, name), name=name)
                task.add_done_callback(lambda _: free.release())

    def close(self) -> None:
        """Stop listening; may be called again."""
        if self._path is not None and self._file is not None:
            with suppress(OSError):
                # Another daemon may have put its own there meanwhile.
                if os.path.samestat(self._path.stat(), self._file):
                    self._path.unlink()
            self._path = None
        self._socket.close()


_HINTS: Final = {
    errno.EADDRINUSE: "another program, or another pgofflined, listens there; "
    "stop it or give another address",
    errno.EADDRNOTAVAIL: "this host has no such address",
    errno.EACCES: "the daemon has no right to; run it as root",
    errno.ENOENT: "the directory must exist",
    errno.EEXIST: "something that is no socket is in the way; remove it",
    errno.EROFS: "the service may write only below its RuntimeDirectory; choose a path there",
}


async def _attend(accepted: socket.socket, handle: Handler, limit: int, name: str) -> None:
    try:
        reader, writer = await asyncio.open_connection(sock=accepted, limit=limit)
    except OSError:
        accepted.close()
        return
    try:
        await handle(reader, writer)
        await _finish(reader, writer)
    except OSError:
        pass  # the other side has gone; nobody is left to answer
    except Exception:  # noqa: BLE001 - a fault in answering a question must not end the daemon
        _log.exception("a connection ended with a fault of ours (%s)", name)
    finally:
        # Not close(), which waits for a peer that does not read what was written to it.
        writer.transport.abort()
        with suppress(OSError):
            await writer.wait_closed()


async def _finish(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Let the other side have the whole answer.

    To close while something that it sent lies unread would reset the connection, and the answer
    ("your request is too long") could be lost with it.
    """
    with suppress(TimeoutError):
        async with asyncio.timeout(_FAREWELL):
            await writer.drain()
            writer.write_eof()
            discarded = 0
            while discarded < _MOST_DISCARDED and (chunk := await reader.read(4096)):
                discarded += len(chunk)


def _listen_tcp(address: TcpAddress) -> socket.socket:
    family, kind, protocol, _, where = socket.getaddrinfo(
        address.host, address.port, type=socket.SOCK_STREAM
    )[0]
    sock = socket.socket(family, kind, protocol)
    try:
        # A restart must not wait until the kernel has forgotten the last scrape.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return _listen(sock, where)
    except BaseException:
        sock.close()
        raise


def _listen_unix(path: Path, mode: int) -> socket.socket:
    _remove_stale(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # Nobody may connect between bind and chmod, whatever the umask: hence the umask.
    before = os.umask(0o777 & ~mode)
    try:
        return _listen(sock, str(path))
    except BaseException:
        sock.close()
        raise
    finally:
        os.umask(before)


def _listen(sock: socket.socket, where: object) -> socket.socket:
    sock.settimeout(0)
    sock.bind(where)  # type: ignore[arg-type]  # as getaddrinfo gave it
    sock.listen(_BACKLOG)
    return sock


def _remove_stale(path: Path) -> None:
    """Remove a socket on which nobody listens.  Raises OSError for anything else in the way."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise OSError(errno.EEXIST, "the file there is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        # A full backlog would make the probe wait, and means that somebody is there.
        probe.settimeout(0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except BlockingIOError:
            pass
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
