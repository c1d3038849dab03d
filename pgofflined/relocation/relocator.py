"""What takes a guest off its pages, as the queue sees it."""

from __future__ import annotations

import asyncio
from typing import Protocol

from pgofflined.core.domains import DomainIdentity
from pgofflined.core.relocation_outcomes import MigrationOutcome


class BreakOff:
    """Asks for the end of a migration that is under way; ``why`` is the first reason given."""

    def __init__(self) -> None:
        self.why: str | None = None
        self.asked = asyncio.Event()

    def ask(self, why: str) -> None:
        """Ask for it."""
        if self.why is None:
            self.why = why
            self.asked.set()


class Relocator(Protocol):
    """A toolstack that can migrate a guest."""

    async def migrate(
        self, domain: DomainIdentity, name: str, target: str, time_limit: float, off: BreakOff
    ) -> MigrationOutcome:
        """Migrate a guest to a host or to ``localhost``.

        Comes back when the toolstack has ended.  Cancelling it must leave the migration to go
        on by itself.  ``name`` is from xenstore and not to be trusted.  When ``off`` is asked for,
        or the time is over, it is broken off as soon as that is safe.
        """
        ...

    async def save_and_restore(self, domain: DomainIdentity, directory: str) -> MigrationOutcome:
        """Save a PV guest into a file in a directory and restore it on this host.

        The same holds.  ``NotMigrated`` says that the guest was seen to run on; after ``InDoubt``
        only a person may go on.
        """
        ...
