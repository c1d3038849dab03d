"""Tells of saves that an earlier daemon, or nobody, goes on with."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final, NoReturn

from pgofflined.core.conditions import Condition, ConditionCode
from pgofflined.core.domains import DomainInfo
from pgofflined.core.errors import PortError
from pgofflined.core.events import Event
from pgofflined.core.saves import UnfinishedSave
from pgofflined.journal_log import event
from pgofflined.ports import Clock
from pgofflined.saving import Saves

log = logging.getLogger(__name__)

# Seconds after which an alarm is told anew.
TELL_AGAIN: Final = 3600.0
# Seconds between two looks at saves that are not ended.
_LOOK_AGAIN: Final = 15.0


class SaveWatch:
    """What is known of unfinished saves; ``limit`` gives how long one may take, in seconds."""

    def __init__(self, clock: Clock, limit: Callable[[], float]) -> None:
        self.conditions: tuple[Condition, ...] = ()
        self._clock = clock
        self._limit = limit
        self._since: dict[UnfinishedSave, float] = {}
        self._alarmed: dict[UnfinishedSave, float] = {}
        self._wake = asyncio.Event()

    async def run(
        self, saves: Saves, domains: Callable[[], Iterable[DomainInfo]], directory: Path
    ) -> NoReturn:
        """Look for saves that are not ended: at the start, when asked, and while there are any.

        ``domains`` asks Xen; ``directory`` is where guests are saved to.
        """
        for line in await asyncio.to_thread(saves.without_note, directory):
            log.warning("%s", line)
        while True:
            self._wake.clear()
            self.see(await asyncio.to_thread(_left_over, saves, domains))
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_AGAIN if self.conditions else None):
                    await self._wake.wait()

    def look_again(self) -> None:
        """A save has just ended, perhaps not well."""
        self._wake.set()

    def see(self, found: Iterable[UnfinishedSave]) -> None:
        """Take what there is now; tells what is new, and again and again of what lasts too long."""
        now = self._clock.monotonic()
        before = self._since
        self._since = {save: before.get(save, now) for save in found}
        self.conditions = tuple(
            self._seen(save, now, is_new=save not in before) for save in self._since
        )
        self._alarmed = {save: at for save, at in self._alarmed.items() if save in self._since}

    def _seen(self, save: UnfinishedSave, now: float, *, is_new: bool) -> Condition:
        if is_new:
            self._tell(logging.WARNING if save.is_under_way else logging.CRITICAL, save, save.text)
        lasts = now - self._since[save]
        if not save.is_under_way:
            return self._condition(ConditionCode.SAVE_UNFINISHED, save, save.text, lasts)
        if lasts < self._limit():
            return self._condition(ConditionCode.SAVE_UNDER_WAY, save, save.text, lasts)
        text = (
            f"{save.text}, unless the disk or the server of relocation.save_directory hangs "
            f"(`dmesg`): it has gone on for {lasts / 60:.0f} min"
        )
        if now >= self._alarmed.get(save, 0.0):
            self._alarmed[save] = now + TELL_AGAIN
            self._tell(logging.ERROR, save, text)
        return self._condition(ConditionCode.SAVE_OVERDUE, save, text, lasts)

    def _condition(
        self, code: ConditionCode, save: UnfinishedSave, text: str, lasts: float
    ) -> Condition:
        domid = None if save.domain is None else save.domain.domid
        return Condition(code=code, text=text, since=self._clock.now() - lasts, domid=domid)

    def _tell(self, level: int, save: UnfinishedSave, text: str) -> None:
        domid = None if save.domain is None else save.domain.domid
        event(log, level, Event.SAVE_UNFINISHED, text, domid=domid)


def _left_over(
    saves: Saves, domains: Callable[[], Iterable[DomainInfo]]
) -> tuple[UnfinishedSave, ...]:
    try:
        return saves.left_over(domains)
    except PortError as error:
        return (UnfinishedSave(text=str(error)),)
