"""The service unit agrees with the daemon."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path, PurePath

import pytest

from pgofflined import cli
from pgofflined.aftercare import CareTimes
from pgofflined.afterstop import _NEXT_DAEMON_SECONDS, _may_be_restarted
from pgofflined.cli import _parser, main
from pgofflined.core.frames import PAGE_SIZE
from pgofflined.core.policy import ControlPolicy, ExchangePolicy, RelocationPolicy
from pgofflined.daemon import EX_UNAVAILABLE, JOBS
from pgofflined.exchanger.scan import MAX_TOGETHER
from pgofflined.xen.monitors import LOCK

SYSTEMD = Path(__file__).parents[2] / "systemd"
UNIT = SYSTEMD / "pgofflined.service"


def commands(name: str) -> list[str]:
    """The command lines of one setting, in their order."""
    lines = UNIT.read_text(encoding="utf-8").splitlines()
    return [line.partition("=")[2] for line in lines if line.startswith(f"{name}=")]


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


def test_a_stop_has_time_for_guests_and_to_say_which_are_left() -> None:
    limit = int(settings()["TimeoutStopSec"][0])
    assert CareTimes().late_at_stop < CareTimes().stop
    assert CareTimes().stop <= limit - 20
    assert CareTimes().stop < int(settings()["TimeoutStartSec"][0])


def test_what_is_left_is_recovered_after_every_end_and_before_all_else() -> None:
    lines = [
        line for line in UNIT.read_text("utf-8").splitlines() if line.startswith("ExecStopPost=")
    ]
    assert len(lines) == 1, "monitors go on after the guests, in the same command"
    program, *arguments = settings()["ExecStopPost"]
    # Its failure must not be the service's.
    assert program == f"-{settings()['ExecStart'][0]}"
    assert arguments == ["recover", "--after-stop"]
    assert _parser().parse_args(arguments).after_stop
    assert "ExecStop" not in settings(), "the daemon sees its guests out by itself"


def test_another_daemon_comes_before_what_is_recovered_later() -> None:
    assert int(settings()["RestartSec"][0]) * 2 <= _NEXT_DAEMON_SECONDS


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
        ("start-limit-hit", "69", True),
    ],
)
def test_where_a_next_daemon_may_follow_is_known(
    result: str,
    status: str,
    restarts: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    assert _may_be_restarted({"SERVICE_RESULT": result, "EXIT_STATUS": status}) is restarts


def test_a_reload_of_a_bad_file_fails_visibly_and_the_daemon_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # systemd runs them in this order and stops at the first that fails: the daemon is told first,
    # so that its metrics and its status say so, too.
    signal, check = commands("ExecReload")
    assert signal == "/bin/kill -HUP $MAINPID"
    program, *arguments = check.split()
    assert program == settings()["ExecStart"][0], "a dash before it would hide the failure"
    path = tmp_path / "pgofflined.toml"
    monkeypatch.setattr(cli, "DEFAULT_PATH", path)
    path.write_text("[retire]\ndry_run = true\n")
    assert main(arguments) == 0
    assert capsys.readouterr() == ("", "")
    path.write_text("[retire]\ndry_run = True\n")
    assert main(arguments) == os.EX_CONFIG
    assert f"{path}: line 2, column 11: a switch is written true" in capsys.readouterr().err


def test_a_reload_checks_the_file_that_the_daemon_reads() -> None:
    _, check = commands("ExecReload")
    for command in (check, *commands("ExecStart")):
        assert ".toml" not in command, "both go by the default, or both by the same file"


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


def test_journald_drops_nothing_of_what_the_daemon_has_chosen_to_write() -> None:
    assert settings()["LogRateLimitIntervalSec"] == ["0"]


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
