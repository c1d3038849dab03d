"""The worker pool: exchanges run in threads, at most one job for each domain at a time.

Pages of one domain that wait together are moved in one suspend.  A job that has begun is always
let finish: a stop takes no thread away from under a suspended guest.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from pgofflined.core.domains import DomainIdentity
from pgofflined.core.frames import Mfn
from pgofflined.core.outcomes import ExchangeReport
from pgofflined.core.status import JobStatus, WorkerStatus
from pgofflined.ports import Clock

RunExchange = Callable[[DomainIdentity, tuple[Mfn, ...]], ExchangeReport]
Finished = Callable[[str, ExchangeReport], None]


@dataclass(slots=True)
class _Batch:
    """Pages of one domain that wait, and the job that will take them."""

    job: str
    name: str
    since: float
    mfns: list[Mfn] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Running:
    job: str
    domain: DomainIdentity
    name: str
    pages: int
    started: float
    since: float


class ExchangePool:
    """Runs exchange jobs in ``workers`` threads.

    ``run_exchange`` is called in a worker thread; ``finished`` with the job's name and report
    on the loop.  ``queue_limit`` bounds the pages that wait.
    """

    def __init__(
        self,
        run_exchange: RunExchange,
        finished: Finished,
        *,
        clock: Clock,
        workers: int,
        max_pages: int,
        queue_limit: int,
    ) -> None:
        self._run_exchange = run_exchange
        self._finished = finished
        self._clock = clock
        self._workers = workers
        self._max_pages = max_pages
        self._queue_limit = queue_limit
        self._numbers = itertools.count(1)
        self._waiting: dict[DomainIdentity, _Batch] = {}
        self._running: dict[DomainIdentity, _Running] = {}
        self._wake = asyncio.Event()
        self._stopping = False

    def set_limits(self, *, max_pages: int, queue_limit: int) -> None:
        """Change how many pages go in one job, and how many may wait."""
        self._max_pages = max_pages
        self._queue_limit = queue_limit

    def submit(self, domain: DomainIdentity, name: str, mfn: Mfn) -> bool:
        """Queue a page of a domain; False when the queue is full (nothing is kept then)."""
        if self.queued_pages() >= self._queue_limit:
            return False
        batch = self._waiting.get(domain)
        if batch is None:
            batch = _Batch(job=self._next_name(), name=name, since=self._clock.now())
            self._waiting[domain] = batch
        if mfn not in batch.mfns:
            batch.mfns.append(mfn)
        self._wake.set()
        return True

    def queued_pages(self) -> int:
        """Pages that wait for a worker."""
        return sum(len(batch.mfns) for batch in self._waiting.values())

    def status(self) -> WorkerStatus:
        """The pool at this moment."""
        return WorkerStatus(
            workers=self._workers,
            busy=len(self._running),
            queued_pages=self.queued_pages(),
            queue_limit=self._queue_limit,
            longest_busy_seconds=self.longest_busy(),
        )

    def longest_busy(self) -> float:
        """Seconds for which the longest-running job has had its worker."""
        now = self._clock.monotonic()
        return max((now - running.started for running in self._running.values()), default=0.0)

    def jobs(self) -> tuple[JobStatus, ...]:
        """Running jobs, then waiting ones."""
        running = [
            JobStatus(
                job=job.job,
                kind="exchange",
                domid=job.domain.domid,
                domain_name=job.name,
                pages=job.pages,
                state="running",
                since=job.since,
            )
            for job in self._running.values()
        ]
        waiting = [
            JobStatus(
                job=batch.job,
                kind="exchange",
                domid=domain.domid,
                domain_name=batch.name,
                pages=len(batch.mfns),
                state="waiting",
                since=batch.since,
            )
            for domain, batch in self._waiting.items()
        ]
        return (*running, *waiting)

    def stop(self) -> None:
        """Take no further job; ``run`` returns when those under way have ended."""
        self._stopping = True
        self._wake.set()

    async def run(self) -> None:
        """Serve jobs until stopped.

        Whatever ends this, the exchanges under way are waited for: the executor is left only
        when its threads have ended.
        """
        with ThreadPoolExecutor(self._workers, thread_name_prefix="exchange") as threads:
            async with asyncio.TaskGroup() as group:
                while not self._stopping:
                    self._wake.clear()
                    while (job := self._begin_next()) is not None:
                        running, mfns = job
                        group.create_task(self._do(threads, running, mfns), name=running.job)
                    await self._wake.wait()

    async def _do(
        self, threads: ThreadPoolExecutor, running: _Running, mfns: tuple[Mfn, ...]
    ) -> None:
        loop = asyncio.get_running_loop()
        thread = loop.run_in_executor(threads, self._run_exchange, running.domain, mfns)
        try:
            await asyncio.wait([thread])
        except asyncio.CancelledError:
            # The thread goes on, and what it says of its guest must not be lost with us.
            await asyncio.wait([thread])
            raise
        finally:
            del self._running[running.domain]
            self._wake.set()
            if thread.done():
                self._finished(running.job, thread.result())

    def _begin_next(self) -> tuple[_Running, tuple[Mfn, ...]] | None:
        """Take the next job whose domain has none running, if a worker is free for it."""
        if len(self._running) >= self._workers:
            return None
        for domain, batch in self._waiting.items():
            if domain not in self._running:
                return self._begin(domain, batch)
        return None

    def _begin(self, domain: DomainIdentity, batch: _Batch) -> tuple[_Running, tuple[Mfn, ...]]:
        mfns = tuple(batch.mfns[: self._max_pages])
        del self._waiting[domain]
        rest = batch.mfns[self._max_pages :]
        if rest:
            self._waiting[domain] = _Batch(
                job=self._next_name(), name=batch.name, since=batch.since, mfns=rest
            )
        running = _Running(
            job=batch.job,
            domain=domain,
            name=batch.name,
            pages=len(mfns),
            started=self._clock.monotonic(),
            since=batch.since,
        )
        self._running[domain] = running
        return running, mfns

    def _next_name(self) -> str:
        return f"x{next(self._numbers)}"
