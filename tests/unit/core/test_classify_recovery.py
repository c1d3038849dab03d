"""What is reported where Xen itself says what it did about a page."""

from __future__ import annotations

import pytest

from pgofflined.core.classify import classify
from pgofflined.core.frames import Domid, Mfn
from pgofflined.core.machine import CpuVendor, Machine
from pgofflined.core.reports import (
    CorrectedPageError,
    ErrorReport,
    HypervisorActed,
    HypervisorResult,
)
from pgofflined.core.telemetry import decode_mc_info
from tests.unit.mca_records import (
    ADDRV,
    EN,
    MISCV,
    UC,
    VAL,
    BankError,
    S,
    bank_entry,
    global_entry,
    mc_info,
    recovery_entry,
)

INTEL = Machine(vendor=CpuVendor.INTEL, family=6, physical_bits=46, max_mfn=Mfn(0xFFFFF))
USABLE = VAL | MISCV | ADDRV
MFN = Mfn(0x12345)
SRAO = BankError(status=USABLE | UC | S | EN | 0x17A, bank=7, addr=0x5000, domid=1)


def reports(*entries: bytes) -> tuple[ErrorReport, ...]:
    blob = mc_info(global_entry(SRAO), *entries)
    return classify(decode_mc_info(blob), INTEL)


def test_frame_and_owner_are_those_of_the_recovery_entry() -> None:
    [report] = reports(bank_entry(SRAO), recovery_entry(bank=7, mfn=0xB481E, status=0x23004))
    assert isinstance(report, HypervisorActed)
    assert (report.mfn, report.domid, report.broken) == (0xB481E, Domid(2), True)
    assert report.bank is not None
    assert (report.result, report.bank.status) == (HypervisorResult.PENDING, SRAO.status)


def test_its_bank_is_not_counted_again_even_where_it_looks_corrected() -> None:
    [report] = reports(
        bank_entry(BankError(bank=7)), recovery_entry(bank=7, mfn=0xB481E, status=0x2002)
    )
    assert isinstance(report, HypervisorActed)


def test_corrected_error_of_another_bank_still_counts() -> None:
    acted, corrected = reports(
        bank_entry(SRAO),
        bank_entry(BankError(bank=9)),
        recovery_entry(bank=7, mfn=0xB481E, status=0x13004),
    )
    assert isinstance(acted, HypervisorActed)
    assert isinstance(corrected, CorrectedPageError)
    assert corrected.mfn == MFN


@pytest.mark.parametrize(
    ("status", "result", "broken"),
    [
        (0x2002, HypervisorResult.OFFLINED, True),
        (0x13004, HypervisorResult.PENDING, True),
        (0x0010, HypervisorResult.REPEATED, False),
        (0x0108, HypervisorResult.FAILED, False),
        (0x0001, HypervisorResult.FAILED, False),
        (0x0000, HypervisorResult.UNKNOWN, False),
        (0x01010101, HypervisorResult.UNKNOWN, False),
    ],
)
def test_result_is_what_the_status_word_says(
    status: int,
    result: HypervisorResult,
    broken: bool,  # noqa: FBT001
) -> None:
    [report] = reports(recovery_entry(bank=7, mfn=0x100, status=status))
    assert isinstance(report, HypervisorActed)
    assert (report.result, report.broken, report.mfn) == (result, broken, 0x100)


def test_frame_beyond_the_host_is_not_passed_on() -> None:
    [report] = reports(recovery_entry(bank=7, mfn=0x100000, status=0x2002))
    assert isinstance(report, HypervisorActed)
    assert (report.mfn, report.broken) == (None, False)
    assert report.describe() == (
        "Xen acted on an uncorrected error in an unknown frame (no bank in the record): it names "
        "mfn 0x100000, which the host has not"
    )


def test_last_frame_of_the_host_is_passed_on_and_no_bank_is_needed() -> None:
    [report] = reports(recovery_entry(bank=7, mfn=0xFFFFF, status=0x2002))
    assert isinstance(report, HypervisorActed)
    assert (report.mfn, report.bank) == (INTEL.max_mfn, None)
    assert "no bank in the record" in report.describe()


def test_xens_own_page_has_no_owning_domain() -> None:
    [report] = reports(recovery_entry(bank=7, mfn=0x100, status=0x7FF0_3004))
    assert isinstance(report, HypervisorActed)
    assert (report.mfn, report.domid) == (0x100, None)


def test_owner_of_the_bank_entry_serves_where_the_status_names_none() -> None:
    [report] = reports(bank_entry(SRAO), recovery_entry(bank=7, mfn=0x100, status=0x2002))
    assert isinstance(report, HypervisorActed)
    assert report.domid == Domid(1)
    assert report.describe().startswith(
        "Xen acted on an uncorrected error in mfn 0x100 of d1 (bank 7, status "
    )
    assert report.describe().endswith("): the page is offline")
