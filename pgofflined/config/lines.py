"""Where in a TOML text something is, and what its syntax errors mean in plain words.

``tomllib`` tells the place of a syntax error only, inside a sentence of its own.  The place of a
key is looked for in the text, and is given only where there can be no doubt.
"""

from __future__ import annotations

import contextlib
import re
import tomllib
from collections.abc import Iterator, Mapping
from typing import Final

from pgofflined.config.problems import Line, Mistake
from pgofflined.core.text import printable

_SHOWN: Final = 60
_LOOKED_BACK: Final = 500

_PART: Final = r"""(?:[A-Za-z0-9_-]+|"[^"\\]*"|'[^']*')"""
_PATH: Final = rf"{_PART}(?:\s*\.\s*{_PART})*"
_HEADER: Final = re.compile(rf"\s*\[\[?\s*({_PATH})\s*\]\]?\s*(?:#.*)?", re.ASCII)
_KEY: Final = re.compile(rf"\s*({_PATH})\s*=", re.ASCII)
_PLACE: Final = re.compile(
    r"(?P<what>.*) \(at (?:line (?P<line>\d+), column (?P<column>\d+)|end of document)\)", re.DOTALL
)

Path = tuple[str, ...]


class Places:
    """Lines of the sections and keys of a text that has been parsed to ``root``."""

    def __init__(self, text: str, root: Mapping[str, object]) -> None:
        found: dict[Path, list[Line]] = {}
        self._found = found
        if '"""' in text or "'''" in text:
            return  # what looks like a key may be text
        for path, line in _scan(text):
            if not _is_in(path, root):
                # What looked like a section was part of a list: nothing below it is certain.
                found.clear()
                return
            found.setdefault(path, []).append(line)

    def line(self, *path: str) -> Line | None:
        """The line that sets a key or begins a section, None where it is not certain."""
        lines = self._found.get(path, [])
        if not lines and len(path) > 1:
            # In an inline table, which is on the line of its own key.
            return self._line_of_table(path[:-1])
        return lines[0] if len(lines) == 1 else None

    def _line_of_table(self, path: Path) -> Line | None:
        lines = self._found.get(path, [])
        below = any(other[: len(path)] == path and other != path for other in self._found)
        return lines[0] if len(lines) == 1 and not below else None


def _scan(text: str) -> Iterator[tuple[Path, Line]]:
    section: Path = ()
    for number, line in enumerate(text.split("\n"), start=1):
        if header := _HEADER.fullmatch(line.rstrip("\r")):
            section = _split(header[1])
            yield section, Line(number)
        elif key := _KEY.match(line):
            yield (*section, *_split(key[1])), Line(number)


def _split(path: str) -> Path:
    return tuple(part.strip("\"'") for part in re.findall(_PART, path, re.ASCII))


def _is_in(path: Path, root: Mapping[str, object]) -> bool:
    value: object = root
    for part in path:
        if isinstance(value, list) and value:
            value = value[-1]  # [[section]]
        if not isinstance(value, Mapping) or part not in value:
            return False
        value = value[part]
    return True


def syntax_error(text: str, error: Exception) -> Mistake:
    """A syntax error of ``tomllib`` in plain words, with its place and what is there."""
    if isinstance(error, RecursionError):
        return Mistake(key="", text="there are far too many brackets within brackets")
    lines = text.split("\n")
    place = _PLACE.fullmatch(str(error))
    if place is None:
        return Mistake(key="", text=f"this is not TOML: {printable(str(error))}")
    column: int | None = None
    if place["line"] is None:
        number = _begin_of_unended(lines)
        if number is None:
            return Mistake(key="", text=f"{_explain(place['what'], '')}; found the end of the file")
    else:
        number, column = int(place["line"]), int(place["column"])
    shown = lines[number - 1].strip() if number <= len(lines) else ""
    told = f"{_explain(place['what'], shown)}; found {_shorten(shown) or 'nothing more'}"
    return Mistake(key="", text=told, line=Line(number), column=column)


def _begin_of_unended(lines: list[str]) -> int | None:
    """The line in which what is not ended begins: all before it is good."""
    for good in range(len(lines) - 1, max(-1, len(lines) - _LOOKED_BACK), -1):
        with contextlib.suppress(ValueError, RecursionError):
            tomllib.loads("\n".join(lines[:good]))
            return next((at for at in range(good, len(lines)) if lines[at].strip()), good) + 1
    return None


_UNENDED_LIST: Final = "a list that begins with [ has no ] at its end, or a comma is missing"
_EXPLAINED: Final = (
    (r"Cannot overwrite a value", "this name is there twice; keep one of the two"),
    (
        r"Cannot (declare|mutate|redefine|overwrite).*",
        "this section is there twice; put all its keys under one heading",
    ),
    (r"Expected '=' after a key.*", 'a key is to be followed by "=" and its value'),
    (r"Expected ']' at the end.*", "the heading of a section is to end with ]"),
    (r"Unclosed inline table", "what begins with { is to end with } on the same line"),
    (r"Unclosed array", _UNENDED_LIST),
    (
        r"(Unterminated string|(Illegal|Found invalid) character '\\n'|Expected ['\"]{3}).*",
        "a text has no quotation mark at its end",
    ),
    (
        r"(Unescaped|Invalid hex|Escaped character).*",
        "in \"...\" a backslash has a meaning of its own; write it twice, or use '...'",
    ),
    (r"(Illegal|Found invalid) character.*", "there is a character that TOML does not allow here"),
    (r"Invalid statement", "this is neither the heading of a section, [NAME], nor KEY = VALUE"),
)


def _explain(what: str, line: str) -> str:
    if what.startswith(("Invalid value", "Expected newline", "Invalid initial character")):
        return _explain_value(what, line)
    if line.startswith("\ufeff"):
        return "the file begins with a byte order mark; save it as UTF-8 without one"
    for pattern, told in _EXPLAINED:
        if re.fullmatch(pattern, what, re.DOTALL):
            return told
    return f"this is not TOML ({printable(what)})"


def _explain_value(what: str, line: str) -> str:
    _, equals, value = line.partition("=")
    value = value.partition("#")[0].strip()
    if equals and not value:
        return 'the value after "=" is missing'
    if value.lower().strip("\"'") in ("true", "false", "yes", "no", "on", "off"):
        return "a switch is written true or false, in small letters and without quotation marks"
    if not equals and what.startswith("Invalid value"):
        return "this is no value of a list; is the ] missing that ends the list before it?"
    if value.startswith("[") and "]" not in value:
        return _UNENDED_LIST
    if equals and "=" in value:
        return "there is something after the value; a line holds one key"
    if equals and value[0] not in "\"'[{":
        return f'a text, and a number with a unit, stands in quotation marks: "{_shorten(value)}"'
    if equals:
        return "there is something after the value, or it is not ended"
    return "this is neither the heading of a section, [NAME], nor KEY = VALUE"


def _shorten(text: str) -> str:
    text = "".join(char if char.isprintable() else "?" for char in text)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
