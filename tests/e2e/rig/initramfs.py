"""Builds the guest's initramfs: busybox, the memory checker, the load and kernel modules."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from . import cpio
from .tools import BUSYBOX, call

GUEST = Path(__file__).parents[1] / "guest"
COMPILER = ("gcc", "-static", "-O2", "-Wall", "-Wextra", "-Werror", "-std=gnu11")


PROGRAMS = ("memcheck", "ioload")


def compile_programs(scratch: Path) -> Mapping[str, Path]:
    """Compile the guest's programs into `scratch`; where each goes in the guest."""
    for name in PROGRAMS:
        call([*COMPILER, "-o", str(scratch / name), str(GUEST / f"{name}.c")])
    return {f"bin/{name}": scratch / name for name in PROGRAMS}


def build(modules: Path, programs: Mapping[str, Path], target: Path) -> None:
    """Write the initramfs to `target`; modules are the *.ko files in `modules`."""
    files = {
        "init": GUEST / "init",
        "bin/busybox": BUSYBOX,
        "sbin/poweroff": GUEST / "poweroff",
        "sbin/reboot": GUEST / "reboot",
    }
    files |= programs
    files |= {f"modules/{path.name}": path for path in sorted(modules.glob("*.ko"))}
    target.write_bytes(cpio.initramfs(files))
