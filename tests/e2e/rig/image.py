"""Builds and caches the dom0 image: Debian 13 with Xen 4.20, systemd and the Xen tools.

The cache's key is a hash of all that goes in; the project under test does not
go in (see payload.py), so that a change of it costs seconds.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from . import cpio, kernel
from .errors import BuildFailed
from .tools import BUSYBOX, call, timed

RELEASE = "trixie"
SIZE = "3G"
OVERLAY = Path(__file__).parent / "overlay"
DOM0_INIT = Path(__file__).parent / "dom0-init"
KEPT_IMAGES = 2

PACKAGES = (
    # Debian and Xen. qemu-system-xen is the device model of HVM guests.
    "systemd-sysv",
    "udev",
    # A migration runs in a unit of its own, which systemd-run asks for over the system bus.
    "dbus",
    "kmod",
    "linux-image-amd64",
    "xen-hypervisor-4.20-amd64",
    "xen-utils-4.20",
    "xen-utils-common",
    "xenstore-utils",
    "qemu-system-xen",
    # What tests use in dom0.
    "busybox-static",
    "curl",
    "iproute2",
    "procps",
    "strace",
    # What the project uses there, and its test suites.
    "python3",
    "python3-click",
    "python3-hypothesis",
    "python3-msgspec",
    "python3-numpy",
    "python3-prometheus-client",
    "python3-pyroute2",
    "python3-pytest",
    "python3-pytest-asyncio",
    "python3-systemd",
)
INITRD_MODULES = ("crc32c_generic", "crc16", "mbcache", "jbd2", "ext4", "virtio_blk")
"""In the order in which they load."""
MASKED_UNITS = (
    # Each costs a part of a second or several under emulation, and no test needs it.
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "dpkg-db-backup.timer",
    "e2scrub_reap.service",
    "fstrim.timer",
    "getty-static.service",
    "getty@tty1.service",
    "ldconfig.service",
    "proc-sys-fs-binfmt_misc.automount",
    "sys-fs-fuse-connections.mount",
    "systemd-binfmt.service",
    "systemd-firstboot.service",
    "systemd-journal-catalog-update.service",
    "systemd-logind.service",
    "systemd-networkd-persistent-storage.service",
    "systemd-networkd.service",
    "systemd-networkd.socket",
    "systemd-network-generator.service",
    "systemd-pstore.service",
    "systemd-random-seed.service",
    "systemd-tmpfiles-clean.timer",
    "systemd-update-done.service",
    "systemd-update-utmp.service",
    "systemd-user-sessions.service",
    # It would save and restore guests behind the tests' back.
    "xendomains.service",
)
ENABLED_UNITS = ("rig-agent.service",)
GUEST_MODULES = ("xen-gntalloc", "xen-blkfront", "xen-netfront")


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """A dom0 image and what boots it. Never written to after it was made."""

    directory: Path

    @property
    def disk(self) -> Path:
        """dom0's root file system, raw ext4."""
        return self.directory / "dom0.img"

    @property
    def xen(self) -> Path:
        """The hypervisor as a multiboot ELF."""
        return self.directory / "xen"

    @property
    def vmlinuz(self) -> Path:
        """dom0's kernel."""
        return self.directory / "vmlinuz"

    @property
    def initrd(self) -> Path:
        """dom0's initial RAM disk."""
        return self.directory / "initrd"

    @property
    def guest_modules(self) -> Path:
        """Kernel modules for guests, uncompressed."""
        return self.directory / "guest-modules"


def cache_directory() -> Path:
    """Where images are kept: $PGOFFLINED_CACHE, or below the user's cache directory."""
    chosen = os.environ.get("PGOFFLINED_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "pgofflined" / "rig"


def obtain() -> Image:
    """The image for this code, from the cache or built now. BuildFailed when it cannot be."""
    cache = cache_directory()
    cache.mkdir(parents=True, exist_ok=True)
    directory = cache / f"dom0-{_key()}"
    with _locked(cache / "lock"):
        if not directory.is_dir():
            for left in cache.glob("building-*"):
                shutil.rmtree(left)
            with timed(f"build the dom0 image {directory.name}"):
                _build(directory)
            _forget_old(cache)
        os.utime(directory)
    return Image(directory=directory)


def _key() -> str:
    digest = hashlib.sha256()
    overlay = sorted(path for path in OVERLAY.rglob("*") if path.is_file())
    code = [Path(module) for module in (__file__, cpio.__file__, kernel.__file__)]
    for path in [*code, DOM0_INIT, *overlay]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(directory: Path) -> None:
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix="building-") as scratch:
        root = Path(scratch) / "root"
        output = Path(scratch) / "image"
        output.mkdir()
        with timed("install Debian"):
            _install_debian(root)
        with timed("customise it"):
            _customise(root)
        with timed("take out the boot files and write the file system"):
            _export(root, output)
        # The rename makes it whole or absent, never half.
        output.rename(directory)


def _install_debian(root: Path) -> None:
    excluded = ("doc", "man", "locale", "info", "iso-codes")
    options = [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in excluded]
    options += ["--variant=minbase", f"--include={','.join(PACKAGES)}"]
    call(
        ["mmdebstrap", *options, RELEASE, str(root), "-"],
        stdin=_apt_sources(),
        # Debian's initrd is not used.
        extra={"INITRD": "No"},
    )


def _apt_sources() -> str:
    """The machine's own Debian sources, for our release instead of its own."""
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
        return re.sub(rf"\b{here}\b", RELEASE, "\n\n".join(stanzas)) + "\n"
    listed = Path("/etc/apt/sources.list")
    lines = listed.read_text().splitlines() if listed.exists() else []
    chosen = [line for line in lines if re.match(rf"deb\s.*\s{here}\b", line)]
    if not chosen:
        raise BuildFailed(f"no apt source for {here} under /etc/apt to take {RELEASE} from")
    return re.sub(rf"\b{here}\b", RELEASE, "\n".join(chosen)) + "\n"


def _customise(root: Path) -> None:
    shutil.copytree(OVERLAY, root, dirs_exist_ok=True)
    units = root / "etc/systemd/system"
    for name in MASKED_UNITS:
        link = units / name
        link.unlink(missing_ok=True)
        link.symlink_to("/dev/null")
    wanted = units / "multi-user.target.wants"
    wanted.mkdir(exist_ok=True)
    for name in ENABLED_UNITS:
        (wanted / name).symlink_to(f"/etc/systemd/system/{name}")
    (root / "etc/machine-id").write_text(f"{uuid.uuid4().hex}\n")
    # xenconsoled does not make it by itself.
    (root / "var/log/xen/console").mkdir(parents=True)


def _export(root: Path, output: Path) -> None:
    vmlinuz = _only(root / "boot", "vmlinuz-*")
    modules = root / "usr/lib/modules" / vmlinuz.name.removeprefix("vmlinuz-")
    image = Image(directory=output)
    shutil.copy(vmlinuz, image.vmlinuz)
    _write_initrd(modules, image.initrd)
    image.xen.write_bytes(gzip.decompress(_only(root / "boot", "xen-*.gz").read_bytes()))
    image.guest_modules.mkdir()
    for name in GUEST_MODULES:
        kernel.export_module(modules, name, image.guest_modules)
    # Guests boot it uncompressed: dom0 need not unpack it under emulation for each.
    guest_files = root / "opt/rig"
    guest_files.mkdir(parents=True)
    shutil.copy(vmlinuz, guest_files / "vmlinuz")
    (guest_files / "vmlinux").write_bytes(kernel.uncompressed(vmlinuz.read_bytes()))
    _only(root / "boot", "xen-*.efi").unlink()
    call(["mke2fs", "-q", "-t", "ext4", "-d", str(root), str(image.disk), SIZE])


def _write_initrd(modules: Path, target: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name in INITRD_MODULES:
            kernel.export_module(modules, name, folder)
        (folder / "order").write_text("".join(f"{name}\n" for name in INITRD_MODULES))
        files = {"init": DOM0_INIT, "bin/busybox": BUSYBOX}
        files |= {f"modules/{path.name}": path for path in sorted(folder.iterdir())}
        target.write_bytes(cpio.initramfs(files))


def _only(folder: Path, pattern: str) -> Path:
    found = [path for path in folder.glob(pattern) if not path.is_symlink()]
    if len(found) != 1:
        raise BuildFailed(f"{len(found)} files {pattern} in the image's /{folder.name}, not one")
    return found[0]


def _forget_old(cache: Path) -> None:
    """Remove all but the newest images. A running QEMU keeps what it has open."""
    images = sorted(cache.glob("dom0-*"), key=lambda path: path.stat().st_mtime, reverse=True)
    for directory in images[KEPT_IMAGES:]:
        shutil.rmtree(directory)
