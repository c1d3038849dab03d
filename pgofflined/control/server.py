"""The daemon's end of the control socket."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import struct
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Final, NoReturn, Protocol, Self, assert_never

from pgofflined.control.protocol import (
    MAX_REQUEST,
    AcknowledgeRequest,
    ErrorReply,
    JobsRequest,
    OfflineRequest,
    OtherVersion,
    QueryRequest,
    Reply,
    Request,
    StatusRequest,
    WaitRequest,
    decode_request,
    encode,
)
from pgofflined.control.replies import (
    acknowledge_reply,
    jobs_reply,
    offline_reply,
    query_reply,
    status_reply,
)
from pgofflined.core.conditions import ConditionCode
from pgofflined.core.errors import PortError
from pgofflined.core.frames import Domid, Mfn, parse_mfn
from pgofflined.core.incidents import Acknowledged
from pgofflined.core.policy import UnixAddress
from pgofflined.core.status import FrameAnswer, OfflineAnswer, Snapshot
from pgofflined.serving import Listener

_log = logging.getLogger(__name__)

_SOCKET_MODE: Final = 0o600
_MAX_CONNECTIONS: Final = 32
_REQUEST_TIMEOUT: Final = 10.0
_REPLY_TIMEOUT: Final = 10.0
# What may take long has a share of the connections: queries if Xen does not answer, and those who
# wait for what becomes of a page.  The other half is for ``status``.
_MAX_QUERIES: Final = 8
_MAX_WAITING: Final = 8

_PEER: Final = struct.Struct("3i")  # struct ucred: pid, uid, gid


class _NoRequest(Exception):
    """No request is to be had from a connection any more; ``reply`` is to be sent."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.reply = ErrorReply(code=code, message=message)


class _Share:
    """So many requests of a kind may be under way."""

    def __init__(self, most: int, what: str) -> None:
        self._most = most
        self._what = what
        self._taken = 0

    @property
    def is_full(self) -> bool:
        """Whether there is no room for another."""
        return self._taken >= self._most

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Be one of them.  Raises _Busy."""
        if self.is_full:
            raise _Busy(f"{self._taken} requests wait for {self._what} already; try again later")
        self._taken += 1
        try:
            yield
        finally:
            self._taken -= 1


class _Busy(Exception):
    """There are enough of a kind under way."""


class Operations(Protocol):
    """What can be asked of the daemon."""

    def snapshot(self) -> Snapshot:
        """The daemon at this moment."""
        ...

    def max_mfn(self) -> Mfn:
        """Highest frame of the host."""
        ...

    async def query(self, mfn: Mfn) -> FrameAnswer:
        """What is known of a frame.  Raises PortError."""
        ...

    async def offline(self, mfn: Mfn, *, is_awaited: bool) -> OfflineAnswer:
        """Retire a frame; ``is_awaited``: answer when the first look at it is over."""
        ...

    async def wait(self, mfn: Mfn, seconds: float) -> OfflineAnswer:
        """What has become of a frame in hand, at its end or after so many seconds."""
        ...

    def acknowledge(
        self, code: ConditionCode | None, mfn: Mfn | None, domid: Domid | None, *, uid: int
    ) -> Acknowledged:
        """A person knows of the conditions of this code, page and guest; None stands for any."""
        ...


class ControlServer:
    """Answers requests on a unix socket, those of root and of the daemon's own user."""

    def __init__(
        self, listener: Listener, operations: Operations, allowed_uids: Collection[int]
    ) -> None:
        self._listener = listener
        self._operations = operations
        self._allowed_uids = allowed_uids
        self._queries = _Share(_MAX_QUERIES, "Xen")
        self._waits = _Share(_MAX_WAITING, "what becomes of a page")

    @classmethod
    def open(
        cls, path: str, operations: Operations, *, allowed_uids: Collection[int] | None = None
    ) -> Self:
        """Listen at a path.  Raises CannotListen, as when another daemon listens there."""
        listener = Listener.open(
            UnixAddress(path=path), mode=_SOCKET_MODE, setting="control.socket"
        )
        allowed = {0, os.geteuid()} if allowed_uids is None else allowed_uids
        return cls(listener, operations, allowed)

    async def serve(self) -> NoReturn:
        """Answer requests for ever."""
        await self._listener.serve(
            self._attend, most=_MAX_CONNECTIONS, limit=MAX_REQUEST, name="control"
        )

    def close(self) -> None:
        """Stop listening and remove the socket."""
        self._listener.close()

    async def _attend(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        uid = _peer_uid(writer)
        if uid not in self._allowed_uids:
            _log.warning("uid %d was turned away from the control socket", uid)
            message = "only root may ask; use sudo"
            writer.write(encode(ErrorReply(code="not_allowed", message=message)))
            return
        try:
            while untrusted_line := await _next_line(reader):
                await _send(writer, await self._reply(untrusted_line, uid))
        except _NoRequest as error:
            await _send(writer, error.reply)

    async def _reply(self, untrusted_line: bytes, uid: int) -> Reply:
        try:
            request = decode_request(untrusted_line)
        except ValueError as error:
            return ErrorReply(code="bad_request", message=str(error))
        except OtherVersion as error:
            return ErrorReply(code="other_version", message=str(error))
        try:
            return await self._perform(request, uid)
        except ValueError as error:
            return ErrorReply(code="bad_value", message=str(error))
        except _Busy as error:
            return ErrorReply(code="busy", message=str(error))
        except PortError as error:
            return ErrorReply(code="failed", message=str(error))
        except Exception:  # noqa: BLE001 - a fault in answering a question must not end the daemon
            _log.exception("a request on the control socket met a fault of ours")
            message = "a fault of the daemon's; see its journal: journalctl -u pgofflined"
            return ErrorReply(code="internal", message=message)

    async def _perform(self, request: Request, uid: int) -> Reply:
        match request:
            case StatusRequest(pages=pages):
                return status_reply(self._operations.snapshot(), pages=pages)
            case JobsRequest():
                return jobs_reply(self._operations.snapshot())
            case QueryRequest(mfn=untrusted_mfn):
                with self._queries.taken():
                    return query_reply(await self._operations.query(self._mfn(untrusted_mfn)))
            case OfflineRequest(mfn=untrusted_mfn, wait=is_awaited):
                mfn = self._mfn(untrusted_mfn)
                # Nobody is turned away: what is asked is done in either case.
                if self._waits.is_full or not is_awaited:
                    return offline_reply(await self._operations.offline(mfn, is_awaited=False))
                with self._waits.taken():
                    return offline_reply(await self._operations.offline(mfn, is_awaited=True))
            case WaitRequest(mfn=untrusted_mfn, seconds=seconds):
                mfn = self._mfn(untrusted_mfn)
                with self._waits.taken():
                    return offline_reply(await self._operations.wait(mfn, seconds))
            case AcknowledgeRequest(code=code, mfn=untrusted_mfn, domid=number):
                page = None if untrusted_mfn is None else self._mfn(untrusted_mfn)
                domid = None if number is None else Domid(number)
                return acknowledge_reply(self._operations.acknowledge(code, page, domid, uid=uid))
            case _:
                assert_never(request)

    def _mfn(self, untrusted_text: str) -> Mfn:
        return parse_mfn(untrusted_text, max_mfn=self._operations.max_mfn())


async def _next_line(reader: asyncio.StreamReader) -> bytes:
    """The next request, empty at the end.  Raises _NoRequest."""
    try:
        async with asyncio.timeout(_REQUEST_TIMEOUT):
            return await reader.readuntil(b"\n")
    except asyncio.IncompleteReadError as error:
        if not error.partial:
            return b""
        raise _NoRequest("bad_request", "a request ends with a line break") from None
    except asyncio.LimitOverrunError:
        raise _NoRequest("bad_request", f"a request has at most {MAX_REQUEST} bytes") from None
    except TimeoutError:
        raise _NoRequest("timeout", f"no request came within {_REQUEST_TIMEOUT:g} s") from None


async def _send(writer: asyncio.StreamWriter, reply: Reply) -> None:
    async with asyncio.timeout(_REPLY_TIMEOUT):
        writer.write(encode(reply))
        await writer.drain()


def _peer_uid(writer: asyncio.StreamWriter) -> int:
    peer = writer.get_extra_info("socket")
    credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    _, uid, _ = _PEER.unpack(credentials)
    return int(uid)
