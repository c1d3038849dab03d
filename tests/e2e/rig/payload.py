"""The second disk: what is under test, made anew for each run in seconds.

It holds the project's wheel, its systemd units, configuration and tests, the
agent, and the guest's initramfs.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from . import initramfs
from .image import Image, cache_directory
from .tools import call, timed

REPOSITORY = Path(__file__).parents[3]
IN_DOM0 = ("__init__.py", "frames.py", "agent.py", "install.py")
WHEEL_SOURCES = ("pyproject.toml", "README.md", "LICENSE", "pgofflined")
IGNORED = shutil.ignore_patterns("__pycache__", "*.pyc", ".*_cache", "*.egg-info")
KEPT_WHEELS = 4
SIZE = "64M"


@dataclass(frozen=True, slots=True, kw_only=True)
class Payload:
    """What goes onto the disk beside the project itself."""

    start_service: bool


def build(payload: Payload, image: Image, scratch: Path) -> Path:
    """Make the payload disk in `scratch`; its path. BuildFailed when it cannot be made."""
    folder = scratch / "payload"
    with timed("make the payload disk"):
        _fill(folder, payload, image, scratch)
        disk = scratch / "payload.img"
        options = ["-q", "-t", "ext4", "-O", "^has_journal", "-d", str(folder)]
        call(["mke2fs", *options, str(disk), SIZE])
        shutil.rmtree(folder)
    return disk


def _fill(folder: Path, payload: Payload, image: Image, scratch: Path) -> None:
    library = folder / "lib" / "rig"
    library.mkdir(parents=True)
    for name in IN_DOM0:
        shutil.copy(Path(__file__).with_name(name), library)
    for name in ("systemd", "config", "tests"):
        if (REPOSITORY / name).is_dir():
            shutil.copytree(REPOSITORY / name, folder / name, ignore=IGNORED)
    if (wheel := _wheel(scratch)) is not None:
        (folder / "wheel").mkdir()
        shutil.copy(wheel, folder / "wheel")
    initramfs.build(image.guest_modules, scratch, folder / "guest.cpio.gz")
    (folder / "payload.json").write_text(json.dumps({"start_service": payload.start_service}))


def _wheel(scratch: Path) -> Path | None:
    """The project's wheel, built when its sources changed; None while there is no project."""
    if not (REPOSITORY / "pgofflined" / "__init__.py").exists():
        return None
    wheels = cache_directory() / "wheels"
    kept = wheels / _wheel_key()
    if not kept.is_dir():
        # A copy, since setuptools leaves stale files in a tree that it builds in.
        source = scratch / "source"
        source.mkdir()
        for name in WHEEL_SOURCES:
            path = REPOSITORY / name
            if path.is_dir():
                shutil.copytree(path, source / name, ignore=IGNORED)
            elif path.exists():
                shutil.copy(path, source)
        built = scratch / "wheel"
        with timed("build the project's wheel"):
            options = ["--quiet", "--no-deps", "--wheel-dir", str(built)]
            call([sys.executable, "-m", "pip", "wheel", *options, str(source)])
        wheels.mkdir(parents=True, exist_ok=True)
        shutil.copytree(built, kept, dirs_exist_ok=True)
        _forget_old(wheels)
    return next(kept.glob("*.whl"))


def _wheel_key() -> str:
    digest = hashlib.sha256()
    for name in WHEEL_SOURCES:
        path = REPOSITORY / name
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file() and "__pycache__" not in file.parts:
                digest.update(str(file.relative_to(REPOSITORY)).encode() + b"\0")
                digest.update(file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _forget_old(wheels: Path) -> None:
    folders = sorted(wheels.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    for folder in folders[KEPT_WHEELS:]:
        shutil.rmtree(folder, ignore_errors=True)
