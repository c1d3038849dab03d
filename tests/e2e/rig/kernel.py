"""Takes Debian's kernel apart: the bare ELF image, and single modules."""

from __future__ import annotations

import gzip
import lzma
import struct
import subprocess
from pathlib import Path

from .errors import BuildFailed
from .tools import PATH

ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
XZ_MAGIC = b"\xfd7zXZ\x00"
GZIP_MAGIC = b"\x1f\x8b"


def uncompressed(image: bytes) -> bytes:
    """The ELF kernel inside a bzImage (Documentation/arch/x86/boot.rst)."""
    if image[0x202:0x206] != b"HdrS":
        raise BuildFailed("dom0's kernel is no bzImage")
    setup_sectors = image[0x1F1] or 4
    offset, length = struct.unpack_from("<II", image, 0x248)
    begin = (setup_sectors + 1) * 512 + offset
    # The last four bytes are the unpacked size, which is not part of the stream.
    elf = _decompress(image[begin : begin + length - 4])
    if not elf.startswith(b"\x7fELF"):
        raise BuildFailed("dom0's kernel does not contain an ELF image")
    return elf


def export_module(modules: Path, name: str, folder: Path) -> None:
    """Write module `name` of the kernel in `modules` uncompressed into `folder`."""
    found = [path for path in modules.rglob(f"{name}.ko*") if path.name.split(".")[0] == name]
    if len(found) != 1:
        raise BuildFailed(f"{len(found)} kernel modules {name}, not one")
    data = found[0].read_bytes()
    (folder / f"{name}.ko").write_bytes(data if data.startswith(b"\x7fELF") else _decompress(data))


def _decompress(data: bytes) -> bytes:
    if data.startswith(XZ_MAGIC):
        return lzma.LZMADecompressor().decompress(data)
    if data.startswith(GZIP_MAGIC):
        return gzip.decompress(data)
    if data.startswith(ZSTD_MAGIC):
        done = subprocess.run(
            ["zstd", "-dc"], input=data, capture_output=True, check=False, env={"PATH": PATH}
        )
        if done.returncode == 0:
            return done.stdout
        raise BuildFailed(f"zstd: {done.stderr!r}")
    raise BuildFailed(f"unknown compression: {data[:8]!r}")
