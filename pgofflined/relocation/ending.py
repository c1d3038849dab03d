"""Tells of guests that have ended when a toolstack had asked them to suspend themselves for us."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from pgofflined.core.domains import DomainIdentity
from pgofflined.core.errors import PortError
from pgofflined.relocation.host import InThread, MigrationHost


class Ending:
    """``tell`` is given each such guest, and what became of it."""

    def __init__(
        self,
        host: MigrationHost,
        in_thread: InThread,
        tell: Callable[[DomainIdentity, str], None],
    ) -> None:
        self._host = host
        self._in_thread = in_thread
        self._tell = tell

    async def has_ended(
        self, domain: DomainIdentity, *, may_be_away: bool = False, crash_only: bool = False
    ) -> bool:
        """Whether the guest has ended, which is told; not where that cannot be seen.

        ``may_be_away`` and ``crash_only`` are those of ``MigrationHost.end_of``.
        """
        end_of = partial(self._host.end_of, domain, may_be_away=may_be_away, crash_only=crash_only)
        try:
            how = await self._in_thread(end_of)
        except (PortError, OSError):
            return False
        if how is not None:
            self._tell(domain, how)
        return how is not None
