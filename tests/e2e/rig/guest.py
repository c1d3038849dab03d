"""Guests with the memory checker, and with devices under load if so wished."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from . import devices
from .errors import CommandFailed, GuestFailed
from .waiting import wait_until

if TYPE_CHECKING:
    from .host import Host

KERNEL = "/opt/rig/vmlinux"
HVM_KERNEL = "/opt/rig/vmlinuz"
"""The device model loads only the compressed form."""
RAMDISK = "/opt/rig/guest.cpio.gz"
OLDER_KERNEL = "/opt/rig/older-vmlinux"
OLDER_RAMDISK = "/opt/rig/older-guest.cpio.gz"
CONSOLES = "/var/log/xen/console"
START_LIMIT = 300.0
START_ATTEMPTS = 3
SHOWN_CONSOLE = 3000
PASS_LIMIT = 60.0
"""Seconds that one checker pass may take; ten times what it does."""

PASS = re.compile(r"memcheck: pass (\d+) (ok|BAD) pages=(\d+) gap_ms=(\d+)")
PFNS = re.compile(r"memcheck: pfns worker=\d+((?: [0-9a-f]+)+)")
BOOT = re.compile(r"memcheck: boot id=(\S+)")
LOAD_PASS = re.compile(r"ioload: (disk|net) pass (\d+) (?:ok|BAD)")
TROUBLE = re.compile(
    r"memcheck: (?:MISMATCH|FAILED)|memcheck: pass \d+ BAD"
    r"|ioload: (?:FAILED|\w+ MISMATCH|\w+ pass \d+ BAD)|Kernel panic|Oops|BUG:|WARNING:"
    r"|Call Trace|segfault|general protection"
)

STARTED = "memcheck: start "
PANIC = "Kernel panic - not syncing"
P2M = re.compile(r"pfn=0x([0-9a-f]+) ==> mfn=0x([0-9a-f]+)")
MFNDUMP = "/usr/lib/xen-*/bin/xen-mfndump"

Kind = Literal["pv", "pvh", "hvm"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestSpec:
    """A guest to start."""

    name: str
    kind: Kind = "pv"
    vcpus: int = 2
    memory_mib: int = 128
    leave_mib: int = 16
    """Memory that the checker leaves to the guest's kernel."""
    older_kernel: bool = False
    """A PV or PVH guest with Debian 12's kernel; Debian 13's dom0 has it."""
    disk: bool = False
    """Give it a disk that is read, verified and written all the time."""
    network: bool = False
    """Give it a network device that sends and verifies packets all the time."""
    ignore_suspend: bool = False
    """Make the guest never watch control/shutdown."""
    modules: tuple[str, ...] = ()
    """Kernel modules to load, such as "xen-gntalloc"."""
    cmdline_extra: str = ""
    restarts: bool = False
    """Let xl start it again when it reboots; otherwise it is destroyed, which is noticed."""
    config_extra: str = ""
    """More lines for xl's configuration file."""

    def command_line(self) -> str:
        """The guest kernel's command line."""
        words = ["console=hvc0", "rdinit=/init", "printk.devkmsg=on", "mitigations=off"]
        words.append(f"memcheck.leave_mib={self.leave_mib}")
        if self.ignore_suspend:
            # Linux sets up its watch on control/shutdown in this initcall.
            words.append("initcall_blacklist=xen_setup_shutdown_event")
        modules = list(self.modules)
        if self.disk:
            modules.append("xen-blkfront")
            words.append(f"ioload.disk={devices.DISK_NAME}")
        if self.network:
            modules.append("xen-netfront")
            words.append(f"ioload.address={devices.address(self.name)} ioload.peer={devices.PEER}")
        if modules:
            words.append(f"memcheck.modules={','.join(modules)}")
        return " ".join([*words, self.cmdline_extra]).strip()

    def configuration(self) -> str:
        """The file for `xl create`."""
        kernel = HVM_KERNEL if self.kind == "hvm" else KERNEL
        ramdisk = RAMDISK
        if self.older_kernel:
            kernel, ramdisk = OLDER_KERNEL, OLDER_RAMDISK
        lines = ""
        if self.disk:
            file = devices.disk_file(self.name)
            lines += f'disk = ["format=raw,vdev={devices.DISK_NAME},access=rw,target={file}"]\n'
        if self.network:
            lines += f'vif = ["bridge={devices.BRIDGE}"]\n'
        return (
            f'name = "{self.name}"\n'
            f'type = "{self.kind}"\n'
            f"vcpus = {self.vcpus}\n"
            f"memory = {self.memory_mib}\n"
            f'kernel = "{kernel}"\n'
            f'ramdisk = "{ramdisk}"\n'
            f'extra = "{self.command_line()}"\n'
            'on_crash = "preserve"\n'
            f'on_reboot = "{"restart" if self.restarts else "destroy"}"\n'
            f"{lines}{self.config_extra}\n"
        )


class Guest:
    """A guest, known by its name: its domid changes when it is migrated."""

    def __init__(self, host: Host, spec: GuestSpec) -> None:
        self.spec = spec
        self._host = host
        self._logs: dict[str, bytes] = {}
        self._first_domid = -1
        self._boot_id = ""

    def start(self) -> None:
        """Create the domain and wait until the checker has completed its first pass.

        A guest that dies before that is started anew, at most twice, and the run's summary says
        so: under emulation a guest's kernel faults now and then as it boots (seen: triple faults of
        the HVM class, and a PV guest's first change of its own code).
        """
        for attempt in range(1, START_ATTEMPTS + 1):
            self._create()
            try:
                wait_until(
                    lambda: self.passes() > 0 or not self.exists() or self._panicked(),
                    timeout=START_LIMIT,
                    what=f"{self.spec.name}'s first pass",
                    interval=1,
                )
            except AssertionError as error:
                error.add_note(self.console()[-SHOWN_CONSOLE:])
                raise
            if self.passes() > 0:
                self._first_domid = self.domid
                self._boot_id = self.boot_ids()[0]
                return
            self._host.remarks.append(f"guest {self.spec.name} died at boot, attempt {attempt}")
            # One that crashed is preserved.
            self._host.run(["xl", "destroy", self.spec.name], check=False)
        raise GuestFailed(
            f"guest {self.spec.name} died at boot {START_ATTEMPTS} times\n"
            f"{self.console()[-SHOWN_CONSOLE:]}"
        )

    def _panicked(self) -> bool:
        return PANIC in self.console()

    def _create(self) -> None:
        configuration = f"/run/rig-guests/{self.spec.name}.cfg"
        if self.spec.disk:
            devices.make_disk(self._host, self.spec.name)
        if self.spec.network:
            devices.make_bridge(self._host)
        self._logs.clear()
        self._host.run(["rm", "-f", *self._paths()])
        self._host.write_text(configuration, self.spec.configuration())
        self._host.run(["xl", "create", configuration], timeout=START_LIMIT)

    @property
    def domid(self) -> int:
        """The domain's id now. CommandFailed when there is no such domain."""
        return int(self._host.run(["xl", "domid", self.spec.name]).out)

    def exists(self) -> bool:
        """Whether there is a domain of this name."""
        return self._host.run(["xl", "domid", self.spec.name], check=False).status == 0

    def console(self) -> str:
        """All that the guest has printed, also after migrations to the same host."""
        for path in self._paths():
            known = self._logs.get(path, b"")
            try:
                self._logs[path] = known + self._host.get(path, offset=len(known))
            except FileNotFoundError:
                # It was never migrated, or has printed nothing yet.
                continue
        return b"".join(self._logs.values()).decode(errors="replace")

    def boot_ids(self) -> list[str]:
        """The ids of the boots seen on the console: more than one means a restart."""
        return BOOT.findall(self.console())

    def passes(self) -> int:
        """How many passes over all its memory the checker has completed."""
        found = PASS.findall(self.console())
        return int(found[-1][0]) if found else 0

    def load_passes(self) -> dict[str, int]:
        """How many passes each of its loads, "disk" and "net", has completed."""
        passes = dict.fromkeys(self._loads(), 0)
        return passes | {load: int(count) for load, count in LOAD_PASS.findall(self.console())}

    def _loads(self) -> list[str]:
        return ["disk"] * self.spec.disk + ["net"] * self.spec.network

    def checker_pfns(self) -> list[int]:
        """Where some of the checker's pages were when it began; spread over all its memory."""
        lines = PFNS.findall(self.console())
        return [int(word, 16) for line in lines for word in line.split()]

    def p2m(self) -> dict[int, int]:
        """A PV guest's mfn for each of its pfns, by Xen's own tool."""
        lines = self._host.run(f"{MFNDUMP} dump-p2m {self.domid}").out
        return {int(pfn, 16): int(mfn, 16) for pfn, mfn in P2M.findall(lines)}

    def gaps(self) -> list[int]:
        """The largest gap between two 10 ms ticks during each pass so far, in ms."""
        return [int(gap) for *_, gap in PASS.findall(self.console())]

    def wait_passes(self, further: int, *, timeout: float | None = None) -> None:
        """Wait for so many passes that begin after now, and one of each load."""
        # The pass under way does not count: it has verified a part of memory already.
        goal = self.passes() + further + 1
        loads = {load: passes + 2 for load, passes in self.load_passes().items()}
        wait_until(
            lambda: self.passes() >= goal and self._has_loaded(loads),
            timeout=timeout or PASS_LIMIT * (further + 1),
            what=f"{self.spec.name}'s pass {goal} (at {self.passes()}), of the loads {loads}",
            interval=1,
        )

    def _has_loaded(self, goals: dict[str, int]) -> bool:
        return all(passes >= goals[load] for load, passes in self.load_passes().items())

    def trouble(self) -> list[str]:
        """Console lines that tell of damaged data or an unwell kernel, since the checker began.

        Earlier ones do not count: Linux warns at boot about the emulated processor.
        """
        _, _, console = self.console().partition(STARTED)
        return [line for line in console.splitlines() if TROUBLE.search(line)]

    def assert_clean(self, *, migrated: bool = False) -> None:
        """Fail when a byte was lost, the kernel complained, or the guest restarted.

        After a migration the domid may differ; the boot id may not.
        """
        assert self.trouble() == [], f"{self.spec.name}: {self.trouble()[:5]}"
        assert self.boot_ids() == [self._boot_id], f"{self.spec.name} restarted: {self.boot_ids()}"
        if not migrated:
            assert self.domid == self._first_domid, f"{self.spec.name}: domid {self.domid}"

    def shutdown(self, *, timeout: float = 60) -> None:
        """Ask the guest to power off; wait until the domain is gone."""
        self._host.run(["xl", "shutdown", "-w", self.spec.name], timeout=timeout)
        self._forget()

    def destroy(self) -> None:
        """Destroy the domain. Nothing to do when it is gone."""
        for _ in range(2):
            # Twice: a crash or a migration may leave another domain of a similar name.
            for name in (self.spec.name, f"{self.spec.name}--incoming"):
                done = self._host.run(["xl", "destroy", name], check=False)
                if done.status and "invalid domain" not in done.err:
                    raise CommandFailed(f"xl destroy {name}: {done.err}")
        self._forget()

    def _forget(self) -> None:
        self._host.guests.pop(self.spec.name, None)

    def _paths(self) -> list[str]:
        # xenconsoled names the log by what the domain is called when it first sees it, and a
        # migration's target is called "--incoming" then.
        return [f"{CONSOLES}/guest-{self.spec.name}{suffix}.log" for suffix in ("", "--incoming")]
