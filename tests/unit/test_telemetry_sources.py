from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from pgofflined.ports import RecordFormat
from pgofflined.sim.telemetry import SimulatedTelemetry
from tests.unit.mca_records import BankError, mc_info_of, xen_mce_of
from tests.unit.pipe_source import PipeSource
from tests.unit.source_contract import TelemetrySourceContract


class PipeFeed:
    """Records of one format through a pipe source."""

    def __init__(self, record_format: str, record_of: Callable[[BankError], bytes]) -> None:
        self.source = PipeSource(record_format=record_format)
        self._record_of = record_of

    def put(self, *errors: BankError) -> None:
        self.source.put(self._record_of(error) for error in errors)

    def put_garbage(self, record: bytes) -> None:
        self.source.put([record])

    def lose(self) -> None:
        self.source.put(lost=1)


class SimulatedFeed:
    """Records of the simulated host's source."""

    def __init__(self) -> None:
        self.source = SimulatedTelemetry()

    def put(self, *errors: BankError) -> None:
        for error in errors:
            self.source.push_garbage(mc_info_of(error))

    def put_garbage(self, record: bytes) -> None:
        self.source.push_garbage(record)

    def lose(self) -> None:
        self.source.lose()


class TestHypervisorFormat(TelemetrySourceContract):
    @pytest.fixture
    def feed(self) -> Iterator[PipeFeed]:
        feed = PipeFeed(RecordFormat.MC_INFO, mc_info_of)
        yield feed
        feed.source.close()


class TestKernelFormat(TelemetrySourceContract):
    @pytest.fixture(params=[88, 112])
    def feed(self, request: pytest.FixtureRequest) -> Iterator[PipeFeed]:
        size: int = request.param
        feed = PipeFeed(RecordFormat.XEN_MCE, lambda error: xen_mce_of(error, size=size))
        yield feed
        feed.source.close()


class TestSimulatedSource(TelemetrySourceContract):
    @pytest.fixture
    def feed(self) -> Iterator[SimulatedFeed]:
        feed = SimulatedFeed()
        yield feed
        feed.source.close()
