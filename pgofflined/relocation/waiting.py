"""Sees which jobs that wait have nothing to wait for any more.

A guest may be migrated by somebody else, end, or give its pages back, and the policy may come to
forbid what was wanted under an earlier one.  Such a job is to end, not to wait for its window.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from functools import partial
from typing import NoReturn

from pgofflined.core.domains import DomainIdentity, DomainInfo
from pgofflined.core.errors import PortError
from pgofflined.core.premigration import forbidden
from pgofflined.core.relocating import RelocationJob, RelocationQueue
from pgofflined.relocation.host import InThread, MigrationHost

log = logging.getLogger(__name__)


class Waiting:
    """``over`` is called with each job that has nothing to wait for; it decides nothing else."""

    def __init__(
        self,
        queue: RelocationQueue,
        host: MigrationHost,
        denial: Callable[[DomainInfo], str | None],
        in_thread: InThread,
        over: Callable[[DomainIdentity], None],
    ) -> None:
        self._queue = queue
        self._host = host
        self._denial = denial
        self._in_thread = in_thread
        self._over = over
        self._jobs: list[RelocationJob] = []
        self._wake = asyncio.Event()

    def look_at(self, jobs: Iterable[RelocationJob]) -> None:
        """Have jobs looked at."""
        self._jobs += jobs
        if self._jobs:
            self._wake.set()

    async def run(self) -> NoReturn:
        """Look at what is to be looked at, all at one go."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            jobs, self._jobs = self._jobs, []
            pages = {job.domain: job.mfns for job in jobs}
            try:
                standing = await self._in_thread(partial(self._host.standing, pages))
            except (PortError, OSError) as error:
                log.debug("what became of guests that wait to be migrated: %s", error)
                continue  # they are looked at again in a while
            for job in jobs:
                info = standing[job.domain]
                if info is None or self._is_unwanted(job, info):
                    self._over(job.domain)

    def _is_unwanted(self, job: RelocationJob, info: DomainInfo) -> bool:
        policy = self._queue.policy
        if forbidden(job.domain, policy, by_saving=job.by_saving) is not None:
            return True
        return self._denial(info) is not None
