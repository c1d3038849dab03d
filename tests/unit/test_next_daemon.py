"""What a person has to see to is shown by the next daemon, whichever process has found it."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from pgofflined.aftercare import CareTimes
from pgofflined.control.client import NotRunning, ask
from pgofflined.control.protocol import StatusReply, StatusRequest
from pgofflined.daemon import Host, start
from pgofflined.ports import nothing
from pgofflined.sim.faults import Fault, FaultyHypervisor
from pgofflined.store import Store
from tests.unit.test_afterstop import KILLED, STOPPED, After
from tests.unit.test_daemon import Found, found_after


def shown(found: Found) -> dict[str, str]:
    """The critical conditions of a daemon that is started, asked and stopped."""
    socket = found.config.parent / "control.sock"
    replies: list[StatusReply] = []
    ended = threading.Event()

    def operator() -> None:
        while not replies and not ended.wait(0.01):
            with suppress(NotRunning):
                reply = ask(socket, StatusRequest())
                assert isinstance(reply, StatusReply)
                replies.append(reply)
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
    [reply] = replies
    return {
        one.code: one.text
        for one in reply.attention
        if one.severity == "critical" and one.code != "no_source"
    }


def let_go_by_somebody(found: Found) -> None:
    found.bench.host.unpause(found.bench.domid)
    found.bench.host.resume(found.bench.domid)


@pytest.mark.parametrize("environ", [KILLED, STOPPED, {}])
def test_a_guest_that_somebody_let_run_in_the_middle_of_a_change(
    tmp_path: Path, environ: dict[str, str]
) -> None:
    found = found_after(tmp_path, "exchange")
    let_go_by_somebody(found)
    After(found).run(environ)
    conditions = shown(found)
    assert "restart it" in conditions["job_not_recovered"]
    # And the one after that.
    assert shown(found) == conditions


def test_the_same_without_anything_that_ran_in_between(tmp_path: Path) -> None:
    found = found_after(tmp_path, "exchange")
    let_go_by_somebody(found)
    assert "restart it" in shown(found)["job_not_recovered"]


def test_a_daemon_that_only_recovered_because_its_configuration_is_bad(tmp_path: Path) -> None:
    found = found_after(tmp_path, "exchange")
    good = found.config.read_text()
    let_go_by_somebody(found)
    found.config.write_text("retire = [\n")
    assert found.start() == os.EX_CONFIG
    found.config.write_text(good)
    assert "restart it" in shown(found)["job_not_recovered"]


def test_a_daemon_whose_service_could_not_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = found_after(tmp_path, "exchange")
    good = found.config.read_text()
    found.config.write_text(good.replace("control.sock", "no/such/folder.sock"))
    monkeypatch.setattr("pgofflined.exchanging.RECOVERY_SECONDS", 0.0)
    # By then the jobs are the service's, which has not begun.
    xen = FaultyHypervisor(
        found.bench.host,
        Fault(method="condition"),
        Fault(method="condition", nth=2, act=lambda: let_go_by_somebody(found)),
    )
    host = Host(
        open_xen=lambda: xen,
        restore_affinity=nothing,
        release_monitors=nothing,
        directory=found.directory,
        times=CareTimes(interval=0.01, stop=30.0),
    )
    assert start(found.config, host) == os.EX_UNAVAILABLE
    found.config.write_text(good)
    assert "restart it" in shown(found)["job_not_recovered"]


def test_a_guest_that_stands_still_for_nobody_knows_whom(tmp_path: Path) -> None:
    found = found_after(tmp_path, "suspend")
    found.bench.host.clock.wait(700)
    After(found).run(KILLED)
    assert not found.runs
    assert "it may be so for somebody else" in shown(found)["job_not_recovered"]


def test_a_page_that_a_guest_has_lost(tmp_path: Path) -> None:
    found = found_after(tmp_path, "exchange")
    failing = FaultyHypervisor(found.bench.host, Fault(method="write_frames", times=10**6))
    After(found).run(STOPPED, failing)
    assert found.runs
    conditions = shown(found)
    assert "restart it at once" in conditions["page_damaged"]
    assert "cannot be put right" in conditions["job_not_recovered"]


def test_a_guest_whose_memory_was_put_right_while_somebody_saved_it(tmp_path: Path) -> None:
    found = found_after(tmp_path, "exchange")
    found.bench.host.simulated(found.bench.domid).somebody = "process 5 (xl save)"
    After(found).run(STOPPED)
    found.bench.host.simulated(found.bench.domid).somebody = None
    assert "do not trust what it has saved" in shown(found)["job_not_recovered"]


def test_what_cannot_be_stored_is_said_in_the_journal(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = found_after(tmp_path, "exchange")
    let_go_by_somebody(found)
    store = Store.open(found.directory / "state.db", "another")
    try:
        After(found).run(STOPPED)
    finally:
        store.close()
    assert f"no alert for d{found.bench.domid}" in caplog.text


@pytest.mark.parametrize("environ", [KILLED, None])
@pytest.mark.parametrize("call", ["suspend", "exchange"])
def test_a_guest_that_has_crashed_since_it_was_asked(
    tmp_path: Path, environ: dict[str, str] | None, call: str
) -> None:
    found = found_after(tmp_path, call)
    found.bench.host.crash(found.bench.domid, "it could not suspend itself")
    if environ is not None:
        After(found).run(environ)
    conditions = shown(found)
    assert "has crashed since pgofflined asked it" in conditions["guest_ended"]
    assert "job_not_recovered" not in conditions
    assert shown(found) == conditions
