from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import UUID

import pytest

from pgofflined.core.domains import DomainIdentity
from pgofflined.core.frames import Domid, Mfn
from pgofflined.core.outcomes import ExchangeReport
from pgofflined.core.status import JobStatus, WorkerStatus
from pgofflined.jobs import ExchangePool
from pgofflined.sim.clock import ManualClock


def _domain(number: int) -> DomainIdentity:
    return DomainIdentity(Domid(number), UUID(int=number))


class Exchanges:
    """Exchanges that wait to be let finish, and remember what ran beside what."""

    def __init__(self) -> None:
        self.begun: list[tuple[int, tuple[Mfn, ...]]] = []
        self.may_end = threading.Event()
        self.running: set[int] = set()
        self.overlapped: list[set[int]] = []
        self.reports: list[ExchangeReport] = []
        self.changed = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()

    def run(self, domain: DomainIdentity, mfns: tuple[Mfn, ...]) -> ExchangeReport:
        with self._lock:
            assert domain.domid not in self.running, "one domain was suspended twice at a time"
            self.running.add(domain.domid)
            self.begun.append((domain.domid, mfns))
            self.overlapped.append(set(self.running))
        self._loop.call_soon_threadsafe(self.changed.set)
        self.may_end.wait(30)
        with self._lock:
            self.running.remove(domain.domid)
        return ExchangeReport(domain=domain, results=(), blackout=None)

    def finished(self, _job: str, report: ExchangeReport) -> None:
        self.reports.append(report)
        self.changed.set()

    async def until_begun(self, count: int) -> None:
        while len(self.begun) < count:
            self.changed.clear()
            await asyncio.wait_for(self.changed.wait(), 30)

    async def until_reported(self, count: int) -> None:
        while len(self.reports) < count:
            self.changed.clear()
            await asyncio.wait_for(self.changed.wait(), 30)


@asynccontextmanager
async def _pool(
    exchanges: Exchanges,
    *,
    workers: int = 2,
    max_pages: int = 8,
    queue_limit: int = 100,
    clock: ManualClock | None = None,
) -> AsyncIterator[ExchangePool]:
    pool = ExchangePool(
        exchanges.run,
        exchanges.finished,
        clock=clock or ManualClock(),
        workers=workers,
        max_pages=max_pages,
        queue_limit=queue_limit,
    )
    running = asyncio.create_task(pool.run())
    try:
        yield pool
    finally:
        exchanges.may_end.set()
        pool.stop()
        await running


async def test_pages_of_a_domain_that_wait_together_go_in_one_job() -> None:
    exchanges = Exchanges()
    async with _pool(exchanges) as pool:
        for mfn in (1, 2, 3):
            assert pool.submit(_domain(1), "a", Mfn(mfn))
        await exchanges.until_begun(1)
    assert exchanges.begun == [(1, (1, 2, 3))]


async def test_more_pages_than_fit_in_one_suspend_go_in_several() -> None:
    exchanges = Exchanges()
    exchanges.may_end.set()
    async with _pool(exchanges, max_pages=2) as pool:
        for mfn in range(5):
            pool.submit(_domain(1), "a", Mfn(mfn))
        await exchanges.until_reported(3)
    assert [len(mfns) for _, mfns in exchanges.begun] == [2, 2, 1]


async def test_two_domains_run_side_by_side_and_one_never_twice() -> None:
    exchanges = Exchanges()
    async with _pool(exchanges) as pool:
        pool.submit(_domain(1), "a", Mfn(1))
        await exchanges.until_begun(1)
        pool.submit(_domain(1), "a", Mfn(2))
        pool.submit(_domain(2), "b", Mfn(3))
        await exchanges.until_begun(2)
        assert exchanges.begun[1][0] == 2
        assert [job.state for job in pool.jobs()] == ["running", "running", "waiting"]
        exchanges.may_end.set()
        await exchanges.until_reported(3)
    assert exchanges.begun[2] == (1, (2,))


async def test_there_are_never_more_jobs_at_work_than_workers() -> None:
    exchanges = Exchanges()
    exchanges.may_end.set()
    async with _pool(exchanges, workers=2) as pool:
        for number in range(1, 8):
            pool.submit(_domain(number), "a", Mfn(number))
        await exchanges.until_reported(7)
    assert max(len(together) for together in exchanges.overlapped) <= 2


async def test_a_full_queue_takes_no_page() -> None:
    exchanges = Exchanges()
    async with _pool(exchanges, queue_limit=2) as pool:
        assert pool.submit(_domain(1), "a", Mfn(1))
        assert pool.submit(_domain(1), "a", Mfn(2))
        assert not pool.submit(_domain(1), "a", Mfn(3))
        assert pool.queued_pages() == 2


async def test_a_stop_lets_the_job_under_way_finish_and_begins_no_other() -> None:
    exchanges = Exchanges()
    async with _pool(exchanges, workers=1) as pool:
        pool.submit(_domain(1), "a", Mfn(1))
        await exchanges.until_begun(1)
        pool.submit(_domain(2), "b", Mfn(2))
        pool.stop()
    assert [report.domain.domid for report in exchanges.reports] == [1]
    assert [domid for domid, _ in exchanges.begun] == [1]


async def test_a_cancelled_pool_still_waits_for_its_threads() -> None:
    exchanges = Exchanges()
    pool = ExchangePool(
        exchanges.run,
        exchanges.finished,
        clock=ManualClock(),
        workers=1,
        max_pages=1,
        queue_limit=1,
    )
    running = asyncio.create_task(pool.run())
    pool.submit(_domain(1), "a", Mfn(1))
    await exchanges.until_begun(1)
    asyncio.get_running_loop().call_later(0.05, exchanges.may_end.set)
    threading.Timer(0.1, exchanges.may_end.set).start()
    running.cancel()
    await asyncio.wait([running])
    assert exchanges.running == set()


async def test_a_job_that_runs_long_shows_in_the_status() -> None:
    clock = ManualClock()
    exchanges = Exchanges()
    pool = ExchangePool(
        exchanges.run, exchanges.finished, clock=clock, workers=1, max_pages=1, queue_limit=1
    )
    running = asyncio.create_task(pool.run())
    pool.submit(_domain(1), "a", Mfn(1))
    await exchanges.until_begun(1)
    clock.wait(42.0)
    assert pool.status().longest_busy_seconds == 42.0
    assert pool.status().busy == 1
    exchanges.may_end.set()
    pool.stop()
    await running


async def test_what_waits_and_what_runs_is_told_with_its_pages_and_since_when() -> None:
    clock = ManualClock()
    exchanges = Exchanges()
    clock.wait(1000.0)
    began = clock.now()
    async with _pool(exchanges, workers=1, max_pages=2, queue_limit=10, clock=clock) as pool:
        assert (pool.longest_busy(), pool.jobs()) == (0.0, ())
        await _tell_of_three_jobs(pool, exchanges, clock, began)
    assert exchanges.begun == [(1, (1, 2)), (1, (3,)), (2, (4,))]


async def _tell_of_three_jobs(
    pool: ExchangePool, exchanges: Exchanges, clock: ManualClock, began: float
) -> None:
    for mfn in (1, 2, 3):
        pool.submit(_domain(1), "web", Mfn(mfn))
    await exchanges.until_begun(1)
    clock.wait(10.0)
    pool.submit(_domain(2), "mail", Mfn(4))
    pool.submit(_domain(2), "mail", Mfn(4))
    clock.wait(5.0)
    assert pool.jobs() == (
        JobStatus(
            job="x1",
            kind="exchange",
            domid=1,
            domain_name="web",
            pages=2,
            state="running",
            since=began,
        ),
        # The rest of the first, which keeps its place; then the other.
        JobStatus(
            job="x2",
            kind="exchange",
            domid=1,
            domain_name="web",
            pages=1,
            state="waiting",
            since=began,
        ),
        JobStatus(
            job="x3",
            kind="exchange",
            domid=2,
            domain_name="mail",
            pages=1,
            state="waiting",
            since=began + 10.0,
        ),
    )
    assert pool.status() == WorkerStatus(
        workers=1, busy=1, queued_pages=2, queue_limit=10, longest_busy_seconds=15.0
    )
    exchanges.may_end.set()
    await exchanges.until_reported(3)


async def test_other_limits_hold_for_what_comes_and_what_waits() -> None:
    exchanges = Exchanges()
    async with _pool(exchanges, workers=1, max_pages=8, queue_limit=2) as pool:
        pool.submit(_domain(1), "a", Mfn(1))
        await exchanges.until_begun(1)
        pool.submit(_domain(1), "a", Mfn(2))
        pool.submit(_domain(1), "a", Mfn(3))
        assert not pool.submit(_domain(1), "a", Mfn(4))
        pool.set_limits(max_pages=1, queue_limit=3)
        assert pool.submit(_domain(1), "a", Mfn(4))
        assert not pool.submit(_domain(1), "a", Mfn(5))
        exchanges.may_end.set()
        await exchanges.until_reported(4)
    assert [mfns for _, mfns in exchanges.begun] == [(1,), (2,), (3,), (4,)]


async def test_an_exchange_that_fails_by_our_own_fault_takes_the_pool_with_it() -> None:
    def fail(domain: DomainIdentity, mfns: tuple[Mfn, ...]) -> ExchangeReport:
        raise RuntimeError(f"{domain.domid} {mfns}")

    pool = ExchangePool(
        fail, lambda _job, _report: None, clock=ManualClock(), workers=1, max_pages=1, queue_limit=1
    )
    pool.submit(_domain(1), "a", Mfn(1))
    with pytest.raises(ExceptionGroup) as raised:
        await pool.run()
    assert raised.group_contains(RuntimeError, match=r"1 \(1,\)")
    assert pool.jobs() == ()


async def test_exchanges_have_threads_of_their_own() -> None:
    release = threading.Event()
    waiting = [asyncio.ensure_future(asyncio.to_thread(release.wait, 30)) for _ in range(64)]
    exchanges = Exchanges()
    exchanges.may_end.set()
    try:
        async with _pool(exchanges) as pool:
            pool.submit(_domain(1), "a", Mfn(1))
            await exchanges.until_reported(1)
        assert not any(future.done() for future in waiting)
    finally:
        release.set()
        await asyncio.gather(*waiting)
