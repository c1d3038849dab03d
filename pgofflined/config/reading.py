"""From the bytes of a configuration file to a policy.

Nothing is guessed: an unknown key, a wrong type, a number without its unit and a value that
cannot work are each a mistake which says where it is, what was found and what is allowed.
"""

from __future__ import annotations

import os
import stat
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final, NoReturn

from pgofflined.config.doubts import doubts
from pgofflined.config.lines import Places, syntax_error
from pgofflined.config.problems import ConfigError, Doubt, Line, Mistake
from pgofflined.core.policy import Policy
from pgofflined.core.schema import SECTIONS, Invalid, Reader

EX_CONFIG: Final = os.EX_CONFIG
DEFAULT_PATH: Final = Path("/etc/pgofflined/pgofflined.toml")

_MAX_SIZE: Final = 1 << 20
_SHOWN: Final = 60
_LONG_NUMBER: Final = 256
_OTHERS_MAY_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """A file that was understood, and settings in it that are legal and hardly meant."""

    name: str
    policy: Policy
    doubts: tuple[Doubt, ...] = ()

    @property
    def warnings(self) -> tuple[str, ...]:
        """One line for each doubt, with the file's name."""
        return tuple(f"{self.name}: {doubt}" for doubt in self.doubts)


def load(path: Path) -> Configuration:
    """Read a configuration file.  Raises ConfigError."""
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            untrusted_bytes = file.read(_MAX_SIZE + 1)
    except OSError as error:
        _refuse(path, Mistake(key="", text=_unreadable(error)))
    if len(untrusted_bytes) > _MAX_SIZE:
        _refuse(path, Mistake(key="", text="the file has more than 1 MiB, the most allowed"))
    try:
        untrusted_text = untrusted_bytes.decode("utf-8")
    except UnicodeDecodeError as error:
        _refuse(path, _not_utf8(untrusted_bytes, error.start))
    found = parse(untrusted_text, name=str(path))
    if not mode & _OTHERS_MAY_WRITE:
        return found
    writable = Doubt(
        key="",
        text="others than its owner may change this file, and so what is done to guests; "
        f"`chmod go-w {path}`",
    )
    return replace(found, doubts=(writable, *found.doubts))


def parse(untrusted_text: str, *, name: str) -> Configuration:
    """Read the text of a configuration file called ``name``.  Raises ConfigError."""
    try:
        # As tomllib does it, so that line numbers agree.
        untrusted_text = untrusted_text.replace("\r\n", "\n")
        untrusted_root = tomllib.loads(untrusted_text)
    except (tomllib.TOMLDecodeError, RecursionError, ValueError) as error:
        raise ConfigError(name, (syntax_error(untrusted_text, error),)) from None
    reading = _Reading(untrusted_root, Places(untrusted_text, untrusted_root))
    policy = reading.policy()
    if reading.mistakes:
        raise ConfigError(name, tuple(reading.mistakes))
    return Configuration(name=name, policy=policy, doubts=doubts(policy, reading.line))


def _refuse(path: Path, mistake: Mistake) -> NoReturn:
    raise ConfigError(str(path), (mistake,)) from None


def _unreadable(error: OSError) -> str:
    match error:
        case FileNotFoundError():
            return "there is no such file; give the path of one, or install config/pgofflined.toml"
        case PermissionError():
            return "permission denied; run as root, or give yourself the right to read the file"
        case IsADirectoryError():
            return "this is a directory; give the path of the file in it"
        case _:
            return f"the file cannot be read ({error.strerror or error})"


def _not_utf8(untrusted_bytes: bytes, start: int) -> Mistake:
    before = untrusted_bytes[:start]
    line = Line(before.count(b"\n") + 1)
    column = len(before.rpartition(b"\n")[2].decode("utf-8")) + 1
    text = f"the byte {untrusted_bytes[start]:#04x} is no text in UTF-8; save the file as UTF-8"
    return Mistake(key="", text=text, line=line, column=column)


class _Reading:
    """One pass over what TOML has made of a file."""

    def __init__(self, untrusted_root: Mapping[str, object], places: Places) -> None:
        self.mistakes: list[Mistake] = []
        self._root = untrusted_root
        self._places = places

    def line(self, key: str) -> Line | None:
        """The line of a dotted key."""
        return self._places.line(*key.split("."))

    def policy(self) -> Policy:
        """The policy; of no use where there are ``mistakes``."""
        sections: dict[str, Any] = {}
        defaults = Policy()
        for name, untrusted_section in self._root.items():
            if name not in SECTIONS:
                self._unknown_name(name, untrusted_section)
            elif not isinstance(untrusted_section, dict):
                text = f"found {_show(untrusted_section)}; allowed is a section, written [{name}]"
                self._note((name,), text)
            else:
                values = self._section(name, untrusted_section)
                sections[name] = replace(getattr(defaults, name), **values)
        policy = replace(defaults, **sections)
        if not self.mistakes:
            self._contradictions(policy)
        return policy

    def _note(self, path: tuple[str, ...], text: str) -> None:
        self.mistakes.append(Mistake(key=".".join(path), text=text, line=self._places.line(*path)))

    def _unknown_name(self, name: str, untrusted_section: object) -> None:
        known = ", ".join(f"[{section}]" for section in SECTIONS)
        if isinstance(untrusted_section, dict):
            near = _near(name, SECTIONS, "[{}]")
            self._note((name,), f"found an unknown section; {near}allowed is one of {known}")
            return
        owners = [section for section, keys in SECTIONS.items() if name in keys]
        if owners:
            where = " or ".join(f"[{section}]" for section in owners)
            text = f"found a key outside of any section; it belongs below {where}"
        else:
            text = f"found an unknown key outside of any section; allowed is one of {known}"
        self._note((name,), text)

    def _section(self, section: str, untrusted_section: Mapping[str, object]) -> dict[str, object]:
        readers: Mapping[str, Reader] = SECTIONS[section]
        values: dict[str, object] = {}
        for key, untrusted_value in untrusted_section.items():
            if key not in readers:
                self._note((section, key), _unknown_key(section, key, readers))
                continue
            try:
                values[key] = readers[key](untrusted_value)
            except Invalid as invalid:
                found = _show(invalid.items[0]) if invalid.items else _show(untrusted_value)
                twice = " twice" if invalid.twice else ""
                text = f"found {found}{twice}; allowed is {invalid.allowed}"
                self._note((section, key), text)
        return values

    def _contradictions(self, policy: Policy) -> None:
        """What is wrong with keys that are right one by one."""
        for section in fields(policy):
            values = getattr(policy, section.name)
            first, last = getattr(values, "retry_first", 0.0), getattr(values, "retry_last", 0.0)
            if first > last:
                text = (
                    f"found {last:g} s; allowed is no less than {section.name}.retry_first, which "
                    f"is {first:g} s"
                )
                path = section.name, "retry_last"
                line = self._places.line(*path) or self._places.line(section.name, "retry_first")
                self.mistakes.append(Mistake(key=".".join(path), text=text, line=line))


def _unknown_key(section: str, key: str, readers: Mapping[str, Reader]) -> str:
    elsewhere = [other for other, keys in SECTIONS.items() if other != section and key in keys]
    hint = _near(key, readers, '"{}"')
    if elsewhere and not hint:
        hint = f"it belongs below {' or '.join(f'[{other}]' for other in elsewhere)}; "
    return f"found an unknown key; {hint}allowed is one of the keys of [{section}]: " + ", ".join(
        readers
    )


def _near(name: str, known: Mapping[str, object], shown: str) -> str:
    """A question for what was meant, if that is near."""
    near = get_close_matches(name.lower(), known, n=1, cutoff=0.6)
    return f"did you mean {shown.format(near[0])}? " if near else ""


_SPELLED: Final[Mapping[type, Callable[[Any], str]]] = {
    bool: lambda value: "true" if value else "false",
    str: lambda value: f'"{value}"',
    # Python writes no number of more than 4300 digits in tens.
    int: lambda value: str(value) if value.bit_length() < _LONG_NUMBER else hex(value),
    list: lambda value: f"[{', '.join(map(_spell, value))}]",
    dict: lambda _: "a table",
}


def _spell(value: object) -> str:
    return _SPELLED.get(type(value), str)(value)


def _show(value: object) -> str:
    """A value about as the file has it, shortened."""
    text = "".join(char if char.isprintable() else "?" for char in _spell(value))
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
