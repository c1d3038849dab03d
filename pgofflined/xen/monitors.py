"""Keeps xl's monitors of the guests over a suspend, on releases where it would end them.

Every guest that xl has started has an xl process which waits for its end, and then does what
``on_crash`` and ``on_reboot`` say.  Up to Xen 4.19 it takes a suspend for the end and exits
(``handle_domain_death`` in tools/xl/xl_vmcontrol.c; 6b8c85872e, 4.20, keeps it).  It asks Xen only
when xenstored wakes it: one that is stopped as long as a guest stands still finds it running and
waits on.

Which guest a monitor is for does not show from outside, so all of them are stopped.  The others are
late by that time in what they do.

Who holds them has a lock on a file, which ends with the process: whoever finds them stopped and the
file unlocked knows that nobody is left to let them go on.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

log = logging.getLogger(__name__)

# What xl was started as when it stays to monitor the guest.
_MONITORING: Final = frozenset({b"create", b"restore", b"migrate-receive"})
_STOPPED: Final = "T"
LOCK: Final = Path("/run/pgofflined/monitors.lock")


class Monitors:
    """xl's monitors, found by what /proc tells of every process.

    Several threads may hold them at a time; they go on when the last lets go.
    """

    def __init__(self, proc: Path = Path("/proc"), parent: int = 1, lock_file: Path = LOCK) -> None:
        """``parent`` is the process whose children they are, init."""
        self._proc = proc
        self._parent = parent
        self._lock_file = lock_file
        self._lock = threading.Lock()
        self._holders = 0
        self._descriptor: int | None = None
        self._held: set[int] = set()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Stop them; whatever happens meanwhile, let them go on in the end."""
        with self._lock:
            self._holders += 1
            try:
                if self._descriptor is None:
                    self._descriptor = self._lock_descriptor(fcntl.LOCK_SH)
                self._stop()
            except BaseException:
                self._leave()
                raise
        try:
            yield
        finally:
            with self._lock:
                self._leave()

    def release_all(self) -> list[int]:
        """Let those go on that a process which has died had stopped; gives their numbers.

        Does nothing while a process that lives holds them: a guest of its stands still.
        """
        try:
            descriptor = self._lock_descriptor(fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("xl's monitors are held by another process, which lets them go on")
            return []
        try:
            stopped = [
                pid for pid in self._monitors() if self._field(pid, "State").startswith(_STOPPED)
            ]
            released = [pid for pid in stopped if _signal(pid, signal.SIGCONT)]
        finally:
            if descriptor is not None:
                os.close(descriptor)
        for pid in released:
            log.warning("xl's monitor %d was still stopped by us and goes on", pid)
        return released

    def _lock_descriptor(self, how: int) -> int | None:
        """The locked file; None where it cannot be had.  Raises BlockingIOError."""
        try:
            descriptor = os.open(self._lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            # The service has its directory; without one there is no daemon to be mistaken for.
            log.debug("%s cannot be locked: %s", self._lock_file, error)
            return None
        try:
            fcntl.flock(descriptor, how)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _stop(self) -> None:
        for pid in self._monitors():
            if pid not in self._held and not self._field(pid, "State").startswith(_STOPPED):
                self._held.add(pid)
                _signal(pid, signal.SIGSTOP)

    def _leave(self) -> None:
        self._holders -= 1
        if self._holders:
            return
        for pid in self._held:
            _signal(pid, signal.SIGCONT)
        self._held.clear()
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _monitors(self) -> Iterator[int]:
        """The process behind a foreground xl has daemonised: init is its parent."""
        for name in os.listdir(self._proc):
            if not name.isdecimal():
                continue
            pid = int(name)
            with contextlib.suppress(OSError):
                program, *arguments = (self._proc / name / "cmdline").read_bytes().split(b"\0")
                if (
                    os.path.basename(program) == b"xl"
                    and _MONITORING.intersection(arguments)
                    and self._field(pid, "PPid") == str(self._parent)
                ):
                    yield pid

    def _field(self, pid: int, name: str) -> str:
        """A line of a process's status; empty when it has ended."""
        with contextlib.suppress(OSError):
            for line in (self._proc / str(pid) / "status").read_text("utf-8").splitlines():
                key, _, value = line.partition(":")
                if key == name:
                    return value.strip()
        return ""


def _signal(pid: int, number: signal.Signals) -> bool:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    except OSError as error:
        log.warning("xl's monitor %d could not be sent %s: %s", pid, number.name, error)
        return False
    return True
