"""Waiting until the pages of a guest that has gone are out of use."""

from __future__ import annotations

from functools import partial
from typing import Final

from pgofflined.core.domains import DomainIdentity
from pgofflined.core.frames import Mfn
from pgofflined.core.relocating import RelocationQueue
from pgofflined.relocation.following import Sleep
from pgofflined.relocation.host import InThread, MigrationHost, Settled

# A destroyed domain's pages are freed in the background; backends may hold some a while longer.
_FIRST: Final = 0.25
_LAST: Final = 8.0
_LIMIT: Final = 120.0


class Settling:
    """Looks at the pages of jobs until Xen says that they are offline; not for ever."""

    def __init__(
        self, queue: RelocationQueue, host: MigrationHost, sleep: Sleep, in_thread: InThread
    ) -> None:
        self._queue = queue
        self._host = host
        self._sleep = sleep
        self._in_thread = in_thread

    async def settled(self, domain: DomainIdentity) -> Settled:
        """How the pages of a job are in the end."""
        self._queue.note(domain, "has left; its pages are being freed")
        wait = _FIRST
        waited = 0.0
        while True:
            mfns = self._queue.job(domain).mfns
            settled = await self._look(domain, mfns)
            # Pages that came meanwhile must have been asked for, too.
            late = self._queue.job(domain).mfns - mfns
            if (not settled.remaining and not late) or waited >= _LIMIT:
                return settled
            await self._sleep(wait)
            waited += wait
            wait = min(2 * wait, _LAST)

    async def _look(self, domain: DomainIdentity, mfns: frozenset[Mfn]) -> Settled:
        try:
            return await self._in_thread(partial(self._host.settled, domain, mfns))
        except OSError as error:
            nothing: frozenset[Mfn] = frozenset()
            return Settled(
                offlined=nothing, remaining=mfns, new_domid=None, detail=str(error), stuck=None
            )
