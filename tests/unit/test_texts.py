"""What people read names nothing that is not there: commands, keys, metrics, alerts, conditions."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from pgofflined.cli import main
from pgofflined.control.protocol import MAX_PAGES
from pgofflined.core.conditions import ConditionCode
from pgofflined.core.schema import SECTIONS
from pgofflined.metrics import Metrics

from .rim_samples import NOW, SNAPSHOT

ROOT = Path(__file__).parents[2]
RULES = ROOT / "prometheus" / "pgofflined.rules.yml"
# What was is told in the changelog and in the decisions.
DOCUMENTS = [
    *(path for path in ROOT.glob("*.md") if path.name != "CHANGELOG.md"),
    *ROOT.glob("docs/*.md"),
    *(path for name in ("config", "prometheus", "systemd") for path in (ROOT / name).iterdir()),
]
MESSAGES = [*DOCUMENTS, *ROOT.glob("pgofflined/**/*.py")]
# Messages of the daemon that are quoted, and look like a command.
NO_COMMANDS = {"ends", "cannot"}
# A word with a dot that is a file.
NO_KEYS = {"control.sock"}


def found_in(paths: list[Path], pattern: str) -> set[str]:
    """All matches of a pattern's only group."""
    compiled = re.compile(pattern)
    return {match for path in paths for match in compiled.findall(path.read_text())}


def test_commands_and_their_options(capsys: pytest.CaptureFixture[str]) -> None:
    lines = found_in(MESSAGES, r"`pgofflined ([a-z-]+[^`]*)`")
    named = {tuple(line.split(maxsplit=1)) for line in lines}
    named = {command for command in named if command[0] not in NO_COMMANDS}
    assert {"status", "offline", "acknowledge", "recover"} <= {command for command, *_ in named}
    for command, *rest in sorted(named):
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        assert ended.value.code == 0, command
        said = capsys.readouterr().out
        for option in re.findall(r"--[a-z-]+", " ".join(rest)):
            assert option in said, (command, option)


def test_numbers_of_pages_that_the_command_takes() -> None:
    named = found_in(MESSAGES, r"`pgofflined status --pages (\d+)`")
    assert named
    assert all(int(number) <= MAX_PAGES for number in named)


def test_keys_of_the_configuration() -> None:
    sections = "|".join(SECTIONS)
    named = found_in(DOCUMENTS, rf"(?<![\w./])((?:{sections})\.[a-z_]+)\b(?!\()") - NO_KEYS
    assert len(named) > 20
    assert named <= {f"{name}.{key}" for name, keys in SECTIONS.items() for key in keys}


def test_metrics() -> None:
    shown = set(re.findall(r"^(pgofflined_\w+)", generate_latest(metrics()).decode(), re.MULTILINE))
    named = found_in(DOCUMENTS, r"\b(pgofflined_[a-z_]+)\b")
    assert len(named) > 12
    histograms = {name.removesuffix("_bucket") for name in shown if name.endswith("_bucket")}
    assert named <= shown | histograms


def metrics() -> Metrics:
    return Metrics(lambda: SNAPSHOT, lambda: NOW)


def test_alerts() -> None:
    there = set(re.findall(r"alert: (\w+)", RULES.read_text()))
    readme = found_in([ROOT / "README.md"], r"`(Pgofflined[A-Za-z]+)`")
    assert there == readme


def test_conditions() -> None:
    named = found_in(DOCUMENTS, r"pgofflined acknowledge ([a-z_]+)") - {"all"}
    assert len(named) > 5
    assert named <= set(ConditionCode)
