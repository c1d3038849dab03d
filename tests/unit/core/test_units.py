from __future__ import annotations

from fractions import Fraction

import pytest

from pgofflined.core.units import (
    AmountOfMemory,
    ShareOfMemory,
    parse_duration,
    parse_limit,
    parse_size,
)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1ms", 0.001),
        ("250 ms", 0.25),
        ("1s", 1.0),
        ("1m", 60.0),
        ("1h", 3600.0),
        ("24h", 86_400.0),
        ("72h", 259_200.0),
        ("1d", 86_400.0),
        ("0s", 0.0),
        ("1.5h", 5400.0),
        (" 10s ", 10.0),
    ],
)
def test_duration_of_every_unit(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text",
    ["", "72", "h", "72 hours", "1H", "1M", "-1s", "+1s", "1e3s", "1 h 30 m", "1,5h", ".5h", "1.h",
     "٣s", "inf", "nan s", "1" * 16 + "s", "1w", "1  s", "1s\n2s"],
)  # fmt: skip
def test_duration_without_a_clear_unit_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="72h"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512B", 512),
        ("1KiB", 1024),
        ("64MiB", 67_108_864),
        ("2 GiB", 2_147_483_648),
        ("1TiB", 1_099_511_627_776),
        ("0.5MiB", 524_288),
        ("0B", 0),
    ],
)
def test_size_of_every_unit(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["64", "64MB", "64M", "64mib", "1kB", "0.1B", "-1MiB", "1%", ""])
def test_size_without_a_clear_unit_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="MiB"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "frames"),
    [("0%", 0), ("0.1%", 1000), ("0.1 %", 1000), (" 0.1% ", 1000),
     ("100%", 1_000_000), ("64MiB", 16_384), ("4095B", 0), ("4096B", 1), ("1TiB", 1_000_000)],
)  # fmt: skip
def test_limit_in_frames_of_a_host_of_a_million(text: str, frames: int) -> None:
    assert parse_limit(text).frames(1_000_000) == frames


def test_limit_keeps_tenths_of_a_percent_exactly() -> None:
    assert parse_limit("0.1%") == ShareOfMemory(percent=Fraction(1, 10))
    assert parse_limit("64MiB") == AmountOfMemory(size=64 << 20)


@pytest.mark.parametrize("text", ["0.1", "101%", "-1%", "%", "0.1 percent", "64M"])
def test_limit_that_is_neither_share_nor_amount_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"0\.1%"):
        parse_limit(text)
