"""Tells of saves that an earlier daemon, or nobody, goes on with."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable
from typing import Final

from pgofflined.core.events import Event
from pgofflined.core.frames import Domid
from pgofflined.journal_log import event
from pgofflined.ports import Clock

log = logging.getLogger(__name__)

# What ``core.saves`` says of a note.
_GUEST: Final = re.compile(r"the guest that was d(\d+) ")
_UNDER_WAY: Final = "is being saved and restored"

# Seconds after which an alarm is told anew.
TELL_AGAIN: Final = 3600.0


class SaveWatch:
    """What is known of unfinished saves, as sentences; ``limit`` gives how long one may take."""

    def __init__(self, clock: Clock, limit: Callable[[], float]) -> None:
        self.lines: tuple[str, ...] = ()
        self._clock = clock
        self._limit = limit
        self._since: dict[str, float] = {}
        self._alarmed: dict[str, float] = {}

    def see(self, found: Iterable[str]) -> None:
        """Take what there is now; tells what is new, and again and again of what lasts too long."""
        now = self._clock.monotonic()
        before = self._since
        self._since = {line: before.get(line, now) for line in found}
        self.lines = tuple(self._seen(line, now, is_new=line not in before) for line in self._since)
        self._alarmed = {line: at for line, at in self._alarmed.items() if line in self._since}

    def _seen(self, line: str, now: float, *, is_new: bool) -> str:
        is_under_way = _UNDER_WAY in line
        if is_new:
            self._tell(logging.WARNING if is_under_way else logging.CRITICAL, line)
        lasts = now - self._since[line]
        if not is_under_way or lasts < self._limit():
            return line
        line_now = (
            f"{line}, unless the disk or the server of relocation.save_directory hangs (`dmesg`): "
            f"it has gone on for {lasts / 60:.0f} min"
        )
        if now >= self._alarmed.get(line, 0.0):
            self._alarmed[line] = now + TELL_AGAIN
            self._tell(logging.ERROR, line_now)
        return line_now

    def _tell(self, level: int, line: str) -> None:
        named = _GUEST.search(line)
        domid = None if named is None else Domid(int(named[1]))
        event(log, level, Event.SAVE_UNFINISHED, line, domid=domid)
