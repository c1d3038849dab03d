"""What the daemon tells of itself: to `pgofflined status`, to the metrics, to the journal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from pgofflined.core.book import PageEntry
from pgofflined.core.conditions import Condition


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceStatus:
    """Where machine checks come from; ``name`` is None while degraded, ``note`` says why."""

    name: str | None
    note: str
    last_record: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStatus:
    """Worker pool: how many there are, are at work, and the pages waiting for them."""

    workers: int
    busy: int
    queued_pages: int
    queue_limit: int
    longest_busy_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PutOff:
    """Why a job is begun later: ``reason`` is a short code, ``detail`` a sentence for people.

    ``needs_person``: it does not pass before somebody acts.
    """

    reason: str
    detail: str
    needs_person: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class JobStatus:
    """One job that waits or runs: ``kind`` is ``exchange`` or ``relocation``.

    ``put_off`` is what its pages wait for, None where they do not.
    """

    job: str
    kind: str
    domid: int
    domain_name: str
    pages: int
    state: str
    since: float
    attempts: int = 0
    next_try: float | None = None
    detail: str = ""
    put_off: PutOff | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReloadStatus:
    """How the configuration was read last, at the start or by a reload; times are of the epoch.

    After a failure the policy of ``last_success`` is in force, and ``problems`` say why the file
    was rejected: a restart of the daemon would fail.  ``warnings`` are of the policy in force.
    """

    successful: bool
    when: float
    last_success: float
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The daemon at one moment.

    ``idle_scrub`` counts pages that were retired in the way that leaves one idle CPU per NUMA
    node looking for them (docs/xen-bugs).  ``reports`` counts error reports by class and source,
    ``lost`` lost or undecodable records by place.  ``attention`` has the most urgent first.
    """

    version: str
    started: float
    xen_version: str
    dry_run: bool
    source: SourceStatus
    reports: Mapping[tuple[str, str], int]
    lost: Mapping[str, int]
    pages_by_phase: Mapping[str, int]
    retired_frames: int
    cap_frames: int
    tracked_pages: int
    evicted_pages: int
    idle_scrub: int
    oldest_unfinished: float | None
    workers: WorkerStatus
    jobs: tuple[JobStatus, ...] = ()
    attention: tuple[Condition, ...] = ()
    policy: tuple[str, ...] = ()
    policy_digest: str = ""
    pages: tuple[PageEntry, ...] = field(default=())
    reload: ReloadStatus = ReloadStatus(successful=True, when=0.0, last_success=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameAnswer:
    """Answer to a query for one frame: Xen's state, the owner as far as known, our entry.

    ``uncorrected`` says whether the page has had an uncorrected error, as far as we or Xen know.
    """

    mfn: int
    state: str
    owner: str
    hits_in_window: int
    entry: PageEntry | None
    note: str = ""
    uncorrected: bool = False


class Fate(StrEnum):
    """What has become of a page that was to be retired.

    ``REFUSED``: nothing was begun.  ``UNRESOLVED``: it stays in use, and why is known.
    ``UNDER_WAY``: not at its end yet.  ``UNKNOWN``: nobody here has it in hand.
    """

    OUT_OF_USE = "out_of_use"
    REFUSED = "refused"
    UNRESOLVED = "unresolved"
    UNDER_WAY = "under_way"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class OfflineAnswer:
    """Answer to a request to retire one frame, or to wait for what becomes of it, and why."""

    mfn: int
    fate: Fate
    detail: str
