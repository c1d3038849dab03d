"""Word of a simulated host's domains that have ended."""

from __future__ import annotations

import os
from contextlib import suppress

from pgofflined.core.errors import PortError
from pgofflined.sim.host import HostState


class SimulatedEnds:
    """``ports.DomainEnds`` of a simulated host."""

    def __init__(self, host: HostState) -> None:
        self._failure: str | None = None
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)
        self._host = host
        host.told_of_ends.append(self._announce)

    def fileno(self) -> int:
        """Readable when a domain has ended."""
        return self._reader

    def drain(self) -> None:
        """Take what is there."""
        if self._failure is not None:
            raise PortError(self._failure)
        with suppress(BlockingIOError):  # nothing was announced
            os.read(self._reader, 4096)

    def fail(self, reason: str) -> None:
        """Break for good."""
        self._failure = reason
        self._announce()

    def close(self) -> None:
        """Close both ends."""
        self._host.told_of_ends.remove(self._announce)
        for descriptor in (self._reader, self._writer):
            os.close(descriptor)

    def _announce(self) -> None:
        with suppress(BlockingIOError):  # full of announcements
            os.write(self._writer, b"!")
