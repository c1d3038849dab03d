"""Migrates HVM and PVH guests off their bad pages."""

from __future__ import annotations

import logging
from datetime import UTC, tzinfo
from pathlib import Path
from zoneinfo import ZoneInfo

from pgofflined.relocation.links import KernelLinks, Links
from pgofflined.relocation.processes import Launcher, NoLauncher, choose_launcher
from pgofflined.relocation.relocator import Relocator
from pgofflined.relocation.service import RelocationService
from pgofflined.relocation.xl import XlRelocator

__all__ = [
    "KernelLinks",
    "Launcher",
    "Links",
    "NoLauncher",
    "RelocationService",
    "Relocator",
    "XlRelocator",
    "choose_launcher",
    "local_zone",
]

log = logging.getLogger(__name__)


def local_zone(localtime: Path = Path("/etc/localtime")) -> tzinfo:
    """The host's time zone, with its rules for summer time; UTC where none is set."""
    try:
        with localtime.open("rb") as file:
            return ZoneInfo.from_file(file)
    except FileNotFoundError:
        return UTC
    except (OSError, ValueError) as error:
        log.warning(
            "maintenance windows are taken in UTC, as %s cannot be read: %s", localtime, error
        )
        return UTC
