"""What takes a guest off its pages, as the queue sees it."""

from __future__ import annotations

from typing import Protocol

from pgofflined.core.domains import DomainIdentity
from pgofflined.core.relocation_outcomes import MigrationOutcome


class Relocator(Protocol):
    """A toolstack that can migrate a guest."""

    async def migrate(
        self, domain: DomainIdentity, name: str, target: str, time_limit: float
    ) -> MigrationOutcome:
        """Migrate a guest to a host or to ``localhost``.

        Comes back when the toolstack has ended.  Cancelling it must leave the migration to go
        on by itself.  ``name`` is from xenstore and not to be trusted.
        """
        ...

    async def save_and_restore(self, domain: DomainIdentity, directory: str) -> MigrationOutcome:
        """Save a PV guest into a file in a directory and restore it on this host.

        The same holds.  ``NotMigrated`` says that the guest was seen to run on; after ``InDoubt``
        only a person may go on.
        """
        ...
