"""One QEMU: its command line, its life, its monitor, its serial log."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from .errors import HostLost, RigError
from .image import Image
from .tools import environment
from .waiting import wait_until

MEMORY_MIB = 3072
DOM0_MIB = 1024
MONITOR_LIMIT = 30.0
TAIL_LINES = 25
PANIC = re.compile(r"Panic on CPU|Kernel panic|FATAL TRAP|Assertion '.*' failed|Xen BUG at")


class Flavour(Enum):
    """The emulated processor."""

    AMD = "amd"
    """Nested SVM: PV, PVH and HVM guests."""
    INTEL = "intel"
    """Machine checks by Intel's rules, L1TF enforced; PV guests only."""
    INTEL_417 = "intel417"
    """The same processor with Debian 12's Xen 4.17 and dom0."""


class Source(Enum):
    """Who owns VIRQ_MCA in dom0."""

    MCELOG = "mcelog"
    """The kernel's driver, which offers /dev/mcelog."""
    NATIVE = "native"
    """Nobody: a user process can bind it."""


CPU_MODEL = {
    # XSAVE loses registers under nested SVM in QEMU 7.2: guests triple-fault, dom0's programs
    # crash. SMAP faults dom0 at start; Xen's MONITOR/MWAIT form is refused by the emulation; AVX
    # corrupts user memory in QEMU 7.2; RDTSCP's wrong intercept length kills HVM-class guests.
    Flavour.AMD: "EPYC,-xsave,-xsaveopt,-xsavec,-xgetbv1,-xsaves,"
    "-smap,-smep,-monitor,-avx,-avx2,-fma,-f16c,-rdtscp",
    Flavour.INTEL: "Westmere",
    Flavour.INTEL_417: "Westmere",
}
XEN_ARGUMENTS = (
    "com1=115200,8n1",
    "console=com1",
    "conring_size=1M",
    "loglvl=all",
    "guest_loglvl=all",
    "noreboot",
)
UNWANTED_MODULES = (
    # Emulated hardware and ciphers that no test uses and that take seconds to set up.
    *("aesni_intel", "ata_generic", "ata_piix", "cfg80211", "crc32_pclmul", "crct10dif_pclmul"),
    *("evdev", "floppy", "ghash_clmulni_intel", "i2c_piix4", "kvm_amd", "kvm_intel", "pcspkr"),
    *("psmouse", "qemu_fw_cfg", "serio_raw", "sha1_ssse3", "sha256_ssse3", "sha512_ssse3"),
    *("vga16fb", "xen_netfront"),
)
DOM0_ARGUMENTS = (
    "console=hvc0",
    "root=/dev/vda",
    "rw",
    "net.ifnames=0",
    "mitigations=off",
    "systemd.getty_auto=0",
    "audit=0",
    f"module_blacklist={','.join(UNWANTED_MODULES)}",
)
SOURCE_ARGUMENTS = {
    Source.MCELOG: (),
    Source.NATIVE: ("initcall_blacklist=xen_late_init_mcelog",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What to emulate."""

    flavour: Flavour
    source: Source
    image: Image
    payload: Path
    memory_mib: int = MEMORY_MIB
    dom0_mib: int = DOM0_MIB


def command_line(machine: Machine, folder: Path, logs: Path) -> list[str]:
    """QEMU's arguments; its sockets are in `folder`, the serial console's log in `logs`."""
    image = machine.image
    dom0 = " ".join([*DOM0_ARGUMENTS, *SOURCE_ARGUMENTS[machine.source]])
    # A single comma would end the kernel's arguments and begin the next file.
    dom0 = dom0.replace(",", ",,")
    xen = " ".join([f"dom0_mem={machine.dom0_mib}M,max:{machine.dom0_mib}M", *XEN_ARGUMENTS])
    return [
        *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none"),
        *("-accel", "tcg,thread=multi"),
        *("-cpu", CPU_MODEL[machine.flavour], "-smp", "2", "-m", f"{machine.memory_mib}M"),
        *("-kernel", str(image.xen), "-append", xen),
        *("-initrd", f"{image.vmlinuz} {dom0},{image.initrd}"),
        *("-drive", f"file={image.disk},if=virtio,format=raw,snapshot=on"),
        *("-drive", f"file={machine.payload},if=virtio,format=raw,readonly=on"),
        *("-device", "virtio-serial-pci"),
        *("-chardev", f"socket,id=agent,path={folder / 'agent.sock'},server=on,wait=off"),
        *("-device", "virtserialport,chardev=agent,name=rig.agent"),
        *("-serial", f"file:{logs / 'serial.log'}"),
        *("-qmp", f"unix:{folder / 'qmp.sock'},server=on,wait=off"),
    ]


class Qemu:
    """A running QEMU, its monitor connected. Dies with the test run, however that ends.

    To be made on the main thread: the kernel ties a child's life to the thread that started it.
    """

    def __init__(self, machine: Machine, folder: Path, logs: Path) -> None:
        self._folder = folder
        self._logs = logs
        self._errors = (logs / "qemu.log").open("wb")
        self._process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *command_line(machine, folder, logs)],
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=self._errors,
            stderr=self._errors,
            # A terminal's ^C is the test run's to handle.
            start_new_session=True,
        )
        self._monitor: Monitor | None = None
        try:
            self.agent = self._connect("agent.sock")
            self._monitor = Monitor(self._connect("qmp.sock"))
        except OSError as error:
            self.kill()
            raise RigError(f"QEMU did not start: {error}\n{self._complaints()}") from error
        except BaseException:
            self.kill()
            raise

    def exited(self) -> bool:
        """Whether QEMU has ended."""
        return self._process.poll() is not None

    def pid(self) -> int:
        """QEMU's process id."""
        return self._process.pid

    def qmp(self, command: str, **arguments: object) -> object:
        """Run a QMP command; what it returns. HostLost when the monitor does not answer."""
        assert self._monitor is not None
        try:
            return self._monitor.execute(command, arguments)
        except OSError as error:
            raise HostLost(f"QEMU's monitor does not answer: {error}\n{self.tail()}") from error

    def hmp(self, line: str) -> str:
        """Run a line of QEMU's human monitor; what it prints."""
        return str(self.qmp("human-monitor-command", **{"command-line": line}))

    def where(self) -> str:
        """Where the CPUs are: RIP, CS and the halt flag of each; or why that is unknown."""
        if self.exited():
            return f"QEMU ended with status {self._process.returncode}\n{self._complaints()}"
        try:
            registers = self.hmp("info registers -a")
        except RigError as error:
            return str(error)
        found = re.findall(r"CPU#(\d+)|(RIP=\S+ RFL=\S+).*?(HLT=\d)|^(CS =\S+)", registers, re.M)
        words = [f"\nCPU {cpu}:" if cpu else " ".join(rest).strip() for cpu, *rest in found]
        return " ".join(words).strip() or registers

    def serial(self) -> str:
        """All that was written on the serial console so far."""
        log = self._logs / "serial.log"
        return log.read_text(errors="replace") if log.exists() else ""

    def panic(self) -> str | None:
        """The serial console's line that says Xen or dom0 died, if there is one."""
        for line in self.serial().splitlines():
            if PANIC.search(line):
                return line.strip()
        return None

    def tail(self) -> str:
        """The serial console's last lines."""
        return "\n".join(self.serial().splitlines()[-TAIL_LINES:])

    def kill(self) -> None:
        """End QEMU now. Nothing to do when it has ended."""
        if not self.exited():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        if self._monitor is not None:
            self._monitor.close()
        self._errors.close()

    def _connect(self, name: str) -> socket.socket:
        """A connection to one of QEMU's sockets, once QEMU has made it."""

        def attempt() -> socket.socket | None:
            if self.exited():
                raise RigError(f"QEMU did not start:\n{self._complaints()}")
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.connect(str(self._folder / name))
            except (FileNotFoundError, ConnectionRefusedError):
                connection.close()
                return None
            return connection

        return wait_until(attempt, timeout=MONITOR_LIMIT, what=f"QEMU's {name}", interval=0.05)

    def _complaints(self) -> str:
        return (self._logs / "qemu.log").read_text(errors="replace")[-2000:]


class Monitor:
    """QEMU's machine protocol: one JSON object a line."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(MONITOR_LIMIT)
        self._connection = connection
        self._stream = connection.makefile("rwb")
        self._receive()  # the greeting
        self.execute("qmp_capabilities", {})

    def execute(self, command: str, arguments: dict[str, object]) -> object:
        """Run one command; what it returns. OSError when there is no answer."""
        request = {"execute": command, "arguments": arguments}
        self._stream.write(json.dumps(request).encode() + b"\n")
        self._stream.flush()
        while True:
            answer = self._receive()
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise RigError(f"monitor command {command} {arguments}: {answer['error']}")

    def close(self) -> None:
        """Disconnect. May be called twice."""
        with contextlib.suppress(OSError):
            # Closing flushes what was not sent; there may be nobody to send it to.
            self._stream.close()
        self._connection.close()

    def _receive(self) -> dict[str, object]:
        line = self._stream.readline()
        if not line:
            raise ConnectionResetError("monitor connection closed")
        answer = json.loads(line)
        assert isinstance(answer, dict)
        return answer
