"""The service unit agrees with the daemon."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path, PurePath

import pytest

from pgofflined.cli import _may_be_restarted, main
from pgofflined.core.frames import PAGE_SIZE
from pgofflined.core.policy import ControlPolicy, ExchangePolicy, RelocationPolicy
from pgofflined.daemon import EX_UNAVAILABLE, JOBS
from pgofflined.exchanger.scan import MAX_TOGETHER
from pgofflined.xen import hypervisor
from pgofflined.xen.monitors import LOCK

SYSTEMD = Path(__file__).parents[2] / "systemd"
UNIT = SYSTEMD / "pgofflined.service"


def settings(unit: Path = UNIT) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for line in unit.read_text(encoding="utf-8").splitlines():
        if "=" in line and not line.startswith("#"):
            name, _, value = line.partition("=")
            found[name] += value.split()
    return found


def test_the_daemon_may_bring_an_exchange_to_its_end() -> None:
    exchange = ExchangePolicy()
    longest = exchange.acknowledge_timeout + exchange.suspend_timeout
    assert int(settings()["TimeoutStopSec"][0]) >= 2 * longest
    assert settings()["KillMode"] == ["mixed"]


def test_the_daemon_may_use_what_its_jobs_need_and_is_not_slowed_down_in_them() -> None:
    unit = settings()
    assert "MemoryHigh" not in unit
    [most] = unit["MemoryMax"]
    assert most == "1G"
    exchange = ExchangePolicy()
    contents = 4 * exchange.max_pages_per_suspend * PAGE_SIZE
    # Level, table, index, value and page of an entry; some copies of each.
    entries = 4 * MAX_TOGETHER * 33
    assert (100 << 20) + exchange.workers * ((60 << 20) + contents + entries) < (1 << 30) / 2


def test_what_a_killed_daemon_has_stopped_goes_on_without_a_next_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hypervisor, "release_monitors", lambda: [17, 23])
    monkeypatch.setenv("SERVICE_RESULT", "success")
    program, *arguments = settings()["ExecStopPost"]
    # Its failure must not be the service's.
    assert program == f"-{settings()['ExecStart'][0]}"
    assert main(arguments) == 0
    assert "17, 23" in capsys.readouterr().out


STARTED = """#!/bin/sh
echo "$*" >> {}
exit {}
"""


@pytest.mark.parametrize("works", [True, False])
@pytest.mark.parametrize("stops", [True, False])
@pytest.mark.parametrize(
    ("result", "status", "restarts"),
    [
        ("success", "0", False),
        ("exit-code", "78", False),
        ("exit-code", "64", False),
        ("exit-code", "69", True),
        ("signal", "KILL", True),
        ("oom-kill", "KILL", True),
        ("watchdog", "ABRT", True),
        ("timeout", "KILL", True),
    ],
)
def test_where_a_next_daemon_may_follow_it_lets_the_guest_go_first(
    result: str,
    status: str,
    *,
    restarts: bool,
    stops: bool,
    works: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked, released = tmp_path / "asked", list[bool]()
    program = tmp_path / "systemd-run"
    program.write_text(STARTED.format(asked, 0 if works else 1))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("SERVICE_RESULT", result)
    monkeypatch.setenv("EXIT_STATUS", status)
    monkeypatch.setattr(hypervisor, "release_monitors", lambda: released.append(True))
    monkeypatch.setattr(hypervisor, "stops_monitors", lambda: stops)
    _, *arguments = settings()["ExecStopPost"]
    assert main(arguments) == 0
    assert bool(released) is (not restarts or (stops and not works))
    assert asked.exists() is (restarts and stops)
    if asked.exists():
        options, command = asked.read_text().split(" -I -m pgofflined ")
        assert command == "release-monitors\n"
        [seconds] = [int(o.split("=")[1]) for o in options.split() if o.startswith("--on-active=")]
        assert seconds >= 2 * int(settings()["RestartSec"][0])


def test_what_ends_all_tries_is_known() -> None:
    for code in settings()["RestartPreventExitStatus"]:
        assert not _may_be_restarted({"SERVICE_RESULT": "exit-code", "EXIT_STATUS": code})


def test_a_bad_configuration_is_not_tried_again_and_a_missing_xen_is() -> None:
    final = {int(code) for code in settings()["RestartPreventExitStatus"]}
    assert os.EX_CONFIG in final
    assert EX_UNAVAILABLE not in final


def test_control_socket_and_lock_lie_where_the_service_may_write() -> None:
    folder = PurePath("/run", *settings()["RuntimeDirectory"])
    assert PurePath(ControlPolicy().socket).parent == folder
    assert settings()["RuntimeDirectoryMode"] == ["0700"]
    assert LOCK.parent == folder


def test_what_the_daemon_speaks_is_allowed() -> None:
    families = settings()["RestrictAddressFamilies"]
    assert {"AF_UNIX", "AF_INET", "AF_INET6", "AF_NETLINK"} == set(families)
    assert int(settings()["FileDescriptorStoreMax"][0]) >= 1
    assert settings()["Type"] == ["notify"]


def test_migrations_have_units_of_their_own_and_need_no_right_here() -> None:
    assert RelocationPolicy().time_limit > int(settings()["TimeoutStopSec"][0])
    assert settings()["ReadWritePaths"] == []


def test_what_is_kept_of_guests_reaches_no_disk() -> None:
    mount = SYSTEMD / f"{'-'.join(JOBS.parts[1:])}.mount"
    assert mount.name in settings()["Wants"]
    assert settings(mount)["Where"] == [str(JOBS)]
    assert settings(mount)["Type"] == ["ramfs"]
    assert "mode=0700" in settings(mount)["Options"][0]
    assert settings()["MemorySwapMax"] == ["0"]
    assert settings()["LimitCORE"] == ["0"]
