"""Breaks off migrations of guests in which an uncorrected error is reported while they run.

What sends a guest's memory reads all of it, sooner or later.  Saves are not broken off: their guest
may be in a file only.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import NoReturn

from pgofflined.core.domains import DomainIdentity
from pgofflined.core.errors import PortError
from pgofflined.relocation.host import InThread, MigrationHost
from pgofflined.relocation.relocator import BreakOff

log = logging.getLogger(__name__)


class Breaking:
    """The migrations that are under way.  All methods belong to the event loop's thread."""

    def __init__(self, host: MigrationHost, in_thread: InThread) -> None:
        self._host = host
        self._in_thread = in_thread
        self._under_way: dict[DomainIdentity, BreakOff] = {}
        self._wake = asyncio.Event()

    @contextmanager
    def following(self, domain: DomainIdentity) -> Iterator[BreakOff]:
        """A migration that is broken off when it has to be, as long as the block lasts."""
        off = self._under_way[domain] = BreakOff()
        # An error may have been reported since it was asked for.
        self._wake.set()
        try:
            yield off
        finally:
            del self._under_way[domain]

    def look(self) -> None:
        """An uncorrected error was reported, or its owner is known by now."""
        self._wake.set()

    async def run(self) -> NoReturn:
        """Look at all that are under way, when told."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            for domain, off in tuple(self._under_way.items()):
                try:
                    why = await self._in_thread(partial(self._host.poison_in, domain))
                except (PortError, OSError) as error:
                    log.error(
                        "whether d%d, which is being migrated, has a page with an uncorrected "
                        "error cannot be told: %s",
                        domain.domid,
                        error,
                    )
                    continue
                if why is not None:
                    off.ask(why)
