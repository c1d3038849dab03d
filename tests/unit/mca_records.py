"""Machine-check records as bytes, laid out by hand from the headers and not by our decoder."""

from __future__ import annotations

import struct
from dataclasses import dataclass

DOMID_INVALID = 0x7FF4

VAL = 1 << 63
OVER = 1 << 62
UC = 1 << 61
EN = 1 << 60
MISCV = 1 << 59
ADDRV = 1 << 58
PCC = 1 << 57
S = 1 << 56
AR = 1 << 55

CORRECTABLE, UNCORRECTABLE, RECOVERABLE = 1, 2, 4
POLLED, CMCI, MCE = 8, 32, 64

MISC_PAGE = 0x8C  # physical address, valid from bit 12 on


@dataclass(frozen=True, kw_only=True)
class BankError:
    """One error in one bank; the default is a corrected memory read error."""

    status: int = VAL | MISCV | ADDRV | 1 << 38 | 0x90
    addr: int = 0x1234_5678
    misc: int = MISC_PAGE
    bank: int = 9
    apicid: int = 3
    socket: int = 1
    gstatus: int = 0
    domid: int = DOMID_INVALID


def flags_of(error: BankError) -> int:
    """How Xen flags a new error: found by the poll, or signalled."""
    if not error.status & UC:
        return POLLED | CORRECTABLE
    severity = UNCORRECTABLE if error.status & PCC else RECOVERABLE
    return severity | (MCE if error.status & S else POLLED)


def global_entry(error: BankError, *, flags: int | None = None) -> bytes:
    flags = flags_of(error) if flags is None else flags
    return struct.pack(
        "<HHHHIHHIIQ",
        *(0, 32, DOMID_INVALID, 0xFFFF, error.socket, 0, 0, error.apicid, flags, error.gstatus),
    )


def bank_entry(error: BankError) -> bytes:
    return struct.pack(
        "<HHHHQQQQQ", 1, 48, error.bank, error.domid, error.status, error.addr, error.misc, 0, 0
    )


def extended_entry() -> bytes:
    return struct.pack("<HHI", 2, 520, 1).ljust(520, b"\xee")


def recovery_entry(*, bank: int, mfn: int, status: int, action: int = 1) -> bytes:
    return struct.pack("<HHHBBQQ", 3, 24, bank, 0, action, mfn, status)


def mc_info(*entries: bytes, count: int | None = None, flags: int = 0) -> bytes:
    announced = len(entries) if count is None else count
    blob = struct.pack("<II", announced, flags) + b"".join(entries)
    return blob.ljust(768, b"\0")


def mc_info_of(error: BankError, *, flags: int | None = None) -> bytes:
    """The record that Xen makes of an error."""
    return mc_info(global_entry(error, flags=flags), bank_entry(error))


def xen_mce_of(error: BankError, *, size: int = 112, cpuvendor: int = 1, mcg_cap: int = 0) -> bytes:
    """The record that Linux makes of Xen's."""
    record = bytearray(size)
    struct.pack_into("<QQQQ", record, 0, error.status, error.misc, error.addr, error.gstatus)
    record[56] = cpuvendor
    record[65] = error.bank
    record[66] = 5  # the CPU's number, which Xen's own record does not have
    struct.pack_into("<IIQ", record, 72, error.socket, error.apicid, mcg_cap)
    return bytes(record)
