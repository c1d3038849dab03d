"""The host's time zone, in which maintenance windows are."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest

from pgofflined.core.domains import DomainIdentity
from pgofflined.core.frames import Domid, Mfn
from pgofflined.core.policy import RelocationPolicy
from pgofflined.core.relocating import Instant, RelocationQueue
from pgofflined.core.schedule import parse_window
from pgofflined.relocation import local_zone
from tests.unit.relocation.doubles import guest

BERLIN = Path("/usr/share/zoneinfo/Europe/Berlin")


def test_without_a_zone_it_is_utc(tmp_path: Path) -> None:
    assert local_zone(tmp_path / "localtime") is UTC


def test_a_file_that_is_no_zone_is_said_and_taken_as_utc(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "localtime").write_text("not a zone")
    assert local_zone(tmp_path / "localtime") is UTC
    assert "maintenance windows" in caplog.text


@pytest.mark.skipif(not BERLIN.exists(), reason="needs the time zone database (tzdata)")
def test_a_window_opens_at_its_local_time_after_summer_time_has_begun() -> None:
    policy = RelocationPolicy(
        target="localhost", maintenance_windows=(parse_window("Sun 04:00-05:00"),)
    )
    queue = RelocationQueue(policy, local_zone(BERLIN))
    saturday = datetime(2025, 3, 29, 12, 0, tzinfo=ZoneInfo("Europe/Berlin"))
    identity = DomainIdentity(Domid(7), guest(7).uuid)
    now = Instant(wall=saturday.timestamp(), steady=0.0)
    queue.submit(identity, "guest7", [Mfn(1)], now)
    assert queue.take(now) is None
    # Fifteen hours: clocks go from 02:00 to 03:00 in that night.
    hours = timedelta(hours=15).total_seconds()
    assert queue.closed_for(now) == hours
    assert queue.take(Instant(wall=now.wall + hours, steady=hours)) is not None
