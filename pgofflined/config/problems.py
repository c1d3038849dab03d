"""What may be wrong with a configuration file: mistakes refuse it, doubts are told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NewType

from pgofflined.core.text import printable

Line = NewType("Line", int)
"""A line of the file, from 1 on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mistake:
    """Something that cannot be used: where it is, what was found, what is allowed or to be done.

    ``key`` is dotted, and empty for the file as a whole; ``line`` and ``column`` are None where
    they are not certain.
    """

    key: str
    text: str
    line: Line | None = None
    column: int | None = None

    def __str__(self) -> str:
        """``line 12: retire.window: found "72"; allowed is a number with its unit …``."""
        return _placed(self.key, self.text, self.line, self.column)


@dataclass(frozen=True, slots=True, kw_only=True)
class Doubt:
    """A setting that is legal and is hardly meant, or that is dangerous."""

    key: str
    text: str
    line: Line | None = None

    def __str__(self) -> str:
        """``line 40: relocation.save_directory: …``."""
        return _placed(self.key, self.text, self.line, None)


Problem = Mistake | Doubt


def _placed(key: str, text: str, line: Line | None, column: int | None) -> str:
    where = "" if line is None else f"line {line}"
    if where and column is not None:
        where = f"{where}, column {column}"
    return ": ".join(part for part in (where, printable(key), text) if part)


class ConfigError(Exception):
    """The configuration cannot be used; the program exits with ``EX_CONFIG``."""

    def __init__(self, name: str, problems: tuple[Mistake, ...]) -> None:
        self.name = name
        self.problems = problems
        super().__init__("\n".join(self.lines))

    @property
    def lines(self) -> tuple[str, ...]:
        """One line for each mistake, with the file's name."""
        return tuple(f"{self.name}: {problem}" for problem in self.problems)
