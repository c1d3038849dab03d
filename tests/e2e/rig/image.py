"""Builds and caches the dom0 images: Debian with Xen, systemd and the Xen tools.

The cache's key is a hash of all that goes in; the project under test does not
go in (see payload.py), so that a change of it costs seconds.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from . import cpio, kernel, releases
from .errors import BuildFailed
from .releases import DEBIAN_12, Release, extract_kernel, install
from .tools import BUSYBOX, call, timed

SIZE = "3G"
OVERLAY = Path(__file__).parent / "overlay"
DOM0_INIT = Path(__file__).parent / "dom0-init"
KEPT_IMAGES = 4

PACKAGES = (
    # Debian and Xen. qemu-system-xen is the device model of HVM guests.
    "systemd-sysv",
    "udev",
    # A migration runs in a unit of its own, which systemd-run asks for over the system bus.
    "dbus",
    "kmod",
    "linux-image-amd64",
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
        """Kernel modules for guests with dom0's own kernel, uncompressed."""
        return self.directory / "guest-modules"

    @property
    def older_guest_modules(self) -> Path | None:
        """Those for guests with Debian 12's kernel; None where that is dom0's own."""
        folder = self.directory / "older-guest-modules"
        return folder if folder.is_dir() else None


def cache_directory() -> Path:
    """Where images are kept: $PGOFFLINED_CACHE, or below the user's cache directory."""
    chosen = os.environ.get("PGOFFLINED_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "pgofflined" / "rig"


def obtain(release: Release) -> Image:
    """The image for this code, from the cache or built now. BuildFailed when it cannot be."""
    cache = cache_directory()
    cache.mkdir(parents=True, exist_ok=True)
    directory = cache / f"dom0-{release.suite}-{_key()}"
    with _locked(cache / "lock"):
        if not directory.is_dir():
            for left in cache.glob("building-*"):
                shutil.rmtree(left)
            with timed(f"build the dom0 image {directory.name}"):
                _build(release, directory)
            _forget_old(cache)
        os.utime(directory)
    return Image(directory=directory)


def _key() -> str:
    digest = hashlib.sha256()
    overlay = sorted(path for path in OVERLAY.rglob("*") if path.is_file())
    modules = (__file__, cpio.__file__, kernel.__file__, releases.__file__)
    code = [Path(module) for module in modules]
    for path in [*code, DOM0_INIT, *overlay]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(release: Release, directory: Path) -> None:
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix="building-") as scratch:
        root = Path(scratch) / "root"
        output = Path(scratch) / "image"
        output.mkdir()
        with timed(f"install Debian ({release.suite})"):
            _install_debian(release, root)
        with timed("customise it"):
            _customise(root)
        with timed("take out the boot files and write the file system"):
            older = _older_kernel(Path(scratch)) if release is not DEBIAN_12 else None
            _export(release, root, output, older)
        # The rename makes it whole or absent, never half.
        output.rename(directory)


def _install_debian(release: Release, root: Path) -> None:
    excluded = ("doc", "man", "locale", "info", "iso-codes")
    options = [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in excluded]
    packages = (*PACKAGES, *release.packages())
    options += ["--variant=minbase", f"--include={','.join(packages)}"]
    install(release, options, root)


def _older_kernel(scratch: Path) -> Path:
    """The tree of Debian 12's kernel, which some guests run."""
    tree = scratch / "older"
    extract_kernel(DEBIAN_12, tree)
    return tree


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


def _export(release: Release, root: Path, output: Path, older: Path | None) -> None:
    vmlinuz, modules = _kernel_of(root)
    image = Image(directory=output)
    shutil.copy(vmlinuz, image.vmlinuz)
    _write_initrd(modules, (*release.boot_modules, *INITRD_MODULES), image.initrd)
    image.xen.write_bytes(gzip.decompress(_only(root / "boot", "xen-*.gz").read_bytes()))
    guest_files = root / "opt/rig"
    guest_files.mkdir(parents=True)
    shutil.copy(vmlinuz, guest_files / "vmlinuz")
    _export_for_guests(root, image.guest_modules, guest_files / "vmlinux")
    if older is not None:
        _export_for_guests(older, output / "older-guest-modules", guest_files / "older-vmlinux")
    _only(root / "boot", "xen-*.efi").unlink()
    call(["mke2fs", "-q", "-t", "ext4", "-d", str(root), str(image.disk), SIZE])


def _export_for_guests(root: Path, folder: Path, target: Path) -> None:
    """Write what guests need of the kernel in the tree `root`."""
    vmlinuz, modules = _kernel_of(root)
    folder.mkdir()
    for name in GUEST_MODULES:
        kernel.export_module(modules, name, folder)
    # Guests boot it uncompressed: dom0 need not unpack it under emulation for each.
    target.write_bytes(kernel.uncompressed(vmlinuz.read_bytes()))


def _kernel_of(root: Path) -> tuple[Path, Path]:
    """The kernel's image in the tree `root`, and the folder of its modules."""
    vmlinuz = _only(root / "boot", "vmlinuz-*")
    return vmlinuz, root / "lib/modules" / vmlinuz.name.removeprefix("vmlinuz-")


def _write_initrd(modules: Path, names: Sequence[str], target: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name in names:
            kernel.export_module(modules, name, folder)
        (folder / "order").write_text("".join(f"{name}\n" for name in names))
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
