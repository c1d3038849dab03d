from __future__ import annotations

from datetime import UTC, datetime

import pytest

from pgofflined.core.schedule import next_opening, parse_window


def at(text: str) -> datetime:
    """A time in the week of Monday 2024-01-01, or the next."""
    return datetime.fromisoformat(f"2024-01-{text}").replace(tzinfo=UTC)


@pytest.mark.parametrize(
    ("windows", "now", "opens"),
    [
        ([], "01T12:00", "01T12:00"),
        (["22:00-06:00"], "01T12:00", "01T22:00"),
        (["22:00-06:00"], "01T22:00", "01T22:00"),
        (["22:00-06:00"], "01T23:59", "01T23:59"),
        (["22:00-06:00"], "02T05:59", "02T05:59"),
        (["22:00-06:00"], "02T06:00", "02T22:00"),
        (["00:00-24:00"], "03T00:00", "03T00:00"),
        (["01:00-02:00"], "01T02:00", "02T01:00"),
        (["Sat,Sun 00:00-24:00"], "01T12:00", "06T00:00"),
        (["Sat,Sun 00:00-24:00"], "07T23:59", "07T23:59"),
        (["Sat,Sun 00:00-24:00"], "08T00:00", "13T00:00"),
        # The night that began on Friday goes on on Saturday, that of Sunday does not begin.
        (["Mon-Fri 22:00-06:00"], "06T05:00", "06T05:00"),
        (["Mon-Fri 22:00-06:00"], "06T07:00", "08T22:00"),
        (["Sat-Mon 10:00-11:00"], "02T10:30", "06T10:00"),
        (["Sat-Mon 10:00-11:00"], "07T12:00", "08T10:00"),
        (["22:30-06:15"], "02T06:14", "02T06:14"),
        (["22:30-06:15"], "02T06:15", "02T22:30"),
        (["Mon 03:00-04:00"], "01T04:00", "08T03:00"),
        (["Wed 03:00-04:00", "Tue 05:00-06:00"], "01T12:00", "02T05:00"),
    ],
)
def test_next_opening(windows: list[str], now: str, opens: str) -> None:
    assert next_opening([parse_window(text) for text in windows], at(now)) == at(opens)


@pytest.mark.parametrize(
    "text",
    ["", "22:00", "22-06", "24:00-06:00", "22:00-24:01", "22:60-23:00", "22:00-22:00",
     "Mo 22:00-06:00", "mon 22:00-06:00", "Mon-Nope 22:00-06:00", "Mon, 22:00-06:00",
     "Mon 22:00-06:00 Tue", "always"],
)  # fmt: skip
def test_window_that_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="22:00-06:00"):
        parse_window(text)


def test_window_reads_back_in_plain_words() -> None:
    assert str(parse_window("22:00-06:00")) == "22:00 for 480 min"
    assert str(parse_window("Sat,Sun 00:00-24:00")) == "Sat,Sun 00:00 for 1440 min"
