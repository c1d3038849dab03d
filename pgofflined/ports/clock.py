"""The time."""

from __future__ import annotations

from typing import Protocol


class Clock(Protocol):
    """The two times that are needed, so that tests can set them."""

    def now(self) -> float:
        """Seconds since the epoch."""
        ...

    def monotonic(self) -> float:
        """Seconds that never run backwards."""
        ...

    def wait(self, seconds: float) -> None:
        """Let that time pass; for threads, not for the event loop's."""
        ...
