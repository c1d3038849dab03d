"""What the machine must have before anything is built or booted."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from .errors import BuildFailed, MissingTools

PACKAGE_LIST = Path(__file__).parents[1] / "apt-packages.txt"
BUSYBOX = Path("/bin/busybox")
SHOWN_OUTPUT = 4000
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

NEEDED_PROGRAMS: Mapping[str, str] = {
    "qemu-system-x86_64": "qemu-system-x86",
    "setpriv": "util-linux",
    "mmdebstrap": "mmdebstrap",
    "mke2fs": "e2fsprogs",
    "gcc": "gcc",
    "zstd": "zstd",
}
NEEDED_FILES: Mapping[str, str] = {
    "/usr/share/seabios/bios-256k.bin": "seabios",
    "/usr/share/keyrings/debian-archive-keyring.gpg": "debian-archive-keyring",
    "/usr/lib/x86_64-linux-gnu/libc.a": "libc6-dev",
    str(BUSYBOX): "busybox-static",
}


def check_machine() -> None:
    """Raise MissingTools with everything that is missing, and the remedy."""
    problems: list[str] = []
    packages: set[str] = set()
    if os.geteuid() != 0:
        problems.append("not root: dom0's files belong to root and mmdebstrap runs as root")
    for program, package in NEEDED_PROGRAMS.items():
        if shutil.which(program, path=PATH) is None:
            problems.append(f"no {program}")
            packages.add(package)
    for path, package in NEEDED_FILES.items():
        if not Path(path).exists():
            problems.append(f"no {path}")
            packages.add(package)
    if not problems:
        return
    remedies = ["run it as root"] if os.geteuid() != 0 else []
    if packages:
        remedies.append(f"apt-get install --no-install-recommends {' '.join(sorted(packages))}")
    raise MissingTools(
        "the emulated host cannot be started here:\n"
        + "".join(f"  - {problem}\n" for problem in problems)
        + "remedy:\n"
        + "".join(f"  {remedy}\n" for remedy in remedies)
        + f"all packages that it needs are listed in tests/e2e/{PACKAGE_LIST.name}"
    )


def environment() -> dict[str, str]:
    """Our environment with a PATH that has the system's tools."""
    return os.environ | {"PATH": PATH, "LC_ALL": "C.UTF-8"}


def call(argv: list[str], *, stdin: str = "", extra: Mapping[str, str] | None = None) -> str:
    """Run a build step; its standard output. BuildFailed with all it said when it fails.

    `extra` goes into its environment.
    """
    done = subprocess.run(
        # A killed test run must leave nothing running.
        ["setpriv", "--pdeathsig", "TERM", *argv],
        env=environment() | dict(extra or {}),
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        said = done.stdout[-SHOWN_OUTPUT:] + done.stderr[-SHOWN_OUTPUT:]
        raise BuildFailed(f"{' '.join(argv)}: status {done.returncode}\n{said}")
    return done.stdout


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Say on standard error what begins, and how long it took."""
    print(f"rig: {what} ...", file=sys.stderr, flush=True)
    begin = time.monotonic()
    yield
    print(f"rig: {what}: {time.monotonic() - begin:.1f} s", file=sys.stderr, flush=True)
