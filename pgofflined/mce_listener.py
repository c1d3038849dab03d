"""Takes machine-check records from a source as they come, and passes reports on.

Nothing here decides anything: records become reports, stamped with our clock, and are counted.
Nothing polls either: while a source is open, we sleep until its descriptor is readable.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Final, NoReturn

from pgofflined.core.classify import classify, errors_overwritten
from pgofflined.core.errors import PortError, SourceUnavailable
from pgofflined.core.events import Event
from pgofflined.core.machine import Machine
from pgofflined.core.policy import Backoff
from pgofflined.core.reports import Sighting, report_class
from pgofflined.core.telemetry import Flaw, Telemetry, decode
from pgofflined.journal_log import Chatter, event
from pgofflined.ports import Clock, TelemetryBatch, TelemetrySource, nothing

_log = logging.getLogger(__name__)

# A descriptor that stays readable while nothing comes out would turn waiting into spinning.
# Event channels do wake us for nothing now and then, but not so often.
_MAX_IDLE_WAKES: Final = 100
_IDLE_WAKES_WITHIN: Final = 1.0

# A source that worked so long (seconds) before it broke starts the waits anew.
_STABLE_AFTER: Final = 60.0


@dataclass(kw_only=True)
class IntakeCounters:
    """What came in since the start.

    ``reports`` is by (class, source), the classes those of ``core.reports.REPORT_CLASSES``;
    ``lost`` is by source and counts what the source knows it lost, ``incomplete`` the records
    for which Xen had no room; ``undecodable`` is by flaw.  ``overwritten`` counts the errors that
    the hardware overwrote before they were read, as far as it tells: there may have been more.
    ``last_record`` is when the latest record was read, by the wall clock.
    """

    reports: Counter[tuple[str, str]] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    incomplete: int = 0
    overwritten: int = 0
    undecodable: Counter[Flaw] = field(default_factory=Counter)
    last_record: float | None = None

    def lost_by_place(self) -> dict[str, int]:
        """Everything that did not become a report, by where it was lost."""
        return {
            **self.lost,
            "incomplete": self.incomplete,
            "hardware": self.overwritten,
            "undecodable": self.undecodable.total(),
        }


class MceListener:
    """Reads one source until it breaks.

    ``deliver`` gets every report in its order and may wait: then no more is read meanwhile, and
    what comes waits at the source.  ``drained`` is called when all of that has been passed on.
    """

    def __init__(
        self,
        source: TelemetrySource,
        *,
        machine: Machine,
        clock: Clock,
        deliver: Callable[[Sighting], Awaitable[None]],
        counters: IntakeCounters,
        chatter: Chatter | None = None,
        drained: Callable[[], None] = nothing,
    ) -> None:
        self._chatter = chatter or Chatter(clock.monotonic)
        self._drained = drained
        self._source = source
        self._machine = machine
        self._clock = clock
        self._deliver = deliver
        self._counters = counters

    async def run(self) -> NoReturn:
        """Read what is there already, then what comes.  Raises PortError when it breaks.

        Cancelled, it ends when all that was read has been passed on: nobody could read it again.
        """
        idle_since = self._clock.monotonic()
        idle_wakes = 0
        while True:
            if await _to_its_end(self._drain()):
                idle_since, idle_wakes = self._clock.monotonic(), 0
            else:
                idle_wakes += 1
                if self._clock.monotonic() - idle_since > _IDLE_WAKES_WITHIN:
                    idle_since, idle_wakes = self._clock.monotonic(), 1
                elif idle_wakes > _MAX_IDLE_WAKES:
                    raise PortError(
                        f"the {self._source.name} source says that there are records, and gives "
                        f"none: {idle_wakes} times within {_IDLE_WAKES_WITHIN:g} s"
                    )
            await self._readable()

    async def _readable(self) -> None:
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()
        descriptor = self._source.fileno()
        loop.add_reader(descriptor, readable.set)
        try:
            await readable.wait()
        finally:
            loop.remove_reader(descriptor)

    async def _drain(self) -> bool:
        """Read and pass on what is there; whether there was anything."""
        batch = self._source.read()
        when = self._clock.now()
        if batch.lost:
            self._note_lost(batch.lost)
        if batch.records:
            self._counters.last_record = when
        for untrusted_record in batch.records:
            await self._take(decode(batch.format, untrusted_record, batch.mcg_cap), when)
        self._drained()
        return _holds_anything(batch)

    async def _take(self, telemetry: Telemetry, when: float) -> None:
        for flaw in telemetry.flaws:
            self._counters.undecodable[flaw.flaw] += 1
            if self._chatter.admits(Event.RECORD_UNDECODABLE):
                event(_log, logging.WARNING, Event.RECORD_UNDECODABLE, flaw.describe())
        if telemetry.incomplete:
            self._counters.incomplete += 1
            if self._chatter.admits(Event.RECORDS_LOST):
                message = "Xen had no room for all of a machine check; a part of it is lost"
                event(_log, logging.WARNING, Event.RECORDS_LOST, message)
        for entry in telemetry.banks:
            self._counters.overwritten += errors_overwritten(entry, self._machine)
        for report in classify(telemetry, self._machine):
            self._counters.reports[report_class(report), self._source.name] += 1
            await self._deliver(Sighting(when=when, source=self._source.name, report=report))

    def _note_lost(self, lost: int) -> None:
        self._counters.lost[self._source.name] += lost
        if self._chatter.admits(Event.RECORDS_LOST):
            name = self._source.name
            message = f"the {name} source has lost {lost} machine-check records or more"
            event(_log, logging.WARNING, Event.RECORDS_LOST, message)


async def _to_its_end(work: Coroutine[object, object, bool]) -> bool:
    """Do all of it, also where we are cancelled meanwhile."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await task
        raise


def _holds_anything(batch: TelemetryBatch) -> bool:
    return bool(batch.records or batch.lost)


SourceFactory = Callable[[], TelemetrySource]
"""Opens a source.  Raises SourceUnavailable."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceChoice:
    """The source that was opened, if any, and why others are not in use."""

    source: TelemetrySource | None
    refused: tuple[PortError, ...] = ()

    def describe(self) -> str:
        """A sentence for the journal and for ``status``."""
        refusals = "; ".join(str(refusal) for refusal in self.refused)
        if self.source is None:
            why = refusals or "none is configured"
            return f"no machine checks can be received: {why}"
        return f"machine checks come from the {self.source.name} source" + (
            f" ({refusals})" if refusals else ""
        )


def choose_source(factories: Sequence[SourceFactory]) -> SourceChoice:
    """Open the first source that can be had, the best coming first."""
    refused: list[SourceUnavailable] = []
    for factory in factories:
        try:
            return SourceChoice(source=factory(), refused=tuple(refused))
        except SourceUnavailable as refusal:
            refused.append(refusal)
    return SourceChoice(source=None, refused=tuple(refused))


async def keep_source(
    factories: Sequence[SourceFactory],
    *,
    listen: Callable[[TelemetrySource], Awaitable[NoReturn]],
    chosen: Callable[[SourceChoice], None],
    retry: Backoff,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> NoReturn:
    """Keep a source open and listened to, for ever.

    ``chosen`` hears of every try: which source was opened, or that there is none (any more).
    Between tries we sleep, longer each time.  That a source breaks counts as a failed try too,
    so that one which always breaks at once is not reopened in a rush.
    """
    loop = asyncio.get_running_loop()
    failures = 0
    told = ""
    while True:
        choice = choose_source(factories)
        chosen(choice)
        failures += 1
        if choice.source is not None:
            told = ""
            event(_log, logging.INFO, Event.SOURCE_CHOSEN, choice.describe())
            opened = loop.time()
            choice = SourceChoice(source=None, refused=(await _listen(choice.source, listen),))
            chosen(choice)
            if loop.time() - opened > _STABLE_AFTER:
                failures = 1
        if choice.describe() != told:
            told = choice.describe()
            event(_log, logging.ERROR, Event.DEGRADED, choice.describe())
        await sleep(retry.delay(failures) or retry.last)


async def _listen(
    source: TelemetrySource, listen: Callable[[TelemetrySource], Awaitable[NoReturn]]
) -> PortError:
    """Listen until the source breaks, close it, and give what it said."""
    try:
        await listen(source)
    except PortError as error:
        return error
    finally:
        source.close()
