"""``grant_table.h``: size, version and entries of a grant table."""

from __future__ import annotations

import ctypes
from typing import ClassVar, Final

from pgofflined.xen.abi.structure import AbiStructure

GNTTABOP_query_size: Final = 6
GNTTABOP_get_version: Final = 10

GNTST_okay: Final = 0

GTF_invalid: Final = 0
GTF_permit_access: Final = 1
GTF_accept_transfer: Final = 2
GTF_transitive: Final = 3
GTF_type_mask: Final = 3
GTF_reading: Final = 1 << 3
GTF_writing: Final = 1 << 4


class GnttabQuerySize(AbiStructure):
    """``struct gnttab_query_size``."""

    c_name = "struct gnttab_query_size"
    dom: int
    nr_frames: int
    max_nr_frames: int
    status: int
    _fields_: ClassVar = [
        ("dom", ctypes.c_uint16),
        ("nr_frames", ctypes.c_uint32),
        ("max_nr_frames", ctypes.c_uint32),
        ("status", ctypes.c_int16),
    ]


class GnttabGetVersion(AbiStructure):
    """``struct gnttab_get_version``."""

    c_name = "struct gnttab_get_version"
    dom: int
    version: int
    _fields_: ClassVar = [
        ("dom", ctypes.c_uint16),
        ("pad", ctypes.c_uint16),
        ("version", ctypes.c_uint32),
    ]


class GrantEntryV1(AbiStructure):
    """``struct grant_entry_v1``, 8 bytes."""

    c_name = "struct grant_entry_v1"
    _fields_: ClassVar = [
        ("flags", ctypes.c_uint16),
        ("domid", ctypes.c_uint16),
        ("frame", ctypes.c_uint32),
    ]


class GrantEntryV2Page(AbiStructure):
    """``full_page`` of ``union grant_entry_v2``, 16 bytes; ``sub_page`` has its frame there too.

    ``hdr.flags`` lies at 0, and a transitive entry has another layout and no frame.
    """

    c_name = "__typeof__(((union grant_entry_v2 *)0)->full_page)"
    _fields_: ClassVar = [
        ("hdr", ctypes.c_uint16 * 2),
        ("pad0", ctypes.c_uint32),
        ("frame", ctypes.c_uint64),
    ]
