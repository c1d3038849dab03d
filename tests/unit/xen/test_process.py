"""What a process of ours asks of the kernel for itself."""

from __future__ import annotations

import subprocess
import sys

ASKED = """
import ctypes
from pathlib import Path
{}
print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))  # PR_GET_DUMPABLE
"""


def dumpable(statements: str) -> str:
    script = ASKED.format(statements)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    return done.stdout.decode().split()[-1]


def test_no_core_is_written_of_a_process_that_has_asked_for_none() -> None:
    assert dumpable("") == "1"
    assert dumpable("from pgofflined.xen.process import leave_no_core; leave_no_core()") == "0"


def test_no_core_is_written_of_the_daemon() -> None:
    run = "from pgofflined import daemon; daemon.start = lambda *_: 0; daemon.run(Path('/none'))"
    assert dumpable(run) == "0"
