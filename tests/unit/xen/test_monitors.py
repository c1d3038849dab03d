"""xl's monitors stand still with a guest, and go on with it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pgofflined.xen.monitors import Monitors

HERE = os.getpid()
LIMIT = 10.0


@contextmanager
def process(directory: Path, *arguments: str, name: str = "xl") -> Iterator[int]:
    """A process of ours that shows this name and these arguments."""
    program = directory / name
    shutil.copy("/bin/sh", program)
    command = [str(program), "-c", "echo up; read line", *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == b"up\n"
        try:
            yield running.pid
        finally:
            running.kill()


def stops(pid: int) -> bool:
    """Whether it stops; a signal takes effect when the process is next looked at by the kernel."""
    return _comes_to(pid, lambda letter: letter == "T")


def goes_on(pid: int) -> bool:
    return _comes_to(pid, lambda letter: letter != "T")


def ends(pid: int) -> bool:
    """Whether it ends, as a process does that is not stopped and gets SIGUSR1."""
    return _comes_to(pid, lambda letter: letter == "Z")


def _comes_to(pid: int, wanted: Callable[[str], bool]) -> bool:
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        if wanted(Path(f"/proc/{pid}/status").read_text().split("State:")[1].split()[0]):
            return True
        time.sleep(0.01)
    return False


@pytest.fixture
def monitors(tmp_path: Path) -> Monitors:
    return Monitors(parent=HERE, lock_file=tmp_path / "lock")


@pytest.mark.parametrize("verb", ["create", "restore", "migrate-receive"])
def test_a_monitor_stands_still_as_long_as_it_is_held(
    tmp_path: Path, monitors: Monitors, verb: str
) -> None:
    with process(tmp_path, verb) as pid:
        with monitors.held():
            assert stops(pid)
        assert goes_on(pid)


def test_a_monitor_goes_on_when_the_last_holder_has_let_go(
    tmp_path: Path, monitors: Monitors
) -> None:
    with process(tmp_path, "create") as pid:
        with monitors.held():
            with monitors.held():
                pass
            assert stops(pid)
        assert goes_on(pid)


def test_a_monitor_goes_on_whatever_happens(tmp_path: Path, monitors: Monitors) -> None:
    with process(tmp_path, "create") as pid:
        with pytest.raises(RuntimeError), monitors.held():
            raise RuntimeError
        assert goes_on(pid)


def test_a_monitor_goes_on_where_not_all_could_be_stopped(tmp_path: Path) -> None:
    proc = tmp_path / "proc"
    broken = proc / "4999999"
    broken.mkdir(parents=True)
    (broken / "cmdline").write_bytes(b"xl\0create\0")
    (broken / "status").write_bytes(b"Name:\t\xff\n")  # no text, which nobody expects
    monitors = Monitors(proc, parent=HERE, lock_file=tmp_path / "lock")
    with process(tmp_path, "create") as pid:
        (proc / str(pid)).symlink_to(f"/proc/{pid}")
        with pytest.raises(UnicodeDecodeError), monitors.held():
            pytest.fail("they are not held")
        assert goes_on(pid)
        shutil.rmtree(broken)
        # That try is over: it is neither a holder nor has it the lock.
        with monitors.held():
            assert stops(pid)
        assert goes_on(pid)
        os.kill(pid, signal.SIGSTOP)
        assert stops(pid)
        assert monitors.release_all() == [pid]


def test_other_processes_are_left_alone(tmp_path: Path, monitors: Monitors) -> None:
    with (
        process(tmp_path, "migrate") as migration,
        process(tmp_path, "create", name="virsh") as other,
        monitors.held(),
    ):
        # Signals to one process arrive in order: this one would be the second.
        for pid in (migration, other):
            os.kill(pid, signal.SIGUSR1)
        assert ends(migration)
        assert ends(other)


def test_an_xl_that_a_person_waits_for_is_left_alone(tmp_path: Path) -> None:
    with process(tmp_path, "create") as pid, Monitors(parent=1).held():
        os.kill(pid, signal.SIGUSR1)
        assert ends(pid)


def test_a_monitor_that_ends_meanwhile_is_no_error(tmp_path: Path, monitors: Monitors) -> None:
    with monitors.held(), process(tmp_path, "create"), monitors.held():
        pass


# Holds the monitors of process PARENT, with the lock file LOCK, until it is killed.
HOLDER = """
import signal, sys
from pathlib import Path
from pgofflined.xen.monitors import Monitors
with Monitors(parent=int(sys.argv[1]), lock_file=Path(sys.argv[2])).held():
    print("held", flush=True)
    signal.pause()
"""


@contextmanager
def holder(lock: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that holds them, as a daemon does."""
    command = [sys.executable, "-c", HOLDER, str(HERE), str(lock)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == b"held\n"
        try:
            yield running
        finally:
            running.kill()


def test_what_a_killed_process_has_stopped_goes_on(tmp_path: Path, monitors: Monitors) -> None:
    with process(tmp_path, "create") as pid, holder(tmp_path / "lock") as killed:
        assert stops(pid)
        killed.kill()
        killed.wait()
        assert monitors.release_all() == [pid]
        assert goes_on(pid)


def test_what_a_living_process_has_stopped_stays_so(tmp_path: Path, monitors: Monitors) -> None:
    with process(tmp_path, "create") as pid, holder(tmp_path / "lock"):
        assert stops(pid)
        assert monitors.release_all() == []
        # Had it been let go on, this would end it.
        os.kill(pid, signal.SIGUSR1)
        assert stops(pid)


def test_monitors_that_run_are_not_released(tmp_path: Path, monitors: Monitors) -> None:
    with process(tmp_path, "create") as pid:
        assert monitors.release_all() == []
        assert goes_on(pid)


def test_they_are_held_and_released_without_a_file_to_lock(tmp_path: Path) -> None:
    nowhere = Monitors(parent=HERE, lock_file=tmp_path / "none" / "lock")
    with process(tmp_path, "create") as pid:
        with nowhere.held():
            assert stops(pid)
            assert nowhere.release_all() == [pid]
        assert goes_on(pid)
