"""The start of the daemon: what an earlier one left of exchanges comes before all that may fail."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import pytest

from pgofflined.aftercare import CareTimes
from pgofflined.core.errors import PortError
from pgofflined.core.policy import Policy, RetirePolicy
from pgofflined.core.status import ReloadStatus
from pgofflined.daemon import EX_UNAVAILABLE, LOCK, STATE, Host, HostClock, _reload, start
from pgofflined.jobstore import JobStore
from pgofflined.notify import NullNotifier
from pgofflined.ports import DomainEnds, Hypervisor, nothing
from pgofflined.sim.clock import ManualClock
from pgofflined.sim.faults import Fault, FaultyHypervisor, Killed, Moment
from pgofflined.sim.scenarios import demo_host
from pgofflined.store import Store, read_boot_id
from tests.crash.killing import PAGES, MortalJournal, run
from tests.unit.exchanger.conftest import Bench
from tests.unit.test_savewatch import service_of

GOOD = """
[control]
socket = "{}/control.sock"
[metrics]
listen = "off"
"""


class Clock(HostClock):
    """The host's, as the simulated guest's record has it."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench

    def now(self) -> float:
        return self._bench.host.clock.now()


@dataclass
class Found:
    """What a daemon finds that starts after one that was killed in an exchange."""

    bench: Bench
    directory: Path
    config: Path
    ran_at_release: bool | None = None

    @property
    def runs(self) -> bool:
        info = self.bench.host.domain(self.bench.domid)
        return info.shutdown is None and not info.paused

    def records(self) -> list[str]:
        return [path.name for path in (self.directory / "jobs").iterdir()]

    def start(self, **changes: object) -> int:
        host = Host(
            open_xen=lambda: self.bench.host,
            restore_affinity=nothing,
            release_monitors=self._release,
            lock_wait=0.2,
            directory=self.directory,
            clock=Clock(self.bench),
        )
        return start(self.config, replace(host, **changes))  # type: ignore[arg-type]

    def _release(self) -> None:
        self.ran_at_release = self.runs


@pytest.fixture
def found(tmp_path: Path) -> Found:
    return found_after(tmp_path, "exchange")


def found_after(tmp_path: Path, method: str) -> Found:
    """The daemon was killed as this call came back."""
    bench = Bench.build()
    left, directory = tmp_path / "left", tmp_path / "run"
    xen = FaultyHypervisor(bench.host, Fault(method=method, moment=Moment.AFTER, kills=True))
    mfns = bench.mark(*PAGES["data"](bench.layout))
    with pytest.raises(Killed):
        run(bench, mfns, xen, MortalJournal(JobStore(left), xen))
    # This process, which is not really dead, still holds the locks of the records in there.
    shutil.copytree(left, directory / "jobs")
    config = tmp_path / "pgofflined.toml"
    config.write_text(GOOD.format(tmp_path))
    found = Found(bench=bench, directory=directory, config=config)
    assert not found.runs
    return found


def test_a_guest_is_let_go_although_the_configuration_is_bad(found: Found) -> None:
    found.config.write_text("retire = [\n")
    assert found.start() == os.EX_CONFIG
    assert found.ran_at_release, "a monitor takes a suspend for the end"
    assert found.records() == []
    found.bench.assert_guest_runs_unharmed()


def test_a_guest_is_let_go_although_the_store_cannot_be_had(found: Found) -> None:
    store = Store.open(found.directory / STATE, read_boot_id())
    try:
        assert found.start() == EX_UNAVAILABLE
    finally:
        store.close()
    assert found.records() == []
    found.bench.assert_guest_runs_unharmed()


def test_a_guest_is_let_go_although_the_store_is_damaged(found: Found) -> None:
    (found.directory / STATE).write_bytes(b"no database " * 999)
    found.config.write_text("retire = [\n")
    assert found.start() == os.EX_CONFIG
    found.bench.assert_guest_runs_unharmed()


def test_nothing_is_touched_while_another_daemon_runs(
    found: Found, caplog: pytest.LogCaptureFixture
) -> None:
    lock = found.directory / LOCK
    script = (
        "import fcntl,sys; f=open(sys.argv[1],'w'); fcntl.flock(f,2); print(); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"\n"
        before = found.records()
        assert found.start() == EX_UNAVAILABLE
        assert not found.runs
        assert found.records() == before
        other.communicate(b"")
    assert f"has locked {lock}" in caplog.text


def test_without_a_file_to_lock_a_guest_is_let_go_all_the_same(found: Found) -> None:
    (found.directory / LOCK).mkdir()
    found.config.write_text("retire = [\n")
    assert found.start() == os.EX_CONFIG
    found.bench.assert_guest_runs_unharmed()


def test_a_bad_configuration_is_final_only_where_no_guest_may_wait(found: Found) -> None:
    def fail() -> Hypervisor:
        raise PortError("no Xen yet")

    found.config.write_text("retire = [\n")
    host = Host(open_xen=fail, directory=found.directory)
    assert start(found.config, host) == EX_UNAVAILABLE
    shutil.rmtree(found.directory / "jobs")
    assert start(found.config, host) == os.EX_CONFIG


def test_the_service_goes_on_with_what_was_not_ended(
    found: Found, caplog: pytest.LogCaptureFixture
) -> None:
    guest = found.bench.host.simulated(found.bench.domid)
    guest.somebody = "process 5 (xl save)"
    ended = threading.Event()

    def operator() -> None:
        """He ends what he does with the guest, and stops the daemon when it runs."""
        while not (found.config.parent / "control.sock").exists() and not ended.wait(0.01):
            pass
        guest.somebody = None
        while not found.runs and not ended.wait(0.01):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, lambda *_: None)
    thread = threading.Thread(target=operator)
    thread.start()
    try:
        assert found.start() == 0
    finally:
        ended.set()
        thread.join()
        signal.signal(signal.SIGTERM, before)
    told = [one.getMessage() for one in caplog.records if one.name == "pgofflined.recoverylog"]
    assert sum("process 5 (xl save)" in line for line in told) == 1
    assert "is in use by another process" not in caplog.text
    assert found.records() == []
    found.bench.assert_guest_runs_unharmed()


def test_systemd_hears_of_a_service_that_has_failed_while_it_looks_after_a_guest(
    found: Found, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = found.bench.host.simulated(found.bench.domid)
    guest.somebody = "process 5 (xl save)"
    heard: list[str] = []

    class Fault(Exception):
        pass

    def fail() -> DomainEnds:
        raise Fault

    def notify(status: str) -> None:
        heard.append(status)
        if is_fed() > 3:
            guest.somebody = None

    def is_fed() -> int:
        return heard.count("WATCHDOG=1")

    systemd = ModuleType("systemd.daemon")
    systemd.notify = notify  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "systemd", ModuleType("systemd"))
    monkeypatch.setitem(sys.modules, "systemd.daemon", systemd)
    monkeypatch.setenv("NOTIFY_SOCKET", "/nowhere")
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)
    times = CareTimes(interval=0.05, stop=20.0)
    with pytest.raises(ExceptionGroup):
        found.start(open_ends=fail, times=times)
    assert any(status.startswith("READY=1") for status in heard)
    assert is_fed() > 3
    found.bench.assert_guest_runs_unharmed()


async def test_a_reload_is_noted_whether_it_succeeds_or_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    config = tmp_path / "pgofflined.toml"
    demo = demo_host(clock=ManualClock(), seed=1)
    clock = demo.host.clock
    with closing(Store.open(tmp_path / STATE, "this")) as store:
        service = service_of(demo, tmp_path, store)

        def reload(text: str) -> ReloadStatus:
            config.write_text(text)
            clock.wait(60)
            _reload(config, service, NullNotifier())
            return service.snapshot().reload

        started = service.snapshot().reload
        assert (started.successful, started.last_success) == (True, clock.now())

        rejected = reload('[retire]\ndry_run = true\n[domains]\ndeny = ["web[1-3"]\n')
        assert (rejected.successful, rejected.when) == (False, clock.now())
        assert rejected.last_success == started.last_success
        [problem] = rejected.problems
        assert problem.startswith(f"{config}: line 4: domains.deny: ")
        assert problem in caplog.text
        assert service.policy.retire == Policy().retire, "nothing of a bad file is in force"

        accepted = reload('[retire]\ndry_run = true\n[relocation]\nsave_directory = "/tmp/x"\n')
        assert (accepted.successful, accepted.problems) == (True, ())
        assert accepted.when == accepted.last_success == clock.now()
        [warning] = accepted.warnings
        assert "line 4: relocation.save_directory" in warning
        assert warning in caplog.text
        assert service.policy.retire == RetirePolicy(dry_run=True)

        config.unlink()
        clock.wait(60)
        _reload(config, service, NullNotifier())
        gone = service.snapshot().reload
        assert (gone.successful, gone.last_success) == (False, accepted.when)
        assert gone.warnings == accepted.warnings, "what is in force is as doubtful as it was"
        assert "there is no such file" in gone.problems[0]


async def test_after_a_reload_the_journal_lists_what_is_in_force_not_what_waits_for_a_restart(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    config = tmp_path / "pgofflined.toml"
    config.write_text("[retire]\ndry_run = true\n[exchange]\nworkers = 7\n")
    demo = demo_host(clock=ManualClock(), seed=1)
    with closing(Store.open(tmp_path / STATE, "this")) as store:
        service = service_of(demo, tmp_path, store)
        workers = service.policy.exchange.workers
        assert workers != 7
        _reload(config, service, NullNotifier())
    assert "policy: retire.dry_run = true" in caplog.messages
    assert f"policy: exchange.workers = {workers}" in caplog.messages
    assert "exchange.workers take effect with the next start of the daemon" in caplog.text


def test_what_is_doubtful_is_told_at_the_start(
    found: Found, caplog: pytest.LogCaptureFixture
) -> None:
    found.config.write_text(
        GOOD.format(found.config.parent) + '[relocation]\nsave_directory = "/tmp/x"\n'
    )
    store = Store.open(found.directory / STATE, read_boot_id())
    try:
        # It goes no further than that.
        assert found.start() == EX_UNAVAILABLE
    finally:
        store.close()
    assert "relocation.save_directory: everybody may write" in caplog.text
