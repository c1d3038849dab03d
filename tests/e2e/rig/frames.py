"""Frames on the channel between the test run and the agent in dom0.

A frame is a fixed head (magic, two lengths, checksum), a JSON object and a
blob. Both ends use this file; it needs nothing but the standard library.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

MAGIC = b"RIG1"
HEAD = struct.Struct("!4sIII")
MAX_FIELDS = 1 << 20
MAX_BLOB = 1 << 20
CHUNK = 64 << 10
"""Bytes of output or file content in one frame: small, so that answers to other requests get in."""


class FrameError(Exception):
    """What came is not a frame. Nothing after it can be trusted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One message: a JSON object and the bytes that go with it."""

    fields: dict[str, object] = field(default_factory=dict)
    blob: bytes = b""

    def integer(self, name: str) -> int:
        """The field as an int. FrameError when it is missing or something else."""
        value = self.fields.get(name)
        if not isinstance(value, int):
            raise FrameError(f"field {name!r} is {value!r}, not an integer")
        return value

    def number(self, name: str) -> float:
        """The field as a float. FrameError when it is missing or something else."""
        value = self.fields.get(name)
        if not isinstance(value, int | float):
            raise FrameError(f"field {name!r} is {value!r}, not a number")
        return float(value)

    def text(self, name: str) -> str:
        """The field as a str. FrameError when it is missing or something else."""
        value = self.fields.get(name)
        if not isinstance(value, str):
            raise FrameError(f"field {name!r} is {value!r}, not text")
        return value


def encode(frame: Frame) -> bytes:
    """The bytes of a frame. ValueError when it is larger than the reader accepts."""
    fields = json.dumps(frame.fields).encode()
    if len(fields) > MAX_FIELDS or len(frame.blob) > MAX_BLOB:
        raise ValueError(f"frame too large: {len(fields)} + {len(frame.blob)} bytes")
    checksum = zlib.crc32(frame.blob, zlib.crc32(fields))
    return HEAD.pack(MAGIC, len(fields), len(frame.blob), checksum) + fields + frame.blob


def read_frame(read: Callable[[int], bytes]) -> Frame | None:
    """The next frame; None when the stream ended between two frames.

    `read(n)` gives at least one byte and at most n, or b"" at the end.
    """
    head = _read_exactly(read, HEAD.size, at_start=True)
    if not head:
        return None
    magic, fields_size, blob_size, checksum = HEAD.unpack(head)
    if magic != MAGIC:
        raise FrameError(f"no frame here: {head!r}")
    if fields_size > MAX_FIELDS or blob_size > MAX_BLOB:
        raise FrameError(f"frame claims {fields_size} + {blob_size} bytes")
    fields = _read_exactly(read, fields_size)
    blob = _read_exactly(read, blob_size)
    if zlib.crc32(blob, zlib.crc32(fields)) != checksum:
        raise FrameError("checksum is wrong")
    decoded = json.loads(fields)
    if not isinstance(decoded, dict):
        raise FrameError(f"not a JSON object: {fields[:80]!r}")
    return Frame(fields=decoded, blob=blob)


def _read_exactly(read: Callable[[int], bytes], size: int, *, at_start: bool = False) -> bytes:
    parts: list[bytes] = []
    missing = size
    while missing:
        part = read(missing)
        if not part:
            if at_start and missing == size:
                return b""
            raise FrameError(f"stream ended with {missing} of {size} bytes to come")
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)
