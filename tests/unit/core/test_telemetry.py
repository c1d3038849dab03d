from __future__ import annotations

import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pgofflined.core.classify import classify
from pgofflined.core.frames import Domid, Mfn
from pgofflined.core.machine import CpuVendor, Machine
from pgofflined.core.offline import OfflineFlag, OfflineReply
from pgofflined.core.telemetry import (
    BankEntry,
    Flaw,
    Telemetry,
    decode,
    decode_mc_info,
    decode_xen_mce,
)
from tests.unit.mca_records import (
    BankError,
    bank_entry,
    extended_entry,
    global_entry,
    mc_info,
    mc_info_of,
    recovery_entry,
    xen_mce_of,
)

ERROR = BankError(domid=7, gstatus=5)
MACHINES = [
    Machine(vendor=vendor, family=family, physical_bits=46, max_mfn=Mfn(0xFFFFF))
    for vendor in CpuVendor
    for family in (6, 0x10, 0x17)
]


def flaws(telemetry: Telemetry) -> list[Flaw]:
    return [flaw.flaw for flaw in telemetry.flaws]


def test_bank_of_mc_info_is_decoded_with_owner_and_cpu() -> None:
    telemetry = decode_mc_info(mc_info_of(ERROR))
    assert telemetry == Telemetry(
        banks=(
            BankEntry(
                bank=9,
                status=ERROR.status,
                addr=0x1234_5678,
                misc=0x8C,
                gstatus=5,
                apicid=3,
                socket=1,
                domid=Domid(7),
                flags=9,
            ),
        )
    )


@pytest.mark.parametrize("size", [88, 112])
def test_old_and_new_xen_mce_are_decoded(size: int) -> None:
    telemetry = decode_xen_mce(xen_mce_of(ERROR, size=size, cpuvendor=2, mcg_cap=0x1000C14))
    assert telemetry.flaws == ()
    assert telemetry.banks == (
        BankEntry(
            bank=9,
            status=ERROR.status,
            addr=0x1234_5678,
            misc=0x8C,
            gstatus=5,
            apicid=3,
            socket=1,
            vendor=CpuVendor.AMD,
            mcg_cap=0x1000C14,
        ),
    )


@pytest.mark.parametrize(
    ("number", "vendor"),
    [
        # Xen's own numbers, before 4.19.5, 4.20.3, 4.21.1 and 4.22.
        (1, CpuVendor.INTEL),
        (2, CpuVendor.AMD),
        (4, CpuVendor.OTHER),
        (8, CpuVendor.OTHER),
        (16, CpuVendor.AMD),
        # Linux' numbers, since.
        (0, CpuVendor.INTEL),
        (5, CpuVendor.OTHER),
        (9, CpuVendor.AMD),
        (10, CpuVendor.OTHER),
        (0xFF, None),
        (99, None),
    ],
)
def test_vendor_numbers_of_every_xen_are_known(number: int, vendor: CpuVendor | None) -> None:
    assert decode_xen_mce(xen_mce_of(ERROR, cpuvendor=number)).banks[0].vendor is vendor


@pytest.mark.parametrize("domid", [0x7FF0, 0x7FF1, 0x7FF2, 0x7FF3, 0x7FF4, 0xFFFF])
def test_reserved_domid_is_no_owner(domid: int) -> None:
    telemetry = decode_mc_info(mc_info_of(BankError(domid=domid)))
    assert telemetry.banks[0].domid is None


def test_recovery_entry_names_frame_and_owner() -> None:
    # As seen on a real host after an SRAO on a PV guest's page.
    blob = mc_info(
        global_entry(ERROR),
        bank_entry(ERROR),
        recovery_entry(bank=7, mfn=0xB481E, status=0x13004),
    )
    [recovery] = decode_mc_info(blob).recoveries
    assert (recovery.bank, recovery.mfn) == (7, Mfn(0xB481E))
    assert recovery.reply == OfflineReply(
        flags=OfflineFlag.BROKEN | OfflineFlag.OWNED | OfflineFlag.PENDING, owner=Domid(1)
    )


@pytest.mark.parametrize("status", [0x01010101, 0x4000, 1 << 32 | 0x2002, 1 << 33])
def test_recovery_with_a_status_word_not_understood_keeps_the_frame(status: int) -> None:
    [recovery] = decode_mc_info(
        mc_info(recovery_entry(bank=7, mfn=0x100, status=status))
    ).recoveries
    assert (recovery.mfn, recovery.reply) == (0x100, None)


@pytest.mark.parametrize(("mfn", "action"), [(1 << 40, 1), (0x100, 2), (0x100, 0)])
def test_recovery_entry_without_a_frame_is_undecodable(mfn: int, action: int) -> None:
    telemetry = decode_mc_info(mc_info(recovery_entry(bank=7, mfn=mfn, status=2, action=action)))
    assert (telemetry.recoveries, flaws(telemetry)) == ((), [Flaw.NO_FRAME])


@pytest.mark.parametrize(
    ("format_name", "size", "flaw"),
    [
        ("mc_info", 0, Flaw.SHORT),
        ("mc_info", 767, Flaw.SHORT),
        ("mc_info", 769, Flaw.OVERSIZED),
        ("mc_info", 1 << 20, Flaw.OVERSIZED),
        ("xen_mce", 0, Flaw.SHORT),
        ("xen_mce", 87, Flaw.SHORT),
        ("xen_mce", 100, Flaw.SHORT),
        ("xen_mce", 113, Flaw.OVERSIZED),
        ("edac", 88, Flaw.UNKNOWN_FORMAT),
    ],
)
def test_record_of_wrong_size_or_format_is_dropped_whole(
    format_name: str, size: int, flaw: Flaw
) -> None:
    telemetry = decode(format_name, bytes(size))
    assert (telemetry.banks, telemetry.recoveries, flaws(telemetry)) == ((), (), [flaw])


@pytest.mark.parametrize(
    ("format_name", "size", "told"),
    [
        ("mc_info", 767, "mc_info of 767 bytes, 768 expected"),
        ("xen_mce", 100, "xen_mce of 100 bytes, 88 or 112 expected"),
        ("edac", 88, "records of format 'edac' are not known"),
    ],
)
def test_a_record_that_is_dropped_is_told_with_what_was_expected(
    format_name: str, size: int, told: str
) -> None:
    [flaw] = decode(format_name, bytes(size)).flaws
    assert flaw.detail == told


def test_a_record_without_it_gets_the_capabilities_that_are_known_of_the_processors() -> None:
    for mcg_cap in (None, 0x1000C14):
        [entry] = decode("mc_info", mc_info_of(ERROR), mcg_cap).banks
        assert entry.mcg_cap == mcg_cap
    [entry] = decode("xen_mce", xen_mce_of(ERROR, mcg_cap=0xC09), 0x1000C14).banks
    assert entry.mcg_cap == 0xC09


@pytest.mark.parametrize("count", [191, 192, 0xFFFF_FFFF])
def test_more_entries_than_can_fit_drop_the_record(count: int) -> None:
    telemetry = decode_mc_info(mc_info(global_entry(ERROR), bank_entry(ERROR), count=count))
    assert (telemetry.banks, flaws(telemetry)) == ((), [Flaw.TOO_MANY_ENTRIES])


def test_entries_before_a_bad_one_are_kept() -> None:
    telemetry = decode_mc_info(mc_info(global_entry(ERROR), bank_entry(ERROR), count=5))
    assert len(telemetry.banks) == 1
    assert flaws(telemetry) == [Flaw.BAD_ENTRY_SIZE]


@pytest.mark.parametrize("size", [0, 3, 47])
def test_bank_entry_that_is_too_small_ends_the_walk(size: int) -> None:
    bad = struct.pack("<HH", 1, size).ljust(48, b"\0")
    telemetry = decode_mc_info(mc_info(global_entry(ERROR), bad, bank_entry(ERROR)))
    assert (telemetry.banks, flaws(telemetry)) == ((), [Flaw.BAD_ENTRY_SIZE])


def test_entry_that_reaches_beyond_the_end_is_dropped() -> None:
    bad = struct.pack("<HH", 1, 800).ljust(48, b"\0")
    telemetry = decode_mc_info(mc_info(bank_entry(ERROR), bad))
    assert (len(telemetry.banks), flaws(telemetry)) == (1, [Flaw.BEYOND_END])


def test_entry_that_starts_beyond_the_end_is_dropped() -> None:
    filler = struct.pack("<HH", 2, 760).ljust(760, b"\0")
    telemetry = decode_mc_info(mc_info(filler, count=2))
    assert flaws(telemetry) == [Flaw.BEYOND_END]


def test_entry_that_ends_with_the_record_is_whole() -> None:
    filler = struct.pack("<HH", 2, 760 - 48).ljust(760 - 48, b"\0")
    telemetry = decode_mc_info(mc_info(filler, bank_entry(ERROR)))
    assert (len(telemetry.banks), telemetry.flaws) == (1, ())


def test_as_many_entries_as_can_fit_are_walked() -> None:
    smallest = struct.pack("<HH", 2, 4)
    assert decode_mc_info(mc_info(*[smallest] * 190)).flaws == ()


def test_unknown_entry_type_is_stepped_over() -> None:
    unknown = struct.pack("<HH", 9, 64).ljust(64, b"\xff")
    telemetry = decode_mc_info(mc_info(global_entry(ERROR), unknown, bank_entry(ERROR)))
    assert (len(telemetry.banks), flaws(telemetry)) == (1, [Flaw.UNKNOWN_ENTRY_TYPE])


def test_extended_entry_is_stepped_over_silently() -> None:
    telemetry = decode_mc_info(mc_info(global_entry(ERROR), extended_entry(), bank_entry(ERROR)))
    assert (len(telemetry.banks), telemetry.flaws) == (1, ())


def test_several_banks_share_the_global_entry() -> None:
    other = BankError(bank=4)
    telemetry = decode_mc_info(mc_info(bank_entry(ERROR), bank_entry(other), global_entry(ERROR)))
    assert [(entry.bank, entry.apicid) for entry in telemetry.banks] == [(9, 3), (4, 3)]


def test_record_without_global_entry_still_gives_its_bank() -> None:
    [entry] = decode_mc_info(mc_info(bank_entry(ERROR))).banks
    assert entry == BankEntry(
        bank=9, status=ERROR.status, addr=ERROR.addr, misc=ERROR.misc, domid=Domid(7)
    )
    assert (entry.apicid, entry.socket, entry.gstatus, entry.flags) == (None, None, 0, 0)


def test_incomplete_flag_is_passed_on() -> None:
    assert decode_mc_info(mc_info(bank_entry(ERROR), flags=1)).incomplete
    assert not decode_mc_info(mc_info(bank_entry(ERROR))).incomplete


def mutated(records: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """Valid records with bytes overwritten: they get deeper than noise does."""

    def overwrite(record: bytes, changes: list[tuple[int, int]]) -> bytes:
        changed = bytearray(record)
        for position, value in changes:
            changed[position % len(changed)] = value
        return bytes(changed)

    changes = st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=8)
    return st.builds(overwrite, records, changes)


VALID = st.sampled_from(
    [
        mc_info_of(ERROR),
        mc_info(global_entry(ERROR), extended_entry(), bank_entry(ERROR)),
        mc_info(bank_entry(ERROR), recovery_entry(bank=9, mfn=3, status=0x2002)),
        xen_mce_of(ERROR),
        xen_mce_of(ERROR, size=88),
    ]
)
NOISE = st.one_of(
    st.binary(max_size=1000), st.binary(min_size=768, max_size=768), st.binary(min_size=88)
)


@given(NOISE | mutated(VALID), st.sampled_from(["mc_info", "xen_mce", ""]))
@example(b"\xff" * 768, "mc_info")
@example(b"\xff" * 112, "xen_mce")
def test_no_bytes_at_all_raise_anything(record: bytes, format_name: str) -> None:
    telemetry = decode(format_name, record)
    for machine in MACHINES:
        for report in classify(telemetry, machine):
            assert report.describe()
            mfn = report.mfn
            assert mfn is None or 0 <= mfn <= machine.max_mfn
    assert all(flaw.describe() for flaw in telemetry.flaws)
