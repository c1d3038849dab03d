"""What a machine check means for a page: the reports that the rest of the program sees."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final, assert_never

from pgofflined.core.frames import Domid, Mfn
from pgofflined.core.telemetry import STATUS_ADDRV, STATUS_UC, STATUS_VAL, BankEntry


class OtherKind(StrEnum):
    """What kind of error it was, where it was not a corrected one in a page."""

    NO_ERROR = "no_error"
    FATAL = "fatal"
    FATAL_BEFORE_BOOT = "fatal_before_boot"
    UNCORRECTED_SIGNALLED = "uncorrected_signalled"
    UNCORRECTED_NOT_SIGNALLED = "uncorrected_not_signalled"
    UNCORRECTED_BEFORE_BOOT = "uncorrected_before_boot"
    NOT_MEMORY = "not_memory"
    MEMORY_AS_CACHE = "memory_as_cache"
    COMMAND_OR_ADDRESS_PARITY = "command_or_address_parity"
    NO_USABLE_ADDRESS = "no_usable_address"
    NORMALIZED_ADDRESS = "normalized_address"
    GRANULARITY_TOO_COARSE = "granularity_too_coarse"
    ADDRESS_OUT_OF_RANGE = "address_out_of_range"
    UNKNOWN_VENDOR = "unknown_vendor"

    @property
    def is_leftover(self) -> bool:
        """Whether Xen found it in a bank when it started: an error from before this boot."""
        return self in _LEFTOVERS

    @property
    def is_uncorrected(self) -> bool:
        """Whether data was lost, or may have been."""
        return self in _UNCORRECTED


_LEFTOVERS: Final = frozenset({OtherKind.FATAL_BEFORE_BOOT, OtherKind.UNCORRECTED_BEFORE_BOOT})
_UNCORRECTED: Final = _LEFTOVERS | {
    OtherKind.FATAL,
    OtherKind.UNCORRECTED_SIGNALLED,
    OtherKind.UNCORRECTED_NOT_SIGNALLED,
}

_REASONS: Final = {
    OtherKind.NO_ERROR: "the bank holds no valid error",
    OtherKind.FATAL: (
        "the processor's context is corrupt, or the processor cannot recover from errors; Xen "
        "stops the host for such an error when it is signalled"
    ),
    OtherKind.FATAL_BEFORE_BOOT: (
        "an error from before this boot, which the processor could not recover from"
    ),
    OtherKind.UNCORRECTED_SIGNALLED: "an uncorrected error of a type that Xen does not handle",
    OtherKind.UNCORRECTED_NOT_SIGNALLED: "an uncorrected error that nothing has consumed yet",
    OtherKind.UNCORRECTED_BEFORE_BOOT: "an uncorrected error from before this boot",
    OtherKind.NOT_MEMORY: "not an error of a memory controller",
    OtherKind.MEMORY_AS_CACHE: (
        "an error of memory that serves as a cache of other memory; to retire a page does not help"
    ),
    OtherKind.COMMAND_OR_ADDRESS_PARITY: (
        "an error on the memory's command or address lines, which is not the page's fault"
    ),
    OtherKind.NO_USABLE_ADDRESS: "the record holds no physical address",
    OtherKind.NORMALIZED_ADDRESS: (
        "AMD's memory controllers since family 17h give an address of their own space, not of "
        "the machine; such errors are counted, no page is retired"
    ),
    OtherKind.GRANULARITY_TOO_COARSE: "the address covers more than one page",
    OtherKind.ADDRESS_OUT_OF_RANGE: "the address lies beyond the host's last frame",
    OtherKind.UNKNOWN_VENDOR: "the rules of this processor's vendor are not known",
}


class HypervisorResult(StrEnum):
    """How Xen's own handling of a page ended, as far as it says."""

    OFFLINED = "offlined"
    PENDING = "pending"
    REPEATED = "repeated"
    FAILED = "failed"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class CorrectedPageError:
    """A memory error that was corrected, in a frame that is known: one hit of that page.

    ``count`` is how many errors the *bank* has counted, at least 1; the address is the last one's
    only, so it says nothing of the page.  ``overflow`` says that the bank was overwritten before
    it was read.  ``domid`` is Xen's hint at the owner at the time, ``granularity`` the number of
    bytes among which the error lies.
    """

    mfn: Mfn
    count: int
    overflow: bool
    granularity: int
    domid: Domid | None
    bank: BankEntry

    def describe(self) -> str:
        """A sentence for the journal."""
        counted = f"; {self.count} errors counted in this bank" if self.count > 1 else ""
        more = "; others were overwritten" if self.overflow else ""
        return (
            f"a corrected memory error in mfn {self.mfn:#x}{_owner(self.domid)} "
            f"({_place(self.bank)}{counted}{more})"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class UncorrectedPageError:
    """An error that was not corrected and that Xen does nothing about, in a frame that is known.

    The page's contents must not be read.  Whether the frame is memory at all only Xen knows: the
    address may be a device's.  ``kind`` is one of those that are uncorrected; ``domid`` is Xen's
    hint at the owner at the time.
    """

    mfn: Mfn
    kind: OtherKind
    domid: Domid | None
    bank: BankEntry

    @property
    def is_leftover(self) -> bool:
        """Whether it is known to be from before this boot."""
        return self.kind.is_leftover

    @property
    def reason(self) -> str:
        """What kind of error it was."""
        return _REASONS[self.kind]

    def describe(self) -> str:
        """A sentence for the journal."""
        return (
            f"an uncorrected error in mfn {self.mfn:#x}{_owner(self.domid)} "
            f"({_place(self.bank)}): {self.reason}; Xen does nothing about it, and the page must "
            "not be read"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class HypervisorActed:
    """Xen has already dealt with an uncorrected error.

    ``mfn`` is the frame as Xen's own recovery entry names it; None where there is no such entry,
    as always with /dev/mcelog.  ``broken`` says that Xen is known to have marked it broken.
    ``bank`` is None where the record holds only the recovery entry.
    """

    mfn: Mfn | None
    domid: Domid | None
    broken: bool
    result: HypervisorResult
    reason: str
    bank: BankEntry | None

    def describe(self) -> str:
        """A sentence for the journal."""
        did = "may have acted" if self.result is HypervisorResult.UNKNOWN else "acted"
        frame = "an unknown frame" if self.mfn is None else f"mfn {self.mfn:#x}"
        place = "no bank in the record" if self.bank is None else _place(self.bank)
        return (
            f"Xen {did} on an uncorrected error in {frame}{_owner(self.domid)} ({place}): "
            f"{self.reason}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherError:
    """Any other report, which leads to no page; it is counted and told.

    ``no_page`` is why an uncorrected error leads to none.
    """

    kind: OtherKind
    bank: BankEntry
    no_page: OtherKind | None = None

    @property
    def mfn(self) -> None:
        """None: it names no page."""

    @property
    def is_uncorrected(self) -> bool:
        """Whether data was lost, or may have been; also where nothing else of it is understood."""
        said = self.bank.status & STATUS_VAL and self.bank.status & STATUS_UC
        return self.kind.is_uncorrected or bool(said)

    @property
    def reason(self) -> str:
        """Why nothing is done about a page."""
        if self.no_page is None:
            return _REASONS[self.kind]
        return f"{_REASONS[self.kind]}; no page is known: {_REASONS[self.no_page]}"

    def describe(self) -> str:
        """A sentence for the journal."""
        return f"machine check ({_place(self.bank)}): {self.reason}"


ErrorReport = CorrectedPageError | UncorrectedPageError | HypervisorActed | OtherError


@dataclass(frozen=True, slots=True, kw_only=True)
class Sighting:
    """A report, when it was read (seconds since the epoch, by our clock), and from where."""

    when: float
    source: str
    report: ErrorReport


def report_class(report: ErrorReport) -> str:
    """One of few words for a report, for counting."""
    match report:
        case CorrectedPageError():
            return "corrected"
        case HypervisorActed():
            return "hypervisor_acted"
        case UncorrectedPageError() | OtherError():
            return report.kind.value
        case _:
            assert_never(report)


REPORT_CLASSES: Final = ("corrected", "hypervisor_acted", *(kind.value for kind in OtherKind))


def _owner(domid: Domid | None) -> str:
    return "" if domid is None else f" of d{domid}"


def _place(bank: BankEntry) -> str:
    address = f"address {bank.addr:#x}" if bank.status & STATUS_ADDRV else "no address"
    return f"bank {bank.bank}, status {bank.status:#018x}, {address}"
