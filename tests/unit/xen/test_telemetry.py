from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pgofflined.core.errors import SourceUnavailable, XenError
from pgofflined.ports import RecordFormat
from pgofflined.xen.abi.mca import (
    Mc,
    McInfo,
    McLogicalCpu,
    XEN_MC_fetch,
    XEN_MC_physcpuinfo,
)
from pgofflined.xen.abi.mcelog import (
    MCE_GET_LOG_LEN,
    MCE_GET_RECORD_LEN,
    MCE_GETCLEAR_FLAGS,
)
from pgofflined.xen.abi.xen import HYPERVISOR_arch_0
from pgofflined.xen.libs import EventChannels
from pgofflined.xen.telemetry import McelogSource, NativeSource

from .recorder import calling, failing

URGENT, NONURGENT, ACK = 2, 1, 4
PORT = 41


def record(text: bytes) -> bytes:
    return text.ljust(768, b".")


@dataclass
class Telemetry:
    """Xen's two queues: a fetch leaves the oldest record, an acknowledgement takes it.

    It has ``cpus`` processors, of which the first one has the MSRs ``msrs``.
    """

    queues: dict[int, list[tuple[int, bytes]]] = field(
        default_factory=lambda: {URGENT: [], NONURGENT: []}
    )
    deaf: bool = False
    endless: bool = False
    fetch_error: int = 0
    ack_errors: int = 0
    acks: int = 0
    cpus: int = 3
    msrs: tuple[tuple[int, int], ...] = ((0x179, 0x1C09),)
    cpu_questions: int = 0
    cpu_error: int = 0

    def __call__(self, number: int, arguments: tuple[int, ...]) -> int:
        assert number == HYPERVISOR_arch_0
        request = Mc.from_address(arguments[0])
        assert request.interface_version == 0x01ECC003
        if request.cmd == XEN_MC_physcpuinfo:
            return self.describe_cpus(request)
        assert request.cmd == XEN_MC_fetch
        fetch = request.u.mc_fetch
        queue = self.queues[fetch.flags & 3]
        if fetch.flags & ACK:
            self.acknowledge(queue, fetch.fetch_id)
        elif self.fetch_error:
            raise failing(self.fetch_error)
        elif queue:
            fetch.flags, fetch.fetch_id = 0, queue[0][0]
            ctypes.memmove(fetch.data, queue[0][1], ctypes.sizeof(McInfo))
        else:
            fetch.flags, fetch.fetch_id = 2, 0
        return 0

    def describe_cpus(self, request: Mc) -> int:
        self.cpu_questions += 1
        if self.cpu_error:
            raise failing(self.cpu_error)
        question = request.u.mc_physcpuinfo
        if question.info:
            # do_mca() writes of every processor into a buffer of its own with room for ncpus.
            assert question.ncpus >= self.cpus, "the hypervisor's heap is overwritten"
            for number in range(min(self.cpus, question.ncpus)):
                cpu = McLogicalCpu(mc_cpunr=number, mc_nmsrvals=0 if number else len(self.msrs))
                for place, (register, value) in enumerate(self.msrs):
                    cpu.mc_msrvalues[place].reg = register
                    cpu.mc_msrvalues[place].value = value
                size = ctypes.sizeof(cpu)
                ctypes.memmove(question.info + number * size, ctypes.addressof(cpu), size)
        question.ncpus = min(self.cpus, question.ncpus) if question.info else self.cpus
        return 0

    def acknowledge(self, queue: list[tuple[int, bytes]], number: int) -> None:
        self.acks += 1
        if self.ack_errors:
            self.ack_errors -= 1
            raise failing(errno.EFAULT)
        if queue and queue[0][0] == number and not self.deaf:
            taken = queue.pop(0)
            if self.endless:
                queue.append((taken[0] + 1, taken[1]))


class Pipe:
    """A libxenevtchn over a pipe: a written port is a pending one."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        self.unmasked: list[int] = []

    def xenevtchn_open(self, _logger: None, _flags: int) -> int:
        return 1

    def xenevtchn_fdopen(self, _logger: None, fd: int, _flags: int) -> int:
        assert fd == self.reader
        return 1

    def xenevtchn_close(self, _handle: int) -> int:
        os.close(self.reader)
        os.close(self.writer)
        return 0

    def xenevtchn_fd(self, _handle: int) -> int:
        return self.reader

    def xenevtchn_pending(self, _handle: int) -> int:
        try:
            return int(struct.unpack("I", os.read(self.reader, 4))[0])
        except BlockingIOError:
            ctypes.set_errno(errno.EAGAIN)
            return -1

    def xenevtchn_unmask(self, _handle: int, port: int) -> int:
        self.unmasked.append(port)
        return 0

    def fire(self) -> None:
        os.write(self.writer, struct.pack("I", PORT))


@pytest.fixture
def pipe() -> Pipe:
    return Pipe()


def native(xen: Telemetry, pipe: Pipe) -> NativeSource:
    return NativeSource(call=calling(xen)[0], channels=EventChannels(pipe), port=PORT)


def test_both_queues_are_drained_urgent_first_and_acknowledged(pipe: Pipe) -> None:
    xen = Telemetry()
    xen.queues[NONURGENT] = [(10, record(b"c1")), (11, record(b"c2"))]
    xen.queues[URGENT] = [(20, record(b"u1"))]
    source = native(xen, pipe)
    batch = source.read()
    assert batch.format == RecordFormat.MC_INFO
    assert batch.records == (record(b"u1"), record(b"c1"), record(b"c2"))
    assert xen.queues == {URGENT: [], NONURGENT: []}
    source.close()


def test_event_is_taken_and_the_port_unmasked(pipe: Pipe) -> None:
    source = native(Telemetry(), pipe)
    pipe.fire()
    assert source.read().records == ()
    assert pipe.unmasked == [PORT]
    # Without an event nothing blocks and nothing is unmasked.
    source.read()
    assert pipe.unmasked == [PORT]
    source.close()


def test_hypervisor_that_always_has_more_does_not_hold_us(pipe: Pipe) -> None:
    xen = Telemetry(endless=True)
    xen.queues[URGENT] = [(1, record(b"x"))]
    source = native(xen, pipe)
    assert len(source.read().records) == 1000
    source.close()


def test_hypervisor_deaf_to_acknowledgements_gives_its_record_once(pipe: Pipe) -> None:
    xen = Telemetry(deaf=True)
    xen.queues[URGENT] = [(1, record(b"x"))]
    xen.queues[NONURGENT] = [(2, record(b"y"))]
    source = native(xen, pipe)
    assert source.read().records == (record(b"x"), record(b"y"))
    source.close()


def test_record_whose_acknowledgement_failed_is_not_given_twice(pipe: Pipe) -> None:
    xen = Telemetry(ack_errors=1)
    xen.queues[URGENT] = [(1, record(b"x")), (2, record(b"y"))]
    source = native(xen, pipe)
    assert source.read().records == (record(b"x"),)
    assert source.read().records == (record(b"y"),)
    source.close()


def test_source_that_is_refused_everything_is_broken(pipe: Pipe) -> None:
    source = native(Telemetry(fetch_error=errno.EPERM), pipe)
    with pytest.raises(XenError):
        source.read()
    source.close()


@pytest.mark.parametrize("cpus", [1, 3, 512])
def test_mcg_cap_of_the_first_processor_comes_with_every_batch(pipe: Pipe, cpus: int) -> None:
    xen = Telemetry(cpus=cpus, msrs=((0x4F, 7), (0x179, 0x1C09)))
    source = native(xen, pipe)
    assert [source.read().mcg_cap for _ in range(3)] == [0x1C09] * 3
    assert xen.cpu_questions == 2  # how many there are, and of what kind; once
    source.close()


@pytest.mark.parametrize(
    "xen",
    [
        Telemetry(cpu_error=errno.ENOSYS),
        Telemetry(cpus=0),
        Telemetry(cpus=1 << 20),
        Telemetry(msrs=((0x4F, 7),)),
    ],
    ids=["refused", "none", "too many", "another MSR"],
)
def test_records_are_read_where_mcg_cap_cannot_be_known(pipe: Pipe, xen: Telemetry) -> None:
    xen.queues[URGENT] = [(1, record(b"x"))]
    source = native(xen, pipe)
    batch = source.read()
    assert (batch.records, batch.mcg_cap) == ((record(b"x"),), None)
    source.close()


def test_descriptor_does_not_block(pipe: Pipe) -> None:
    source = native(Telemetry(), pipe)
    assert not os.get_blocking(source.fileno())
    assert source.port == PORT
    source.close()


class Mcelog:
    """The device's ioctls; its log is the file's contents."""

    def __init__(self, record_length: int, log_length: int, flags: int = 0) -> None:
        self.answers = {
            MCE_GET_RECORD_LEN: record_length,
            MCE_GET_LOG_LEN: log_length,
            MCE_GETCLEAR_FLAGS: flags,
        }

    def ioctl(self, _fd: int, request: int, _argument: bytes) -> bytes:
        return struct.pack("i", self.answers[request])


def mcelog(monkeypatch: pytest.MonkeyPatch, path: Path, device: Mcelog) -> McelogSource:
    monkeypatch.setattr(fcntl, "ioctl", device.ioctl)
    return McelogSource(str(path))


def test_log_is_cut_into_records_of_the_kernels_length(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    log = tmp_path / "mcelog"
    log.write_bytes(b"a" * 112 + b"b" * 112 + b"c" * 50)
    source = mcelog(monkeypatch, log, Mcelog(112, 32))
    batch = source.read()
    assert batch.format == RecordFormat.XEN_MCE
    # A record that is cut short is the decoder's to count and drop.
    assert batch.records == (b"a" * 112, b"b" * 112, b"c" * 50)
    assert batch.lost == 0
    assert not os.get_blocking(source.fileno())
    source.close()
    source.close()


def test_overflow_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    log = tmp_path / "mcelog"
    log.write_bytes(b"")
    source = mcelog(monkeypatch, log, Mcelog(112, 32, flags=1))
    assert source.read().lost == 1
    source.close()


@pytest.mark.parametrize(
    ("record_length", "log_length"), [(0, 32), (8, 32), (112, 0), (1 << 30, 1)]
)
def test_unbelievable_lengths_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, record_length: int, log_length: int
) -> None:
    log = tmp_path / "mcelog"
    log.write_bytes(b"")
    with pytest.raises(SourceUnavailable, match="not believable"):
        mcelog(monkeypatch, log, Mcelog(record_length, log_length))


def test_missing_device_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(SourceUnavailable, match="CONFIG_XEN_MCE_LOG") as caught:
        McelogSource(str(tmp_path / "none"))
    assert caught.value.errno == errno.ENOENT


def test_device_that_answers_no_ioctl_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mcelog"
    path.write_bytes(b"")
    with pytest.raises(SourceUnavailable):
        McelogSource(str(path))
