"""The Debian releases whose dom0, Xen and kernels the rig runs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from .errors import BuildFailed
from .tools import call

MERGED_USR = "--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr"


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """A Debian release as a dom0."""

    suite: str
    xen: str
    wheels: tuple[str, ...] = ()
    """What the project needs and the release does not have; see requirements-run.txt."""
    python: str
    boot_modules: tuple[str, ...] = ()
    """What the kernel needs before its disks' module and is not built in, in order."""
    options: tuple[str, ...] = ()
    """For mmdebstrap."""

    def packages(self) -> tuple[str, ...]:
        """What differs from release to release."""
        names = [f"xen-hypervisor-{self.xen}-amd64", f"xen-utils-{self.xen}"]
        return tuple(names if "msgspec" in self.wheels else [*names, "python3-msgspec"])


DEBIAN_13 = Release(suite="trixie", xen="4.20", python="3.13")
DEBIAN_12 = Release(
    suite="bookworm",
    xen="4.17",
    python="3.11",
    wheels=("msgspec",),
    boot_modules=(
        "virtio_ring",
        "virtio",
        "virtio_pci_legacy_dev",
        "virtio_pci_modern_dev",
        "virtio_pci",
    ),
    options=(MERGED_USR,),
)


def install(release: Release, options: list[str], target: Path) -> None:
    """Run mmdebstrap for a release into the folder `target`."""
    call(
        ["mmdebstrap", *release.options, *options, release.suite, str(target), "-"],
        stdin=_apt_sources(release.suite),
        # Debian's initrd is not used.
        extra={"INITRD": "No"},
    )


def extract_kernel(release: Release, target: Path) -> None:
    """Unpack a release's kernel into the folder `target`, without installing anything."""
    install(release, ["--variant=extract", "--include=linux-image-amd64"], target)


def _apt_sources(suite: str) -> str:
    """The machine's own Debian sources, for another release instead of its own."""
    match = re.search(r"^VERSION_CODENAME=(\w+)", Path("/etc/os-release").read_text(), re.MULTILINE)
    if match is None:
        raise BuildFailed("/etc/os-release does not name a Debian release")
    here = match[1]
    folder = Path("/etc/apt/sources.list.d")
    stanzas = [
        stanza
        for file in sorted(folder.glob("*.sources"))
        for stanza in re.split(r"\n\s*\n", file.read_text())
        if re.search(rf"^Suites:.*\b{here}\b", stanza, re.MULTILINE)
    ]
    if stanzas:
        return re.sub(rf"\b{here}\b", suite, "\n\n".join(stanzas)) + "\n"
    listed = Path("/etc/apt/sources.list")
    lines = listed.read_text().splitlines() if listed.exists() else []
    chosen = [line for line in lines if re.match(rf"deb\s.*\s{here}\b", line)]
    if not chosen:
        raise BuildFailed(f"no apt source for {here} under /etc/apt to take {suite} from")
    return re.sub(rf"\b{here}\b", suite, "\n".join(chosen)) + "\n"
