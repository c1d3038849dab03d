"""The word of domains that end is followed, and had again when it is lost."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress

import pytest

from pgofflined.core.errors import PortError
from pgofflined.core.policy import Backoff
from pgofflined.endwatch import watch_ends
from pgofflined.ports import DomainEnds

LIMIT = 10.0
SOON = Backoff(first=0.001, last=0.002)


class Ends:
    """Word comes through a pipe; its last word may be that none will come."""

    def __init__(self) -> None:
        self.readable, self.writable = os.pipe2(os.O_NONBLOCK)
        self.is_lost = False
        self.is_closed = False

    def fileno(self) -> int:
        return self.readable

    def drain(self) -> None:
        with suppress(BlockingIOError):  # it may be called once more than there is word
            os.read(self.readable, 64)
        if self.is_lost:
            raise PortError("nobody tells any more")

    def close(self) -> None:
        self.is_closed = True
        os.close(self.readable)
        os.close(self.writable)

    def tell(self, *, lost: bool = False) -> None:
        self.is_lost = lost
        os.write(self.writable, b"x")


class Watch:
    """What ``watch_ends`` is given, and what it has done."""

    def __init__(self, failures: int = 0) -> None:
        self.failures = failures
        self.opened: list[Ends] = []
        self.calls = 0

    def open(self) -> DomainEnds:
        if self.failures:
            self.failures -= 1
            raise PortError("xenstored does not answer")
        self.opened.append(Ends())
        return self.opened[-1]

    def ended(self) -> None:
        self.calls += 1


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT):
        while not holds():  # noqa: ASYNC110 - the watch tells nobody else
            await asyncio.sleep(0.001)


@asynccontextmanager
async def running(watch: Coroutine[object, object, None]) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(watch)
    try:
        yield task
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def test_each_word_of_an_end_is_passed_on() -> None:
    watch = Watch()
    async with running(watch_ends(watch.open, SOON, watch.ended)):
        await until(lambda: len(watch.opened) == 1)
        for _ in range(3):
            calls = watch.calls + 1
            watch.opened[0].tell()
            await until(lambda: watch.calls >= calls)  # noqa: B023 - awaited here
    assert watch.opened[0].is_closed


async def test_word_that_is_lost_is_told_and_had_again(caplog: pytest.LogCaptureFixture) -> None:
    watch = Watch(failures=2)
    with caplog.at_level(logging.WARNING):
        async with running(watch_ends(watch.open, SOON, watch.ended)):
            await until(lambda: len(watch.opened) == 1)
            watch.opened[0].tell(lost=True)
            await until(lambda: len(watch.opened) == 2)
            assert watch.opened[0].is_closed
            assert watch.calls == 0
            watch.opened[1].tell()
            await until(lambda: watch.calls > 0)
    told = "no word of domains that end, until it can be had again"
    assert [record.getMessage() for record in caplog.records] == [
        f"{told}: xenstored does not answer",
        f"{told}: xenstored does not answer",
        f"{told}: nobody tells any more",
    ]


async def test_waits_grow_while_no_word_is_had_and_are_short_again_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits: list[float] = []
    sleep = asyncio.sleep

    async def note(seconds: float) -> None:
        waits.append(seconds)
        await sleep(0)

    watch = Watch(failures=4)
    retry = Backoff(first=10.0, last=60.0)
    with monkeypatch.context() as patched:
        patched.setattr("pgofflined.endwatch.asyncio.sleep", note)
        async with running(watch_ends(watch.open, retry, watch.ended)):
            async with asyncio.timeout(LIMIT):
                while not watch.opened:
                    await sleep(0)
            watch.opened[0].tell(lost=True)
            async with asyncio.timeout(LIMIT):
                while len(watch.opened) < 2:
                    await sleep(0)
    assert waits == [10.0, 20.0, 40.0, 60.0, 10.0]


async def test_where_nobody_tells_of_ends_there_is_nothing_to_follow() -> None:
    async with asyncio.timeout(LIMIT):
        await watch_ends(None, SOON, lambda: None)
