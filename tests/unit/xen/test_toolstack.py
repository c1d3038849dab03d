"""Who saves or migrates a domain, by the processes that are really there."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pgofflined.core.frames import Domid
from pgofflined.xen.toolstack import somebody_at

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


def test_a_domain_without_a_name_is_not_everybodys(tmp_path: Path) -> None:
    with process(tmp_path, "xl", "migrate", "-s", "", "5", "xl migrate-receive"):
        assert somebody_at(GUEST, b"") is None


def test_what_the_arguments_hold_is_shown_on_one_line(tmp_path: Path) -> None:
    with process(tmp_path, "xl", "save", "31999", "a\nb\x1b[0m" + "x" * 500):
        found = somebody_at(GUEST, NAME)
    assert found is not None
    assert found.isprintable()
    assert len(found) < 200
