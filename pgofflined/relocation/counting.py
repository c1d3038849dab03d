"""A relocator whose migrations are counted."""

from __future__ import annotations

from collections.abc import Callable

from pgofflined.core.domains import DomainIdentity
from pgofflined.core.relocation_outcomes import MigrationOutcome
from pgofflined.relocation.relocator import BreakOff, Relocator


class CountedRelocator:
    """Passes migrations and saves on; ``observe`` is given what came of each.

    ``begins`` is told of each guest whose migration is about to begin.
    """

    def __init__(
        self,
        inner: Relocator,
        observe: Callable[[MigrationOutcome], None],
        begins: Callable[[DomainIdentity], None] = lambda _: None,
    ) -> None:
        self._inner = inner
        self._observe = observe
        self._begins = begins

    async def migrate(
        self, domain: DomainIdentity, name: str, target: str, time_limit: float, off: BreakOff
    ) -> MigrationOutcome:
        """Migrate, and count what came of it."""
        self._begins(domain)
        outcome = await self._inner.migrate(domain, name, target, time_limit, off)
        self._observe(outcome)
        return outcome

    async def save_and_restore(self, domain: DomainIdentity, directory: str) -> MigrationOutcome:
        """Save and restore, and count what came of it."""
        outcome = await self._inner.save_and_restore(domain, directory)
        self._observe(outcome)
        return outcome
