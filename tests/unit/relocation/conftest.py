"""What tests of saves need on the disk."""

from __future__ import annotations

import os
from pathlib import Path
from uuid import UUID

import pytest

from pgofflined.saving import Saves


@pytest.fixture
def saves(tmp_path: Path) -> Saves:
    """Where xl knows the configuration of d7 and d8, and guests may be saved."""
    tmp_path.chmod(0o700)
    for domid in (7, 8):
        (tmp_path / f"userdata-d.{domid}.{UUID(int=domid)}.libxl-json").touch()
    return Saves(
        notes=tmp_path / "notes",
        configs=tmp_path,
        libvirt=tmp_path / "libvirt",
        mounts=Path(os.devnull),
    )
