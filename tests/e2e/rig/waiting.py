"""Waiting for conditions, never for time to pass."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from .errors import ConditionNotMet

T = TypeVar("T")


def wait_until(
    condition: Callable[[], T | None], *, timeout: float, what: str, interval: float = 0.5
) -> T:
    """The condition's first true answer.

    `what` completes "waited N s for ..."; ConditionNotMet after `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    while True:
        if answer := condition():
            return answer
        if time.monotonic() > deadline:
            raise ConditionNotMet(f"waited {timeout:.0f} s for {what}")
        time.sleep(interval)
