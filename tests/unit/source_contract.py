"""What every source of machine-check records does, whatever its format.

A class of tests derives from ``TelemetrySourceContract`` and gives a ``feed``: the source, and
how an error gets into it.  The same error then gives the same report from each.
"""

from __future__ import annotations

import select
from typing import Protocol

from pgofflined.core.classify import classify
from pgofflined.core.frames import Mfn
from pgofflined.core.machine import CpuVendor, Machine
from pgofflined.core.reports import (
    CorrectedPageError,
    ErrorReport,
    HypervisorActed,
    OtherKind,
    UncorrectedPageError,
)
from pgofflined.core.telemetry import decode
from pgofflined.ports import TelemetrySource
from tests.unit.mca_records import ADDRV, MISCV, OVER, UC, VAL, BankError, S

MACHINE = Machine(vendor=CpuVendor.INTEL, family=6, physical_bits=46, max_mfn=Mfn(0xFFFFF))
USABLE = VAL | MISCV | ADDRV


class Feed(Protocol):
    """A source and the other end of it."""

    @property
    def source(self) -> TelemetrySource:
        """The source under test."""
        ...

    def put(self, *errors: BankError) -> None:
        """Let these errors be found, each in a record of its own."""
        ...

    def put_garbage(self, record: bytes) -> None:
        """Let these bytes be read as a record."""
        ...

    def lose(self) -> None:
        """Let the source find that records were lost."""
        ...


def reports(source: TelemetrySource) -> list[ErrorReport]:
    """Everything that the source has, as reports."""
    batch = source.read()
    return [
        report
        for record in batch.records
        for report in classify(decode(batch.format, record), MACHINE)
    ]


def is_readable(source: TelemetrySource) -> bool:
    """Whether the source's descriptor says that there may be records."""
    return bool(select.select([source.fileno()], [], [], 0)[0])


class TelemetrySourceContract:
    """The tests; derived classes define the fixture ``feed``."""

    def test_source_with_nothing_in_it_does_not_wait(self, feed: Feed) -> None:
        batch = feed.source.read()
        assert (batch.records, batch.lost) == ((), 0)
        assert not is_readable(feed.source)

    def test_descriptor_is_readable_until_everything_is_read(self, feed: Feed) -> None:
        feed.put(BankError(), BankError(bank=4))
        assert is_readable(feed.source)
        assert len(reports(feed.source)) == 2
        assert not is_readable(feed.source)
        assert reports(feed.source) == []

    def test_corrected_error_is_reported_alike(self, feed: Feed) -> None:
        feed.put(BankError(status=USABLE | OVER | 3 << 38 | 0x90))
        [report] = reports(feed.source)
        assert isinstance(report, CorrectedPageError)
        assert (report.mfn, report.count, report.overflow) == (0x12345, 3, True)
        assert (report.granularity, report.domid) == (4096, None)
        bank = report.bank
        assert (bank.bank, bank.status) == (9, USABLE | OVER | 3 << 38 | 0x90)
        assert (bank.addr, bank.misc) == (0x1234_5678, 0x8C)
        assert (bank.apicid, bank.socket, bank.gstatus) == (3, 1, 0)

    def test_address_of_what_xen_handled_is_not_used(self, feed: Feed) -> None:
        feed.put(BankError(status=USABLE | UC | S | 0x17A))
        [report] = reports(feed.source)
        assert isinstance(report, HypervisorActed)
        assert report.mfn is None

    def test_uncorrected_error_left_alone_names_the_page_not_to_be_read(self, feed: Feed) -> None:
        feed.put(BankError(status=USABLE | UC | 0x136))
        [report] = reports(feed.source)
        assert isinstance(report, UncorrectedPageError)
        assert (report.kind, report.mfn) == (OtherKind.UNCORRECTED_NOT_SIGNALLED, 0x12345)

    def test_errors_keep_their_order(self, feed: Feed) -> None:
        feed.put(*(BankError(addr=frame << 12) for frame in range(1, 20)))
        assert [report.mfn for report in reports(feed.source)] == list(range(1, 20))

    def test_lost_records_are_told_once(self, feed: Feed) -> None:
        feed.lose()
        assert feed.source.read().lost >= 1
        assert feed.source.read().lost == 0

    def test_garbage_between_records_does_no_harm(self, feed: Feed) -> None:
        feed.put(BankError(addr=1 << 12))
        feed.put_garbage(b"\xff" * 768)
        feed.put(BankError(addr=2 << 12))
        assert [report.mfn for report in reports(feed.source) if report.mfn] == [1, 2]
