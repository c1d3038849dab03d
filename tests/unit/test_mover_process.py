"""The mover, and an xl that says something, as processes: what becomes of them with the daemon."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from pgofflined.core.saves import EX_STAYS
from pgofflined.mover import run_xl
from pgofflined.saving import Saves, log_path, only_one

from .mover_process import IDENTITY, FileHost

# Ends of SIGPIPE as a C program does.  While it saves it says that it is at it, and goes on when
# it is told to.
XL = """
import json, os, signal, sys
from pathlib import Path
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
root = Path(__file__).parent.parent
def say(what):
    os.write(1, what.encode())
    os.write(2, what.encode())
say("begun\\n")
if sys.argv[1] == "save":
    open(root / "begun", "w").close()
    open(root / "go on").close()
    say("progress\\n" * 1000)
    assert sys.argv[2:4] == ["-p", "7"]
    Path(sys.argv[4]).write_bytes(b"memory")
    (root / "domains.json").write_text("[-7]")
elif sys.argv[1] == "destroy":
    (root / "domains.json").write_text("[]")
else:
    assert Path(sys.argv[2]).read_bytes() == b"memory"
    (root / "domains.json").write_text("[8]")
say("done\\n")
"""

# Succeeds where it is killed no later than others, and its files are for others to read.
MONITOR = """
import os, sys, time
from pathlib import Path
until = time.monotonic() + (10 if sys.argv[1] == "restore" else 0)
score = Path("/proc/self/oom_score_adj")
while score.read_text() != "0\\n" and time.monotonic() < until:
    time.sleep(0.01)
sys.exit(score.read_text() != "0\\n" or os.umask(0) != 0o022)
"""


class Moving:
    """A mover that was started, with a pipe for what it says."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.host = FileHost(root)
        self.process: subprocess.Popen[bytes] | None = None
        for name in ("saves", "notes", "jobs", "bin"):
            (root / name).mkdir(mode=0o700)
        for name in ("begun", "go on"):
            os.mkfifo(root / name)
        (root / "domains.json").write_text("[7]")
        (root / "bin" / "xl").write_text(f"#!{sys.executable}\n{XL}")
        (root / "bin" / "xl").chmod(0o755)

    def start(self) -> subprocess.Popen[bytes]:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.unit.mover_process", str(self.root)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PATH": str(self.root / "bin")},
            cwd=Path(__file__).parents[2],
        )
        return self.process

    def wait_for_the_save(self) -> None:
        (self.root / "begun").open().close()

    def let_it_go_on(self) -> None:
        (self.root / "go on").open("w").close()

    def domids(self) -> list[int]:
        found: list[int] = json.loads((self.root / "domains.json").read_text())
        return found

    def left(self) -> list[str]:
        folders = (self.root / "saves", self.root / "notes")
        return sorted(path.name for folder in folders for path in folder.iterdir())

    def told(self) -> tuple[str, ...]:
        saves = Saves("boot", notes=self.root / "notes")
        return tuple(save.text for save in saves.left_over(self.host.domains))


@pytest.fixture
def moving(tmp_path: Path) -> Iterator[Moving]:
    moving = Moving(tmp_path)
    yield moving
    if moving.process is not None:
        moving.process.kill()
        moving.process.wait()
        assert moving.process.stdout is not None
        moving.process.stdout.close()
    # No xl is to wait for ever.
    with suppress(OSError):
        os.close(os.open(tmp_path / "go on", os.O_WRONLY | os.O_NONBLOCK))


def test_a_guest_is_restored_though_nobody_reads_any_more(moving: Moving) -> None:
    process = moving.start()
    assert process.stdout is not None
    moving.wait_for_the_save()
    process.stdout.close()
    moving.let_it_go_on()
    assert process.wait() == 0
    assert moving.domids() == [8]
    assert moving.left() == ["lock"]


def test_what_xl_says_lies_beside_the_note(moving: Moving) -> None:
    moving.start()
    moving.wait_for_the_save()
    log = log_path(IDENTITY.uuid, moving.root / "notes")
    assert log.read_text() == "begun\nbegun\n"
    moving.let_it_go_on()


def test_a_save_goes_on_without_its_mover_and_is_known_to(moving: Moving) -> None:
    process = moving.start()
    moving.wait_for_the_save()
    process.kill()
    process.wait()
    [told] = moving.told()
    assert "is being saved" in told
    moving.let_it_go_on()
    # xl has it as long as it lives.
    with (moving.root / "notes" / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
    assert moving.domids() == [-7]
    [told] = moving.told()
    assert "`xl unpause` lets it run" in told
    assert str(log_path(IDENTITY.uuid, moving.root / "notes")) in told


def test_a_guest_runs_on_where_there_is_no_xl(moving: Moving) -> None:
    (moving.root / "bin" / "xl").unlink()
    process = moving.start()
    said, _ = process.communicate()
    assert process.returncode == EX_STAYS
    assert b"xl cannot be started" in said
    assert moving.domids() == [7]
    assert moving.left() == ["lock"]


def test_what_a_restore_leaves_behind_is_as_if_a_person_had_started_it(moving: Moving) -> None:
    (moving.root / "bin" / "xl").write_text(f"#!{sys.executable}\n{MONITOR}")
    own = Path("/proc/self/oom_score_adj")
    before = own.read_text()
    log = os.open(moving.root / "log", os.O_RDWR | os.O_CREAT, 0o600)
    umask = os.umask(0o077)
    try:
        own.write_text("500")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PATH", str(moving.root / "bin"))
            assert run_xl(["restore", "x"], log) == 0
            assert run_xl(["save", "x"], log) == 1
    finally:
        os.umask(umask)
        own.write_text(before)
        os.close(log)


def test_told_to_stop_in_the_middle_it_goes_on_to_the_end(moving: Moving) -> None:
    process = moving.start()
    moving.wait_for_the_save()
    process.terminate()
    moving.let_it_go_on()
    assert process.wait() == 0
    assert moving.domids() == [8]


def test_told_to_stop_before_the_save_it_leaves_the_guest_as_it_is(moving: Moving) -> None:
    # It waits for this before it does anything.
    with only_one(moving.root / "notes"):
        process = moving.start()
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.terminate()
    said, _ = process.communicate()
    assert process.returncode == EX_STAYS
    assert b"told to stop" in said
    assert moving.domids() == [7]
    assert moving.left() == ["lock"]
