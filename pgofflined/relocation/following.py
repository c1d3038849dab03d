"""Waiting for the end of what was begun: a migration, or a save that must not be hurried."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import NoReturn

from pgofflined.core.domains import DomainIdentity
from pgofflined.core.policy import RelocationPolicy
from pgofflined.core.relocating import RelocationJob
from pgofflined.core.relocation_outcomes import InDoubt, MigrationOutcome
from pgofflined.ports import Clock
from pgofflined.relocation import telling

log = logging.getLogger(__name__)

Sleep = Callable[[float], Awaitable[None]]

# Seconds after which it is told anew that a guest stands still for too long.
_ALARM_AGAIN = 3600.0


class Following:
    """``overdue`` says of guests whose save takes too long what a person has to know."""

    def __init__(self, clock: Clock, sleep: Sleep, stop_grace: float) -> None:
        self.overdue: dict[DomainIdentity, str] = {}
        self._clock = clock
        self._sleep = sleep
        self._stop_grace = stop_grace

    async def migration(self, begun: Awaitable[MigrationOutcome]) -> MigrationOutcome:
        """The outcome; when we are cancelled, wait a while for the end first."""
        task = asyncio.ensure_future(begun)
        try:
            return await asyncio.shield(task)
        except OSError as error:
            what = "what was begun cannot be followed any more, look at `xl list`"
            return InDoubt(detail=f"{what}: {error}")
        except asyncio.CancelledError:
            grace = asyncio.ensure_future(self._sleep(self._stop_grace))
            await asyncio.wait({task, grace}, return_when=asyncio.FIRST_COMPLETED)
            grace.cancel()
            if task.done():
                came = task.exception() or task.result()
                log.info("what was under way ended while we stop: %s", came)
            task.cancel()
            await asyncio.wait({task})
            raise

    async def save(
        self, job: RelocationJob, policy: RelocationPolicy, begun: Awaitable[MigrationOutcome]
    ) -> MigrationOutcome:
        """The same for a save, with an alarm where the guest stands still for too long."""
        alarm = asyncio.ensure_future(self._alarm(job, policy))
        try:
            return await self.migration(begun)
        finally:
            alarm.cancel()
            self.overdue.pop(job.domain, None)

    async def _alarm(self, job: RelocationJob, policy: RelocationPolicy) -> NoReturn:
        """Tell again and again.  Nothing is ended."""
        start = self._clock.monotonic()
        wait = policy.time_limit
        while True:
            await self._sleep(wait)
            seconds = self._clock.monotonic() - start
            self.overdue[job.domain] = telling.save_takes_long(job, policy, seconds)
            wait = _ALARM_AGAIN
