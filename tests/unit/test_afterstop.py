"""What systemd runs after the daemon's end: guests that it left run again, whatever ended it."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pgofflined.affinitynote import AffinityFile
from pgofflined.afterstop import recover
from pgofflined.core.errors import PortError
from pgofflined.core.events import Event
from pgofflined.daemon import LOCK, Host
from pgofflined.ports import Hypervisor
from pgofflined.ports.affinity import Narrowed
from pgofflined.sim.faults import Fault, FaultyHypervisor
from tests.unit.exchanger.conftest import Bench
from tests.unit.test_daemon import Found, found

__all__ = ["found"]

KILLED = {"SERVICE_RESULT": "signal", "EXIT_STATUS": "KILL"}
STOPPED = {"SERVICE_RESULT": "success", "EXIT_STATUS": "0"}


@dataclass
class After:
    """The command, after a daemon that was killed in an exchange."""

    found: Found
    log: list[str] = field(default_factory=list)

    @property
    def bench(self) -> Bench:
        return self.found.bench

    def run(
        self, environ: dict[str, str], xen: Hypervisor | None = None, *, lock_wait: float = 0.2
    ) -> int:
        host = Host(
            open_xen=lambda: xen or self.bench.host,
            restore_affinity=lambda: self._did("affinity"),
            release_monitors=lambda: self._did("monitors"),
            directory=self.found.directory,
            clock=self.bench.host.clock,
            lock_wait=lock_wait,
        )
        return recover(host, environ)

    def _did(self, what: str) -> None:
        state = "runs" if self.found.runs else "stands still"
        self.log.append(f"{what}, the guest {state}")


@pytest.fixture
def after(found: Found) -> After:
    return After(found)


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What systemd-run was asked for."""
    said, program = tmp_path / "asked", tmp_path / "systemd-run"
    program.write_text(f'#!/bin/sh\necho "$*" >> {said}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return said


@pytest.mark.parametrize("environ", [KILLED, STOPPED, {}])
def test_a_guest_runs_again_and_the_monitors_go_on_after_that(
    after: After, environ: dict[str, str], asked: Path
) -> None:
    assert after.run(environ) == 0
    after.bench.assert_guest_runs_unharmed()
    assert after.found.records() == []
    assert after.log == ["monitors, the guest runs", "affinity, the guest runs"]
    assert not asked.exists()


def test_after_a_stop_it_goes_on_until_the_guest_runs(after: After, asked: Path) -> None:
    failing = FaultyHypervisor(after.bench.host, Fault(method="condition", times=4))
    assert after.run(STOPPED, failing) == 0
    after.bench.assert_guest_runs_unharmed()
    assert not asked.exists()


def test_before_a_restart_it_tries_once_and_comes_back_should_there_be_none(
    after: After, asked: Path, caplog: pytest.LogCaptureFixture
) -> None:
    failing = FaultyHypervisor(after.bench.host, Fault(method="condition"))
    began = after.bench.host.clock.monotonic()
    assert after.run(KILLED, failing) == 0
    assert not after.found.runs
    assert after.bench.host.clock.monotonic() == began, "the restart must not wait"
    [line] = asked.read_text().splitlines()
    assert line.endswith(f"{sys.executable} -I -m pgofflined recover")
    assert "--on-active=60" in line
    assert Event.GUEST_LEFT.message_id in str(
        [getattr(record, "pgofflined_fields", None) for record in caplog.records]
    )
    # No daemon was started, for it has failed too often.  The first process is gone by then, which
    # here still holds the locks of the records.
    later = after.found.directory.with_name("later")
    shutil.copytree(after.found.directory, later)
    after.found.directory = later
    assert after.run({}) == 0
    after.bench.assert_guest_runs_unharmed()


def test_without_systemd_run_it_goes_on_itself(
    after: After, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    failing = FaultyHypervisor(after.bench.host, Fault(method="condition", times=4))
    assert after.run(KILLED, failing) == 0
    after.bench.assert_guest_runs_unharmed()


def test_what_cannot_be_helped_in_time_is_told_and_stays_on_record(
    after: After, caplog: pytest.LogCaptureFixture
) -> None:
    after.bench.host.simulated(after.bench.domid).somebody = "process 5 (xl save)"
    before = after.found.records()
    assert after.run(STOPPED) == 1
    assert after.found.records() == before
    [line] = [one.getMessage() for one in caplog.records if one.levelno == logging.CRITICAL][-1:]
    assert "process 5 (xl save)" in line
    assert f"xl unpause {after.bench.domid}" in line


def test_while_a_daemon_runs_nothing_is_touched(after: After) -> None:
    lock = after.found.directory / LOCK
    script = (
        "import fcntl,sys; f=open(sys.argv[1],'w'); fcntl.flock(f,2); print(); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"\n"
        assert after.run({}) == 0
        assert not after.found.runs
        assert after.log == []
        assert other.stdin is not None
        # It ends, and who has waited for the lock goes on.
        other.stdin.close()
        assert after.run({}, lock_wait=30) == 0
    after.bench.assert_guest_runs_unharmed()


def test_without_xen_a_guest_that_is_left_is_a_critical_matter(
    after: After, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> Hypervisor:
        raise PortError("no Xen")

    host = Host(open_xen=fail, directory=after.found.directory, lock_wait=0.0)
    assert recover(host, STOPPED) == os.EX_UNAVAILABLE
    assert caplog.records[-1].levelno == logging.CRITICAL


ONE = Narrowed(before=frozenset({0, 1, 2}), narrowed=frozenset({1, 2}))
TWO = Narrowed(before=frozenset({0, 5}), narrowed=frozenset({5}))


def test_notes_of_narrowed_vcpus_outlive_their_process(tmp_path: Path) -> None:
    file = tmp_path / "affinity"
    assert AffinityFile(file).read() == {}
    AffinityFile(file).put(1, ONE)
    AffinityFile(file).put(3, TWO)
    assert AffinityFile(file).read() == {1: ONE, 3: TWO}
    AffinityFile(file).clear(1)
    assert AffinityFile(file).read() == {3: TWO}
    AffinityFile(file).clear(3)
    AffinityFile(file).clear(3)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"{",
        b'{"1": 2}',
        b'{"x": {"before": [1], "narrowed": [2]}}',
        b"\xff",
        b'{"1": {"before": [-1], "narrowed": [2]}}',
        b'{"1": {"before": [], "narrowed": []}}',
        b'{"1": {"before": ["0"], "narrowed": [2]}}',
    ],
)
def test_a_note_that_makes_no_sense_is_told_and_none(
    tmp_path: Path, text: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "affinity"
    file.write_bytes(text)
    assert AffinityFile(file).read() == {}
    assert "xl vcpu-pin 0" in caplog.text
