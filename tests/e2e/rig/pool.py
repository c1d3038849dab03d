"""Keeps at most one host running, and boots the next one when a test needs another."""

from __future__ import annotations

from pathlib import Path

from . import image
from .errors import BootFailed, RigError
from .host import Host, HostSpec
from .tools import check_machine, timed

BOOT_ATTEMPTS = 3


class HostPool:
    """The one running host, and a record of what did not go smoothly."""

    def __init__(self, evidence: Path) -> None:
        """`evidence` is the folder for the serial consoles of all boots."""
        self.remarks: list[str] = []
        """Retries and losses, for the summary."""
        self.boots: list[str] = []
        """Each boot that succeeded and how long it took."""
        self._evidence = evidence
        self._host: Host | None = None
        self._hopeless: dict[HostSpec, str] = {}
        self._attempts = 0

    def host(self, spec: HostSpec) -> Host:
        """A running host as specified. BootFailed after all attempts."""
        current = self._host
        if current is not None and (current.spec != spec or current.lost is not None):
            self.stop()
        if self._host is None:
            self._host = self._boot(spec)
        return self._host

    def stop(self) -> None:
        """Stop the running host, if there is one."""
        if self._host is not None:
            self.remarks += [f"{self._host.spec}: {remark}" for remark in self._host.remarks]
            if self._host.lost is not None:
                self.remarks.append(f"host lost: {self._host.lost.splitlines()[0]}")
            self._host.stop()
            self._host = None

    def _boot(self, spec: HostSpec) -> Host:
        if spec in self._hopeless:
            raise BootFailed(self._hopeless[spec])
        check_machine()
        dom0 = image.obtain(spec.release)
        for attempt in range(1, BOOT_ATTEMPTS + 1):
            self._attempts += 1
            logs = self._evidence / f"{self._attempts:02}-{spec}"
            logs.mkdir(parents=True, exist_ok=True)
            try:
                with timed(f"boot {spec}"):
                    host = Host(spec, dom0, logs)
            except BootFailed as error:
                (logs / "failure.txt").write_text(str(error))
                first = str(error).splitlines()[0]
                self.remarks.append(f"boot attempt {attempt} of {BOOT_ATTEMPTS} failed: {first}")
                if attempt == BOOT_ATTEMPTS:
                    self._hopeless[spec] = str(error)
                    raise
            else:
                self.boots.append(f"{spec}: {host.boot_seconds:.0f} s")
                return host
        raise RigError("no boot was attempted")
