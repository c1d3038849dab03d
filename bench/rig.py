"""The emulated host of the parts that need one (see tests/e2e/rig): one boot for all of them.

Absolute times are the emulator's; ratios are what counts.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tests.e2e.rig.guest import Guest, GuestSpec
from tests.e2e.rig.host import Host, HostSpec
from tests.e2e.rig.pool import HostPool
from tests.e2e.rig.qemu import Flavour, Source

SMALL_MIB: Final = 128
LARGE_MIB: Final = 2048
# Seconds that one program in dom0 may take.
LIMIT: Final = 400.0
# dom0 has room for the large guest's saved state in memory, so that no disk counts against it.
_HOST: Final = HostSpec(
    flavour=Flavour.INTEL,
    source=Source.NATIVE,
    start_service=False,
    memory_mib=6144,
    dom0_mib=3072,
)
_LOGS: Final = Path(__file__).parents[1] / "build" / "bench"
_IN_DOM0: Final = "/opt/pgofflined-tests"
# The checker of the large guest goes through half of its memory, and rests longer in between: a
# guest that is never idle would take part in what is measured.
_LARGE_LEFT_MIB: Final = LARGE_MIB // 2
_NAP: Final = "memcheck.nap_ms=5000"


class Rig:
    """A host that is booted, and two guests that are started, when the first of them is wanted."""

    def __init__(self) -> None:
        self._pool = HostPool(_LOGS)

    @property
    def host(self) -> Host:
        """The host."""
        return self._pool.host(_HOST)

    def guest(self, memory_mib: int) -> Guest:
        """The guest of that size; it is paused, except within ``alone``."""
        name = f"bench{memory_mib}"
        guest = self.host.guests.get(name)
        if guest is None:
            left = _LARGE_LEFT_MIB if memory_mib == LARGE_MIB else GuestSpec(name=name).leave_mib
            spec = GuestSpec(name=name, memory_mib=memory_mib, leave_mib=left, cmdline_extra=_NAP)
            guest = self.host.start_guest(spec)
            self.host.run(["xl", "pause", name])
        return guest

    @contextmanager
    def alone(self, guest: Guest) -> Iterator[None]:
        """Let one guest run while all others stand still."""
        self.host.run(["xl", "unpause", guest.spec.name])
        yield
        self.host.run(["xl", "pause", guest.spec.name])

    def in_dom0(self, *commands: str) -> list[str]:
        """Run programs of the project in a pipe; the last one's lines."""
        line = " | ".join(f"python3 -m {command}" for command in commands)
        return self.host.run(f"cd {_IN_DOM0} && {line}", timeout=LIMIT).out.splitlines()

    def assert_clean(self) -> None:
        """No guest has lost a byte or complained, a whole pass of its checker later."""
        for guest in self.host.guests.values():
            with self.alone(guest):
                guest.wait_passes(1)
                guest.assert_clean(migrated=True)

    def stop(self) -> None:
        """End the host, if it was booted."""
        self._pool.stop()
        for remark in self._pool.remarks:
            print(f"bench: {remark}", file=sys.stderr)
