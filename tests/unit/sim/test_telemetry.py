from __future__ import annotations

import select
import struct
from collections.abc import Iterator

import pytest

from pgofflined.core.errors import PortError
from pgofflined.core.frames import Domid, Maddr, Mfn
from pgofflined.ports import RecordFormat, TelemetrySource
from pgofflined.sim.telemetry import SimulatedTelemetry


@pytest.fixture
def source() -> Iterator[SimulatedTelemetry]:
    source = SimulatedTelemetry()
    yield source
    source.close()


def readable(source: TelemetrySource) -> bool:
    return bool(select.select([source.fileno()], [], [], 0)[0])


def test_descriptor_is_readable_while_there_are_records(source: SimulatedTelemetry) -> None:
    assert not readable(source)
    source.push_corrected(Maddr(0x1234_5000))
    source.push_corrected(Maddr(0x1234_6000))
    assert readable(source)

    batch = source.read()
    assert batch.format == RecordFormat.MC_INFO
    assert len(batch.records) == 2
    assert not readable(source)
    assert source.read().records == ()


def test_corrected_error_is_laid_out_as_in_xens_header(source: SimulatedTelemetry) -> None:
    record = source.push_corrected(Maddr(0x1234_5678), cpu=3, bank=9, domid=Domid(7), count=2)

    assert len(record) == 768
    assert struct.unpack_from("<I", record) == (2,)
    assert struct.unpack_from("<HH", record, 8) == (0, 32)
    kind, size, bank, domid, status, address = struct.unpack_from("<HHHHQQ", record, 40)
    assert (kind, size, bank, domid) == (1, 48, 9, 7)
    assert status == 0x8C00_0000_0000_0090 | 2 << 38
    assert address == 0x1234_5678


def test_status_of_one_error_is_the_one_seen_on_xen(source: SimulatedTelemetry) -> None:
    record = source.push_corrected(Maddr(0))

    assert struct.unpack_from("<Q", record, 48) == (0x8C00_0040_0000_0090,)


def test_taken_out_page_comes_with_its_true_frame(source: SimulatedTelemetry) -> None:
    record = source.push_srao(Mfn(0xB481E), Domid(1), guest_address=0x5000)

    assert struct.unpack_from("<Q", record, 56) == (0x5000,)
    kind, size, bank, flags, actions, mfn, status = struct.unpack_from("<HHHBBQQ", record, 88)
    assert (kind, size, bank, flags, actions) == (3, 24, 7, 0, 1)
    assert (mfn, status) == (0xB481E, 0x13004)


def test_records_beyond_the_pool_are_lost_and_nobody_hears_of_it(
    source: SimulatedTelemetry,
) -> None:
    for _ in range(2):
        for _ in range(23):
            source.push_garbage(b"?")
        for _ in range(12):
            source.push_garbage(b"!", urgent=True)
        batch = source.read()
        # Those that are urgent have room of their own, and come first.
        assert batch.records == (*[b"!"] * 10, *[b"?"] * 20)
        assert batch.lost == 0
    for _ in range(35):
        source.push_garbage(b"!", urgent=True)
    source.push_garbage(b"?")
    assert source.read().records == (b"!",) * 30


def test_loss_alone_wakes_the_reader(source: SimulatedTelemetry) -> None:
    source.lose(2)

    assert readable(source)
    assert source.read().lost == 2


def test_broken_source_says_so(source: SimulatedTelemetry) -> None:
    source.fail("the descriptor is gone")

    assert readable(source)
    with pytest.raises(PortError, match="is gone"):
        source.read()


MISC_PAGE = 0x8C
UCNA, SCRUB, SRAR = 0xBC00_0000_0101_009F, 0x8C00_0000_0010_00C0, 0xBD80_0000_0010_0134
POLLED, CMCI, MCE = 8, 32, 64
CORRECTABLE, UNCORRECTABLE, RECOVERABLE = 1, 2, 4


def flags_of(record: bytes) -> int:
    return int(struct.unpack_from("<I", record, 28)[0])


def bank_of(record: bytes) -> tuple[int, int, int, int, int]:
    """Its number, owner, status, address and MISC."""
    kind, size, bank, domid, status, address, misc = struct.unpack_from("<HHHHQQQ", record, 40)
    assert (kind, size) == (1, 48)
    return bank, domid, status, address, misc


def test_error_that_nothing_consumed_is_announced_by_an_interrupt(
    source: SimulatedTelemetry,
) -> None:
    record = source.push_ucna(Maddr(0x5040), domid=Domid(7))
    assert flags_of(record) == CMCI | RECOVERABLE
    assert bank_of(record) == (9, 7, UCNA, 0x5040, MISC_PAGE)
    # IA32_MCi_CTL2 and the TSC are read for interrupts only.
    assert struct.unpack_from("<QQ", record, 72) == (1 << 30 | 2, 1)
    assert struct.unpack_from("<QQ", source.push_corrected(Maddr(0x5000)), 72) == (0, 0)


def test_uncorrected_scrub_passes_for_a_corrected_error(source: SimulatedTelemetry) -> None:
    record = source.push_uncorrected_scrub(Maddr(0x5000))
    assert flags_of(record) == CMCI | CORRECTABLE
    assert bank_of(record) == (13, 0x7FF4, SCRUB, 0x5000, MISC_PAGE)


def test_leftover_is_polled_and_has_no_owner(source: SimulatedTelemetry) -> None:
    record = source.push_leftover(0x5000)
    assert flags_of(record) == POLLED | RECOVERABLE == 0x0C
    assert bank_of(record) == (1, 0x7FF4, SRAR, 0x5000, MISC_PAGE)
    assert struct.unpack_from("<I", record) == (2,)  # no recovery entry
    fatal = source.push_leftover(0x5000, status=0xA600_0000_0002_0408, bank=4)
    assert flags_of(fatal) == POLLED | UNCORRECTABLE
    # MISC is not valid, so Xen does not read it.
    assert bank_of(fatal) == (4, 0x7FF4, 0xA600_0000_0002_0408, 0x5000, 0)


def test_error_that_xen_handled_is_recoverable(source: SimulatedTelemetry) -> None:
    assert flags_of(source.push_srao(Mfn(7), None)) == MCE | RECOVERABLE


def test_overwritten_error_has_its_bit(source: SimulatedTelemetry) -> None:
    _, _, status, _, _ = bank_of(source.push_corrected(Maddr(0), count=5, overwritten=True))
    assert status == 0xCC00_0000_0000_0090 | 5 << 38


def test_northbridge_of_amd_has_an_entry_for_its_further_registers_where_misc_is_valid(
    source: SimulatedTelemetry,
) -> None:
    plain = source.push_amd_deferred(Maddr(0x5000))
    assert flags_of(plain) == POLLED | CORRECTABLE
    assert bank_of(plain) == (4, 0x7FF4, 0x9400_1000_0008_0A13, 0x5000, 0)
    assert struct.unpack_from("<I", plain) == (2,)
    assert flags_of(source.push_amd_uncorrected(Maddr(0x5000))) == POLLED | RECOVERABLE
    assert flags_of(source.push_amd_corrected(Maddr(0x5000))) == POLLED | CORRECTABLE
    longer = source.push_northbridge(0x9C00_4000_0008_0A13, 0x5000, misc=1 << 63)
    assert struct.unpack_from("<I", longer) == (3,)
    assert bank_of(longer)[4] == 1 << 63
    assert struct.unpack_from("<HHIQ", longer, 88) == (2, 520, 3, 0xC000_0408)


def test_mcg_cap_of_the_processors_comes_with_the_batch() -> None:
    source = SimulatedTelemetry(mcg_cap=0x1C09)
    assert source.read().mcg_cap == 0x1C09
    source.close()
