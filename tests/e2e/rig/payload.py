"""The second disk: what is under test, made anew for each run in seconds.

Its tree is copied over dom0's root file system before systemd starts, as if
packages had been installed: the project, its units and configuration, its
tests and benchmarks, the agent, and the guest's initramfs.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from . import initramfs
from .image import Image, cache_directory
from .releases import Release
from .tools import call, timed

REPOSITORY = Path(__file__).parents[3]
AGENT = ("__init__.py", "frames.py", "agent.py")
PROJECT = ("pyproject.toml", "README.md", "LICENSE", "pgofflined")
IGNORED = shutil.ignore_patterns("__pycache__", "*.pyc", ".*_cache", "*.egg-info")
SERVICE = "pgofflined.service"
PACKAGES = Path("usr/lib/python3/dist-packages")
PINS = REPOSITORY / "requirements-run.txt"
DOM0_PYTEST = Path(__file__).parents[1] / "dom0/pytest.ini"
UNITS = Path("usr/lib/systemd/system")
UNIT_SUFFIXES = (".service", ".socket", ".timer", ".target", ".slice", ".mount")
KEPT_BUILDS = 4
SIZE = "64M"


@dataclass(frozen=True, slots=True, kw_only=True)
class Payload:
    """What is to be so in dom0 beside the project's mere presence."""

    release: Release
    """dom0's."""
    start_service: bool
    """Whether pgofflined.service is enabled, so that the boot starts it."""


def build(payload: Payload, image: Image, scratch: Path) -> Path:
    """Make the payload disk in `scratch`; its path. BuildFailed when it cannot be made."""
    tree = scratch / "payload"
    with timed("make the payload disk"):
        tree.mkdir()
        if (project := _project(scratch)) is not None:
            shutil.copytree(project, tree, dirs_exist_ok=True)
        for name in payload.release.wheels:
            shutil.copytree(_wheel(name, payload.release), tree / PACKAGES, dirs_exist_ok=True)
        _place_units(tree)
        if payload.start_service:
            _enable(tree)
        _place("config", tree / "etc/pgofflined")
        _place("tests", tree / "opt/pgofflined-tests/tests")
        shutil.copy(DOM0_PYTEST, tree / "opt/pgofflined-tests")
        _place("bench", tree / "opt/pgofflined-tests/bench")
        agent = tree / "opt/rig/lib/rig"
        agent.mkdir(parents=True)
        for name in AGENT:
            shutil.copy(Path(__file__).with_name(name), agent)
        programs = initramfs.compile_programs(scratch)
        initramfs.build(image.guest_modules, programs, tree / "opt/rig/guest.cpio.gz")
        if (older := image.older_guest_modules) is not None:
            initramfs.build(older, programs, tree / "opt/rig/older-guest.cpio.gz")
        disk = scratch / "payload.img"
        options = ["-q", "-t", "ext4", "-O", "^has_journal", "-d", str(tree)]
        call(["mke2fs", *options, str(disk), SIZE])
        shutil.rmtree(tree)
    return disk


def _place(name: str, target: Path) -> None:
    if (REPOSITORY / name).is_dir():
        shutil.copytree(REPOSITORY / name, target, ignore=IGNORED)


def _place_units(tree: Path) -> None:
    for suffix in UNIT_SUFFIXES:
        for unit in (REPOSITORY / "systemd").glob(f"*{suffix}"):
            (tree / UNITS).mkdir(parents=True, exist_ok=True)
            shutil.copy(unit, tree / UNITS)
    for catalog in (REPOSITORY / "systemd").glob("*.catalog"):
        (tree / "usr/lib/systemd/catalog").mkdir(parents=True, exist_ok=True)
        shutil.copy(catalog, tree / "usr/lib/systemd/catalog")


def _enable(tree: Path) -> None:
    """What `systemctl enable` does, from outside of dom0."""
    unit = tree / UNITS / SERVICE
    if not unit.exists():
        return
    for target in re.findall(r"^WantedBy=(\S+)", unit.read_text(), re.MULTILINE):
        wants = tree / "etc/systemd/system" / f"{target}.wants"
        wants.mkdir(parents=True, exist_ok=True)
        (wants / SERVICE).symlink_to(f"/{UNITS}/{SERVICE}")


def _project(scratch: Path) -> Path | None:
    """The project as installed below a folder, built when its sources changed; None if none."""
    if not (REPOSITORY / "pgofflined" / "__init__.py").exists():
        return None
    builds = cache_directory() / "projects"
    kept = builds / _project_key()
    if not kept.is_dir():
        with timed("build and install the project"):
            installed = _install(_build_wheel(scratch), scratch)
        builds.mkdir(parents=True, exist_ok=True)
        shutil.copytree(installed, kept, dirs_exist_ok=True)
        _forget_old(builds)
    return kept


def _build_wheel(scratch: Path) -> Path:
    # From a copy, since setuptools leaves stale files in a tree that it builds in.
    source = scratch / "source"
    source.mkdir()
    for name in PROJECT:
        path = REPOSITORY / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=IGNORED)
        elif path.exists():
            shutil.copy(path, source)
    folder = scratch / "wheel"
    options = ["--quiet", "--no-deps", "--wheel-dir", str(folder)]
    call([sys.executable, "-m", "pip", "wheel", *options, str(source)])
    return next(folder.glob("*.whl"))


def _install(wheel: Path, scratch: Path) -> Path:
    """Install the wheel below a folder, as Debian's Python in dom0 expects it."""
    root = scratch / "installed"
    options = ["--quiet", "--no-deps", "--no-compile", "--ignore-installed"]
    options += ["--no-warn-script-location", "--root", str(root), "--prefix", "/usr"]
    call([sys.executable, "-m", "pip", "install", *options, str(wheel)])
    (found,) = root.glob("usr/lib/python3*/site-packages")
    target = root / PACKAGES
    target.parent.mkdir()
    found.rename(target)
    found.parent.rmdir()
    for script in (root / "usr/bin").iterdir():
        lines = script.read_text().split("\n", 1)
        script.write_text("\n".join(["#!/usr/bin/python3", *lines[1:]]))
    return root


def _wheel(name: str, release: Release) -> Path:
    """A package that the release does not have, unpacked: pip's, as on such a host."""
    (pin,) = re.findall(rf"^{name}==\S+", PINS.read_text(), re.MULTILINE)
    kept = cache_directory() / "wheels" / f"{pin}-{release.suite}"
    if not kept.is_dir():
        with timed(f"fetch {pin} for {release.suite}"):
            scratch = kept.with_name(f"{kept.name}.new")
            shutil.rmtree(scratch, ignore_errors=True)
            options = ["--quiet", "--no-deps", "--no-compile", "--only-binary", ":all:"]
            options += ["--python-version", release.python, "--platform", "manylinux2014_x86_64"]
            call([sys.executable, "-m", "pip", "install", *options, "--target", str(scratch), pin])
            scratch.rename(kept)
    return kept


def _project_key() -> str:
    digest = hashlib.sha256()
    for name in PROJECT:
        path = REPOSITORY / name
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file() and "__pycache__" not in file.parts:
                digest.update(str(file.relative_to(REPOSITORY)).encode() + b"\0")
                digest.update(file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _forget_old(builds: Path) -> None:
    folders = sorted(builds.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    for folder in folders[KEPT_BUILDS:]:
        shutil.rmtree(folder, ignore_errors=True)
