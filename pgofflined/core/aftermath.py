"""Where a guest is after a migration that did not end well, and what may be done about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pgofflined.core.domains import DomainIdentity, DomainInfo, GuestKind, ShutdownReason
from pgofflined.core.frames import Domid

# tools/xl/xl_cmdtable.c has it since dc8e1b33a5; before, xl resumes no suspended guest.
RESUME_SINCE = "(Xen 4.20 or later; else destroy it and start the guest anew)"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunsOn:
    """The guest is here as before; ``note`` says what else is to be known."""

    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """The guest is gone, or has shut itself down."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """The guest runs at the target after all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resume:
    """The migration left the guest suspended, and nothing else can be running it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stuck:
    """The guest does not run, or not only here; an operator has to act."""

    what: str


Aftermath = RunsOn | Ended | Moved | Resume | Stuck


def after_failure(
    job: DomainIdentity,
    domain: DomainInfo | None,
    twins: Sequence[DomainInfo],
    *,
    target: str,
    in_doubt: bool,
) -> Aftermath:
    """What a failed migration of a guest that ran before has led to.

    ``twins`` are other domains of this host with its uuid.  ``in_doubt``: the target may have
    been told to start the guest.
    """
    running = [twin for twin in twins if _runs(twin)]
    if domain is None or domain.identity != job or domain.dying:
        elsewhere = in_doubt and not twins and target != "localhost"
        if running or elsewhere:
            return Moved()
        if not twins:
            return Ended()
        return Stuck(
            what=f"d{job.domid} is gone and {_names(twins)}, which was to take its place, does "
            "not run; look at `xl list` and unpause it"
        )
    if domain.shutdown is ShutdownReason.SUSPEND:
        return _suspended(domain, twins, running, target=target, in_doubt=in_doubt)
    if running:
        return Stuck(
            what=f"d{job.domid} and {_names(running)} have the same uuid and both run: destroy "
            "one at once, or the guest's disks will be ruined"
        )
    if domain.shutdown is not None:
        return Ended()
    if domain.paused:
        return Stuck(
            what=f"d{job.domid} ran before its migration and is paused now; `xl unpause "
            f"{job.domid}` lets it run"
        )
    if twins:
        return RunsOn(note=f"a copy is left, which `xl destroy {twins[0].domid}` removes")
    return RunsOn()


def _suspended(
    domain: DomainInfo,
    twins: Sequence[DomainInfo],
    running: Sequence[DomainInfo],
    *,
    target: str,
    in_doubt: bool,
) -> Resume | Stuck:
    domid = domain.domid
    if running:
        return Stuck(
            what=f"the guest runs as {_names(running)}; what is left of it as d{domid} holds the "
            f"bad pages until `xl destroy {domid}` removes it"
        )
    if in_doubt:
        copy = f" as {_names(twins)}" if twins else ""
        return Stuck(
            what=f"d{domid} is suspended and may run at {target}{copy}: look there, then either "
            f"`xl destroy {domid}` here, or destroy the copy there and `xl resume {domid}` here "
            f"{RESUME_SINCE}"
        )
    if twins:
        return Stuck(
            what=f"d{domid} is suspended, and its copy {_names(twins)} is not to be started: "
            f"`xl destroy {twins[0].domid}`, then `xl resume {domid}` {RESUME_SINCE}"
        )
    if domain.kind is GuestKind.HVM:
        # libxl stops the device model together with the guest; only libxl can start it again.
        return Stuck(
            what=f"d{domid} is left suspended together with its device model; "
            f"`xl resume {domid}` {RESUME_SINCE} lets them run"
        )
    return Resume()


def after_success(
    job: DomainIdentity, domains: Sequence[DomainInfo]
) -> tuple[Domid | None, str | None]:
    """The guest's domid on this host now, if it is here, and what keeps it from running."""
    new = [d for d in domains if d.uuid == job.uuid and d.domid != job.domid and not d.dying]
    if not new:
        return None, None
    domid = new[0].domid
    if new[0].paused:
        return domid, f"d{domid} is paused after its migration; `xl unpause {domid}` lets it run"
    return domid, None


def _runs(domain: DomainInfo) -> bool:
    return not (domain.dying or domain.paused or domain.shutdown is ShutdownReason.SUSPEND)


def _names(domains: Sequence[DomainInfo]) -> str:
    return ", ".join(f"d{domain.domid}" for domain in domains)
