"""Builds the guest's initramfs: busybox, the memory checker and a few kernel modules."""

from __future__ import annotations

from pathlib import Path

from . import cpio
from .tools import BUSYBOX, call

GUEST = Path(__file__).parents[1] / "guest"
COMPILER = ("gcc", "-static", "-O2", "-Wall", "-Wextra", "-Werror", "-std=gnu11")


def build(modules: Path, scratch: Path, target: Path) -> None:
    """Write the initramfs to `target`; modules are the *.ko files in `modules`."""
    checker = scratch / "memcheck"
    call([*COMPILER, "-o", str(checker), str(GUEST / "memcheck.c")])
    files = {
        "init": GUEST / "init",
        "bin/busybox": BUSYBOX,
        "bin/memcheck": checker,
        "sbin/poweroff": GUEST / "poweroff",
        "sbin/reboot": GUEST / "reboot",
    }
    files |= {f"modules/{path.name}": path for path in sorted(modules.glob("*.ko"))}
    target.write_bytes(cpio.initramfs(files))
