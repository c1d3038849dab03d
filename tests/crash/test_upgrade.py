"""A daemon finds the record of another version, or a damaged one: the guest is never forgotten.

Each release reads the records of the one before.  Of any other it reads whose guest it is, and how
far the job had come.
"""

from __future__ import annotations

import logging
import shutil
import sqlite3
from dataclasses import dataclass
from pathlib import Path

import pytest

from pgofflined.core.domains import ShutdownReason
from pgofflined.exchanging import RECOVERY_TRIES
from pgofflined.jobstore import JobStore
from pgofflined.leftovers import Leftovers
from pgofflined.ports import SuspendLimits
from pgofflined.sim.faults import Fault, FaultyHypervisor, Killed, Moment
from tests.crash.killing import PAGES, MortalJournal, run
from tests.unit.exchanger.conftest import Bench


@dataclass
class Found:
    """What a daemon finds that is of another version than the one that was killed."""

    bench: Bench
    folder: Path

    @classmethod
    def killed_at(cls, tmp_path: Path, method: str, moment: Moment = Moment.AFTER) -> Found:
        bench = Bench.build()
        xen = FaultyHypervisor(bench.host, Fault(method=method, moment=moment, kills=True))
        mfns = bench.mark(*PAGES["data"](bench.layout))
        dead, folder = tmp_path / "dead", tmp_path / "jobs"
        with pytest.raises(Killed):
            run(bench, mfns, xen, MortalJournal(JobStore(dead), xen))
        # This process, which is not really dead, still holds the locks of the records in there.
        shutil.copytree(dead, folder)
        return cls(bench=bench, folder=folder)

    @property
    def file(self) -> Path:
        [file] = self.folder.glob("*.job")
        return file

    def change(self, how: str) -> None:
        match how:
            case "later":
                with sqlite3.connect(self.file) as connection:
                    connection.executescript(
                        "DROP TABLE page; DROP TABLE moving; PRAGMA user_version = 9;"
                        "UPDATE writer SET version = '7.1'"
                    )
                connection.close()
            case "damaged":
                self.file.write_bytes(b"garbage" * 1000)
                for other in self.folder.glob("*-wal"):
                    other.unlink()
            case _:
                raise AssertionError(how)

    def start(self) -> Leftovers:
        """A daemon starts; it looks once."""
        host = self.bench.host
        left = Leftovers(host, JobStore(self.folder), host.clock, frozenset)
        left.recover()
        return left

    def see_out(self, left: Leftovers) -> bool:
        return left.see_out(sleep=self.bench.host.clock.wait)


HOW = pytest.mark.parametrize("how", ["later", "damaged"])


@HOW
@pytest.mark.parametrize("method", ["suspend", "pause"])
def test_a_guest_that_was_only_asked_or_held_runs_again(
    tmp_path: Path, how: str, method: str
) -> None:
    found = Found.killed_at(tmp_path, method)
    found.change(how)
    left = found.start()
    assert found.see_out(left)
    found.bench.assert_guest_runs_unharmed()
    assert list(found.folder.glob("*.job")) == []


def without_its_time(found: Found) -> None:
    """The record has no table to read, and was written by a release that set no time beside it."""
    found.change("damaged")
    [stage] = found.folder.glob("*-stage")
    stage.touch()


@pytest.mark.parametrize("forget", [False, True])
def test_a_guest_that_was_asked_long_ago_or_nobody_knows_when_is_a_persons(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    forget: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    found = Found.killed_at(tmp_path, "suspend")
    if forget:
        without_its_time(found)
    else:
        found.change("damaged")
        found.bench.host.clock.wait(700)
    found.see_out(found.start())
    # It may be suspended for somebody else by now.
    assert found.bench.host.domain(found.bench.domid).shutdown is ShutdownReason.SUSPEND
    assert ("when is not known" if forget else "long ago") in caplog.text


def test_a_guest_that_follows_late_runs_on_although_nobody_knows_when_it_was_asked(
    tmp_path: Path,
) -> None:
    found = Found.killed_at(tmp_path, "suspend", Moment.BEFORE)
    without_its_time(found)
    left = found.start()
    assert left.is_owed
    found.bench.host.suspend(found.bench.domid, SuspendLimits())
    assert found.see_out(left)
    found.bench.assert_guest_runs_unharmed()
    assert list(found.folder.iterdir()) == []


@HOW
def test_a_guest_in_the_middle_of_a_change_is_held_and_never_given_up(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    found = Found.killed_at(tmp_path, "exchange")
    found.change(how)
    left = found.start()
    for _ in range(2 * RECOVERY_TRIES):
        found.bench.host.clock.wait(60)
        assert found.see_out(left), "a person's, and nothing to wait for"
    info = found.bench.host.domain(found.bench.domid)
    assert (info.shutdown, info.paused) == (ShutdownReason.SUSPEND, True)
    assert found.file.exists(), "whoever wrote it can end it"
    critical = [one.getMessage() for one in caplog.records if one.levelno == logging.CRITICAL]
    assert f"xl destroy {found.bench.domid}" in critical[0]
    assert "no `xl unpause` or `xl resume`" in critical[0]
    assert ("pgofflined 7.1" in critical[0]) is (how == "later")


def test_a_guest_that_is_held_is_ended_by_the_version_that_can_read_its_record(
    tmp_path: Path,
) -> None:
    found = Found.killed_at(tmp_path, "exchange")
    whole = found.file.read_bytes()
    wal = found.file.with_name(found.file.name + "-wal")
    log = wal.read_bytes()
    found.change("damaged")
    found.start()
    found.file.write_bytes(whole)
    wal.write_bytes(log)
    assert found.see_out(found.start())
    found.bench.assert_guest_runs_unharmed()


@HOW
def test_a_guest_that_is_held_and_gone_leaves_no_record(tmp_path: Path, how: str) -> None:
    found = Found.killed_at(tmp_path, "exchange")
    found.change(how)
    left = found.start()
    found.bench.host.destroy(found.bench.domid)
    found.bench.host.clock.wait(60)
    found.see_out(left)
    found.start()
    assert list(found.folder.iterdir()) == []


@HOW
@pytest.mark.parametrize("stops", [False, True])
def test_a_guest_that_somebody_has_let_run_is_told_of_and_left(
    tmp_path: Path,
    how: str,
    caplog: pytest.LogCaptureFixture,
    stops: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    found = Found.killed_at(tmp_path, "exchange")
    found.change(how)
    host, domid = found.bench.host, found.bench.domid
    host.unpause(domid)
    host.resume(domid)
    if stops:
        host.suspend(domid, SuspendLimits())
    before = host.domain(domid)
    found.see_out(found.start())
    assert host.domain(domid) == before
    assert "restart it" in caplog.text
    assert list(found.folder.glob("*.job")) == []
    assert list(found.folder.glob("*.damaged")) != []


def test_a_record_of_a_domain_that_ended_since_is_removed(tmp_path: Path) -> None:
    found = Found.killed_at(tmp_path, "pause")
    found.change("damaged")
    found.bench.host.reboot(found.bench.domid)
    found.start()
    assert list(found.folder.iterdir()) == []


def fails() -> None:
    raise RuntimeError("a fault of our own")


@pytest.mark.parametrize("readable", [False, True])
def test_a_guest_of_a_job_that_only_meets_faults_of_our_own(
    tmp_path: Path,
    readable: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    found = Found.killed_at(tmp_path, "exchange")
    if not readable:
        found.change("damaged")
    host = found.bench.host
    fault = Fault(method="condition", times=RECOVERY_TRIES + 1, act=fails)
    xen = FaultyHypervisor(host, fault)
    left = Leftovers(xen, JobStore(found.folder), host.clock, frozenset)
    left.recover()
    assert found.see_out(left)
    info = host.domain(found.bench.domid)
    if readable:
        # As any that cannot be put right: what it lacks it faults at.
        assert (info.shutdown, info.paused) == (None, False)
    else:
        assert (info.shutdown, info.paused) == (ShutdownReason.SUSPEND, True)
        assert found.file.exists()
