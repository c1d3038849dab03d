"""Writes archives that the kernel unpacks at boot (cpio's "newc" format)."""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from pathlib import Path

DIRECTORY = 0o040755
PROGRAM = 0o100755
MOUNT_POINTS = ("dev", "proc", "sys")


def initramfs(files: Mapping[str, Path]) -> bytes:
    """A compressed initramfs with these files, all executable, and the usual mount points."""
    folders = sorted({*MOUNT_POINTS, *(name.split("/")[0] for name in files if "/" in name)})
    parts = [_entry(name, DIRECTORY, b"") for name in folders]
    parts += [_entry(name, PROGRAM, path.read_bytes()) for name, path in files.items()]
    parts.append(_entry("TRAILER!!!", 0, b""))
    return gzip.compress(b"".join(parts), compresslevel=1, mtime=0)


def _entry(name: str, mode: int, content: bytes) -> bytes:
    encoded = name.encode() + b"\0"
    links = 2 if mode == DIRECTORY else 1
    # Magic, then thirteen numbers of eight hexadecimal digits: inode, mode, uid, gid, links,
    # mtime, size, four device numbers, name's size, checksum.
    numbers = (0, mode, 0, 0, links, 0, len(content), 0, 0, 0, 0, len(encoded), 0)
    head = b"070701" + b"".join(b"%08x" % number for number in numbers)
    return _padded(head + encoded) + _padded(content)


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)
