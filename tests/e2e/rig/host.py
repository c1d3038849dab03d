"""A booted Xen host: commands, files, guests, machine checks, evidence."""

from __future__ import annotations

import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import payload
from .channel import Channel, ChannelError
from .errors import (
    BootFailed,
    CommandFailed,
    CommandTimeout,
    HostLost,
    RigError,
)
from .frames import CHUNK, Frame
from .guest import Guest, GuestSpec
from .image import Image
from .payload import Payload
from .qemu import DOM0_MIB, MEMORY_MIB, Flavour, Machine, Qemu, Source
from .releases import DEBIAN_12, DEBIAN_13, Release

BOOT_LIMIT = 400.0
"""Seconds from QEMU's start until dom0 must be up; about ten times what it takes."""
AGENT_GRACE = 30.0
"""Seconds that the agent has beyond a command's own limit to report."""
SHOWN_OUTPUT = 4000
SUSPICIOUS = re.compile(
    r"\bBUG\b|Assertion|[Pp]anic|domain_crash|crashed|L1TF|shadow|WARN|FATAL|general protection"
    r"|Bad type|Error getting mfn|Faulting|#GP|double fault",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostSpec:
    """Which host to boot. Equal specs can share one."""

    flavour: Flavour
    source: Source = Source.MCELOG
    start_service: bool = True
    """Whether pgofflined.service is enabled and started at boot."""
    memory_mib: int = MEMORY_MIB
    dom0_mib: int = DOM0_MIB

    @property
    def release(self) -> Release:
        """The Debian release of dom0, and with it Xen's."""
        return DEBIAN_12 if self.flavour is Flavour.INTEL_417 else DEBIAN_13

    @classmethod
    def parse(cls, name: str) -> HostSpec:
        """The specification that is written like this, such as "intel-native-noservice"."""
        flavour, source, *rest = name.split("-")
        if rest not in ([], ["noservice"]):
            raise ValueError(f"unknown host {name!r}")
        return cls(flavour=Flavour(flavour), source=Source(source), start_service=not rest)

    def __str__(self) -> str:
        service = "" if self.start_service else "-noservice"
        return f"{self.flavour.value}-{self.source.value}{service}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed:
    """A command that ended in dom0."""

    status: int
    """Exit status, or minus the signal's number."""
    stdout: bytes
    stderr: bytes

    @property
    def out(self) -> str:
        """Standard output as text."""
        return self.stdout.decode(errors="replace")

    @property
    def err(self) -> str:
        """Standard error as text."""
        return self.stderr.decode(errors="replace")


Command = str | Sequence[str]


class Host:
    """A booted host. All methods raise HostLost when it is gone or hung.

    Methods that talk to dom0 may be called from several threads.
    """

    def __init__(self, spec: HostSpec, image: Image, logs: Path) -> None:
        """Boot; the serial console's log is kept in the folder `logs`.

        BuildFailed when the project cannot be built, BootFailed when dom0 does not come up.
        """
        self.spec = spec
        self.guests: dict[str, Guest] = {}
        self.lost: str | None = None
        self.remarks: list[str] = []
        """What did not go smoothly, for the run's summary."""
        self._logs = logs
        self._scratch = Path(tempfile.mkdtemp(prefix="pgofflined-rig-"))
        self._qemu: Qemu | None = None
        self._channel: Channel | None = None
        self._boot_lines = 0
        begin = time.monotonic()
        try:
            self._boot(image)
        except BaseException:
            self.stop()
            raise
        self.boot_seconds = time.monotonic() - begin

    def run(
        self, command: Command, *, timeout: float = 60, check: bool = True, stdin: bytes = b""
    ) -> Completed:
        """Run a command in dom0 as root: words, or a line for the shell.

        CommandTimeout after `timeout` seconds (the command is killed), CommandFailed when
        `check` is set and the status is not 0.
        """
        argv = ["/bin/sh", "-c", command] if isinstance(command, str) else list(command)
        parts: dict[str, list[bytes]] = {"stdout": [], "stderr": []}
        last = Frame()
        fields: dict[str, object] = {"op": "run", "argv": argv, "timeout": timeout}
        for frame in self._request(fields, stdin):
            if frame.fields.get("op") == "out":
                parts[frame.text("stream")].append(frame.blob)
            last = frame
        done = Completed(
            status=last.integer("status"),
            stdout=b"".join(parts["stdout"]),
            stderr=b"".join(parts["stderr"]),
        )
        if (len(done.stdout), len(done.stderr)) != (last.integer("stdout"), last.integer("stderr")):
            raise self._give_up(f"output of {argv} did not arrive whole")
        shown = command if isinstance(command, str) else shlex.join(command)
        said = f"{done.out[-SHOWN_OUTPUT:]}{done.err[-SHOWN_OUTPUT:]}"
        if last.fields["timed_out"]:
            raise CommandTimeout(f"killed after {timeout:.0f} s in dom0: {shown}\n{said}")
        if check and done.status:
            raise CommandFailed(f"status {done.status} in dom0: {shown}\n{said}")
        return done

    def python(
        self, source: str, *arguments: str, timeout: float = 60, check: bool = True
    ) -> Completed:
        """Run Python source in dom0; `arguments` are its sys.argv[1:]."""
        return self.run(
            ["python3", "-", *arguments], timeout=timeout, check=check, stdin=source.encode()
        )

    def put(self, source: Path | bytes, target: str, *, mode: int = 0o644) -> None:
        """Write a file in dom0, from a file here or from bytes. Missing folders are made."""
        data = source if isinstance(source, bytes) else source.read_bytes()
        for offset in range(0, max(1, len(data)), CHUNK):
            fields: dict[str, object] = {
                "op": "put",
                "path": target,
                "offset": offset,
                "mode": mode,
            }
            for _ in self._request(fields, data[offset : offset + CHUNK]):
                pass

    def get(self, source: str, *, offset: int = 0) -> bytes:
        """A file of dom0, from `offset` on. FileNotFoundError when there is none."""
        parts: list[bytes] = []
        last = Frame()
        for frame in self._request({"op": "get", "path": source, "offset": offset}):
            if frame.fields.get("op") == "out":
                parts.append(frame.blob)
            last = frame
        data = b"".join(parts)
        if len(data) != last.integer("file"):
            raise self._give_up(f"{source} did not arrive whole")
        return data

    def read_text(self, source: str) -> str:
        """A file of dom0 as text."""
        return self.get(source).decode(errors="replace")

    def write_text(self, target: str, text: str, *, mode: int = 0o644) -> None:
        """Write a text file in dom0."""
        self.put(text.encode(), target, mode=mode)

    def start_guest(self, spec: GuestSpec) -> Guest:
        """Start a guest and wait until its memory is filled and was verified once.

        The `host` fixture destroys it after the test.
        """
        guest = Guest(self, spec)
        self.guests[spec.name] = guest
        guest.start()
        return guest

    def destroy_guests(self) -> None:
        """Destroy all guests that were started here."""
        for guest in list(self.guests.values()):
            guest.destroy()

    def qmp(self, command: str, **arguments: object) -> object:
        """Run a command of QEMU's machine protocol."""
        return self._machine().qmp(command, **arguments)

    def hmp(self, line: str) -> str:
        """Run a line of QEMU's human monitor."""
        return self._machine().hmp(line)

    def inject_ce(self, maddr: int, *, cpu: int = 1, bank: int = 9) -> None:
        """Put a corrected memory read error at a machine address into a CPU's bank.

        Xen finds it by its next poll (2 to 16 s on Intel). Before that, a second error in the
        same bank overwrites the first.
        """
        # Valid, MISC and ADDR valid, memory read error on channel 0; the address is physical
        # and as fine as a page.
        self.hmp(f"mce {cpu} {bank} 0x8c00004000000090 0x0 {maddr:#x} 0x8c")

    def inject_srao(self, maddr: int, *, bank: int = 7) -> None:
        """Raise a machine check on all CPUs: an uncorrected error found by a write-back."""
        self.hmp(f"mce -b 0 {bank} 0xbd2000008000017a 0x5 {maddr:#x} 0x8c")

    def xl_dmesg(self) -> str:
        """Xen's console ring since boot."""
        return self.run(["xl", "dmesg"]).out

    def xl_dmesg_suspicious(self, *, after: int | None = None) -> list[str]:
        """Xen's lines that tell of a bug, a crash, L1TF or shadow mode.

        Only those after the first `after` lines; by default, after the boot's own.
        """
        lines = self.xl_dmesg().splitlines()[self._boot_lines if after is None else after :]
        return [line for line in lines if SUSPICIOUS.search(line)]

    def journal(self, unit: str | None = None, *, fields: bool = False) -> str:
        """The journal of this boot, of one unit or all; as JSON lines when `fields`."""
        form = "json" if fields else "short-precise"
        words = ["journalctl", "--boot", "--no-pager", f"--output={form}"]
        return self.run(words + ([f"--unit={unit}"] if unit else [])).out

    def collect(self, folder: Path) -> None:
        """Write all evidence that can be had into `folder`; never raises RigError."""
        folder.mkdir(parents=True, exist_ok=True)
        machine = self._machine()
        (folder / "serial.log").write_text(machine.serial())
        if self.lost is not None:
            (folder / "lost.txt").write_text(self.lost)
            return
        try:
            (folder / "journal.txt").write_text(self.journal())
            (folder / "xl-dmesg.txt").write_text(self.xl_dmesg())
            (folder / "xl-list.txt").write_text(self.run("xl list -l; xl info; xl vcpu-list").out)
            names = self.run("ls /var/log/xen/console /var/log/xen/*.log", check=False).out.split()
            for path in names:
                full = path if path.startswith("/") else f"/var/log/xen/console/{path}"
                if full.endswith(".log"):
                    (folder / Path(full).name).write_bytes(self.get(full))
        except (RigError, AssertionError, OSError) as error:
            (folder / "incomplete.txt").write_text(f"{type(error).__name__}: {error}")

    def pid(self) -> int:
        """QEMU's process id."""
        return self._machine().pid()

    def stop(self) -> None:
        """End the host at once. May be called twice."""
        if self._qemu is not None:
            self._qemu.kill()
        if self._channel is not None:
            self._channel.close()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _boot(self, image: Image) -> None:
        what = Payload(release=self.spec.release, start_service=self.spec.start_service)
        disk = payload.build(what, image, self._scratch)
        machine = Machine(
            flavour=self.spec.flavour,
            source=self.spec.source,
            image=image,
            payload=disk,
            memory_mib=self.spec.memory_mib,
            dom0_mib=self.spec.dom0_mib,
        )
        deadline = time.monotonic() + BOOT_LIMIT
        try:
            self._qemu = Qemu(machine, self._scratch, self._logs)
            # QEMU has it open; so nothing is left even when the test run is killed.
            disk.unlink()
            self._channel = Channel(self._qemu.agent, check=self._check)
            self._channel.wait_hello(BOOT_LIMIT)
            left = max(1.0, deadline - time.monotonic())
            # "degraded" is an answer too: a test may have wanted a unit to fail.
            self.run(["systemctl", "is-system-running", "--wait"], timeout=left, check=False)
            self.run(["xl", "list"])
        except (ChannelError, HostLost, CommandTimeout, CommandFailed) as error:
            where = self._qemu.where() if self._qemu else ""
            tail = self._qemu.tail() if self._qemu else ""
            raise BootFailed(f"{self.spec}: {error}\n{where}\n{tail}") from error
        self._boot_lines = len(self.xl_dmesg().splitlines())

    def _request(self, fields: dict[str, object], blob: bytes = b"") -> list[Frame]:
        assert self._channel is not None
        if self.lost is not None:
            raise HostLost(self.lost)
        try:
            frames = list(self._channel.request(fields, blob))
        except ChannelError as error:
            raise self._give_up(str(error)) from error
        last = frames[-1]
        if last.fields["op"] == "error":
            kind, message = last.text("kind"), last.text("message")
            if kind == "FileNotFoundError":
                raise FileNotFoundError(message)
            raise CommandFailed(f"dom0: {kind}: {message}")
        return frames

    def _check(self) -> None:
        """Raise ChannelError when there is no point in waiting for the agent any more."""
        machine = self._machine()
        if machine.exited():
            raise ChannelError("QEMU ended")
        if (line := machine.panic()) is not None:
            raise ChannelError(f"the host died: {line}")

    def _give_up(self, why: str) -> HostLost:
        machine = self._machine()
        self.lost = f"{self.spec}: {why}\n{machine.where()}\nserial console:\n{machine.tail()}"
        return HostLost(self.lost)

    def _machine(self) -> Qemu:
        assert self._qemu is not None
        return self._qemu
