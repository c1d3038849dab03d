"""Machine-check telemetry, told apart into what can be acted on and what cannot.

Sources: the Intel SDM volume 3, chapter "Machine-Check Architecture" (MCi_STATUS, MCi_MISC,
compound error codes), AMD's APM volume 2, chapter "Machine Check Architecture", and
``xen/arch/x86/cpu/mcheck`` for what Xen does itself.

Two rules keep innocent pages safe.  Xen writes the *guest's* address into a bank whose error it
handled, so the address of such an error is never read as a machine address.  And a page with an
uncorrected error must not be read, so no such error is ever reported as a corrected one.
"""

from __future__ import annotations

from typing import Final, assert_never

from pgofflined.core.frames import DOMID_FIRST_RESERVED, PAGE_SHIFT, PAGE_SIZE, Maddr, Mfn
from pgofflined.core.frames import mfn_of as frame_of
from pgofflined.core.machine import CpuVendor, Machine, counts_corrected_errors
from pgofflined.core.offline import OfflineFlag
from pgofflined.core.reports import (
    CorrectedPageError,
    ErrorReport,
    HypervisorActed,
    HypervisorResult,
    OtherError,
    OtherKind,
)
from pgofflined.core.telemetry import BankEntry, RecoveryEntry, Telemetry

# MCi_STATUS.
_VAL: Final = 1 << 63
_OVER: Final = 1 << 62
_UC: Final = 1 << 61
_MISCV: Final = 1 << 59
_ADDRV: Final = 1 << 58
_PCC: Final = 1 << 57
_S: Final = 1 << 56  # Intel
_AMD_DEFERRED: Final = 1 << 44
_COUNT_SHIFT: Final = 38  # Intel, bits 52:38
_COUNT_MASK: Final = 0x7FFF
_MSCOD_SHIFT: Final = 16
_MCACOD_MASK: Final = 0xEFFF  # without F (bit 12), which says that reports are being filtered

# MCi_MISC of Intel: bits 5:0 the least significant valid address bit, 8:6 the address mode.
_MISC_LSB_MASK: Final = 0x3F
_MISC_MODE_SHIFT: Final = 6
_MISC_MODE_MASK: Final = 0x7
_MISC_MODE_PHYSICAL: Final = 2

# The errors that Xen handles itself (mce_intel.c): patrol scrub, write-back; load, fetch.
_SCRUB_CODES: Final = range(0xC0, 0xD0)
_HANDLED_BY_XEN: Final = frozenset((*_SCRUB_CODES, 0x17A, 0x134, 0x150))
# Model-specific code that Intel's server memory controllers give with a scrub code when the
# error could not be corrected, although UC is clear.
_MSCOD_UNCORRECTED_SCRUB: Final = 0x0010

# Compound codes 000F 0000 1MMM CCCC (memory controller) and 000F 0010 1MMM CCCC (extended
# memory).
_CONTROLLER_MASK: Final = 0xEF80
_CONTROLLER_FORMS: Final = (0x0080, 0x0280)
_MMM_SHIFT: Final = 4
_MMM_MASK: Final = 0x7
_MMM_ADDRESS_COMMAND: Final = 3
_MMM_OF_THE_PAGE: Final = (0, 1, 2, 4)  # generic, read, write, scrub

# AMD before SMCA: the northbridge's bank, and its extended code (bits 20:16) of a DRAM error.
_NORTHBRIDGE_BANK: Final = 4
_XEC_MASK: Final = 0x1F
_XEC_DRAM: Final = 0x8


def classify(telemetry: Telemetry, machine: Machine) -> tuple[ErrorReport, ...]:
    """The reports in one record, Xen's own actions first.

    A bank for which the record says what Xen did gives that report and no other.
    """
    if not telemetry.recoveries:
        return tuple(classify_bank(entry, machine) for entry in telemetry.banks)
    banks = {entry.bank: entry for entry in telemetry.banks}
    recovered = {recovery.bank for recovery in telemetry.recoveries}
    return (
        *(_acted(recovery, banks.get(recovery.bank), machine) for recovery in telemetry.recoveries),
        *(
            classify_bank(entry, machine)
            for entry in telemetry.banks
            if entry.bank not in recovered
        ),
    )


def classify_bank(entry: BankEntry, machine: Machine) -> ErrorReport:
    """The report in one bank of which no recovery entry speaks.

    EN is not looked at: polled corrected errors have it clear as often as not.
    """
    if not entry.status & _VAL:
        return _other(OtherKind.NO_ERROR, entry)
    if entry.vendor not in (None, machine.vendor):
        return _other(OtherKind.UNKNOWN_VENDOR, entry)
    match machine.vendor:
        case CpuVendor.INTEL:
            return _classify_intel(entry, machine)
        case CpuVendor.AMD:
            return _classify_amd(entry, machine)
        case CpuVendor.OTHER:
            return _other(OtherKind.UNKNOWN_VENDOR, entry)
        case _:
            assert_never(machine.vendor)


def _classify_intel(entry: BankEntry, machine: Machine) -> ErrorReport:
    status = entry.status
    code = status & _MCACOD_MASK
    if status & _PCC:
        return _other(OtherKind.FATAL, entry)
    if status & _UC and status & _S:
        if code in _HANDLED_BY_XEN:
            return _signalled(entry)
        return _other(OtherKind.UNCORRECTED_SIGNALLED, entry)
    located = _locate_intel(entry, machine)
    if status & _UC or _is_uncorrected_scrub(status):
        mfn = None if isinstance(located, OtherKind) else located
        return _other(OtherKind.UNCORRECTED_NOT_SIGNALLED, entry, mfn)
    if code & _CONTROLLER_MASK not in _CONTROLLER_FORMS:
        return _other(OtherKind.NOT_MEMORY, entry)
    operation = code >> _MMM_SHIFT & _MMM_MASK
    if operation == _MMM_ADDRESS_COMMAND:
        return _other(OtherKind.COMMAND_OR_ADDRESS_PARITY, entry)
    if operation not in _MMM_OF_THE_PAGE:
        return _other(OtherKind.NOT_MEMORY, entry)
    if isinstance(located, OtherKind):
        return _other(located, entry)
    mcg_cap = machine.mcg_cap if machine.mcg_cap is not None else entry.mcg_cap
    counted = status >> _COUNT_SHIFT & _COUNT_MASK if counts_corrected_errors(mcg_cap) else 1
    granularity = 1 << (entry.misc & _MISC_LSB_MASK)
    return _corrected(entry, located, weight=max(1, counted), granularity=granularity)


def _classify_amd(entry: BankEntry, machine: Machine) -> ErrorReport:
    status = entry.status
    if status & _PCC:
        return _other(OtherKind.FATAL, entry)
    if status & _UC:
        return _other(OtherKind.UNCORRECTED_SIGNALLED, entry)
    if status & _AMD_DEFERRED:
        return _other(OtherKind.UNCORRECTED_NOT_SIGNALLED, entry)
    if not machine.has_legacy_northbridge:
        # Which bank is a memory controller's only MCA_IPID says, and Xen does not give it.
        dram = _is_amd_dram_code(status & _MCACOD_MASK)
        return _other(OtherKind.NORMALIZED_ADDRESS if dram else OtherKind.NOT_MEMORY, entry)
    if entry.bank != _NORTHBRIDGE_BANK or status >> _MSCOD_SHIFT & _XEC_MASK != _XEC_DRAM:
        return _other(OtherKind.NOT_MEMORY, entry)
    if not status & _ADDRV:
        return _other(OtherKind.NO_USABLE_ADDRESS, entry)
    located = _in_range(entry.addr, machine)
    if isinstance(located, OtherKind):
        return _other(located, entry)
    return _corrected(entry, located, weight=1, granularity=PAGE_SIZE)


def _locate_intel(entry: BankEntry, machine: Machine) -> Mfn | OtherKind:
    """The frame at a bank's address, or why it names none."""
    if not (entry.status & _ADDRV and entry.status & _MISCV):
        return OtherKind.NO_USABLE_ADDRESS
    if entry.misc >> _MISC_MODE_SHIFT & _MISC_MODE_MASK != _MISC_MODE_PHYSICAL:
        return OtherKind.NO_USABLE_ADDRESS
    if entry.misc & _MISC_LSB_MASK > PAGE_SHIFT:
        return OtherKind.GRANULARITY_TOO_COARSE
    return _in_range(entry.addr, machine)


def _in_range(addr: int, machine: Machine) -> Mfn | OtherKind:
    mfn = frame_of(Maddr(addr & machine.address_mask))
    return mfn if mfn <= machine.max_mfn else OtherKind.ADDRESS_OUT_OF_RANGE


def _is_uncorrected_scrub(status: int) -> bool:
    """Whether the patrol scrubber found what it could not correct, but reports it as corrected.

    Linux knows this of particular server models; elsewhere at worst a corrected error goes
    uncounted, while the other mistake would have a poisoned page read.
    """
    mscod = status >> _MSCOD_SHIFT & 0xFFFF
    return mscod == _MSCOD_UNCORRECTED_SCRUB and status & _MCACOD_MASK in _SCRUB_CODES


def _is_amd_dram_code(code: int) -> bool:
    """Whether a code may be a DRAM error of AMD's.

    Those are memory-hierarchy codes of level "generic" (000F 0001 RRRR TT11), bus codes about
    memory (000F 1PPT RRRR 00LL), or, as injected ones have it, Intel's controller form.
    """
    hierarchy = code & 0xEF03 == 0x0103
    bus = code & 0xE80C == 0x0800
    return hierarchy or bus or code & _CONTROLLER_MASK in _CONTROLLER_FORMS


def _corrected(entry: BankEntry, mfn: Mfn, *, weight: int, granularity: int) -> CorrectedPageError:
    return CorrectedPageError(
        mfn=mfn,
        weight=weight,
        overflow=bool(entry.status & _OVER),
        granularity=granularity,
        domid=entry.domid,
        apicid=entry.apicid,
        bank=entry.bank,
        status=entry.status,
        misc=entry.misc,
    )


def _other(kind: OtherKind, entry: BankEntry, mfn: Mfn | None = None) -> OtherError:
    return OtherError(kind=kind, bank=entry.bank, status=entry.status, mfn=mfn)


def _signalled(entry: BankEntry) -> HypervisorActed:
    return HypervisorActed(
        mfn=None,
        domid=entry.domid,
        broken=False,
        result=HypervisorResult.UNKNOWN,
        reason=(
            "the record does not say which frame it was; its address may be a guest's and is "
            "not used"
        ),
        bank=entry.bank,
        status=entry.status,
    )


def _acted(recovery: RecoveryEntry, bank: BankEntry | None, machine: Machine) -> HypervisorActed:
    flags = OfflineFlag.NONE if recovery.reply is None else recovery.reply.flags
    result, reason = _result(recovery, flags)
    owner = None if recovery.reply is None else recovery.reply.owner
    if owner is None or owner >= DOMID_FIRST_RESERVED:
        owner = None if bank is None else bank.domid
    in_host = recovery.mfn <= machine.max_mfn
    return HypervisorActed(
        mfn=recovery.mfn if in_host else None,
        domid=owner,
        broken=in_host and bool(flags & OfflineFlag.BROKEN),
        result=result,
        reason=reason if in_host else f"it names mfn {recovery.mfn:#x}, which the host has not",
        bank=recovery.bank,
        status=0 if bank is None else bank.status,
    )


def _result(recovery: RecoveryEntry, flags: OfflineFlag) -> tuple[HypervisorResult, str]:
    if recovery.reply is None:
        return HypervisorResult.UNKNOWN, f"its status word {recovery.status:#x} is not understood"
    if flags & OfflineFlag.AGAIN:
        return HypervisorResult.REPEATED, "the page was broken before, and Xen crashed its owner"
    if flags & (OfflineFlag.FAILED | OfflineFlag.INVALID):
        return HypervisorResult.FAILED, "the page could not be taken offline"
    if flags & OfflineFlag.OFFLINED:
        return HypervisorResult.OFFLINED, "the page is offline"
    if flags & OfflineFlag.PENDING:
        return HypervisorResult.PENDING, "the page goes offline when its owner lets go of it"
    return HypervisorResult.UNKNOWN, f"its status word {recovery.status:#x} says no result"
