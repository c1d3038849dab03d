"""Clocks for the simulated host: one that tests move, one that follows the real time."""

from __future__ import annotations

import threading
import time


class ManualClock:
    """Time that passes only when something waits on it, and then at once."""

    def __init__(self, *, epoch: float = 1_700_000_000.0) -> None:
        self._lock = threading.Lock()
        self._epoch = epoch
        self._elapsed = 0.0

    def now(self) -> float:
        """Seconds since the epoch."""
        return self._epoch + self._elapsed

    def monotonic(self) -> float:
        """Seconds since this clock was made."""
        return self._elapsed

    def wait(self, seconds: float) -> None:
        """Move both times on."""
        with self._lock:
            self._elapsed += max(0.0, seconds)


class WallClock:
    """The machine's own time; ``speed`` 10 makes a guest's second last a tenth of one."""

    def __init__(self, *, speed: float = 1.0) -> None:
        self._speed = speed

    def now(self) -> float:
        """Seconds since the epoch."""
        return time.time()

    def monotonic(self) -> float:
        """Seconds that never run backwards."""
        return time.monotonic()

    def wait(self, seconds: float) -> None:
        """Sleep for as long as the guest needs, sped up."""
        time.sleep(max(0.0, seconds) / self._speed)
