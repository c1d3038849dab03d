"""Follows the word of domains that end, for as long as there is any."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable
from typing import NoReturn

from pgofflined.core.errors import PortError
from pgofflined.core.policy import Backoff
from pgofflined.ports import DomainEnds

log = logging.getLogger(__name__)


async def watch_ends(
    open_ends: Callable[[], DomainEnds] | None, retry: Backoff, ended: Callable[[], None]
) -> None:
    """Call ``ended`` whenever some domain may have ended; tries again when the word is lost."""
    if open_ends is None:
        return
    failures = 0
    while True:
        try:
            with contextlib.closing(await _opened(open_ends)) as ends:
                failures = 0
                await _follow(ends, ended)
        except PortError as error:
            failures += 1
            log.warning("no word of domains that end, until it can be had again: %s", error)
        await asyncio.sleep(retry.delay(failures) or retry.last)


async def _opened(open_ends: Callable[[], DomainEnds]) -> DomainEnds:
    """The word, opened in a thread: xenstored may hang, and the loop feeds the watchdog.

    A thread of its own that ends with the process: nobody can end it, and one of a pool would keep
    a daemon that is told to stop.  What it opens when nobody waits any more, it closes.
    """
    loop = asyncio.get_running_loop()
    opened: asyncio.Future[DomainEnds] = loop.create_future()

    def settle(ends: DomainEnds | None, error: BaseException | None) -> None:
        if opened.cancelled():
            if ends is not None:
                ends.close()
        elif ends is not None:
            opened.set_result(ends)
        elif error is not None:
            opened.set_exception(error)

    def work() -> None:
        ends, problem = None, None
        try:
            ends = open_ends()
        except Exception as error:  # noqa: BLE001 - whoever waits gets it
            problem = error
        try:
            loop.call_soon_threadsafe(settle, ends, problem)
        except RuntimeError:  # the loop is closed
            if ends is not None:
                ends.close()

    threading.Thread(target=work, name="ends", daemon=True).start()
    return await opened


async def _follow(ends: DomainEnds, ended: Callable[[], None]) -> NoReturn:
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(ends.fileno(), readable.set)
    try:
        while True:
            await readable.wait()
            readable.clear()
            ends.drain()
            ended()
    finally:
        loop.remove_reader(ends.fileno())
