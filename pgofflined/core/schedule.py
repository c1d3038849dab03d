"""Maintenance windows, in the host's local time."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, time, timedelta
from typing import Final

_DAYS: Final = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_EVERY_DAY: Final = frozenset(range(7))
_MINUTES_PER_DAY: Final = 24 * 60

WINDOW_ALLOWED: Final = (
    'times of day, such as "22:00-06:00", optionally after days (Mon Tue Wed Thu Fri Sat Sun), '
    'such as "Sat,Sun 00:00-24:00" or "Mon-Fri 22:00-06:00"'
)
_WINDOW: Final = re.compile(
    r"(?:([A-Za-z,-]{3,40}) )?([012]\d):([0-5]\d)-([012]\d):([0-5]\d)", re.ASCII
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MaintenanceWindow:
    """A span of minutes that begins on certain days (0 is Monday) and may end on the next."""

    days: frozenset[int]
    start: int
    length: int

    def __str__(self) -> str:
        """``Sat,Sun 22:00 for 480 min``."""
        days = (
            "" if self.days == _EVERY_DAY else ",".join(_DAYS[d] for d in sorted(self.days)) + " "
        )
        return f"{days}{self.start // 60:02}:{self.start % 60:02} for {self.length} min"


def parse_window(untrusted_text: str) -> MaintenanceWindow:
    """Read a window.  Raises ValueError with what is allowed."""
    found = _WINDOW.fullmatch(untrusted_text.strip())
    if not found:
        raise ValueError(WINDOW_ALLOWED)
    start = int(found[2]) * 60 + int(found[3])
    end = int(found[4]) * 60 + int(found[5])
    if start >= _MINUTES_PER_DAY or end > _MINUTES_PER_DAY or start == end:
        raise ValueError(WINDOW_ALLOWED)
    days = _EVERY_DAY if found[1] is None else _parse_days(found[1])
    return MaintenanceWindow(days=days, start=start, length=(end - start) % _MINUTES_PER_DAY or end)


def _parse_days(text: str) -> frozenset[int]:
    days: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if first not in _DAYS or (dash and last not in _DAYS):
            raise ValueError(WINDOW_ALLOWED)
        begin = _DAYS.index(first)
        end = _DAYS.index(last) if dash else begin
        days.update((begin + step) % 7 for step in range((end - begin) % 7 + 1))
    return frozenset(days)


def next_opening(windows: Sequence[MaintenanceWindow], now: datetime) -> datetime:
    """When a window is next open: ``now`` where one is, or where there are none at all."""
    if not windows:
        return now
    midnight = datetime.combine(now.date(), time(), tzinfo=now.tzinfo)
    openings: list[datetime] = []
    for window in windows:
        # From yesterday, whose window may reach into today, to the same day next week.
        for offset in range(-1, 8):
            day = midnight + timedelta(days=offset)
            opens = day + timedelta(minutes=window.start)
            if day.weekday() in window.days and now < opens + timedelta(minutes=window.length):
                openings.append(max(now, opens))
                break
    return min(openings)
