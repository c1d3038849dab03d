"""xenstored may hang while the daemon asks it for word of domains that end."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pgofflined.core.errors import PortError
from pgofflined.sim.ends import SimulatedEnds
from tests.unit.whole import PATIENCE, at_work


async def test_the_service_goes_on_while_xenstored_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, answers = threading.Event(), threading.Event()
    in_time: list[bool] = []

    def hangs(*_: object) -> None:
        entered.set()
        in_time.append(answers.wait(PATIENCE))
        raise PortError("xenstored hung")

    monkeypatch.setattr(SimulatedEnds, "__init__", hangs)
    async with at_work(tmp_path) as whole:
        await whole.until(entered.is_set)
        assert whole.service.snapshot().source.name is not None
        answers.set()
        await whole.until(lambda: bool(in_time))
    assert in_time == [True], "the loop stood still"


def test_a_daemon_that_is_told_to_stop_does_not_wait_for_xenstored() -> None:
    script = """
import asyncio, threading
from pgofflined.core.policy import Backoff
from pgofflined.endwatch import watch_ends

entered = threading.Event()

def hangs():
    entered.set()
    threading.Event().wait()

async def main():
    task = asyncio.create_task(watch_ends(hangs, Backoff(first=1.0, last=1.0), lambda: None))
    while not entered.is_set():
        await asyncio.sleep(0.001)
    task.cancel()
    await asyncio.wait([task])

asyncio.run(main())
print("ended")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], timeout=PATIENCE, check=True, capture_output=True
    )
    assert done.stdout == b"ended\n"
