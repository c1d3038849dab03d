"""What a machine check means for a page: the reports that the rest of the program sees."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final, assert_never

from pgofflined.core.frames import Domid, Mfn


class OtherKind(StrEnum):
    """Why a report leads to no page."""

    NO_ERROR = "no_error"
    FATAL = "fatal"
    UNCORRECTED_SIGNALLED = "uncorrected_signalled"
    UNCORRECTED_NOT_SIGNALLED = "uncorrected_not_signalled"
    NOT_MEMORY = "not_memory"
    COMMAND_OR_ADDRESS_PARITY = "command_or_address_parity"
    NO_USABLE_ADDRESS = "no_usable_address"
    NORMALIZED_ADDRESS = "normalized_address"
    GRANULARITY_TOO_COARSE = "granularity_too_coarse"
    ADDRESS_OUT_OF_RANGE = "address_out_of_range"
    UNKNOWN_VENDOR = "unknown_vendor"


_REASONS: Final = {
    OtherKind.NO_ERROR: "the bank holds no valid error",
    OtherKind.FATAL: "the processor's context is corrupt; the host went down with this error",
    OtherKind.UNCORRECTED_SIGNALLED: "an uncorrected error of a type that names no page for us",
    OtherKind.UNCORRECTED_NOT_SIGNALLED: (
        "an uncorrected error that nothing has consumed yet; the page's contents must not be read"
    ),
    OtherKind.NOT_MEMORY: "not an error of a memory controller",
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
    """A memory error that was corrected, in a frame that is known.

    ``weight`` is how many errors the record stands for, at least 1.  ``overflow`` says that the
    bank was overwritten, so there were more.  ``domid`` is Xen's hint at the owner at the time,
    ``granularity`` the number of bytes among which the error lies.
    """

    mfn: Mfn
    weight: int
    overflow: bool
    granularity: int
    domid: Domid | None
    apicid: int | None
    bank: int
    status: int
    misc: int

    def describe(self) -> str:
        """A sentence for the journal."""
        count = (
            "a corrected memory error" if self.weight == 1 else f"{self.weight} corrected errors"
        )
        owner = "" if self.domid is None else f" of d{self.domid}"
        more = ", and others were lost" if self.overflow else ""
        return f"{count} in mfn {self.mfn:#x}{owner} ({_place(self.bank, self.status)}){more}"


@dataclass(frozen=True, slots=True, kw_only=True)
class HypervisorActed:
    """Xen has already dealt with an uncorrected error.

    ``mfn`` is the frame as Xen's own recovery entry names it; None where there is no such entry,
    as always with /dev/mcelog.  ``broken`` says that Xen is known to have marked it broken.
    """

    mfn: Mfn | None
    domid: Domid | None
    broken: bool
    result: HypervisorResult
    reason: str
    bank: int
    status: int

    def describe(self) -> str:
        """A sentence for the journal."""
        frame = "an unknown frame" if self.mfn is None else f"mfn {self.mfn:#x}"
        owner = "" if self.domid is None else f" of d{self.domid}"
        place = _place(self.bank, self.status)
        return f"Xen acted on an uncorrected error in {frame}{owner} ({place}): {self.reason}"


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherError:
    """Any other report; it is counted and told.

    ``mfn`` is given only for an uncorrected error that Xen leaves alone and whose address can be
    relied on: that page's contents must not be read.
    """

    kind: OtherKind
    bank: int
    status: int
    mfn: Mfn | None = None

    @property
    def reason(self) -> str:
        """Why nothing is done about a page."""
        return _REASONS[self.kind]

    def describe(self) -> str:
        """A sentence for the journal."""
        frame = "" if self.mfn is None else f" in mfn {self.mfn:#x}"
        return f"machine check{frame} ({_place(self.bank, self.status)}): {self.reason}"


ErrorReport = CorrectedPageError | HypervisorActed | OtherError


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
        case OtherError():
            return report.kind.value
        case _:
            assert_never(report)


REPORT_CLASSES: Final = ("corrected", "hypervisor_acted", *(kind.value for kind in OtherKind))


def _place(bank: int, status: int) -> str:
    return f"bank {bank}, status {status:#018x}"
