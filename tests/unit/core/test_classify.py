from __future__ import annotations

from itertools import product

import pytest

from pgofflined.core.classify import classify, classify_bank, errors_overwritten
from pgofflined.core.frames import Domid, Mfn
from pgofflined.core.machine import CpuVendor, Machine
from pgofflined.core.reports import (
    CorrectedPageError,
    ErrorReport,
    HypervisorActed,
    HypervisorResult,
    OtherError,
    OtherKind,
    UncorrectedPageError,
    report_class,
)
from pgofflined.core.telemetry import (
    BankEntry,
    Telemetry,
    decode_mc_info,
    decode_xen_mce,
)
from tests.unit.mca_records import (
    ADDRV,
    AR,
    EN,
    MCE,
    MISC_PAGE,
    MISCV,
    OVER,
    PCC,
    RECOVERABLE,
    UC,
    VAL,
    BankError,
    S,
    mc_info_of,
    xen_mce_of,
)

INTEL = Machine(vendor=CpuVendor.INTEL, family=6, physical_bits=46, max_mfn=Mfn(0xFFFFF))
AMD_ZEN = Machine(vendor=CpuVendor.AMD, family=0x17, physical_bits=48, max_mfn=Mfn(0xFFFFF))
AMD_OLD = Machine(vendor=CpuVendor.AMD, family=0x10, physical_bits=48, max_mfn=Mfn(0xFFFFF))
OTHER = Machine(vendor=CpuVendor.OTHER, family=7, physical_bits=46, max_mfn=Mfn(0xFFFFF))

ADDR = 0x1234_5678
MFN = Mfn(0x12345)
USABLE = VAL | MISCV | ADDRV


def classified(
    status: int,
    machine: Machine = INTEL,
    *,
    addr: int = ADDR,
    misc: int = MISC_PAGE,
    bank: int = 9,
    mcg_cap: int | None = None,
    flags: int = 0,
) -> ErrorReport:
    entry = BankEntry(bank=bank, status=status, addr=addr, misc=misc, mcg_cap=mcg_cap, flags=flags)
    return classify_bank(entry, machine)


# Codes on both sides of every border that the rules draw.
CODES = (
    *(0x0000, 0x000C, 0x0080, 0x0090, 0x009F, 0x00A5, 0x00B0, 0x00BF, 0x00C0, 0x00CF, 0x00D0),
    *(0x00E0, 0x00F0, 0x0110, 0x0134, 0x0135, 0x0136, 0x0150, 0x0151, 0x017A, 0x017B, 0x0280),
    *(0x02B1, 0x02C2, 0x02D0, 0x0300, 0x0480, 0x0800, 0x0E0B, 0x4090, 0x8090),
)


def oracle(bits: dict[str, bool], code: int, lsb: int, mode: int) -> str:
    """The rules once more, as a person would say them, on named bits instead of words."""
    memory = {
        *range(0x080, 0x0B0),  # generic, read, write
        *range(0x0C0, 0x0D0),  # scrub
    }
    parity = range(0x0B0, 0x0C0)
    handled = {*range(0xC0, 0xD0), 0x17A, 0x134, 0x150}
    plain = code - 0x1000 if code & 0x1000 else code
    if not bits["val"]:
        return "no_error"
    if bits["pcc"]:
        return "fatal"
    if bits["uc"]:
        if not bits["s"]:
            return "uncorrected_not_signalled"
        return "hypervisor_acted" if plain in handled else "uncorrected_signalled"
    if plain in range(0x280, 0x300):
        return "memory_as_cache"
    if plain in parity:
        return "command_or_address_parity"
    if plain not in memory:
        return "not_memory"
    if not (bits["addrv"] and bits["miscv"] and mode == 2):
        return "no_usable_address"
    return "granularity_too_coarse" if lsb > 12 else "corrected"


@pytest.mark.parametrize("code", CODES)
def test_every_combination_of_flags_agrees_with_the_rules(code: int) -> None:
    flags = {
        "val": VAL, "over": OVER, "uc": UC, "en": EN, "miscv": MISCV, "addrv": ADDRV,
        "pcc": PCC, "s": S, "ar": AR,
    }  # fmt: skip
    for values in product((False, True), repeat=len(flags)):
        bits = dict(zip(flags, values, strict=True))
        word = sum(flag for name, flag in flags.items() if bits[name])
        for filtered, lsb, mode in product((0, 0x1000), (6, 12, 13, 63), (1, 2)):
            status = word | code | filtered
            report = classified(status, misc=mode << 6 | lsb)
            expected = oracle(bits, code | filtered, lsb, mode)
            assert report_class(report) == expected, f"{status:#x} lsb {lsb} mode {mode}"
            usable = bits["addrv"] and bits["miscv"] and mode == 2 and lsb <= 12
            uncorrected = ("uncorrected_not_signalled", "uncorrected_signalled")
            named = expected == "corrected" or (expected in uncorrected and usable)
            assert report.mfn == (MFN if named else None)
            assert isinstance(report, UncorrectedPageError) == (expected in uncorrected and usable)


def test_genuine_corrected_error_with_en_clear_counts() -> None:
    report = classified(0x8C00_0042_0080_0090)
    assert report == CorrectedPageError(
        mfn=MFN,
        count=0x42 >> 6,
        overflow=False,
        granularity=4096,
        domid=None,
        bank=BankEntry(bank=9, status=0x8C00_0042_0080_0090, addr=ADDR, misc=MISC_PAGE),
    )


@pytest.mark.parametrize(("field", "count"), [(0, 1), (1, 1), (2, 2), (0x7FFF, 0x7FFF)])
def test_count_is_the_banks_and_at_least_one(field: int, count: int) -> None:
    report = classified(USABLE | field << 38 | 0x90)
    assert isinstance(report, CorrectedPageError)
    assert report.count == count


def test_count_field_means_nothing_where_mcg_cap_denies_it() -> None:
    report = classified(USABLE | 77 << 38 | 0x90, mcg_cap=0x100_0009)
    assert isinstance(report, CorrectedPageError)
    assert report.count == 1


def test_count_field_is_used_where_mcg_cap_allows_it() -> None:
    report = classified(USABLE | 77 << 38 | 0x90, mcg_cap=0x100_0409)
    assert isinstance(report, CorrectedPageError)
    assert report.count == 77


CORRECTED_OVER = USABLE | OVER | 0x90


@pytest.mark.parametrize(
    ("status", "machine", "mcg_cap", "lost"),
    [
        (USABLE | 0x90, INTEL, None, 0),
        (USABLE | 5 << 38 | 0x90, INTEL, None, 0),  # counted, and not overwritten
        (CORRECTED_OVER & ~VAL, INTEL, None, 0),
        (CORRECTED_OVER, INTEL, None, 1),
        (CORRECTED_OVER | 2 << 38, INTEL, None, 1),
        (CORRECTED_OVER | 78 << 38, INTEL, None, 77),
        (CORRECTED_OVER | 78 << 38, INTEL, 0x100_0409, 77),
        (CORRECTED_OVER | 78 << 38, INTEL, 0x100_0009, 1),  # the bank does not count
        (CORRECTED_OVER | UC | S, INTEL, None, 1),
        (CORRECTED_OVER | UC | 9 << 38, INTEL, None, 1),
        (VAL | OVER | UC | PCC, INTEL, None, 1),
        (CORRECTED_OVER | 78 << 38, AMD_ZEN, None, 1),
        (CORRECTED_OVER | 78 << 38, OTHER, None, 1),
    ],
)
def test_overwritten_errors_are_at_least_those_the_bank_has_counted(
    status: int, machine: Machine, mcg_cap: int | None, lost: int
) -> None:
    entry = BankEntry(bank=9, status=status, addr=ADDR, misc=MISC_PAGE, mcg_cap=mcg_cap)
    assert errors_overwritten(entry, machine) == lost


def test_overflow_is_passed_on() -> None:
    report = classified(USABLE | OVER | 0x90)
    assert isinstance(report, CorrectedPageError)
    assert report.overflow


@pytest.mark.parametrize(("lsb", "granularity"), [(0, 1), (6, 64), (12, 4096)])
def test_granularity_follows_the_least_valid_bit(lsb: int, granularity: int) -> None:
    report = classified(USABLE | 0x90, misc=2 << 6 | lsb)
    assert isinstance(report, CorrectedPageError)
    assert report.granularity == granularity


def test_bits_above_the_physical_width_are_no_address() -> None:
    report = classified(USABLE | 0x90, addr=0xABC << 52 | 1 << 46 | ADDR)
    assert report.mfn == MFN


@pytest.mark.parametrize(("frame", "inside"), [(0xFFFFF, True), (0x100000, False)])
def test_frame_beyond_the_hosts_last_is_out_of_range(frame: int, inside: bool) -> None:  # noqa: FBT001
    report = classified(USABLE | 0x90, addr=frame << 12 | 0xFFF)
    if inside:
        assert report.mfn == frame
    else:
        assert isinstance(report, OtherError)
        assert (report.kind, report.mfn) == (OtherKind.ADDRESS_OUT_OF_RANGE, None)


@pytest.mark.parametrize("code", [0xC0, 0xCF, 0x10C3])
def test_uncorrected_patrol_scrub_sent_as_corrected_is_not_counted(code: int) -> None:
    report = classified(USABLE | 0x10 << 16 | code)
    assert isinstance(report, UncorrectedPageError)
    assert (report.kind, report.mfn) == (OtherKind.UNCORRECTED_NOT_SIGNALLED, MFN)


def test_corrected_patrol_scrub_counts() -> None:
    assert isinstance(classified(USABLE | 0x8 << 16 | 0xC0), CorrectedPageError)


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (0xBD20_0000_8000_017A, "hypervisor_acted"),  # write-back, SRAO
        (0xBD00_0000_0040_00CF, "hypervisor_acted"),  # patrol scrub, SRAO
        (0xBD80_0000_0010_0134, "hypervisor_acted"),  # data load, SRAR
        (0xBD80_0000_0010_0150, "hypervisor_acted"),  # instruction fetch, SRAR
        (0xBC20_0000_8000_0136, "uncorrected_not_signalled"),
        (0xBF20_0000_8000_017A, "fatal"),
        (0x8C00_0000_4000_0090, "corrected"),
    ],
)
def test_statuses_known_from_hardware_and_test_suites(status: int, expected: str) -> None:
    assert report_class(classified(status)) == expected


@pytest.mark.parametrize("code", [0xC0, 0xCF, 0x17A, 0x134, 0x150, 0x10C5, 0x117A, 0x1134, 0x1150])
def test_address_of_an_error_that_xen_handled_is_never_a_frame(code: int) -> None:
    for extra in (0, OVER, AR, EN, OVER | AR | EN):
        report = classified(USABLE | UC | S | extra | code)
        assert isinstance(report, HypervisorActed)
        assert (report.mfn, report.broken, report.result) == (None, False, HypervisorResult.UNKNOWN)


@pytest.mark.parametrize("machine", [AMD_ZEN, AMD_OLD, OTHER])
@pytest.mark.parametrize("code", [0xC0, 0x17A, 0x134, 0x150])
def test_signature_of_handled_errors_gives_no_frame_elsewhere_either(
    machine: Machine, code: int
) -> None:
    assert classified(USABLE | UC | S | code, machine).mfn is None


def kind(report: ErrorReport) -> OtherKind:
    assert isinstance(report, OtherError)
    assert report.mfn is None
    return report.kind


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (0x8C00_0040_0000_0090, OtherKind.NORMALIZED_ADDRESS),  # what the AMD rig can inject
        (0x9C20_4000_0000_011B, OtherKind.NORMALIZED_ADDRESS),  # a unified memory controller's
        (0x9C00_4000_0000_0A13, OtherKind.NORMALIZED_ADDRESS),  # bus code about memory
        (0x9400_0000_0000_0151, OtherKind.NOT_MEMORY),  # instruction cache
        (0x9400_0000_0000_0E0B, OtherKind.NOT_MEMORY),
        (USABLE | 1 << 44 | 0x11B, OtherKind.UNCORRECTED_NOT_SIGNALLED),
        (USABLE | UC | 0x11B, OtherKind.UNCORRECTED_SIGNALLED),
        (USABLE | UC | PCC | 0x11B, OtherKind.FATAL),
        (0, OtherKind.NO_ERROR),
    ],
)
@pytest.mark.parametrize("bank", [4, 9])
def test_amd_with_scalable_banks_is_accounted_only(
    status: int, expected: OtherKind, bank: int
) -> None:
    assert kind(classified(status, AMD_ZEN, bank=bank)) is expected


def test_dram_error_of_an_old_amd_northbridge_counts() -> None:
    report = classified(VAL | ADDRV | 0x8 << 16 | 0x0A13, AMD_OLD, bank=4, misc=0)
    assert isinstance(report, CorrectedPageError)
    assert (report.mfn, report.count) == (MFN, 1)


@pytest.mark.parametrize(
    ("status", "bank", "expected"),
    [
        (VAL | ADDRV | 0x8 << 16 | 0x0A13, 3, OtherKind.NOT_MEMORY),
        (VAL | ADDRV | 0x5 << 16 | 0x0A13, 4, OtherKind.NOT_MEMORY),
        (VAL | 0x8 << 16 | 0x0A13, 4, OtherKind.NO_USABLE_ADDRESS),
    ],
)
def test_other_errors_of_an_old_amd_do_not_count(
    status: int, bank: int, expected: OtherKind
) -> None:
    assert kind(classified(status, AMD_OLD, bank=bank)) is expected


def test_old_amd_address_beyond_the_host_is_out_of_range() -> None:
    status = VAL | ADDRV | 0x8 << 16 | 0x0A13
    report = classified(status, AMD_OLD, bank=4, addr=1 << 40)
    assert kind(report) is OtherKind.ADDRESS_OUT_OF_RANGE


def test_uncorrected_is_also_what_is_not_understood_otherwise() -> None:
    def is_uncorrected(status: int, machine: Machine) -> bool:
        report = classified(status, machine)
        assert isinstance(report, OtherError)
        return report.is_uncorrected

    assert is_uncorrected(USABLE | UC | 0x90, OTHER)
    assert not is_uncorrected(USABLE | 0x90, OTHER)
    assert not is_uncorrected((USABLE | UC | 0x90) & ~VAL, OTHER)
    assert is_uncorrected(VAL | PCC, INTEL)
    assert is_uncorrected(VAL | 1 << 44 | 0x11B, AMD_ZEN)


def test_unknown_vendor_is_accounted_only() -> None:
    assert kind(classified(USABLE | 0x90, OTHER)) is OtherKind.UNKNOWN_VENDOR


def test_record_that_names_another_vendor_than_the_host_is_not_believed() -> None:
    telemetry = decode_xen_mce(xen_mce_of(BankError(), cpuvendor=2))
    assert kind(classify(telemetry, INTEL)[0]) is OtherKind.UNKNOWN_VENDOR


@pytest.mark.parametrize(
    "error",
    [
        BankError(),
        BankError(status=USABLE | OVER | 3 << 38 | 0x1090, misc=0x86),
        BankError(status=USABLE | UC | S | 0x17A),
        BankError(status=USABLE | UC | 0x136),
        BankError(status=VAL | 0x151),
        BankError(addr=1 << 45),
    ],
)
def test_both_formats_give_the_same_report(error: BankError) -> None:
    def essence(telemetry: Telemetry) -> tuple[object, ...]:
        [report] = classify(telemetry, INTEL)
        bank = report.bank
        assert bank is not None
        words = (bank.status, bank.addr, bank.misc, bank.gstatus)
        return report_class(report), report.mfn, bank.bank, words, bank.apicid, bank.socket

    native = essence(decode_mc_info(mc_info_of(error)))
    assert native == essence(decode_xen_mce(xen_mce_of(error, size=88)))
    assert native == essence(decode_xen_mce(xen_mce_of(error, size=112)))


def test_every_report_says_what_it_is_about() -> None:
    corrected = classified(USABLE | OVER | 3 << 38 | 0x90)
    assert "a corrected memory error in mfn 0x12345" in corrected.describe()
    assert "3 errors counted in this bank" in corrected.describe()
    assert "others were overwritten" in corrected.describe()
    assert "guest's" in classified(USABLE | UC | S | 0x17A).describe()
    bank = BankEntry(bank=2, status=USABLE, addr=ADDR, misc=0)
    for other in OtherKind:
        nowhere = OtherError(kind=other, bank=bank)
        somewhere = UncorrectedPageError(mfn=MFN, kind=other, domid=None, bank=bank)
        assert "mfn 0x12345" in somewhere.describe()
        assert "must not be read" in somewhere.describe()
        for report in (nowhere, somewhere):
            assert "bank 2" in report.describe()
            assert "address 0x12345678" in report.describe()
            assert report.reason in report.describe()


def test_an_uncorrected_error_without_a_page_says_why_there_is_none() -> None:
    report = classified(USABLE | UC | 0x136, addr=1 << 45)
    assert isinstance(report, OtherError)
    assert (report.kind, report.no_page) == (
        OtherKind.UNCORRECTED_NOT_SIGNALLED,
        OtherKind.ADDRESS_OUT_OF_RANGE,
    )
    assert "beyond the host's last frame" in report.describe()
    assert "no address" in classified(VAL | 0x90).describe()


@pytest.mark.parametrize(
    ("count", "overflow", "owner", "told"),
    [
        (1, False, None, "in mfn 0x12345 ({})"),
        (2, False, Domid(7), "in mfn 0x12345 of d7 ({}; 2 errors counted in this bank)"),
        (1, True, Domid(0), "in mfn 0x12345 of d0 ({}; others were overwritten)"),
    ],
)
def test_a_corrected_error_is_told_with_its_owner_and_what_else_the_bank_has_had(
    count: int,
    overflow: bool,  # noqa: FBT001
    owner: Domid | None,
    told: str,
) -> None:
    report = CorrectedPageError(
        mfn=MFN,
        count=count,
        overflow=overflow,
        granularity=64,
        domid=owner,
        bank=BankEntry(bank=9, status=VAL | ADDRV, addr=ADDR, misc=0),
    )
    place = "bank 9, status 0x8400000000000000, address 0x12345678"
    assert report.describe() == f"a corrected memory error {told.format(place)}"


def test_an_uncorrected_error_is_told_with_its_owner() -> None:
    bank = BankEntry(bank=2, status=USABLE, addr=ADDR, misc=0)
    kind = OtherKind.UNCORRECTED_NOT_SIGNALLED
    owned = UncorrectedPageError(mfn=MFN, kind=kind, domid=Domid(7), bank=bank)
    assert owned.describe().startswith("an uncorrected error in mfn 0x12345 of d7 (bank 2, ")
    nobodys = UncorrectedPageError(mfn=MFN, kind=kind, domid=None, bank=bank)
    assert nobodys.describe().startswith("an uncorrected error in mfn 0x12345 (bank 2, ")


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (USABLE | 0x90, CorrectedPageError),
        (USABLE | UC | 0x90, UncorrectedPageError),
        (USABLE | UC | S | EN | 0x17A, HypervisorActed),
    ],
)
def test_every_report_of_a_page_has_the_owner_that_xen_names(status: int, kind: type) -> None:
    [report] = classify(decode_mc_info(mc_info_of(BankError(status=status, domid=7))), INTEL)
    assert type(report) is kind
    assert not isinstance(report, OtherError)
    assert report.domid == 7


def test_what_xen_may_have_acted_upon_is_told_with_what_is_in_doubt() -> None:
    status = USABLE | UC | S | 0x17A
    without_flags = classified(status)
    assert without_flags.describe().startswith(
        "Xen may have acted on an uncorrected error in an unknown frame (bank 9, status "
    )
    assert without_flags.describe().endswith(
        "): the record does not say which frame it was, nor whether it is from before this boot; "
        "its address may be a guest's and is not used"
    )
    with_flags = classified(status, flags=MCE | RECOVERABLE)
    assert with_flags.describe().endswith(
        "): the record does not say which frame it was; its address may be a guest's and is not "
        "used"
    )
