"""Serves the metrics over HTTP, on the event loop.

The library's own server has a thread that looks every half second whether it is to end, and
threads that would have to ask the loop for a snapshot.  A scrape takes a few milliseconds and
comes a few times a minute: it is answered on the loop, which sleeps otherwise.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable, Iterable
from http.client import HTTPException, parse_headers
from typing import Any, Final, NoReturn, Self

from prometheus_client import make_wsgi_app

from pgofflined.core.policy import TcpAddress, UnixAddress
from pgofflined.metrics.collector import Metrics
from pgofflined.serving import Listener

_PATH: Final = "/metrics"
_MAX_REQUEST: Final = 16384
_MAX_CONNECTIONS: Final = 8
_REQUEST_TIMEOUT: Final = 10.0

# On TCP's loopback anybody on the host may ask; who may on a unix socket is for its directory.
_SOCKET_MODE: Final = 0o666

_Start = Callable[[str, list[tuple[str, str]]], object]
_WsgiApp = Callable[[dict[str, Any], _Start], Iterable[bytes]]


class _BadRequest(Exception):
    """What was sent cannot be answered; the status line says why."""


class MetricsServer:
    """Answers GET /metrics; one request a connection."""

    def __init__(self, listener: Listener, metrics: Metrics) -> None:
        self._listener = listener
        self._app: _WsgiApp = make_wsgi_app(metrics.registry)

    @classmethod
    def open(cls, address: TcpAddress | UnixAddress, metrics: Metrics) -> Self:
        """Listen at an address.  Raises CannotListen."""
        listener = Listener.open(address, mode=_SOCKET_MODE, setting="metrics.listen")
        return cls(listener, metrics)

    @property
    def port(self) -> int:
        """The TCP port; 0 on a unix socket."""
        return self._listener.port

    async def serve(self) -> NoReturn:
        """Answer requests for ever."""
        await self._listener.serve(
            self._answer, most=_MAX_CONNECTIONS, limit=_MAX_REQUEST, name="metrics"
        )

    def close(self) -> None:
        """Stop listening."""
        self._listener.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_REQUEST_TIMEOUT):
                untrusted_request = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return
        except TimeoutError:
            response = _plain("408 Request Timeout")
        except asyncio.LimitOverrunError:
            response = _plain("431 Request Header Fields Too Large")
        else:
            response = self._respond(untrusted_request)
        writer.write(response)

    def _respond(self, untrusted_request: bytes) -> bytes:
        try:
            environ = _parse(untrusted_request)
        except _BadRequest as error:
            return _plain(str(error))
        if environ["REQUEST_METHOD"] != "GET":
            return _plain("405 Method Not Allowed")
        if environ["PATH_INFO"] != _PATH:
            return _plain("404 Not Found", f"the metrics are at {_PATH}\n")
        began: list[tuple[str, list[tuple[str, str]]]] = []
        body = b"".join(self._app(environ, lambda status, headers: began.append((status, headers))))
        ((status, headers),) = began
        return _response(status, headers, body)


def _parse(untrusted_request: bytes) -> dict[str, Any]:
    """The part of WSGI's environment that the library's application looks at."""
    first, _, rest = untrusted_request.partition(b"\r\n")
    try:
        method, target, version = first.decode("ascii").split(" ")
        headers = parse_headers(io.BytesIO(rest))
    except (ValueError, HTTPException):
        raise _BadRequest("400 Bad Request") from None
    if not version.startswith("HTTP/1."):
        raise _BadRequest("505 HTTP Version Not Supported")
    # A query would choose series that the collector names beforehand, and ours names none.
    path = target.partition("?")[0]
    return {
        "REQUEST_METHOD": method,
        "PATH_INFO": path,
        "HTTP_ACCEPT": headers.get("Accept", ""),
        "HTTP_ACCEPT_ENCODING": headers.get("Accept-Encoding", ""),
    }


def _plain(status: str, text: str = "") -> bytes:
    body = (text or f"{status}\n").encode()
    return _response(status, [("Content-Type", "text/plain; charset=utf-8")], body)


def _response(status: str, headers: list[tuple[str, str]], body: bytes) -> bytes:
    lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in headers)]
    lines += [f"Content-Length: {len(body)}", "Connection: close", "", ""]
    return "\r\n".join(lines).encode("latin-1") + body
