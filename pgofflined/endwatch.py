"""Follows the word of domains that end, for as long as there is any."""

from __future__ import annotations

import asyncio
import contextlib
import logging
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
            with contextlib.closing(open_ends()) as ends:
                failures = 0
                await _follow(ends, ended)
        except PortError as error:
            failures += 1
            log.warning("no word of domains that end, until it can be had again: %s", error)
        await asyncio.sleep(retry.delay(failures) or retry.last)


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
