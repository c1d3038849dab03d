"""What the virtual disk and network device of a guest need in dom0.

The disk is a file in dom0's memory, which xl attaches as a loop device; the network device is a
port of a bridge. dom0's own kernel answers what the guest sends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING
from zlib import crc32

if TYPE_CHECKING:
    from .host import Host

BRIDGE = "rigbr"
PEER = "192.0.2.1"
"""dom0's address on the bridge; of the network that is set aside for documentation."""
DISK_NAME = "xvda"
DISK_SIZE = "8M"
MODULES: dict[str, Sequence[str]] = {
    "disk": ("loop", "xen-blkback"),
    "network": ("bridge", "xen-netback"),
}


def disk_file(guest: str) -> str:
    """The file in dom0 behind a guest's disk."""
    return f"/run/rig-guests/{guest}.disk"


def address(guest: str) -> str:
    """A guest's address on the bridge."""
    return f"192.0.2.{2 + crc32(guest.encode()) % 250}"


def make_disk(host: Host, guest: str) -> None:
    """Make the file of a guest's disk, with nothing in it."""
    host.run(["modprobe", "-a", *MODULES["disk"]])
    file = disk_file(guest)
    host.run(f"mkdir -p {file.rpartition('/')[0]}; rm -f {file}; truncate -s {DISK_SIZE} {file}")


def make_bridge(host: Host) -> None:
    """Make the bridge, if there is none yet."""
    host.run(["modprobe", "-a", *MODULES["network"]])
    host.run(
        f"ip link show dev {BRIDGE} || {{ ip link add {BRIDGE} type bridge && "
        f"ip address add {PEER}/24 dev {BRIDGE} && ip link set {BRIDGE} up; }}"
    )
