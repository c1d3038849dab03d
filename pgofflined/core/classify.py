"""Machine-check telemetry, told apart into what can be acted on and what cannot.

Sources: the Intel SDM volume 3, chapter "Machine-Check Architecture" (MCi_STATUS, MCi_MISC,
compound error codes), AMD's APM volume 2, chapter "Machine Check Architecture", and
``xen/arch/x86/cpu/mcheck`` for what Xen does itself.

Two rules keep innocent pages safe.  Xen writes the *guest's* address into a bank whose error it
handled, so the address of such an error is never read as a machine address.  And a page with an
uncorrected error must not be read, so no such error is ever reported as a corrected one.

What a bank held when Xen started is no error that Xen handled, though it may look like one: it is
from before this boot, and its address is a machine address still.
"""

from __future__ import annotations

from typing import Final, assert_never

from pgofflined.core.frames import DOMID_FIRST_RESERVED, PAGE_SHIFT, PAGE_SIZE, Maddr, Mfn
from pgofflined.core.frames import mfn_of as frame_of
from pgofflined.core.machine import (
    CpuVendor,
    Machine,
    counts_corrected_errors,
    recovers_from_errors,
)
from pgofflined.core.offline import OfflineFlag
from pgofflined.core.reports import (
    CorrectedPageError,
    ErrorReport,
    HypervisorActed,
    HypervisorResult,
    OtherError,
    OtherKind,
    UncorrectedPageError,
)
from pgofflined.core.telemetry import (
    MC_FLAG_MCE,
    MC_FLAG_POLLED,
    STATUS_ADDRV,
    STATUS_UC,
    STATUS_VAL,
    BankEntry,
    RecoveryEntry,
    Telemetry,
)

# MCi_STATUS.
_OVER: Final = 1 << 62
_MISCV: Final = 1 << 59
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

# Compound codes 000F 0000 1MMM CCCC (memory controller) and 000F 0010 1MMM CCCC ("extended memory":
# memory that serves as a cache of other memory).
_CONTROLLER_MASK: Final = 0xEF80
_CONTROLLER_FORM: Final = 0x0080
_AS_CACHE_FORM: Final = 0x0280
_MMM_SHIFT: Final = 4
_MMM_MASK: Final = 0x7
_MMM_ADDRESS_COMMAND: Final = 3
_MMM_OF_THE_PAGE: Final = (0, 1, 2, 4)  # generic, read, write, scrub

# AMD before SMCA: the northbridge's bank, and its extended code (bits 20:16; of family 0Fh bits
# 19:16) of a DRAM error.  On family 0Fh that is the code of chipkill ECC, and plain ECC has another
# (BKDG of family 0Fh, "NB MCA Error Status").
_NORTHBRIDGE_BANK: Final = 4
_XEC_MASK: Final = 0x1F
_XEC_DRAM: Final = 0x8
_XEC_MASK_K8: Final = 0xF
_XEC_PLAIN_ECC_K8: Final = 0x0
# A bus error (000F 1PPT RRRR IILL) whose II says that it was about memory.
_BUS_MASK: Final = 0xE80C
_BUS_MEMORY: Final = 0x0800


def classify(telemetry: Telemetry, machine: Machine) -> tuple[ErrorReport, ...]:
    """The reports in one record, Xen's own actions first.

    A bank for which the record says what Xen did gives that report and no other.
    """
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
    if not entry.status & STATUS_VAL:
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


def errors_overwritten(entry: BankEntry, machine: Machine) -> int:
    """At least so many errors were overwritten in a bank before it was read.

    Where a corrected one was read, and the bank counts these, that is all it has counted but one.
    """
    if not (entry.status & STATUS_VAL and entry.status & _OVER):
        return 0
    return 1 if entry.status & STATUS_UC else max(1, _counted(entry, machine) - 1)


def _counted(entry: BankEntry, machine: Machine) -> int:
    """The corrected errors that a bank has counted, at least 1."""
    if machine.vendor is not CpuVendor.INTEL or not counts_corrected_errors(entry.mcg_cap):
        return 1
    return max(1, entry.status >> _COUNT_SHIFT & _COUNT_MASK)


def _classify_intel(entry: BankEntry, machine: Machine) -> ErrorReport:
    status = entry.status
    recovers = recovers_from_errors(entry.mcg_cap)
    located = _locate_intel(entry, machine)
    # Xen (intel_check_mce_type) goes down with any uncorrected error of a processor that cannot
    # recover from errors.
    if status & _PCC or (status & STATUS_UC and not recovers):
        return _fatal(entry, located)
    if status & STATUS_UC and status & _S:
        if _is_leftover(entry):
            return _uncorrected(OtherKind.UNCORRECTED_BEFORE_BOOT, entry, located)
        if status & _MCACOD_MASK in _HANDLED_BY_XEN:
            return _signalled(entry)
        return _uncorrected(OtherKind.UNCORRECTED_SIGNALLED, entry, located)
    if status & STATUS_UC or (recovers and _is_uncorrected_scrub(status)):
        return _uncorrected(OtherKind.UNCORRECTED_NOT_SIGNALLED, entry, located)
    fault = _not_of_a_page(status & _MCACOD_MASK)
    if fault is not None:
        return _other(fault, entry)
    if isinstance(located, OtherKind):
        return _other(located, entry)
    granularity = 1 << (entry.misc & _MISC_LSB_MASK) if recovers else PAGE_SIZE
    return _corrected(entry, located, count=_counted(entry, machine), granularity=granularity)


def _not_of_a_page(code: int) -> OtherKind | None:
    """Why an error code of Intel's speaks of no fault of a page; None where it does."""
    form = code & _CONTROLLER_MASK
    if form == _AS_CACHE_FORM:
        return OtherKind.MEMORY_AS_CACHE
    if form != _CONTROLLER_FORM:
        return OtherKind.NOT_MEMORY
    operation = code >> _MMM_SHIFT & _MMM_MASK
    if operation == _MMM_ADDRESS_COMMAND:
        return OtherKind.COMMAND_OR_ADDRESS_PARITY
    return None if operation in _MMM_OF_THE_PAGE else OtherKind.NOT_MEMORY


def _classify_amd(entry: BankEntry, machine: Machine) -> ErrorReport:
    status = entry.status
    located = _locate_amd(entry, machine)
    if status & _PCC:
        return _other(OtherKind.FATAL, entry)
    if status & STATUS_UC:
        return _uncorrected(OtherKind.UNCORRECTED_SIGNALLED, entry, located)
    if status & _AMD_DEFERRED:
        return _uncorrected(OtherKind.UNCORRECTED_NOT_SIGNALLED, entry, located)
    if isinstance(located, OtherKind):
        return _other(located, entry)
    return _corrected(entry, located, count=1, granularity=PAGE_SIZE)


def _is_leftover(entry: BankEntry) -> bool:
    """Whether Xen has found this in the bank when it started.

    For errors that are signalled only: after the start Xen's machine-check handler takes those.
    AMD's banks Xen clears at its start without a look at them.
    """
    return bool(entry.flags & MC_FLAG_POLLED) and not entry.flags & MC_FLAG_MCE


def _fatal(entry: BankEntry, located: Mfn | OtherKind) -> ErrorReport:
    """An error that the processor could not recover from.

    One from before this boot has its page only where it was memory's.
    """
    if not _is_leftover(entry):
        return _other(OtherKind.FATAL, entry)
    code = entry.status & _MCACOD_MASK
    if code in _HANDLED_BY_XEN or _not_of_a_page(code) is None:
        return _uncorrected(OtherKind.FATAL_BEFORE_BOOT, entry, located)
    return _other(OtherKind.FATAL_BEFORE_BOOT, entry)


def _uncorrected(
    kind: OtherKind, entry: BankEntry, located: Mfn | OtherKind
) -> UncorrectedPageError | OtherError:
    if isinstance(located, OtherKind):
        return OtherError(kind=kind, bank=entry, no_page=located)
    return UncorrectedPageError(mfn=located, kind=kind, domid=entry.domid, bank=entry)


def _locate_intel(entry: BankEntry, machine: Machine) -> Mfn | OtherKind:
    """The frame at a bank's address, or why it names none."""
    if not entry.status & STATUS_ADDRV:
        return OtherKind.NO_USABLE_ADDRESS
    if recovers_from_errors(entry.mcg_cap):
        mode = entry.misc >> _MISC_MODE_SHIFT & _MISC_MODE_MASK
        if not entry.status & _MISCV or mode != _MISC_MODE_PHYSICAL:
            return OtherKind.NO_USABLE_ADDRESS
        if entry.misc & _MISC_LSB_MASK > PAGE_SHIFT:
            return OtherKind.GRANULARITY_TOO_COARSE
    return _in_range(entry.addr, machine)


def _locate_amd(entry: BankEntry, machine: Machine) -> Mfn | OtherKind:
    """The frame of a DRAM error, or why it is none or names none."""
    if not machine.has_legacy_northbridge:
        # Which bank is a memory controller's only MCA_IPID says, and Xen does not give it.
        dram = _is_amd_dram_code(entry.status & _MCACOD_MASK)
        return OtherKind.NORMALIZED_ADDRESS if dram else OtherKind.NOT_MEMORY
    if not _is_northbridge_dram(entry, machine):
        return OtherKind.NOT_MEMORY
    if not entry.status & STATUS_ADDRV:
        return OtherKind.NO_USABLE_ADDRESS
    return _in_range(entry.addr, machine)


def _is_northbridge_dram(entry: BankEntry, machine: Machine) -> bool:
    if entry.bank != _NORTHBRIDGE_BANK:
        return False
    extended = entry.status >> _MSCOD_SHIFT
    if not machine.is_k8:
        return extended & _XEC_MASK == _XEC_DRAM
    if extended & _XEC_MASK_K8 == _XEC_PLAIN_ECC_K8:
        return entry.status & _MCACOD_MASK & _BUS_MASK == _BUS_MEMORY
    return extended & _XEC_MASK_K8 == _XEC_DRAM


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
    bus = code & _BUS_MASK == _BUS_MEMORY
    return hierarchy or bus or code & _CONTROLLER_MASK in (_CONTROLLER_FORM, _AS_CACHE_FORM)


def _corrected(entry: BankEntry, mfn: Mfn, *, count: int, granularity: int) -> CorrectedPageError:
    return CorrectedPageError(
        mfn=mfn,
        count=count,
        overflow=bool(entry.status & _OVER),
        granularity=granularity,
        domid=entry.domid,
        bank=entry,
    )


def _other(kind: OtherKind, entry: BankEntry) -> OtherError:
    return OtherError(kind=kind, bank=entry)


def _signalled(entry: BankEntry) -> HypervisorActed:
    """An error of a kind that Xen handles, without a word of Xen's on it.

    /dev/mcelog passes on neither Xen's recovery entries nor its flags, so one from before this
    boot cannot be told from one that Xen has just handled.
    """
    doubt = "" if entry.flags else ", nor whether it is from before this boot"
    return HypervisorActed(
        mfn=None,
        domid=entry.domid,
        broken=False,
        result=HypervisorResult.UNKNOWN,
        reason=(
            f"the record does not say which frame it was{doubt}; its address may be a guest's and "
            "is not used"
        ),
        bank=entry,
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
        bank=bank,
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
