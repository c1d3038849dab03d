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


def test_records_beyond_the_pool_are_lost_and_counted(source: SimulatedTelemetry) -> None:
    for _ in range(33):
        source.push_garbage(b"?")
    batch = source.read()

    assert len(batch.records) == 30
    assert batch.lost == 3
    assert source.read().lost == 0


def test_loss_alone_wakes_the_reader(source: SimulatedTelemetry) -> None:
    source.lose(2)

    assert readable(source)
    assert source.read().lost == 2


def test_broken_source_says_so(source: SimulatedTelemetry) -> None:
    source.fail("the descriptor is gone")

    assert readable(source)
    with pytest.raises(PortError, match="is gone"):
        source.read()
