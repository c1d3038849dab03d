"""The commands that ask the daemon."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Final

from pgofflined.cli import view
from pgofflined.config import ConfigError, load
from pgofflined.control import client
from pgofflined.control.protocol import (
    MAX_WAIT,
    AcknowledgeReply,
    AcknowledgeRequest,
    JobsReply,
    JobsRequest,
    OfflineReply,
    OfflineRequest,
    QueryReply,
    QueryRequest,
    Reply,
    Request,
    StatusReply,
    StatusRequest,
    WaitRequest,
)
from pgofflined.core.policy import ControlPolicy
from pgofflined.core.status import Fate

_WAIT_PIECE: Final = MAX_WAIT / 2
# Until the next try, while enough others wait already.
_BUSY_PAUSE: Final = 1.0


def status(options: argparse.Namespace) -> int:
    """What needs a person, and how things stand; gives the exit status, as all here do."""
    return _ask_and_show(options, StatusRequest(pages=options.pages))


def query(options: argparse.Namespace) -> int:
    """What is known of one page."""
    return _ask_and_show(options, QueryRequest(mfn=options.mfn))


def jobs(options: argparse.Namespace) -> int:
    """The jobs that run or wait."""
    return _ask_and_show(options, JobsRequest())


def offline(options: argparse.Namespace) -> int:
    """Retire one page; the exit status is its fate, see README."""
    try:
        reply = _ask(options, OfflineRequest(mfn=options.mfn))
        if options.wait:
            reply = _until_its_end(options, reply)
    except _Failed as failed:
        return failed.tell()
    _show(options, reply)
    match reply:
        case OfflineReply(fate=Fate.OUT_OF_USE):
            return 0
        case OfflineReply(fate=Fate.UNDER_WAY):
            return os.EX_TEMPFAIL if options.wait else 0
        case _:
            return 1


def _until_its_end(options: argparse.Namespace, reply: Reply) -> Reply:
    """The fate of a page, or how it stands when the time is over."""
    deadline = time.monotonic() + options.timeout
    while isinstance(reply, OfflineReply) and reply.fate == Fate.UNDER_WAY:
        left = deadline - time.monotonic()
        if left <= 0:
            break
        # In pieces: a daemon should not keep a connection for somebody who has gone.
        piece = WaitRequest(mfn=options.mfn, seconds=min(left, _WAIT_PIECE))
        try:
            reply = _ask(options, piece)
        except _Busy:
            time.sleep(min(left, _BUSY_PAUSE))
    return reply


def acknowledge(options: argparse.Namespace) -> int:
    """Say that conditions are known; 1 where there was nothing to acknowledge."""
    request = AcknowledgeRequest(code=options.code, mfn=options.mfn, domid=options.domid)
    try:
        reply = _ask(options, request)
    except _Failed as failed:
        return failed.tell()
    _show(options, reply)
    done = isinstance(reply, AcknowledgeReply) and bool(reply.acknowledged)
    return 0 if done else 1


class _Failed(Exception):
    """The daemon gave no answer."""

    def __init__(self, error: Exception, status: int) -> None:
        super().__init__(str(error))
        self._status = status

    def tell(self) -> int:
        """Say why; gives the exit status."""
        return fail(self, self._status)


class _Busy(_Failed):
    """It has enough to do, and may give one later."""


def _ask_and_show(options: argparse.Namespace, request: Request) -> int:
    try:
        _show(options, _ask(options, request))
    except _Failed as failed:
        return failed.tell()
    return 0


def _ask(options: argparse.Namespace, request: Request) -> Reply:
    """The daemon's reply.  Raises _Failed."""
    try:
        return client.ask(options.socket or _configured_socket(options.config), request)
    except client.NotRunning as error:
        raise _Failed(error, os.EX_UNAVAILABLE) from None
    except client.NotAllowed as error:
        raise _Failed(error, os.EX_NOPERM) from None
    except client.Busy as error:
        raise _Busy(error, os.EX_TEMPFAIL) from None
    except client.RequestFailed as error:
        raise _Failed(error, 1) from None


def _show(options: argparse.Namespace, reply: Reply) -> None:
    print(view.as_json(reply) if options.json else "\n".join(_lines(reply)))


def _lines(reply: Reply) -> list[str]:
    now = time.time()
    match reply:
        case StatusReply():
            return view.status(reply, now)
        case JobsReply():
            return view.jobs(reply, now)
        case QueryReply():
            return view.query(reply, now)
        case OfflineReply():
            return view.offline(reply)
        case AcknowledgeReply():
            return view.acknowledge(reply, now)
        case _:
            raise AssertionError(f"the client gave {reply}")


def _configured_socket(config: Path) -> Path:
    """Where the daemon listens; the default where its configuration cannot be read."""
    try:
        return Path(load(config).policy.control.socket)
    except ConfigError:
        return Path(ControlPolicy().socket)


def fail(error: Exception, status: int) -> int:
    """Say what went wrong; gives the exit status."""
    print(f"pgofflined: {error}", file=sys.stderr)
    return status
