"""Starting a toolstack's program so that it outlives us, and finding what it has started.

A migration must not die with the daemon: xl installs no signal handlers, so killed half-way it
leaves the guest suspended.  And what a migration to this host leaves behind (the new guest's
device model and xl's own monitor of it) has to run for as long as the guest does.  Under systemd
both would be in our control group and behind our hardening, hence a unit of its own.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from pgofflined.core.errors import PortError

log = logging.getLogger(__name__)

_PIECE: Final = 64 << 10
_PROC: Final = Path("/proc")
_SYSTEMD: Final = Path("/run/systemd/system")
_BUS: Final = Path("/run/dbus/system_bus_socket")


class NoLauncher(PortError):
    """Programs that must outlive the daemon cannot be started here."""


class Launcher(Protocol):
    """A way of starting a program apart from the daemon."""

    def command(self, argv: Sequence[str], unit: str, properties: Sequence[str] = ()) -> list[str]:
        """What to execute so that ``argv`` is run; ``unit`` is a name used only once.

        ``properties`` are systemd's, for a unit of its own.
        """
        ...

    def owns(self, pid: int, started: int, unit: str) -> bool:
        """Whether a process belongs to the run that was begun as process ``started``."""
        ...


class SessionLauncher:
    """Starts a program in a session of its own; for hosts without systemd."""

    def command(self, argv: Sequence[str], unit: str, properties: Sequence[str] = ()) -> list[str]:
        """The program itself."""
        del unit, properties
        return list(argv)

    def owns(self, pid: int, started: int, unit: str) -> bool:
        """Whether the process is in the program's session; one that became a daemon is not."""
        del unit
        try:
            return os.getsid(pid) == started
        except ProcessLookupError:
            return False


class UnitLauncher:
    """Starts a program as a transient systemd unit, which no stop of the daemon touches."""

    def command(self, argv: Sequence[str], unit: str, properties: Sequence[str] = ()) -> list[str]:
        """The program through systemd-run, with our pipes, waited for."""
        return [
            "systemd-run",
            "--quiet",
            "--pipe",
            "--wait",
            "--collect",
            "--service-type=exec",
            f"--unit={unit}.service",
            # A stop of the unit, or xl's end, must spare the new guest's device model.
            "--property=KillMode=process",
            *(f"--property={one}" for one in properties),
            "--",
            *argv,
        ]

    def owns(self, pid: int, started: int, unit: str) -> bool:
        """Whether the process is in the unit's control group."""
        del started
        try:
            groups = (_PROC / str(pid) / "cgroup").read_text()
        except OSError:
            return False
        return any(line.endswith(f"/{unit}.service") for line in groups.splitlines())


def choose_launcher() -> Launcher:
    """The launcher for this host.  Raises NoLauncher where none would be safe."""
    if not _SYSTEMD.is_dir():
        return SessionLauncher()
    if not _BUS.exists():
        raise NoLauncher(
            f"guests cannot be migrated: systemd-run needs the system bus and {_BUS} is not "
            "there; install dbus, or else stopping this service would kill the device models of "
            "guests that it has migrated"
        )
    return UnitLauncher()


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A process of a run: its number and its arguments."""

    pid: int
    argv: tuple[str, ...]


class Run:
    """One program that was started.  Nothing here ever kills it."""

    def __init__(
        self,
        argv: Sequence[str],
        unit: str,
        launcher: Launcher,
        feed: Callable[[bytes], None],
        properties: Sequence[str] = (),
    ) -> None:
        """Start the program; its output goes to ``feed``.  Raises OSError when it cannot be."""
        self._unit = unit
        self._launcher = launcher
        self._feed = feed
        self._loop = asyncio.get_running_loop()
        self._output, write_end = os.pipe()
        os.set_blocking(self._output, False)
        try:
            # Not asyncio's subprocess: its transport kills the child when the loop closes.
            self._child = subprocess.Popen(
                launcher.command(argv, unit, properties),
                stdin=subprocess.DEVNULL,
                stdout=write_end,
                stderr=write_end,
                start_new_session=True,
            )
        except OSError:
            os.close(self._output)
            raise
        finally:
            os.close(write_end)
        self._pidfd = os.pidfd_open(self._child.pid)
        self._ended = asyncio.Event()
        self._loop.add_reader(self._output, self._read)
        self._loop.add_reader(self._pidfd, self._ended.set)

    @property
    def pid(self) -> int:
        """Process number of what was executed."""
        return self._child.pid

    async def ended(self) -> int:
        """Wait for the end; the exit status, negative for a signal.

        Does not wait for the output's end: what the program left behind may hold it open.
        """
        await self._ended.wait()
        status = self._child.wait()
        self._read()
        return status

    def close(self) -> None:
        """Stop watching; a program that still runs goes on."""
        for descriptor in (self._output, self._pidfd):
            self._loop.remove_reader(descriptor)
            os.close(descriptor)
        if self._child.poll() is None:
            # It is not ours to wait for any more; Popen would warn that nobody did.
            self._child.returncode = 0

    def processes(self) -> Iterator[Found]:
        """Every process of this run that is there now."""
        for entry in _PROC.iterdir():
            if not entry.name.isdecimal():
                continue
            pid = int(entry.name)
            if self._launcher.owns(pid, self._child.pid, self._unit):
                argv = _argv(pid)
                if argv:
                    yield Found(pid=pid, argv=argv)

    def terminate(self, found: Found) -> bool:
        """Send SIGTERM to a process of this run, if it still is the one that was found."""
        try:
            pidfd = os.pidfd_open(found.pid)
        except ProcessLookupError:
            return False
        try:
            if _argv(found.pid) != found.argv:
                return False
            signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        except ProcessLookupError:
            return False
        finally:
            os.close(pidfd)
        return True

    def _read(self) -> None:
        while True:
            try:
                piece = os.read(self._output, _PIECE)
            except BlockingIOError:
                return
            if not piece:
                self._loop.remove_reader(self._output)
                return
            self._feed(piece)


def _argv(pid: int) -> tuple[str, ...]:
    try:
        raw = (_PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return ()
    return tuple(part.decode("utf-8", "replace") for part in raw.split(b"\0")[:-1])
