"""What the operator wants, and what follows from it for one report.

The field defaults here are the defaults of the configuration file; ``config/pgofflined.toml``
explains each.  Durations are seconds, sizes bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field, fields
from enum import StrEnum
from fractions import Fraction
from typing import Any, Final
from uuid import UUID

from pgofflined.core.frames import PAGE_SIZE, Mfn
from pgofflined.core.patterns import any_names, is_for_uuids, names, names_uuid
from pgofflined.core.schedule import MaintenanceWindow
from pgofflined.core.units import MemoryLimit, ShareOfMemory

_TENTH_OF_A_PERCENT: Final = ShareOfMemory(percent=Fraction(1, 10))

# Units of fields for ``effective``.
_SECONDS: Final = {"unit": "s"}
_BYTES: Final = {"unit": "bytes"}
_PAGES: Final = {"unit": "pages"}
_HITS: Final = {"unit": "errors"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """Waits between tries: ``first``, doubled each time, at most ``last``; then no more."""

    first: float
    last: float
    attempts: int | None = None

    def delay(self, failures: int) -> float | None:
        """Seconds to wait after so many failed tries (at least 1); None to give up."""
        if self.attempts is not None and failures >= self.attempts:
            return None
        # 2 ** 64 is beyond any wait; a larger power would only cost time.
        return float(min(self.last, self.first * 2 ** min(failures - 1, 64)))


@dataclass(frozen=True, slots=True, kw_only=True)
class RetirePolicy:
    """Which pages are retired."""

    enabled: bool = True
    dry_run: bool = False
    corrected_errors: int = field(default=2, metadata=_HITS)
    window: float = field(default=72 * 3600.0, metadata=_SECONDS)
    max_tracked_pages: int = field(default=100_000, metadata=_PAGES)
    max_retired: MemoryLimit = _TENTH_OF_A_PERCENT


class DomainDefault(StrEnum):
    """What holds for a domain that no pattern matches."""

    ALLOW = "allow"
    DENY = "deny"


class Dom0Action(StrEnum):
    """What is done about a page of dom0's own."""

    REPORT = "report"


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainPolicy:
    """Which domains may be suspended or moved for a page.  ``deny`` wins over ``allow``."""

    default: DomainDefault = DomainDefault.ALLOW
    allow: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()
    dom0: Dom0Action = Dom0Action.REPORT


class Marking(StrEnum):
    """When a page of a PV guest is marked offline-pending."""

    BEFORE = "before"
    """Before the exchange: Xen takes it out as the guest leaves it, not yet scrubbed."""
    AFTER_SCRUB = "after_scrub"
    """When it is free and has been scrubbed; until then Xen may hand it out again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangePolicy:
    """How pages of PV domains are exchanged.

    ``ask_unannounced`` names domains that are asked to suspend themselves without having announced
    that they can, for exchanges, saves and migrations.
    """

    enabled: bool = True
    workers: int = 2
    max_queued: int = field(default=4096, metadata=_PAGES)
    max_pages_per_suspend: int = field(default=64, metadata=_PAGES)
    acknowledge_timeout: float = field(default=10.0, metadata=_SECONDS)
    suspend_timeout: float = field(default=60.0, metadata=_SECONDS)
    ask_unannounced: tuple[str, ...] = ()
    max_blackout: float = field(default=1.0, metadata=_SECONDS)
    mark: Marking = Marking.BEFORE
    scrub_wait: float = field(default=10.0, metadata=_SECONDS)
    retry_first: float = field(default=60.0, metadata=_SECONDS)
    retry_last: float = field(default=3600.0, metadata=_SECONDS)
    attempts: int = 10

    @property
    def retry(self) -> Backoff:
        """The waits between tries for one domain."""
        return Backoff(first=self.retry_first, last=self.retry_last, attempts=self.attempts)

    @property
    def pages_in_one_suspend(self) -> int:
        """Unmarked, a page that was just left would be given for the next one of its batch."""
        return 1 if self.mark is Marking.AFTER_SCRUB else self.max_pages_per_suspend


@dataclass(frozen=True, slots=True, kw_only=True)
class RelocationPolicy:
    """How domains are taken off bad pages that cannot be moved in place.

    HVM and PVH domains are migrated; PV domains, with ``save_restore``, are saved into a file in
    ``save_directory`` and restored.  ``target`` is empty (migrate nowhere), ``localhost`` or
    another host.  With no maintenance window either may start at any time.
    """

    enabled: bool = True
    target: str = ""
    parallel: int = 1
    max_queued: int = field(default=1024, metadata={"unit": "domains"})
    time_limit: float = field(default=1800.0, metadata=_SECONDS)
    retry_first: float = field(default=60.0, metadata=_SECONDS)
    retry_last: float = field(default=3600.0, metadata=_SECONDS)
    attempts: int = 10
    maintenance_windows: tuple[MaintenanceWindow, ...] = ()
    ssh_command: str = "ssh"
    save_restore: bool = False
    save_directory: str = "/var/lib/pgofflined/saves"
    free_memory_reserve: int = field(default=256 << 20, metadata=_BYTES)

    @property
    def retry(self) -> Backoff:
        """The waits between tries for one domain."""
        return Backoff(first=self.retry_first, last=self.retry_last, attempts=self.attempts)

    @property
    def is_local(self) -> bool:
        """Whether domains are migrated to this very host."""
        return self.target == "localhost"


@dataclass(frozen=True, slots=True, kw_only=True)
class TcpAddress:
    """A host name or address, and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        """``127.0.0.1:9709``, ``[::1]:9709``."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class UnixAddress:
    """Path of a unix socket."""

    path: str

    def __str__(self) -> str:
        """``unix:/run/pgofflined/metrics.sock``."""
        return f"unix:{self.path}"


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsPolicy:
    """Where metrics are served; None for nowhere."""

    listen: TcpAddress | UnixAddress | None = TcpAddress(host="127.0.0.1", port=9709)


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlPolicy:
    """Where the command line reaches the daemon."""

    socket: str = "/run/pgofflined/control.sock"


class SourceName(StrEnum):
    """The ways to machine-check records."""

    NATIVE = "native"
    MCELOG = "mcelog"


@dataclass(frozen=True, slots=True, kw_only=True)
class SourcesPolicy:
    """Which source of machine-check records is tried first, and how often without one."""

    order: tuple[SourceName, ...] = (SourceName.NATIVE, SourceName.MCELOG)
    retry_first: float = field(default=1.0, metadata=_SECONDS)
    retry_last: float = field(default=300.0, metadata=_SECONDS)

    @property
    def retry(self) -> Backoff:
        """The waits between tries to open a source; it is tried for ever."""
        return Backoff(first=self.retry_first, last=self.retry_last)


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Everything that can be set."""

    retire: RetirePolicy = RetirePolicy()
    domains: DomainPolicy = DomainPolicy()
    exchange: ExchangePolicy = ExchangePolicy()
    relocation: RelocationPolicy = RelocationPolicy()
    sources: SourcesPolicy = SourcesPolicy()
    metrics: MetricsPolicy = MetricsPolicy()
    control: ControlPolicy = ControlPolicy()


@dataclass(frozen=True, slots=True, kw_only=True)
class Ignore:
    """Nothing is to be done about any page."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """The page has had ``hits`` of the ``of`` errors that retire it."""

    mfn: Mfn
    hits: int
    of: int

    @property
    def reason(self) -> str:
        """Why the page is kept."""
        return f"{self.hits} of the {self.of} corrected errors that retire a page"


@dataclass(frozen=True, slots=True, kw_only=True)
class Retire:
    """The page is to be retired."""

    mfn: Mfn
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DryRun:
    """The page would be retired, were this not a dry run."""

    mfn: Mfn
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CapReached:
    """The page ought to be retired, but as much as may be already is."""

    mfn: Mfn
    retired_frames: int
    limit_frames: int

    @property
    def reason(self) -> str:
        """Why the page is kept."""
        return (
            f"{self.retired_frames} pages are retired or on their way, and retire.max_retired "
            f"allows {self.limit_frames}; "
            "so many bad pages point at a memory module to be replaced"
        )


Verdict = Ignore | Watch | Retire | DryRun | CapReached


def decide(
    mfn: Mfn,
    hits: int,
    policy: RetirePolicy,
    *,
    retired_frames: int,
    limit_frames: int,
    poisoned: Container[Mfn] = (),
) -> Verdict:
    """What follows from so many corrected errors of a page within the window.

    ``retired_frames`` counts the pages that are retired or on their way, ``limit_frames`` says how
    many may be.  ``poisoned`` holds the frames known to have an uncorrected error: to retire one
    that is in use would mean to copy it, which must not be.
    """
    if not policy.enabled:
        return Ignore(reason="retiring is switched off (retire.enabled = false)")
    if mfn in poisoned:
        return Ignore(reason="the page has had an uncorrected error and must not be read")
    if hits < policy.corrected_errors:
        return Watch(mfn=mfn, hits=hits, of=policy.corrected_errors)
    if retired_frames >= limit_frames:
        return CapReached(mfn=mfn, retired_frames=retired_frames, limit_frames=limit_frames)
    reason = (
        f"{hits} corrected errors within {policy.window:g} s, "
        f"{policy.corrected_errors} are enough to retire a page"
    )
    return DryRun(mfn=mfn, reason=reason) if policy.dry_run else Retire(mfn=mfn, reason=reason)


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowed:
    """The domain may be suspended or moved."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Denied:
    """The domain may not be touched."""

    reason: str


def domain_allowed(policy: DomainPolicy, name: str, uuid: UUID) -> Allowed | Denied:
    """Whether a domain may be suspended or moved for the sake of a page.

    In doubt it may not: a pattern of ``deny`` is tried on the uuid even where it reads like a name,
    one of ``allow`` is not; and a domain whose name xenstore does not tell may be any that ``deny``
    has by name.
    """
    shown = name or str(uuid)
    for pattern in policy.deny:
        if names(pattern, name) or names_uuid(pattern, uuid):
            return Denied(reason=f"domains.deny has {pattern!r}, which names {shown}")
    if not name and not all(map(is_for_uuids, policy.deny)):
        return Denied(reason=f"domains.deny has names, and that of {shown} is not known")
    if policy.default is DomainDefault.ALLOW:
        return Allowed()
    if any_names(policy.allow, name, uuid):
        return Allowed()
    return Denied(reason=f'domains.default is "deny" and domains.allow does not name {shown}')


def effective(policy: Policy, *, host_frames: int | None = None) -> list[str]:
    """The policy as it was understood, one line a key, in plain units."""
    lines = [line for section in fields(policy) for line in _section_lines(policy, section.name)]
    if host_frames is not None:
        limit = policy.retire.max_retired.frames(host_frames)
        lines.append(
            f"retire.max_retired is {limit} pages ({limit * PAGE_SIZE} bytes) "
            f"of this host's {host_frames} pages"
        )
    return lines


def _section_lines(policy: Policy, name: str) -> Iterator[str]:
    section = getattr(policy, name)
    for item in fields(section):
        value = getattr(section, item.name)
        unit = item.metadata.get("unit", "")
        yield f"{name}.{item.name} = {_plain(value)}{unit and f' {unit}'}"


_PLAIN: Final[dict[type, Callable[[Any], str]]] = {
    bool: lambda value: "true" if value else "false",
    float: lambda value: f"{value:.15g}",
    type(None): lambda _: "off",
    tuple: lambda value: ", ".join(str(part) for part in value) or "none",
}


def _plain(value: object) -> str:
    return _PLAIN.get(type(value), str)(value) or "none"
