"""The agent in dom0: runs commands and moves files for the test run.

It speaks frames on a virtio-serial port. Each request gets a thread of its
own, so that a long command never holds up others. Runs on dom0's Python,
with nothing but the standard library.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from .frames import CHUNK, Frame, FrameError, encode, read_frame

PORT = Path("/dev/virtio-ports/rig.agent")
PORT_LIMIT = 60.0
PIPE_GRACE = 2.0
"""Seconds to wait for output after the command ended: a background child may hold the pipe open."""

Send = Callable[[Frame], None]


class Port:
    """The virtio-serial port: whole frames in, whole frames out."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._sending = threading.Lock()

    def receive(self) -> Frame:
        """The next frame. FrameError when the stream is broken."""
        while (frame := read_frame(self._read)) is None:
            pass
        return frame

    def send(self, frame: Frame) -> None:
        """Write one frame whole; callable from any thread."""
        data = memoryview(encode(frame))
        with self._sending:
            while data:
                data = data[os.write(self._descriptor, data) :]

    def _read(self, size: int) -> bytes:
        while not (data := os.read(self._descriptor, size)):
            # The far end is not connected (yet); the port reads as ended meanwhile.
            time.sleep(0.1)
        return data


def serve(port: Port) -> None:
    """Answer requests for ever."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    port.send(Frame(fields={"id": 0, "op": "hello", "boot_id": boot_id}))
    while True:
        request = port.receive()
        if request.fields.get("op") == "ping":
            port.send(Frame(fields={"id": request.integer("id"), "op": "pong"}))
            continue
        threading.Thread(target=_answer, args=(request, port.send), daemon=True).start()


def _answer(request: Frame, send: Send) -> None:
    identifier = request.integer("id")
    handlers = {"run": _run, "put": _put, "get": _get}
    try:
        handlers[request.text("op")](request, send)
    except (OSError, KeyError, FrameError, TypeError, ValueError) as error:
        send(
            Frame(
                fields={
                    "id": identifier,
                    "op": "error",
                    "kind": type(error).__name__,
                    "message": str(error),
                }
            )
        )


def _run(request: Frame, send: Send) -> None:
    identifier = request.integer("id")
    argv = request.fields["argv"]
    if not isinstance(argv, list):
        raise TypeError("argv is not a list")
    process = subprocess.Popen(
        [str(word) for word in argv],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    counts = {"stdout": 0, "stderr": 0}
    helpers = [
        threading.Thread(target=_feed, args=(process.stdin, request.blob), daemon=True),
        threading.Thread(
            target=_pump, args=(identifier, "stdout", process.stdout, counts, send), daemon=True
        ),
        threading.Thread(
            target=_pump, args=(identifier, "stderr", process.stderr, counts, send), daemon=True
        ),
    ]
    for helper in helpers:
        helper.start()
    timed_out = False
    try:
        process.wait(request.number("timeout"))
    except subprocess.TimeoutExpired:
        timed_out = True
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    deadline = time.monotonic() + PIPE_GRACE
    for helper in helpers[1:]:
        helper.join(max(0.0, deadline - time.monotonic()))
    fields: dict[str, object] = {
        "id": identifier,
        "op": "exit",
        "status": process.returncode,
        "timed_out": timed_out,
        "held_open": any(helper.is_alive() for helper in helpers[1:]),
        **counts,
    }
    send(Frame(fields=fields))


def _feed(pipe: IO[bytes] | None, data: bytes) -> None:
    assert pipe is not None
    try:
        with pipe:
            pipe.write(data)
    except BrokenPipeError:
        # A command need not read its input.
        pass


def _pump(
    identifier: int, stream: str, pipe: IO[bytes], counts: dict[str, int], send: Send
) -> None:
    while data := os.read(pipe.fileno(), CHUNK):
        send(Frame(fields={"id": identifier, "op": "out", "stream": stream}, blob=data))
        counts[stream] += len(data)


def _put(request: Frame, send: Send) -> None:
    path = Path(request.text("path"))
    offset = request.integer("offset")
    if offset == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("r+b" if offset else "wb") as file:
        file.seek(offset)
        file.write(request.blob)
    if offset == 0:
        path.chmod(request.integer("mode"))
    send(Frame(fields={"id": request.integer("id"), "op": "done"}))


def _get(request: Frame, send: Send) -> None:
    identifier = request.integer("id")
    total = 0
    with Path(request.text("path")).open("rb") as file:
        file.seek(request.integer("offset"))
        while data := file.read(CHUNK):
            send(Frame(fields={"id": identifier, "op": "out", "stream": "file"}, blob=data))
            total += len(data)
    send(Frame(fields={"id": identifier, "op": "end", "file": total}))


def main() -> None:
    """Wait for the port, then serve."""
    deadline = time.monotonic() + PORT_LIMIT
    while not PORT.exists():
        if time.monotonic() > deadline:
            raise SystemExit(f"{PORT} did not appear within {PORT_LIMIT:.0f} s")
        time.sleep(0.2)
    serve(Port(PORT))


if __name__ == "__main__":
    main()
