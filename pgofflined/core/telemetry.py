"""Raw machine-check records, decoded into values.

Sources: ``xen/include/public/arch-x86/xen-mca.h`` (struct mc_info and its entries) and Linux's
``include/xen/interface/xen-mca.h`` (struct xen_mce, what /dev/mcelog gives under Xen).  The
bytes are untrusted: whatever they hold, decoding gives values and raises nothing; what cannot
be decoded becomes an ``Undecodable`` among them.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from pgofflined.core.frames import DOMID_FIRST_RESERVED, Domid, Mfn
from pgofflined.core.machine import CpuVendor
from pgofflined.core.offline import OfflineReply, decode_offline
from pgofflined.core.pages import MFN_BITS

MC_INFO_SIZE: Final = 768
XEN_MCE_SIZES: Final = (88, 112)  # before and since Linux appended synd, ipid and ppin

_INFO_HEADER: Final = struct.Struct("<II")  # mi_nentries, flags
_FLAG_INCOMPLETE: Final = 1 << 0  # MCINFO_FLAGS_UNCOMPLETE
_ENTRY_HEADER: Final = struct.Struct("<HH")  # mcinfo_common: type, size
_MAX_ENTRIES: Final = (MC_INFO_SIZE - _INFO_HEADER.size) // _ENTRY_HEADER.size

_TYPE_GLOBAL: Final = 0
_TYPE_BANK: Final = 1
_TYPE_EXTENDED: Final = 2
_TYPE_RECOVERY: Final = 3

# mcinfo_global: mc_domid, mc_vcpuid, mc_socketid, mc_coreid, mc_core_threadid, mc_apicid,
# mc_flags, mc_gstatus
_GLOBAL: Final = struct.Struct("<4xHHIHHIIQ")
# mcinfo_bank: mc_bank, mc_domid, mc_status, mc_addr, mc_misc, mc_ctrl2, mc_tsc
_BANK: Final = struct.Struct("<4xHHQQQQQ")
# mcinfo_recovery with page_offline_action: mc_bank, action_flags, action_types, mfn, status
_RECOVERY: Final = struct.Struct("<4xHBBQQ")
_ACTION_PAGE_OFFLINE: Final = 1 << 0  # MC_ACTION_PAGE_OFFLINE

# struct xen_mce: the fields status, misc, addr and mcgstatus at the start, cpuvendor at byte 56,
# bank at 65, then socketid, apicid and mcgcap from 72 to the end of the older layout.
_XEN_MCE: Final = struct.Struct("<QQQQ24xB8xB6xIIQ")

# cpuvendor, as Xen hands it to Linux.  Since a94c5fd829 (4.19.5, 4.20.3, 4.21.1, 4.22.0) these
# are Linux' numbers (Intel, AMD, Centaur, Hygon, Zhaoxin); before they were Xen's own X86_VENDOR_*
# (xen/arch/x86/include/asm/x86-vendors.h: Intel, AMD, Centaur, Shanghai, Hygon).  No number means
# one vendor here and another there.  The rest says nothing, 0xff included.
_VENDORS: Final = {
    0: CpuVendor.INTEL,
    1: CpuVendor.INTEL,
    2: CpuVendor.AMD,
    4: CpuVendor.OTHER,
    5: CpuVendor.OTHER,
    8: CpuVendor.OTHER,
    9: CpuVendor.AMD,
    10: CpuVendor.OTHER,
    16: CpuVendor.AMD,
}

# MCi_STATUS: the bank holds something; it was not corrected; MCi_ADDR holds something.
STATUS_VAL: Final = 1 << 63
STATUS_UC: Final = 1 << 61
STATUS_ADDRV: Final = 1 << 58

# mc_flags of a mcinfo_global: how Xen came by the record.  The poll and the look at the banks when
# Xen starts give MC_FLAG_POLLED, the machine-check handler MC_FLAG_MCE (mce.c).
MC_FLAG_POLLED: Final = 1 << 3
MC_FLAG_CMCI: Final = 1 << 5
MC_FLAG_MCE: Final = 1 << 6


class Flaw(StrEnum):
    """Why bytes could not be decoded."""

    SHORT = "short"
    OVERSIZED = "oversized"
    TOO_MANY_ENTRIES = "too_many_entries"
    BAD_ENTRY_SIZE = "bad_entry_size"
    BEYOND_END = "beyond_end"
    UNKNOWN_ENTRY_TYPE = "unknown_entry_type"
    NO_FRAME = "no_frame"
    UNKNOWN_FORMAT = "unknown_format"


@dataclass(frozen=True, slots=True, kw_only=True)
class Undecodable:
    """A record, or a part of one, that was dropped."""

    flaw: Flaw
    detail: str

    def describe(self) -> str:
        """A sentence for the journal."""
        return f"machine-check record dropped in whole or part: {self.detail}"


@dataclass(frozen=True, slots=True, kw_only=True)
class BankEntry:
    """One machine-check bank as it was found.

    ``apicid`` is the CPU's (the only number of it that both formats hold), None where the
    record does not say.  ``domid`` is the owner of the page at ``addr`` where Xen noted one.
    ``flags`` are MC_FLAG_* of Xen, 0 where the record has none.  ``mcg_cap`` is IA32_MCG_CAP
    where the record or its source tells it.
    """

    bank: int
    status: int
    addr: int
    misc: int
    gstatus: int = 0
    apicid: int | None = None
    socket: int | None = None
    domid: Domid | None = None
    flags: int = 0
    vendor: CpuVendor | None = None
    mcg_cap: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryEntry:
    """What Xen did about the error in a bank: it took a page offline.

    ``reply`` is the decoded status word, None where it has bits unknown to us.
    """

    bank: int
    mfn: Mfn
    status: int
    reply: OfflineReply | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Telemetry:
    """One record.  ``incomplete`` says that Xen had no room for all of it."""

    banks: tuple[BankEntry, ...] = ()
    recoveries: tuple[RecoveryEntry, ...] = ()
    flaws: tuple[Undecodable, ...] = ()
    incomplete: bool = False


def decode_mc_info(untrusted_blob: bytes, mcg_cap: int | None = None) -> Telemetry:
    """Decode one struct mc_info, which does not hold IA32_MCG_CAP."""
    if flaw := _wrong_size(untrusted_blob, (MC_INFO_SIZE,), "mc_info"):
        return Telemetry(flaws=(flaw,))
    count, flags = _INFO_HEADER.unpack_from(untrusted_blob)
    if count > _MAX_ENTRIES:
        flaw = Undecodable(
            flaw=Flaw.TOO_MANY_ENTRIES,
            detail=f"{count} entries announced where at most {_MAX_ENTRIES} fit",
        )
        return Telemetry(flaws=(flaw,))
    entries, flaws = _entries(untrusted_blob, count)
    recoveries: list[RecoveryEntry] = []
    for kind, offset in entries:
        if kind == _TYPE_RECOVERY:
            match _recovery(untrusted_blob, offset):
                case RecoveryEntry() as recovery:
                    recoveries.append(recovery)
                case Undecodable() as flaw:
                    flaws.append(flaw)
    return Telemetry(
        banks=_banks(untrusted_blob, entries, mcg_cap),
        recoveries=tuple(recoveries),
        flaws=tuple(flaws),
        incomplete=bool(flags & _FLAG_INCOMPLETE),
    )


def decode_xen_mce(untrusted_record: bytes) -> Telemetry:
    """Decode one struct xen_mce, old or new."""
    if flaw := _wrong_size(untrusted_record, XEN_MCE_SIZES, "xen_mce"):
        return Telemetry(flaws=(flaw,))
    (status, misc, addr, gstatus, vendor, bank, socket, apicid, mcg_cap) = _XEN_MCE.unpack_from(
        untrusted_record
    )
    entry = BankEntry(
        bank=bank,
        status=status,
        addr=addr,
        misc=misc,
        gstatus=gstatus,
        apicid=apicid,
        socket=socket,
        vendor=_VENDORS.get(vendor),
        # Linux leaves it 0 where Xen did not tell it.
        mcg_cap=mcg_cap or None,
    )
    return Telemetry(banks=(entry,))


def decode(untrusted_format: str, untrusted_record: bytes, mcg_cap: int | None = None) -> Telemetry:
    """Decode one record of a format that ``ports.RecordFormat`` names.

    ``mcg_cap`` is IA32_MCG_CAP of the processors, for records that do not hold it.
    """
    match untrusted_format:
        case "mc_info":
            return decode_mc_info(untrusted_record, mcg_cap)
        case "xen_mce":
            return decode_xen_mce(untrusted_record)
        case _:
            detail = f"records of format {untrusted_format!r} are not known"
            return Telemetry(flaws=(Undecodable(flaw=Flaw.UNKNOWN_FORMAT, detail=detail),))


def _wrong_size(blob: bytes, allowed: tuple[int, ...], name: str) -> Undecodable | None:
    if len(blob) in allowed:
        return None
    sizes = " or ".join(str(size) for size in allowed)
    flaw = Flaw.OVERSIZED if len(blob) > max(allowed) else Flaw.SHORT
    return Undecodable(flaw=flaw, detail=f"{name} of {len(blob)} bytes, {sizes} expected")


_LEAST_SIZES: Final = {
    _TYPE_GLOBAL: _GLOBAL.size,
    _TYPE_BANK: _BANK.size,
    _TYPE_EXTENDED: _ENTRY_HEADER.size,  # registers at the time; nothing of it is used
    _TYPE_RECOVERY: _RECOVERY.size,
}


def _entries(blob: bytes, count: int) -> tuple[list[tuple[int, int]], list[Undecodable]]:
    """Type and offset of the entries that are whole, and what is wrong with the others.

    An entry of unknown type is stepped over; one whose size cannot be right ends the walk, for
    where the next one starts is not known then.
    """
    found: list[tuple[int, int]] = []
    flaws: list[Undecodable] = []
    offset = _INFO_HEADER.size
    for index in range(count):
        if offset + _ENTRY_HEADER.size > len(blob):
            detail = f"entry {index} of {count} starts beyond the end"
            flaws.append(Undecodable(flaw=Flaw.BEYOND_END, detail=detail))
            break
        kind, size = _ENTRY_HEADER.unpack_from(blob, offset)
        least = _LEAST_SIZES.get(kind, _ENTRY_HEADER.size)
        if size < least:
            detail = f"entry {index} of type {kind} has {size} bytes, {least} at least expected"
            flaws.append(Undecodable(flaw=Flaw.BAD_ENTRY_SIZE, detail=detail))
            break
        if offset + size > len(blob):
            detail = f"entry {index} of type {kind} with {size} bytes reaches beyond the end"
            flaws.append(Undecodable(flaw=Flaw.BEYOND_END, detail=detail))
            break
        if kind in _LEAST_SIZES:
            found.append((kind, offset))
        else:
            detail = f"entry {index} is of unknown type {kind}"
            flaws.append(Undecodable(flaw=Flaw.UNKNOWN_ENTRY_TYPE, detail=detail))
        offset += size
    return found, flaws


def _banks(
    blob: bytes, entries: list[tuple[int, int]], mcg_cap: int | None
) -> tuple[BankEntry, ...]:
    gstatus = flags = 0
    apicid: int | None = None
    socket: int | None = None
    for kind, offset in entries:
        if kind == _TYPE_GLOBAL:
            _, _, socket, _, _, apicid, flags, gstatus = _GLOBAL.unpack_from(blob, offset)
            break
    banks = []
    for kind, offset in entries:
        if kind != _TYPE_BANK:
            continue
        bank, domid, status, addr, misc, _, _ = _BANK.unpack_from(blob, offset)
        banks.append(
            BankEntry(
                bank=bank,
                status=status,
                addr=addr,
                misc=misc,
                gstatus=gstatus,
                apicid=apicid,
                socket=socket,
                # Xen writes DOMID_INVALID where it knows no owner; the other reserved ones
                # are no domains either.
                domid=Domid(domid) if domid < DOMID_FIRST_RESERVED else None,
                flags=flags,
                mcg_cap=mcg_cap,
            )
        )
    return tuple(banks)


def _recovery(blob: bytes, offset: int) -> RecoveryEntry | Undecodable:
    bank, _, action, mfn, status = _RECOVERY.unpack_from(blob, offset)
    if not action & _ACTION_PAGE_OFFLINE or mfn >> MFN_BITS:
        detail = f"recovery entry of bank {bank} with action {action:#x} names no frame"
        return Undecodable(flaw=Flaw.NO_FRAME, detail=detail)
    return RecoveryEntry(bank=bank, mfn=Mfn(mfn), status=status, reply=_offline_reply(status))


def _offline_reply(word: int) -> OfflineReply | None:
    if word >> 32:
        return None
    try:
        return decode_offline(word)
    except ValueError:
        return None
