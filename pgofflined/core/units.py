"""Durations, sizes and shares as people write them, always with a unit.

A number without a unit is refused: seconds, minutes and hours are mixed up too easily.  Prefixes
of sizes are the binary ones only, and so spelt; "MB" would leave open which is meant.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

from pgofflined.core.frames import PAGE_SIZE

_DURATION_UNITS: Final = {
    "ms": Fraction(1, 1000),
    "s": Fraction(1),
    "m": Fraction(60),
    "h": Fraction(3600),
    "d": Fraction(86400),
}
_SIZE_UNITS: Final = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}

DURATION_ALLOWED: Final = (
    'a number with its unit, "ms", "s" (seconds), "m" (minutes), "h" (hours) or "d" (days), '
    'such as "72h"'
)
SIZE_ALLOWED: Final = 'a number with its unit, "B", "KiB", "MiB", "GiB" or "TiB", such as "64MiB"'
LIMIT_ALLOWED: Final = f'a share of memory from "0%" to "100%", such as "0.1%", or {SIZE_ALLOWED}'

# Enough digits for any real value, few enough to compute with.
_NUMBER: Final = re.compile(r"(\d{1,15}(?:\.\d{1,9})?) ?([A-Za-z%]{1,3})", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShareOfMemory:
    """So many hundredths of the host's memory."""

    percent: Fraction

    def frames(self, host_frames: int) -> int:
        """Whole frames in that share of a host."""
        return int(host_frames * self.percent / 100)

    def __str__(self) -> str:
        """``0.1 %``."""
        return f"{float(self.percent):g} %"


@dataclass(frozen=True, slots=True, kw_only=True)
class AmountOfMemory:
    """So many bytes, whatever the host has."""

    size: int

    def frames(self, host_frames: int) -> int:
        """Whole frames in that amount, no more than the host has."""
        return min(self.size // PAGE_SIZE, host_frames)

    def __str__(self) -> str:
        """``67108864 bytes``."""
        return f"{self.size} bytes"


MemoryLimit = ShareOfMemory | AmountOfMemory


def parse_duration(untrusted_text: str) -> float:
    """Seconds.  Raises ValueError with what is allowed."""
    return float(_parse(untrusted_text, _DURATION_UNITS, DURATION_ALLOWED))


def parse_size(untrusted_text: str) -> int:
    """Bytes.  Raises ValueError with what is allowed, also for parts of a byte."""
    size = _parse(untrusted_text, _SIZE_UNITS, SIZE_ALLOWED)
    if size.denominator != 1:
        raise ValueError(SIZE_ALLOWED)
    return int(size)


def parse_limit(untrusted_text: str) -> MemoryLimit:
    """A share of the host's memory or an amount.  Raises ValueError with what is allowed."""
    if not untrusted_text.rstrip().endswith("%"):
        try:
            return AmountOfMemory(size=parse_size(untrusted_text))
        except ValueError:
            raise ValueError(LIMIT_ALLOWED) from None
    percent = _parse(untrusted_text, {"%": 1}, LIMIT_ALLOWED)
    if percent > 100:
        raise ValueError(LIMIT_ALLOWED)
    return ShareOfMemory(percent=percent)


def _parse(text: str, units: Mapping[str, Fraction] | Mapping[str, int], allowed: str) -> Fraction:
    found = _NUMBER.fullmatch(text.strip())
    if not found or found[2] not in units:
        raise ValueError(allowed)
    return Fraction(found[1]) * units[found[2]]
