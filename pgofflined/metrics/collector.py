"""The metrics, made from the daemon's snapshot and our own counts when they are asked for.

Series have bounded labels only: no frame, no domain's name, no message.  Those of a known set
are there from the start with 0, so that ``rate`` and ``increase`` see the first change.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate, product
from typing import Any, Final

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from pgofflined.core.book import Phase
from pgofflined.core.conditions import ConditionCode
from pgofflined.core.frames import PAGE_SIZE
from pgofflined.core.outcomes import ExchangeReport, RefusalReason
from pgofflined.core.policy import SourceName
from pgofflined.core.relocation_outcomes import MigrationOutcome, RelocationOutcome
from pgofflined.core.reports import REPORT_CLASSES
from pgofflined.core.status import Snapshot
from pgofflined.core.tally import (
    DAMAGED,
    EXCHANGED,
    JobKind,
    JobOutcome,
    MigrationResult,
    exchange_outcome,
    migration_result,
    page_outcome,
    relocation_outcome,
)

_PREFIX: Final = "pgofflined_"

# From an exchange that is quick to a guest that takes longer than exchange.suspend_timeout.
_BLACKOUT_BUCKETS: Final = (
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
)  # fmt: skip

_PAGE_OUTCOMES: Final = (EXCHANGED, DAMAGED, *(reason.value for reason in RefusalReason))
_LOST_PLACES: Final = (
    *(name.value for name in SourceName),
    "hardware",
    "incomplete",
    "undecodable",
)


class _Durations:
    """A histogram.  The library's own would put a ``_created`` series beside each."""

    def __init__(self) -> None:
        self._counts = [0] * (len(_BLACKOUT_BUCKETS) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        self._counts[bisect_left(_BLACKOUT_BUCKETS, seconds)] += 1
        self._sum += seconds

    def family(self, name: str, text: str) -> Metric:
        bounds = (*(str(bound) for bound in _BLACKOUT_BUCKETS), "+Inf")
        buckets = list(zip(bounds, accumulate(self._counts), strict=True))
        return HistogramMetricFamily(_PREFIX + name, text, buckets=buckets, sum_value=self._sum)


class Metrics(Collector):
    """Counts what was done, and tells it together with the daemon's snapshot.

    ``snapshot`` is called whenever somebody asks, in the same thread: the loop's.
    """

    def __init__(self, snapshot: Callable[[], Snapshot], now: Callable[[], float]) -> None:
        self.registry = CollectorRegistry()
        self._snapshot = snapshot
        self._now = now
        self._jobs = Counter(dict.fromkeys(product(JobKind, JobOutcome), 0))
        self._pages = Counter(dict.fromkeys(_PAGE_OUTCOMES, 0))
        self._migrations = Counter(dict.fromkeys(MigrationResult, 0))
        self._stuck = 0
        self._ended = 0
        self._whole = _Durations()
        self._ours = _Durations()
        self.registry.register(self)
        ProcessCollector(registry=self.registry)

    def observe_exchange(self, report: ExchangeReport) -> None:
        """Count one exchange job with its pages and the guest's pause."""
        self._jobs[JobKind.EXCHANGE, exchange_outcome(report)] += 1
        for result in report.results:
            self._pages[page_outcome(result)] += 1
        if report.stuck is not None:
            self._stuck += 1
        if report.ended is not None:
            self._ended += 1
        if report.blackout is not None:
            self._whole.observe(report.blackout.whole)
            self._ours.observe(report.blackout.ours)

    def observe_relocation(self, outcome: RelocationOutcome) -> None:
        """Count one relocation job that has come to its end."""
        self._jobs[JobKind.RELOCATION, relocation_outcome(outcome)] += 1

    def observe_end(self) -> None:
        """Count a guest that has ended when a migration or a save had asked it to suspend."""
        self._ended += 1

    def observe_migration(self, outcome: MigrationOutcome) -> None:
        """Count one migration, of which a relocation job may need several."""
        self._migrations[migration_result(outcome)] += 1

    def collect(self) -> Iterator[Metric]:
        """All series at this moment."""
        now = self._now()
        snapshot = self._snapshot()
        yield from _intake(snapshot)
        yield from _pages(snapshot, now)
        yield from _work(snapshot)
        yield from self._done()
        yield from _about(snapshot)
        yield from _configuration(snapshot)

    def _done(self) -> Iterator[Metric]:
        yield _counter(
            "jobs",
            "Jobs that have ended: every page moved (done), some (partly), none (refused), "
            "or somebody has to look (failed).",
            ("kind", "outcome"),
            self._jobs.items(),
        )
        yield _counter(
            "exchange_pages",
            "Pages of exchange jobs by what became of them.",
            ("outcome",),
            _single(self._pages),
        )
        yield _counter(
            "migrations",
            "Migrations of guests off bad pages.",
            ("outcome",),
            _single(self._migrations),
        )
        yield _counter(
            "guests_stuck",
            "Guests that could not be let go; an operator has to act.",
            (),
            [((), self._stuck)],
        )
        yield _counter(
            "guests_ended",
            "Guests that crashed, shut down or vanished right after our request to suspend.",
            (),
            [((), self._ended)],
        )
        yield self._whole.family(
            "guest_blackout_seconds",
            "Time without a guest per exchange job, from our request to suspend to its "
            "resumption; contains the guest's own way into the suspend.",
        )
        yield self._ours.family(
            "guest_blackout_own_seconds",
            "The part of guest_blackout_seconds after the guest was suspended: the exchange.",
        )


def _intake(snapshot: Snapshot) -> Iterator[Metric]:
    source = snapshot.source
    pairs = product(REPORT_CLASSES, (name.value for name in SourceName))
    reports = {**dict.fromkeys(pairs, 0), **snapshot.reports}
    yield _counter(
        "errors",
        "Machine-check reports by class, and by the source they were read from.",
        ("class", "source"),
        reports.items(),
    )
    yield _counter(
        "records_lost",
        'Machine-check records that were lost or made no sense; where="hardware" counts errors '
        "that were overwritten before they were read, or more.",
        ("where",),
        _single({**dict.fromkeys(_LOST_PLACES, 0), **snapshot.lost}),
    )
    yield _gauge(
        "last_record_timestamp_seconds",
        "When the last machine-check record was read; 0 before.",
        source.last_record or 0.0,
    )
    yield _gauge(
        "source_up",
        "Whether machine-check records can be read; 0 while degraded.",
        source.name is not None,
    )
    yield _info("source", "Where machine-check records come from.", source=source.name or "none")


def _pages(snapshot: Snapshot, now: float) -> Iterator[Metric]:
    phases = {**dict.fromkeys((phase.value for phase in Phase), 0), **snapshot.pages_by_phase}
    states = GaugeMetricFamily(
        f"{_PREFIX}pages", "Pages taken in hand by where they stand.", labels=("state",)
    )
    for phase, count in phases.items():
        states.add_metric((phase,), count)
    yield states
    oldest = snapshot.oldest_unfinished
    yield _gauge(
        "pages_pending_oldest_seconds",
        "For how long the oldest page that is not at its end has been in hand; 0 without one.",
        0.0 if oldest is None else max(0.0, now - oldest),
    )
    yield _gauge(
        "retired_bytes",
        "Memory that Xen holds back, or will, because of us.",
        snapshot.retired_frames * PAGE_SIZE,
    )
    yield _gauge(
        "retire_budget_bytes",
        "How much may be: retire.max_retired of the configuration.",
        snapshot.cap_frames * PAGE_SIZE,
    )
    yield _gauge("tracked_pages", "Pages whose errors are remembered.", snapshot.tracked_pages)
    yield _counter(
        "evicted_pages",
        "Pages whose errors were forgotten for want of room.",
        (),
        [((), snapshot.evicted_pages)],
    )
    yield _gauge(
        "idle_scrub_pages",
        "Retired pages that idle processors keep looking for until a reboot.",
        snapshot.idle_scrub,
    )
    yield _attention(snapshot)


def _attention(snapshot: Snapshot) -> Metric:
    found = Counter(one.code for one in snapshot.attention if not one.acknowledged)
    family = GaugeMetricFamily(
        f"{_PREFIX}attention",
        "Conditions that nobody has acknowledged; pgofflined status names them, docs/runbook.md "
        "says what to do.",
        labels=("severity", "reason"),
    )
    for code in ConditionCode:
        family.add_metric((code.severity.value, code.value), found[code])
    return family


def _work(snapshot: Snapshot) -> Iterator[Metric]:
    workers = snapshot.workers
    yield _gauge("queue_pages", "Pages that wait for an exchange worker.", workers.queued_pages)
    yield _gauge("queue_limit_pages", "How many may.", workers.queue_limit)
    yield _gauge("workers", "Exchange workers.", workers.workers)
    yield _gauge("workers_busy", "Exchange workers that have a job.", workers.busy)
    yield _gauge(
        "worker_busy_longest_seconds",
        "For how long the longest-running exchange job has run.",
        workers.longest_busy_seconds,
    )


def _about(snapshot: Snapshot) -> Iterator[Metric]:
    yield _info(
        "build",
        "The daemon and the hypervisor.",
        version=snapshot.version,
        xen=snapshot.xen_version,
    )
    yield _info(
        "policy",
        "The policy in force.",
        digest=snapshot.policy_digest,
        dry_run=str(snapshot.dry_run).lower(),
    )


def _configuration(snapshot: Snapshot) -> Iterator[Metric]:
    # Named as Prometheus and its exporters name their own.
    yield _gauge(
        "config_last_reload_successful",
        "Whether the configuration was accepted when it was read last; 0: a restart would fail.",
        snapshot.reload.successful,
    )
    yield _gauge(
        "config_last_reload_success_timestamp_seconds",
        "When the configuration was last accepted.",
        snapshot.reload.last_success,
    )


def _counter(
    name: str,
    text: str,
    labels: tuple[str, ...],
    values: Iterable[tuple[tuple[str, ...], int]],
) -> Metric:
    family = CounterMetricFamily(_PREFIX + name, text, labels=labels)
    for label_values, value in values:
        family.add_metric(label_values, value)
    return family


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(_PREFIX + name, text, value=float(value))


def _info(name: str, text: str, **labels: str) -> Metric:
    return InfoMetricFamily(_PREFIX + name, text, value=labels)


def _single(counts: Mapping[Any, int]) -> Iterator[tuple[tuple[str], int]]:
    return (((label,), count) for label, count in counts.items())
