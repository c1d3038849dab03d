"""Only tests on an emulated host need what such a host takes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TOP = Path(__file__).parents[2]

# A machine without any of the tools that start a host.
RUN = """
import sys
import pytest
from tests.e2e.rig import tools
tools.PATH = "/nonexistent"
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", RUN, *arguments],
        cwd=TOP,
        check=False,
        capture_output=True,
        text=True,
    )


def test_tests_without_an_emulated_host_run_where_none_can_be_started() -> None:
    # The contract suite has a fixture of the same name as the one for emulated hosts.
    done = run("-m", "not e2e", "tests/e2e", "tests/contract/test_deaf_guest.py")

    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout


def test_tests_on_an_emulated_host_are_refused_where_none_can_be_started() -> None:
    done = run("tests/e2e/test_contract.py")

    assert done.returncode == 1
    assert "no qemu-system-x86_64" in done.stdout + done.stderr
