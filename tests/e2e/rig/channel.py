"""The test run's end of the channel to the agent in dom0."""

from __future__ import annotations

import contextlib
import itertools
import queue
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

from .errors import RigError
from .frames import Frame, FrameError, encode, read_frame

SILENCE_LIMIT = 90.0
"""Seconds without any answer, pings included, after which dom0 counts as hung."""
PING_INTERVAL = 5.0
LAST_OPS = ("exit", "done", "end", "error")


class ChannelError(RigError):
    """The channel is broken or silent; the host is to be given up."""


class Channel:
    """Requests to the agent, several at a time from any thread."""

    def __init__(self, connection: socket.socket, *, check: Callable[[], None]) -> None:
        """`check` is called now and then while waiting; it raises when the host is gone."""
        self._connection = connection
        # A hung host takes nothing in; sending must not block for ever.
        limit = struct.pack("ll", int(SILENCE_LIMIT), 0)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        self._check = check
        self._sending = threading.Lock()
        self._numbers = itertools.count(1)
        self._answers: dict[int, queue.SimpleQueue[Frame]] = {}
        self._heard = time.monotonic()
        self._broken: str | None = None
        self._hello = threading.Event()
        threading.Thread(target=self._listen, name="rig-channel", daemon=True).start()

    def wait_hello(self, timeout: float) -> None:
        """Wait for the agent to come up. ChannelError after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not self._hello.wait(0.5):
            self._raise_if_broken()
            self._check()
            if time.monotonic() > deadline:
                raise ChannelError(f"no sign of the agent within {timeout:.0f} s")
        self._heard = time.monotonic()

    def request(self, fields: dict[str, object], blob: bytes = b"") -> Iterator[Frame]:
        """Send a request; yield its answers, the last one included.

        ChannelError when the agent stays silent too long, or the stream broke. An answer
        "error" is yielded like any other.
        """
        number = next(self._numbers)
        answers = self._answers[number] = queue.SimpleQueue()
        try:
            self._heard = time.monotonic()
            self._send(Frame(fields={**fields, "id": number}, blob=blob))
            while True:
                frame = self._next(answers)
                yield frame
                if frame.fields.get("op") in LAST_OPS:
                    return
        finally:
            del self._answers[number]

    def close(self) -> None:
        """Disconnect."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def _next(self, answers: queue.SimpleQueue[Frame]) -> Frame:
        pinged = time.monotonic()
        while True:
            with contextlib.suppress(queue.Empty):
                return answers.get(timeout=0.5)
            self._raise_if_broken()
            self._check()
            now = time.monotonic()
            if now - self._heard > SILENCE_LIMIT:
                raise ChannelError(f"the agent has been silent for {SILENCE_LIMIT:.0f} s")
            if now - pinged > PING_INTERVAL:
                self._send(Frame(fields={"id": 0, "op": "ping"}))
                pinged = now

    def _send(self, frame: Frame) -> None:
        self._raise_if_broken()
        try:
            with self._sending:
                self._connection.sendall(encode(frame))
        except OSError as error:
            raise ChannelError(f"cannot send to the agent: {error}") from error

    def _raise_if_broken(self) -> None:
        if self._broken is not None:
            raise ChannelError(self._broken)

    def _listen(self) -> None:
        try:
            while (frame := read_frame(self._connection.recv)) is not None:
                self._heard = time.monotonic()
                if frame.fields.get("op") == "hello":
                    self._hello.set()
                elif (answers := self._answers.get(frame.integer("id"))) is not None:
                    answers.put(frame)
            self._broken = "QEMU closed the channel"
        except (OSError, FrameError, ValueError) as error:
            self._broken = f"the channel is broken: {error}"
