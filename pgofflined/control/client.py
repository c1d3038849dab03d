"""The command line's end of the control socket."""

from __future__ import annotations

import socket
from contextlib import suppress
from pathlib import Path
from typing import Final

from pgofflined import __version__
from pgofflined.control.protocol import MAX_REPLY, ErrorReply, Reply, Request, decode_reply, encode

_TIMEOUT: Final = 60.0


class NotRunning(Exception):
    """No daemon answers at the socket."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(
            f"pgofflined does not answer at {path} ({why}); "
            "start it with: systemctl start pgofflined"
        )


class NotAllowed(Exception):
    """The daemon answers root only."""


class RequestFailed(Exception):
    """The daemon could not do what was asked."""


class Busy(RequestFailed):
    """The daemon has enough requests of the kind; the same may be done later."""


_OTHER_VERSION: Final = (
    f"; this command is of pgofflined {__version__}: after an upgrade restart the daemon "
    "(systemctl restart pgofflined)"
)


def ask(path: Path, request: Request, *, timeout: float = _TIMEOUT) -> Reply:
    """Send one request and wait for its reply, which is never an ErrorReply.

    Raises NotRunning, NotAllowed, Busy and RequestFailed.
    """
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(timeout)
            connection.connect(str(path))
            line = _converse(connection, encode(request))
    except PermissionError:
        raise NotAllowed(f"only root may ask the daemon (at {path}); use sudo") from None
    except TimeoutError:
        raise RequestFailed(
            f"the daemon did not reply within {timeout:g} s; see: systemctl status pgofflined"
        ) from None
    except OSError as error:
        raise NotRunning(path, error.strerror or str(error)) from None
    if not line.endswith(b"\n"):
        raise NotRunning(path, "it ended before it replied")
    try:
        reply = decode_reply(line)
    except ValueError as error:
        raise RequestFailed(f"{error}{_OTHER_VERSION}") from None
    if isinstance(reply, ErrorReply):
        raise _error(reply)
    return reply


def _error(reply: ErrorReply) -> NotAllowed | RequestFailed:
    match reply.code:
        case "not_allowed":
            return NotAllowed(reply.message)
        case "busy":
            return Busy(reply.message)
        case "bad_request":
            # What this command sends, a daemon of its own version understands.
            return RequestFailed(f"{reply.message}{_OTHER_VERSION}")
        case _:
            return RequestFailed(reply.message)


def _converse(connection: socket.socket, request: bytes) -> bytes:
    # Who is turned away before asking finds the reason there to be read.
    with suppress(BrokenPipeError):
        connection.sendall(request)
    with connection.makefile("rb") as replies:
        return replies.readline(MAX_REPLY)
