"""Who saves or migrates a domain, by the processes that are really there."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pgofflined.core.errors import PortError
from pgofflined.core.frames import Domid
from pgofflined.xen.toolstack import FirstLook, somebody_at

# No other process of this machine is about a domain of this number and name.
GUEST = Domid(31999)
NAME = b"guest of test_toolstack"
SHOWN = "guest of test_toolstack"


@contextmanager
def process(directory: Path, program: str, *arguments: str) -> Iterator[int]:
    """A process that shows this name and these arguments, and waits."""
    script = directory / program
    script.write_text("#!/bin/sh\necho up\nread line\n")
    script.chmod(0o755)
    command = [str(script), *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == b"up\n"
        try:
            yield running.pid
        finally:
            running.kill()


@pytest.mark.parametrize(
    "command",
    [
        ["xl", "save", "31999", "/srv/saved"],
        ["xl", "save", "-c", SHOWN, "/srv/saved"],
        ["xl", "-vvv", "-f", "save", "31999", "/srv/saved"],
        ["xl", "migrate", "-s", "", "31999", "xl migrate-receive"],
        ["xl", "migrate", SHOWN, "spare"],
        ["xl", "remus", "31999", "spare"],
        ["xl", "suspend", "31999"],
        ["libxl-save-helper", "--save-domain", "7", "-1", "31999", "1", "0"],
    ],
    ids=" ".join,
)
def test_who_saves_or_migrates_the_domain_is_found(tmp_path: Path, command: list[str]) -> None:
    with process(tmp_path, *command) as pid:
        found = somebody_at(GUEST, NAME)
        assert found is not None
        assert found.startswith(f"process {pid} (")
        assert " ".join(command[1:]) in found
    assert somebody_at(GUEST, NAME) is None


@pytest.mark.parametrize(
    "command",
    [
        ["xl", "create", "/etc/xen/31999"],
        ["xl", "create", "31999"],
        ["xl", "restore", "31999"],
        ["xl", "migrate-receive", "31999"],
        ["xl", "save", "319990", "/srv/31999"],
        ["xl", "save", "guest", "/srv/saved"],
        ["xl", "list", "31999"],
        ["xl", "console", SHOWN],
        ["xl"],
        ["xl", "-v"],
        ["xlsave", "save", "31999"],
        ["libxl-save-helper", "--save-domain", "31999", "-1", "5", "1", "0"],
        ["libxl-save-helper", "--restore-domain", "7", "-1", "31999", "1", "0"],
        ["libxl-save-helper"],
        ["editor", "xl save", "31999"],
    ],
    ids=" ".join,
)
def test_others_are_nobody(tmp_path: Path, command: list[str]) -> None:
    with process(tmp_path, *command):
        assert somebody_at(GUEST, NAME) is None


def test_a_guest_that_may_run_elsewhere_is_a_migrations_also_when_xl_has_gone() -> None:
    found = somebody_at(GUEST, NAME + b"--migratedaway")
    assert found is not None
    assert f"{SHOWN}--migratedaway" in found
    assert somebody_at(GUEST, NAME + b"--incoming") is None


def test_xl_is_found_by_its_number_before_the_name_is_looked_at(tmp_path: Path) -> None:
    with process(tmp_path, "xl", "migrate", "31999", "spare") as pid:
        found = somebody_at(GUEST, NAME + b"--migratedaway")
        assert found is not None
        assert found.startswith(f"process {pid} (")


def test_a_domain_without_a_name_is_not_everybodys(tmp_path: Path) -> None:
    with process(tmp_path, "xl", "migrate", "-s", "", "5", "xl migrate-receive"):
        assert somebody_at(GUEST, b"") is None
    with process(tmp_path, "xl", "save", "31999", "/srv/saved"):
        assert somebody_at(GUEST, b"") is not None


def test_what_the_arguments_hold_is_shown_on_one_line(tmp_path: Path) -> None:
    with process(tmp_path, "xl", "save", "31999", "a\nb\x1b[0m" + "x" * 500):
        found = somebody_at(GUEST, NAME)
    assert found is not None
    assert found.isprintable()
    assert len(found) < 200


def test_who_comes_after_the_first_look_is_found(tmp_path: Path) -> None:
    look = FirstLook(GUEST, NAME)
    assert look.somebody is None
    assert look.newcomer() is None
    with process(tmp_path, "xl", "save", "31999", "/srv/saved") as pid:
        assert str(look.newcomer()).startswith(f"process {pid} (")
    assert look.newcomer() is None


@pytest.mark.parametrize("before", ["libvirtd", "bash", "sshd: root@notty", "sleep"])
def test_a_process_that_becomes_another_after_the_first_look_is_found(
    tmp_path: Path, before: str
) -> None:
    helper = tmp_path / "libxl-save-helper"
    helper.write_text("#!/bin/sh\necho up\nread line\n")
    helper.chmod(0o755)
    script = f"echo up; read line; exec '{helper}' --save-domain 7 -1 31999 1 0"
    with subprocess.Popen(
        [before, "-c", script],
        executable="/bin/sh",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as running:
        assert running.stdin is not None
        assert running.stdout is not None
        try:
            assert running.stdout.readline() == b"up\n"
            look = FirstLook(GUEST, NAME)
            assert look.newcomer() is None
            running.stdin.write(b"\n")
            running.stdin.flush()
            assert running.stdout.readline() == b"up\n"
            assert str(look.newcomer()).startswith(f"process {running.pid} (")
        finally:
            running.kill()


@contextmanager
def fake_proc(directory: Path) -> Iterator[Path]:
    """A /proc with a thread of the kernel, an xl and a device model of guests, and a daemon."""
    flags = "S 2 0 0 0 -1 2129984 0"
    for pid, cmdline, stat in (
        ("2", b"", f"2 (kthreadd (x) 1) {flags}"),
        ("30", b"", "30 (xl) R 1 0 0 0 -1 4194560 0"),
        ("31", b"/usr/lib/xen-4.17/bin/xl\0create\0/etc/xen/one\0", ""),
        ("32", b"/usr/bin/qemu-system-i386\0-xen-domid\x003\0", ""),
        ("33", b"/usr/sbin/libvirtd\0", ""),
        ("34", b"sh\0/usr/sbin/xl\0list\0", ""),
    ):
        (directory / pid).mkdir()
        (directory / pid / "cmdline").write_bytes(cmdline)
        (directory / pid / "stat").write_text(stat)
    yield directory


SAVES = b"xl\0save\x0031999\0/srv/saved\0"


@pytest.mark.parametrize(
    ("pid", "is_read"),
    [("2", False), ("31", False), ("32", False), ("30", True), ("33", True), ("34", True)],
)
def test_only_what_cannot_become_another_is_passed_by(
    tmp_path: Path, pid: str, *, is_read: bool
) -> None:
    with fake_proc(tmp_path) as proc:
        look = FirstLook(GUEST, NAME, proc)
        assert look.somebody is None
        (proc / pid / "cmdline").write_bytes(SAVES)
        assert (look.newcomer() is not None) is is_read
        (proc / pid / "cmdline").write_bytes(b"")
        (proc / "35").mkdir()
        (proc / "35" / "cmdline").write_bytes(SAVES)
        assert look.newcomer() == "process 35 (xl save 31999 /srv/saved)"


def test_processes_that_cannot_be_read_are_no_answer(tmp_path: Path) -> None:
    with pytest.raises(PortError, match="cannot be listed"):
        somebody_at(GUEST, NAME, tmp_path / "none")
    (tmp_path / "5" / "cmdline").mkdir(parents=True)  # EISDIR, as any error but the process's end
    with pytest.raises(PortError, match="5/cmdline cannot be read"):
        somebody_at(GUEST, NAME, tmp_path)
