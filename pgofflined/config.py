"""The configuration file: TOML to ``core.policy.Policy``, every mistake named at once.

Nothing is guessed: an unknown key, a wrong type, a number without its unit and a value that
cannot work are each an error which says where it is, what was found and what is allowed.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

from pgofflined.core.policy import Policy
from pgofflined.core.schema import SECTIONS, Invalid, Reader

EX_CONFIG: Final = os.EX_CONFIG
DEFAULT_PATH: Final = Path("/etc/pgofflined/pgofflined.toml")

_MAX_SIZE: Final = 1 << 20
_SHOWN: Final = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One mistake: the dotted key (empty for the file as a whole), the value, the remedy."""

    key: str
    found: str
    allowed: str

    def __str__(self) -> str:
        """``retire.window: found "72"; allowed is a number with its unit …``."""
        where = f"{self.key}: " if self.key else ""
        return f"{where}found {self.found}; allowed is {self.allowed}"


class ConfigError(Exception):
    """The configuration cannot be used; the program exits with ``EX_CONFIG``."""

    def __init__(self, name: str, problems: tuple[Problem, ...]) -> None:
        self.name = name
        self.problems = problems
        super().__init__("\n".join(f"{name}: {problem}" for problem in problems))


def load(path: Path) -> Policy:
    """Read a configuration file.  Raises ConfigError."""
    try:
        with path.open("rb") as file:
            untrusted_bytes = file.read(_MAX_SIZE + 1)
    except OSError as error:
        found = f"no readable file ({error.strerror or error})"
        raise _file_error(str(path), found, "a configuration file in TOML") from None
    if len(untrusted_bytes) > _MAX_SIZE:
        raise _file_error(str(path), "more than 1 MiB", "a file of at most 1 MiB")
    try:
        untrusted_text = untrusted_bytes.decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"a byte that is not UTF-8 at offset {error.start}"
        raise _file_error(str(path), found, "text in UTF-8") from None
    return parse(untrusted_text, name=str(path))


def parse(untrusted_text: str, *, name: str) -> Policy:
    """Read the text of a configuration file called ``name``.  Raises ConfigError."""
    try:
        untrusted_root = tomllib.loads(untrusted_text)
    except (tomllib.TOMLDecodeError, RecursionError, ValueError) as error:
        raise _file_error(name, f"what is not TOML: {error}", "TOML 1.0") from None
    problems: list[Problem] = []
    policy = _read_root(untrusted_root, problems)
    if problems:
        raise ConfigError(name, tuple(problems))
    return policy


def _file_error(name: str, found: str, allowed: str) -> ConfigError:
    return ConfigError(name, (Problem(key="", found=found, allowed=allowed),))


def _read_root(untrusted_root: Mapping[str, object], problems: list[Problem]) -> Policy:
    sections: dict[str, Any] = {}
    defaults = Policy()
    for name, untrusted_section in untrusted_root.items():
        if name not in SECTIONS:
            found = (
                "an unknown section" if isinstance(untrusted_section, dict) else "an unknown key"
            )
            allowed = "one of the sections " + ", ".join(f"[{known}]" for known in SECTIONS)
            problems.append(Problem(key=name, found=found, allowed=allowed))
        elif not isinstance(untrusted_section, dict):
            allowed = f"a section, written [{name}]"
            problems.append(Problem(key=name, found=_show(untrusted_section), allowed=allowed))
        else:
            values = _read_section(name, untrusted_section, problems)
            sections[name] = replace(getattr(defaults, name), **values)
    policy = replace(defaults, **sections)
    if not problems:
        problems.extend(_contradictions(policy))
    return policy


def _read_section(
    section: str, untrusted_section: Mapping[str, object], problems: list[Problem]
) -> dict[str, object]:
    readers: Mapping[str, Reader] = SECTIONS[section]
    values: dict[str, object] = {}
    for key, untrusted_value in untrusted_section.items():
        dotted = f"{section}.{key}"
        if key not in readers:
            allowed = f"one of the keys of [{section}]: " + ", ".join(readers)
            problems.append(Problem(key=dotted, found="an unknown key", allowed=allowed))
            continue
        try:
            values[key] = readers[key](untrusted_value)
        except Invalid as invalid:
            problems.append(
                Problem(key=dotted, found=_show(untrusted_value), allowed=invalid.allowed)
            )
    return values


def _contradictions(policy: Policy) -> list[Problem]:
    """What is wrong with keys that are right one by one."""
    problems: list[Problem] = []
    for section in fields(policy):
        values = getattr(policy, section.name)
        first, last = getattr(values, "retry_first", 0.0), getattr(values, "retry_last", 0.0)
        if first > last:
            problems.append(
                Problem(
                    key=f"{section.name}.retry_last",
                    found=f"{last:g} s",
                    allowed=f"no less than {section.name}.retry_first, which is {first:g} s",
                )
            )
    return problems


_SPELLED: Final[Mapping[type, Callable[[Any], str]]] = {
    bool: lambda value: "true" if value else "false",
    str: lambda value: f'"{value}"',
    dict: lambda _: "a table",
}


def _show(value: object) -> str:
    """A value about as the file has it, shortened."""
    text = _SPELLED.get(type(value), str)(value)
    text = "".join(char if char.isprintable() else "?" for char in text)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
