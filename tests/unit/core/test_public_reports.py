"""Machine checks as people have published them, and what they mean; identifying details are gone.

Only what was published is given: a record's flags, MCG_CAP and MISC where they are known.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from pgofflined.core.classify import classify, errors_overwritten
from pgofflined.core.frames import Mfn
from pgofflined.core.machine import CpuVendor, Machine
from pgofflined.core.reports import (
    CorrectedPageError,
    ErrorReport,
    HypervisorActed,
    OtherError,
    OtherKind,
    UncorrectedPageError,
    report_class,
)
from pgofflined.core.telemetry import decode_mc_info, decode_xen_mce
from tests.unit.mca_records import (
    CMCI,
    CORRECTABLE,
    MCE,
    MISC_PAGE,
    POLLED,
    RECOVERABLE,
    UNCORRECTABLE,
    BankError,
    mc_info_of,
    xen_mce_of,
)

LAST = Mfn((1 << 24) - 1)  # 64 GiB
INTEL = Machine(vendor=CpuVendor.INTEL, family=6, physical_bits=46, max_mfn=LAST)
K8 = Machine(vendor=CpuVendor.AMD, family=0xF, physical_bits=40, max_mfn=LAST)
AMD_10H = Machine(vendor=CpuVendor.AMD, family=0x10, physical_bits=48, max_mfn=LAST)
AMD_15H = Machine(vendor=CpuVendor.AMD, family=0x15, physical_bits=48, max_mfn=LAST)
AMD_17H = Machine(vendor=CpuVendor.AMD, family=0x17, physical_bits=48, max_mfn=LAST)
# Nehalem and Westmere: 9 banks with CMCI, and no software error recovery.
WITHOUT_SER_P = 0x1C09
WITH_SER_P = 0x0F00_0C14


@dataclass(frozen=True, kw_only=True)
class Case:
    """One record, as Xen gives it, and the report that is right."""

    error: BankError
    flags: int = CMCI | CORRECTABLE
    machine: Machine = INTEL
    mcg_cap: int | None = None
    is_class: str
    mfn: int | None = None

    def report(self) -> ErrorReport:
        record = mc_info_of(self.error, flags=self.flags)
        [report] = classify(decode_mc_info(record, self.mcg_cap), self.machine)
        return report


def bank(status: int, addr: int, misc: int = 0, number: int = 9) -> BankError:
    return BankError(status=status, addr=addr, misc=misc, bank=number)


LEFTOVER = POLLED | RECOVERABLE
CASES = {
    "patrol scrub of a server, 78 errors counted": Case(
        error=bank(0xCC00_1380_0008_00C0, 0xD_6DB0_B8C0, 0x1221_3FFF_FFFF_C086, 13),
        is_class="corrected",
        mfn=0xD6DB0B,
    ),
    "filtered read error, two counted at the first interrupt": Case(
        error=bank(0x8C00_0080_0001_0090, 0x1234_5678, 0x86, 7),
        is_class="corrected",
        mfn=0x12345,
    ),
    "Westmere, MISC is no address mode": Case(
        error=bank(0x8C00_0040_0001_009F, 0x9_6236_C6C0, 0x6407_38DD_0009_159C, 8),
        mcg_cap=WITHOUT_SER_P,
        is_class="corrected",
        mfn=0x96236C,
    ),
    "Westmere, 18 errors counted": Case(
        error=bank(0xCC00_0480_0001_009F, 0x4_A9F3_B1C0, 0x8F44_9608_0009_5840, 8),
        mcg_cap=WITHOUT_SER_P,
        is_class="corrected",
        mfn=0x4A9F3B,
    ),
    "the same MISC where it has an address mode": Case(
        error=bank(0xCC00_0480_0001_009F, 0x4_A9F3_B1C0, 0x8F44_9608_0009_5840, 8),
        mcg_cap=WITH_SER_P,
        is_class="no_usable_address",
    ),
    "uncorrected, at an address that may be a device's": Case(
        error=bank(0xAC20_0000_0003_110A, 0xF_E7F0_0000, 0x86, 6),
        flags=CMCI | RECOVERABLE,
        is_class="uncorrected_not_signalled",
        mfn=0xFE7F00,
    ),
    "the same, beyond the host's last frame": Case(
        error=bank(0xAC20_0000_0003_110A, 0x38_0000_0000, 0x86, 6),
        flags=CMCI | RECOVERABLE,
        is_class="uncorrected_not_signalled",
    ),
    "load that was poisoned, left over from before the boot": Case(
        error=bank(0xBD80_0000_0010_0134, 0x1234_5678, 0x86, 1),
        flags=0x0C,
        is_class="uncorrected_before_boot",
        mfn=0x12345,
    ),
    "the same, newly signalled": Case(
        error=bank(0xBD80_0000_0010_0134, 0x1234_5678, 0x86, 1),
        flags=MCE | RECOVERABLE,
        is_class="hypervisor_acted",
    ),
    "Goldmont at every boot": Case(
        error=bank(0xA600_0000_0002_0408, 0xFEF1_FF80, 0, 4),
        flags=POLLED | UNCORRECTABLE,
        is_class="fatal_before_boot",
    ),
    "K8, chipkill off": Case(
        error=bank(0x9471_C000_0000_0A13, 0x46A9_F888, 0, 4),
        flags=POLLED | CORRECTABLE,
        machine=K8,
        is_class="corrected",
        mfn=0x46A9F,
    ),
    "northbridge that went down": Case(
        error=bank(0xF60C_2001_0000_0813, 0x1_FEF5_1800, 0, 4),
        flags=MCE | UNCORRECTABLE,
        machine=K8,
        is_class="fatal",
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_published_record_means_what_it_meant(case: Case) -> None:
    report = case.report()
    assert (report_class(report), report.mfn) == (case.is_class, case.mfn)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_report_keeps_all_that_was_read(case: Case) -> None:
    kept = case.report().bank
    assert kept is not None
    error = case.error
    assert (kept.status, kept.addr, kept.misc) == (error.status, error.addr, error.misc)
    assert (kept.bank, kept.socket, kept.apicid) == (error.bank, error.socket, error.apicid)
    assert (kept.flags, kept.mcg_cap) == (case.flags, case.mcg_cap)


def test_errors_that_a_published_record_overwrote_are_counted() -> None:
    def lost(name: str) -> int:
        case = CASES[name]
        [entry] = decode_mc_info(mc_info_of(case.error), case.mcg_cap).banks
        return errors_overwritten(entry, case.machine)

    assert lost("patrol scrub of a server, 78 errors counted") == 77
    assert lost("Westmere, 18 errors counted") == 17
    assert lost("northbridge that went down") == 1
    assert lost("filtered read error, two counted at the first interrupt") == 0


def test_a_leftover_of_any_class_is_said_to_be_from_before_this_boot() -> None:
    for name, case in CASES.items():
        report = case.report()
        is_leftover = case.is_class.endswith("before_boot")
        assert ("before this boot" in report.describe()) == is_leftover, name
        assert "went down" not in report.describe()
    usable = CASES["load that was poisoned, left over from before the boot"].report()
    assert isinstance(usable, UncorrectedPageError)
    assert usable.is_leftover


@pytest.mark.parametrize("status", [0xBD80_0000_0010_0134, 0xBD00_0000_0040_00CF])
@pytest.mark.parametrize("pcc", [0, 1 << 57])
def test_through_dev_mcelog_a_leftover_cannot_be_told_and_its_address_is_not_used(
    status: int, pcc: int
) -> None:
    error = bank(status | pcc, 0x1234_5678, 0x8C)
    [report] = classify(decode_xen_mce(xen_mce_of(error, mcg_cap=WITH_SER_P)), INTEL)
    assert report.mfn is None
    if pcc:
        assert report_class(report) == "fatal"
    else:
        assert isinstance(report, HypervisorActed)
        assert "nor whether it is from before this boot" in report.describe()
        assert "may have acted" in report.describe()


@pytest.mark.parametrize(
    ("status", "flags", "is_class", "has_frame"),
    [
        # A leftover is told by its flags; the poll's unsignalled errors stay what they are.
        (0xBC20_0000_8000_0136, LEFTOVER, "uncorrected_not_signalled", True),
        (0xBD20_0000_8000_017A, LEFTOVER, "uncorrected_before_boot", True),
        (0xBD20_0000_8000_017A, LEFTOVER | MCE, "hypervisor_acted", False),
        (0xBD20_0000_8000_0151, LEFTOVER, "uncorrected_before_boot", True),
        (0xBD20_0000_8000_0151, MCE | RECOVERABLE, "uncorrected_signalled", True),
        (0xB900_0000_0040_00CF, LEFTOVER, "uncorrected_before_boot", False),
        # Of those that the processor could not recover from, memory's only name a page.
        (0xBF20_0000_8000_017A, LEFTOVER, "fatal_before_boot", True),
        (0xBE00_0000_0080_0090, LEFTOVER, "fatal_before_boot", True),
        (0xBE00_0000_0080_00B0, LEFTOVER, "fatal_before_boot", False),
        (0xBE00_0000_0080_0E0B, LEFTOVER, "fatal_before_boot", False),
        (0xBE00_0000_0080_0090, MCE | UNCORRECTABLE, "fatal", False),
        (0xBE00_0000_0080_0090, CMCI | UNCORRECTABLE, "fatal", False),
    ],
)
def test_what_xen_found_at_its_start_is_told_from_what_is_new(
    status: int,
    flags: int,
    is_class: str,
    has_frame: bool,  # noqa: FBT001
) -> None:
    case = Case(error=bank(status, 0x1234_5678, MISC_PAGE), flags=flags, is_class=is_class)
    report = case.report()
    assert report_class(report) == is_class
    assert report.mfn == (0x12345 if has_frame else None)


@pytest.mark.parametrize(
    ("status", "flags", "is_class", "has_frame"),
    [
        # Bits 56 and 55 mean nothing here, and MISC says nothing of the address.
        (0xA400_0000_0001_009F, MCE | RECOVERABLE, "fatal", False),
        (0xA580_0000_0001_009F, MCE | RECOVERABLE, "fatal", False),
        (0xA400_0000_0001_009F, LEFTOVER, "fatal_before_boot", True),
        (0xA580_0000_0010_0134, LEFTOVER, "fatal_before_boot", True),
        (0xA000_0000_0001_009F, LEFTOVER, "fatal_before_boot", False),
        (0x8500_0000_0001_009F, POLLED | CORRECTABLE, "corrected", True),
        (0x8000_0000_0001_009F, POLLED | CORRECTABLE, "no_usable_address", False),
        # What Skylake says of a patrol scrub, older controllers say of something else.
        (0x8C00_0000_0010_00C0, POLLED | CORRECTABLE, "corrected", True),
    ],
)
def test_without_error_recovery_addrv_is_enough_and_nothing_uncorrected_is_survived(
    status: int,
    flags: int,
    is_class: str,
    has_frame: bool,  # noqa: FBT001
) -> None:
    error = bank(status, 0x1234_5678, 0x6407_38DD_0009_159C, 8)
    case = Case(error=error, flags=flags, mcg_cap=WITHOUT_SER_P, is_class=is_class)
    report = case.report()
    assert report_class(report) == is_class
    assert report.mfn == (0x12345 if has_frame else None)


def test_kernel_record_says_itself_that_there_is_no_error_recovery() -> None:
    error = CASES["Westmere, 18 errors counted"].error
    record = xen_mce_of(error, cpuvendor=0, mcg_cap=WITHOUT_SER_P)
    [report] = classify(decode_xen_mce(record), INTEL)
    assert isinstance(report, CorrectedPageError)
    assert (report.mfn, report.granularity) == (0x4A9F3B, 4096)


@pytest.mark.parametrize("code", [0x0280, 0x0290, 0x02A5, 0x02B1, 0x02CF, 0x1290])
def test_error_of_memory_that_serves_as_a_cache_retires_nothing(code: int) -> None:
    case = Case(error=bank(0x8C00_0040_0000_0000 | code, 0x1000, MISC_PAGE), is_class="")
    report = case.report()
    assert isinstance(report, OtherError)
    assert report.kind is OtherKind.MEMORY_AS_CACHE


UC_DRAM = 0xB400_2000_0008_0813
DEFERRED_DRAM = 0x9400_1000_0008_0813


@pytest.mark.parametrize(
    ("machine", "status", "number", "is_class", "has_frame"),
    [
        (K8, 0x9400_4000_0000_0813, 4, "corrected", True),  # plain ECC
        (K8, 0x9400_4000_0008_0813, 4, "corrected", True),  # chipkill
        (K8, 0x9400_4000_0030_0813, 4, "corrected", True),  # bits 20 and up are no code there
        (AMD_10H, 0x9400_4000_0018_0813, 4, "not_memory", False),
        (K8, 0x9400_4000_0000_0813, 3, "not_memory", False),
        (K8, 0x9400_4000_0000_0C0F, 4, "not_memory", False),  # not about memory
        (K8, 0x9400_4000_0005_0813, 4, "not_memory", False),  # GART
        (K8, 0xB400_2000_0000_0813, 4, "uncorrected_signalled", True),
        (AMD_10H, 0x9400_4000_0000_0813, 4, "not_memory", False),
        (AMD_10H, 0x9400_4000_0008_0813, 4, "corrected", True),
        (AMD_10H, UC_DRAM, 4, "uncorrected_signalled", True),
        (AMD_15H, DEFERRED_DRAM, 4, "uncorrected_not_signalled", True),
        (AMD_15H, DEFERRED_DRAM, 2, "uncorrected_not_signalled", False),
        (AMD_15H, DEFERRED_DRAM & ~(1 << 58), 4, "uncorrected_not_signalled", False),
        (AMD_15H, UC_DRAM | 1 << 57, 4, "fatal", False),
        (AMD_17H, UC_DRAM, 4, "uncorrected_signalled", False),
        (AMD_17H, DEFERRED_DRAM, 4, "uncorrected_not_signalled", False),
    ],
)
def test_northbridge_of_amd_names_the_page_of_every_dram_error(
    machine: Machine,
    status: int,
    number: int,
    is_class: str,
    has_frame: bool,  # noqa: FBT001
) -> None:
    error = bank(status, 0x1234_5678, 0, number)
    case = Case(error=error, flags=POLLED, machine=machine, is_class=is_class)
    report = case.report()
    assert report_class(report) == is_class
    assert report.mfn == (0x12345 if has_frame else None)
    assert isinstance(report, UncorrectedPageError) == (
        has_frame and is_class.startswith("uncorrected")
    )


def test_uncorrected_error_of_a_zen_host_says_that_its_address_is_no_machine_address() -> None:
    case = Case(error=bank(UC_DRAM, 0x1000), machine=AMD_17H, is_class="")
    assert "an address of their own space" in case.report().describe()
