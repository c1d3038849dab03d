"""A telemetry source that a test feeds, of either format, with a pipe as its descriptor."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress

from pgofflined.core.errors import PortError
from pgofflined.ports import RecordFormat, TelemetryBatch


class PipeSource:
    """``ports.TelemetrySource``; the pipe holds a byte while there is something to read."""

    def __init__(self, *, name: str = "native", record_format: str = RecordFormat.MC_INFO) -> None:
        self.name = name
        self.reads = 0
        self.closed = False
        self.on_read: Callable[[], None] = lambda: None
        self._format = record_format
        self._batches: list[TelemetryBatch] = []
        self._failure: str | None = None
        self._readable, self._writable = os.pipe()
        os.set_blocking(self._readable, False)

    def put(self, records: Iterable[bytes] = (), *, lost: int = 0) -> None:
        """Let the next read give these too."""
        self._batches.append(TelemetryBatch(format=self._format, records=tuple(records), lost=lost))
        self.wake()

    def wake(self) -> None:
        """Be readable, with or without anything to read."""
        os.write(self._writable, b"!")

    def read_event_away(self) -> None:
        """Keep what was put, but be readable no more: its event went to an earlier reader."""
        os.read(self._readable, 4096)

    def fail(self, reason: str) -> None:
        """Break."""
        self._failure = reason
        self.wake()

    def fileno(self) -> int:
        return self._readable

    def read(self) -> TelemetryBatch:
        self.reads += 1
        self.on_read()
        if self._failure is not None:
            raise PortError(self._failure)
        with suppress(BlockingIOError):
            os.read(self._readable, 4096)
        batches, self._batches = self._batches, []
        return TelemetryBatch(
            format=self._format,
            records=tuple(record for batch in batches for record in batch.records),
            lost=sum(batch.lost for batch in batches),
        )

    def close(self) -> None:
        if not self.closed:
            os.close(self._readable)
            os.close(self._writable)
        self.closed = True


class StuckSource(PipeSource):
    """Claims to be readable for ever and gives nothing."""

    def read(self) -> TelemetryBatch:
        self.reads += 1
        return TelemetryBatch(format=self._format, records=())
