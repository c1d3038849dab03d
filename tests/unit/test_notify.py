"""What systemd hears, on a socket as its own."""

from __future__ import annotations

import array
import logging
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from pgofflined.notify import (
    ChannelName,
    NullNotifier,
    SystemdNotifier,
    make_notifier,
    parse_channel_name,
    sort_descriptors,
    watchdog_interval,
)

CHANNEL = ChannelName(virq=16, port=37)


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        listening.settimeout(5)
        yield listening


@pytest.fixture
def notifier(systemd: socket.socket) -> Iterator[SystemdNotifier]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sending:
        sending.connect(systemd.getsockname())

        def send(status: str, *, fds: Sequence[int] = ()) -> None:
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
            sending.sendmsg([status.encode()], [rights] if len(fds) else [])

        yield SystemdNotifier(send, monotonic=lambda: 12.5, watchdog_interval=15.0)


def heard(systemd: socket.socket) -> list[str]:
    return systemd.recv(4096).decode().split("\n")


def test_readiness_comes_with_the_status(systemd: socket.socket, notifier: SystemdNotifier) -> None:
    notifier.ready("watching, 3 pages retired")
    assert heard(systemd) == ["READY=1", "STATUS=watching, 3 pages retired"]


def test_a_line_break_in_the_status_starts_no_assignment(
    systemd: socket.socket, notifier: SystemdNotifier
) -> None:
    notifier.status("source lost\nREADY=1" + "x" * 5000)
    (line,) = heard(systemd)
    assert line.startswith("STATUS=source lost READY=1xxx")
    assert len(line) < 1100


def test_a_reload_names_its_time(systemd: socket.socket, notifier: SystemdNotifier) -> None:
    notifier.reloading()
    assert heard(systemd) == ["RELOADING=1", "MONOTONIC_USEC=12500000"]


def test_the_end_and_the_watchdog(systemd: socket.socket, notifier: SystemdNotifier) -> None:
    notifier.watchdog()
    notifier.stopping("finishing one exchange")
    assert heard(systemd) == ["WATCHDOG=1"]
    assert heard(systemd) == ["STOPPING=1", "STATUS=finishing one exchange"]


def test_a_kept_descriptor_arrives_with_its_name(
    systemd: socket.socket, notifier: SystemdNotifier, tmp_path: Path
) -> None:
    (tmp_path / "channel").write_text("events")
    fd = os.open(tmp_path / "channel", os.O_RDONLY)
    notifier.keep_descriptor(CHANNEL, fd)
    os.close(fd)
    message, fds, _, _ = socket.recv_fds(systemd, 4096, 4)
    assert message.decode().split("\n") == ["FDSTORE=1", "FDNAME=evtchn-16-37", "FDPOLL=0"]
    assert len(fds) == 1
    with os.fdopen(fds[0]) as kept:
        assert kept.read() == "events"


def test_a_dropped_descriptor_is_named(systemd: socket.socket, notifier: SystemdNotifier) -> None:
    notifier.drop_descriptor(CHANNEL)
    assert heard(systemd) == ["FDSTOREREMOVE=1", "FDNAME=evtchn-16-37"]


def test_a_socket_that_is_gone_is_logged_and_no_more(
    systemd: socket.socket, notifier: SystemdNotifier, caplog: pytest.LogCaptureFixture
) -> None:
    systemd.close()
    notifier.ready("well")
    assert "systemd could not be told READY=1" in caplog.text


def test_without_systemd_nobody_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    caplog.set_level(logging.DEBUG)
    notifier = make_notifier(lambda: 0.0)
    assert isinstance(notifier, NullNotifier)
    assert notifier.watchdog_interval is None
    notifier.ready("well")
    notifier.keep_descriptor(CHANNEL, 99)
    assert "NOTIFY_SOCKET is not set" in caplog.text


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "42"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "43"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_the_watchdog_is_fed_at_half_time_if_it_is_ours(
    environ: dict[str, str], expected: float | None
) -> None:
    assert watchdog_interval(environ, 42) == expected


def test_a_channels_name_is_read_as_it_was_written() -> None:
    assert parse_channel_name(str(CHANNEL)) == CHANNEL


@pytest.mark.parametrize(
    "name",
    [
        "",
        "stored",
        "evtchn-16",
        "evtchn-16-",
        "evtchn-016-3",
        "evtchn-16-3\n",
        "evtchn-16--3",
        "evtchn-16-1234567",
        "evtchn-16-٣",
        "Evtchn-16-3",
    ],
)
def test_any_other_name_is_none(name: str) -> None:
    assert parse_channel_name(name) is None


def test_descriptors_that_are_not_ours_are_closed(caplog: pytest.LogCaptureFixture) -> None:
    ours, second, foreign = (os.open(os.devnull, os.O_RDONLY) for _ in range(3))
    kept = sort_descriptors({ours: "evtchn-16-37", second: "evtchn-16-37", foreign: "stored"})
    assert kept == {CHANNEL: ours}
    os.fstat(ours)
    for fd in (second, foreign):
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
    os.close(ours)
    assert caplog.text.count("not to be used") == 2
