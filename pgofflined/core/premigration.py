"""May a domain be migrated off its bad pages now?  Facts in, a verdict with its reason out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from pgofflined.core.domains import DomainIdentity, DomainInfo, GuestKind, ShutdownReason
from pgofflined.core.frames import PAGE_SHIFT, Mfn
from pgofflined.core.offline import OfflineState
from pgofflined.core.policy import RelocationPolicy
from pgofflined.core.relocation_outcomes import RelocationReason
from pgofflined.core.saves import SaveFacts
from pgofflined.core.suspending import Objection
from pgofflined.core.xenversion import XenVersion

# Bytes of a save besides the memory: page types, vCPUs' state, the configuration.
_SAVE_MARGIN: Final = 64 << 20


class Hindrance(StrEnum):
    """What keeps a migration from starting now, and passes."""

    OUTSIDE_WINDOW = "outside_window"
    TARGET_UNRESOLVED = "target_unresolved"
    NO_ROUTE = "no_route"
    LINK_DOWN = "link_down"
    NO_FREE_MEMORY = "no_free_memory"
    DOMAIN_BUSY = "domain_busy"
    UNCORRECTED = "uncorrected"
    NO_DISK_SPACE = "no_disk_space"
    SUSPEND_UNANNOUNCED = "suspend_unannounced"
    CANNOT_ASK_XEN = "cannot_ask_xen"

    @property
    def needs_person(self) -> bool:
        """Whether it does not pass before somebody acts."""
        return self in (
            Hindrance.UNCORRECTED,
            Hindrance.SUSPEND_UNANNOUNCED,
            Hindrance.NO_DISK_SPACE,
        )

    @property
    def ends_with_link_event(self) -> bool:
        """Whether the kernel tells when it may have passed."""
        return self in (Hindrance.NO_ROUTE, Hindrance.LINK_DOWN, Hindrance.TARGET_UNRESOLVED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """The way to one address of the target; ``local`` when that address is this host's own."""

    address: str
    interface: str
    up: bool
    carrier: bool
    local: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class NoWay:
    """There is no way to the target now."""

    hindrance: Hindrance
    detail: str


Way = Route | NoWay


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationFacts:
    """What was seen just now.

    ``domain`` is None when it is gone.  ``twins`` are other domains with its uuid: the receiving
    half of a migration that is under way, or what a failed one left.  ``somebody`` is a process
    that saves or migrates it.  ``poison`` names a page that has had an uncorrected error and that
    the domain owns or may own, and ``poisoned`` holds those of the job itself.  ``saved_guest``
    says what is with a guest that may be in a file, and needs its memory again.  ``denial`` says
    why the policy has the domain left alone, ``has_devices`` whether devices of the host are
    assigned to it, ``objection`` why it must not be asked to suspend itself.  ``way`` is None for a
    migration to this host.  ``save`` is there for a PV domain that is to be saved and restored
    instead.
    """

    domain: DomainInfo | None
    twins: tuple[DomainInfo, ...]
    version: XenVersion
    states: Mapping[Mfn, OfflineState]
    free_frames: int
    way: Way | None
    somebody: str | None = None
    poison: str | None = None
    poisoned: frozenset[Mfn] = frozenset()
    saved_guest: str | None = None
    denial: str | None = None
    has_devices: bool = False
    objection: Objection | None = None
    save: SaveFacts | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Go:
    """Migrate now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NothingLeft:
    """Every page is offlined already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NotNow:
    """Look again later, or when the hindrance is said to have passed."""

    hindrance: Hindrance
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Never:
    """Trying again would not help."""

    reason: RelocationReason
    detail: str


PreMigration = Go | NothingLeft | NotNow | Never


def judge(job: DomainIdentity, facts: MigrationFacts, policy: RelocationPolicy) -> PreMigration:
    """Whether the domain may be migrated now."""
    for look in (_look_at_policy, _look_at_pages, _look_at_domain, _look_at_target):
        verdict = look(job, facts, policy)
        if verdict is not None:
            return verdict
    return Go()


def forbidden(job: DomainIdentity, policy: RelocationPolicy, *, by_saving: bool) -> Never | None:
    """Why the policy wants no such job at all, whatever the facts; None where it does."""
    if not policy.enabled:
        return Never(
            reason=RelocationReason.DISABLED,
            detail="migrating guests is switched off (relocation.enabled = false)",
        )
    if by_saving:
        if not policy.save_restore:
            return Never(
                reason=RelocationReason.DISABLED,
                detail="saving and restoring PV guests is switched off "
                f"(relocation.save_restore = false); its pages stay until d{job.domid} restarts",
            )
    elif not policy.target:
        return Never(
            reason=RelocationReason.NO_TARGET,
            detail="relocation.target names no host to migrate to; its pages stay pending until "
            f"d{job.domid} restarts or is migrated by hand",
        )
    return None


def _look_at_policy(
    job: DomainIdentity, facts: MigrationFacts, policy: RelocationPolicy
) -> Never | None:
    verdict = forbidden(job, policy, by_saving=facts.save is not None)
    if verdict is not None:
        return verdict
    if not facts.version.offlines_free_frames_safely:
        return Never(
            reason=RelocationReason.XEN_FREE_LISTS,
            detail=f"Xen {facts.version} corrupts its free lists when a marked page is freed "
            f"together with its neighbours, so d{job.domid} must not be migrated off it; "
            "update to Xen 4.20.4, 4.21.2, 4.22.0 or later",
        )
    return None


def _look_at_pages(
    job: DomainIdentity, facts: MigrationFacts, policy: RelocationPolicy
) -> Never | NothingLeft | None:
    del policy
    states = facts.states
    broken = sorted(mfn for mfn, state in states.items() if OfflineState.BROKEN in state)
    gone = {mfn for mfn, state in states.items() if OfflineState.OFFLINED in state}
    if all(mfn in gone for mfn in states):
        return NothingLeft()
    if facts.domain is None:
        return None
    if any(mfn not in gone for mfn in broken):
        return Never(
            reason=RelocationReason.BROKEN,
            detail=f"{_frames(broken)} of d{job.domid} is broken and a migration would read it; "
            "restart the guest to get it off the page",
        )
    if not any(OfflineState.OFFLINE_PENDING in state for state in states.values()):
        return Never(
            reason=RelocationReason.NOT_PENDING,
            detail=f"{_frames(sorted(states))} is no longer marked, so a migration of "
            f"d{job.domid} would not retire it; mark it again with `pgofflined offline`",
        )
    return None


def _look_at_domain(
    job: DomainIdentity, facts: MigrationFacts, policy: RelocationPolicy
) -> Never | NotNow | None:
    del policy
    domain = facts.domain
    if domain is None or domain.identity != job or domain.dying:
        return Never(
            reason=RelocationReason.DOMAIN_GONE,
            detail=f"d{job.domid} has ended, and its pages go with it",
        )
    if domain.is_dom0 or (domain.kind is GuestKind.PV) is not (facts.save is not None):
        return Never(
            reason=RelocationReason.NOT_HVM,
            detail=f"d{job.domid} is no HVM or PVH guest, and only those are migrated",
        )
    if facts.denial is not None:
        return Never(
            reason=RelocationReason.DENIED,
            detail=f"d{job.domid} is not to be touched: {facts.denial}",
        )
    if facts.has_devices:
        return Never(
            reason=RelocationReason.HAS_DEVICES,
            detail=f"devices of the host are assigned to d{job.domid}, which know its memory by "
            f"number; its pages go when d{job.domid} ends, restart that guest",
        )
    poisoned = _look_at_poison(job, facts)
    if poisoned is not None:
        return poisoned
    if facts.objection is not None:
        # A save and a migration ask the guest as an exchange does.
        detail = facts.objection.detail
        if facts.objection.may_pass:
            return NotNow(hindrance=Hindrance.SUSPEND_UNANNOUNCED, detail=detail)
        return Never(reason=RelocationReason.NO_SUSPEND_SUPPORT, detail=detail)
    if facts.somebody is not None:
        # Perhaps a migration that an earlier process of ours has begun.
        return _busy(f"d{job.domid} is left alone until {facts.somebody} has ended")
    if facts.twins:
        others = ", ".join(f"d{twin.domid}" for twin in facts.twins)
        have = "has" if len(facts.twins) == 1 else "have"
        return _busy(
            f"{others} {have} the same uuid as d{job.domid}: a migration of it is under way, or a "
            "failed one has left a copy, which `xl destroy` removes if it is paused"
        )
    if domain.shutdown is ShutdownReason.SUSPEND:
        return _busy(
            f"d{job.domid} is suspended: somebody saves or migrates it, or a migration has left it "
            "so and it may run elsewhere; it is tried again when it runs"
        )
    if domain.shutdown is not None:
        return _busy(f"d{job.domid} is shut down ({domain.shutdown.name.lower()})")
    if domain.paused:
        return _busy(f"d{job.domid} is paused by somebody else; `xl unpause` lets it run")
    return None


def _look_at_poison(job: DomainIdentity, facts: MigrationFacts) -> Never | NotNow | None:
    """Xen shows as broken only what it has acted upon itself; the rest is for us to know."""
    own = [m for m in sorted(facts.poisoned) if OfflineState.OFFLINED not in facts.states[m]]
    domid = job.domid
    if own:
        return Never(
            reason=RelocationReason.UNCORRECTED,
            detail=f"{_frames(own)} of d{domid} has had an uncorrected error, and d{domid} would "
            f"be read whole; its page goes when d{domid} ends, restart that guest",
        )
    if facts.poison is not None:
        return NotNow(
            hindrance=Hindrance.UNCORRECTED,
            detail=f"{facts.poison}, and d{domid} would be read whole; it waits until that page is "
            f"out of use, or until d{domid} ends: restart that guest",
        )
    return None


def _look_at_target(
    job: DomainIdentity, facts: MigrationFacts, policy: RelocationPolicy
) -> Never | NotNow | None:
    if facts.save is not None:
        return _look_at_save(job, facts, facts.save, policy)
    way = facts.way
    if way is None:
        return _look_at_memory(job, facts, policy)
    if isinstance(way, NoWay):
        return NotNow(hindrance=way.hindrance, detail=way.detail)
    if way.local:
        return Never(
            reason=RelocationReason.TARGET_IS_THIS_HOST,
            detail=f"{policy.target} ({way.address}) is this very host; say so with "
            'relocation.target = "localhost", so that its free memory is looked at',
        )
    if not (way.up and way.carrier):
        state = "has no carrier" if way.up else "is down"
        return NotNow(
            hindrance=Hindrance.LINK_DOWN,
            detail=f"the way to {policy.target} is {way.interface}, which {state}",
        )
    return None


def _look_at_save(
    job: DomainIdentity, facts: MigrationFacts, save: SaveFacts, policy: RelocationPolicy
) -> Never | NotNow | None:
    """Whether a PV guest can be saved, and restored with certainty as far as that can be told."""
    if facts.domain is None:
        return None
    domid = job.domid
    problem = None
    if save.serves is not None:
        problem = f"d{domid} {save.serves}, and others would fail while it is away"
    elif not save.has_config:
        problem = (
            f"xl does not know how d{domid} was configured, so that it could not restore it; "
            "whoever has created it can save and restore it"
        )
    elif save.manager is not None:
        problem = (
            f"d{domid} is managed by {save.manager}, which would start it again or lose track of "
            f"it; save and restore it with {save.manager}'s own commands"
        )
    if problem is not None:
        return Never(reason=RelocationReason.NOT_SAVABLE, detail=problem)
    if save.unfinished is not None:
        return _busy(f"an earlier save of d{domid} is not ended, see {save.unfinished}")
    if facts.saved_guest is not None:
        return _memory_is_kept(facts.saved_guest)
    if save.trouble is not None:
        return NotNow(hindrance=Hindrance.NO_DISK_SPACE, detail=save.trouble)
    needed = (facts.domain.max_pages << PAGE_SHIFT) + _SAVE_MARGIN
    if save.free < needed:
        return NotNow(
            hindrance=Hindrance.NO_DISK_SPACE,
            detail=f"saving d{domid} takes {needed >> 20} MiB, and {policy.save_directory} "
            f"(relocation.save_directory) has {save.free >> 20} MiB besides a reserve",
        )
    # Its own memory comes free; this is for what it had given back, and for the toolstack.
    spare = max(0, facts.domain.max_pages - facts.domain.tot_pages)
    reserve = -(-policy.free_memory_reserve >> PAGE_SHIFT)
    if facts.free_frames < spare + reserve:
        return NotNow(
            hindrance=Hindrance.NO_FREE_MEMORY,
            detail=f"{_mebibytes(spare + reserve)} are to be free for d{domid} to be restored with "
            f"certainty, but only {_mebibytes(facts.free_frames)} are",
        )
    return None


def _look_at_memory(
    job: DomainIdentity, facts: MigrationFacts, policy: RelocationPolicy
) -> NotNow | None:
    if facts.domain is None:
        return None
    if facts.saved_guest is not None:
        return _memory_is_kept(facts.saved_guest)
    reserve = -(-policy.free_memory_reserve >> PAGE_SHIFT)
    needed = facts.domain.max_pages + reserve
    if facts.free_frames >= needed:
        return None
    return NotNow(
        hindrance=Hindrance.NO_FREE_MEMORY,
        detail=f"a second copy of d{job.domid} needs {_mebibytes(facts.domain.max_pages)} and "
        f"{_mebibytes(reserve)} are to stay free, but only {_mebibytes(facts.free_frames)} are",
    )


def _memory_is_kept(saved_guest: str) -> NotNow:
    return NotNow(
        hindrance=Hindrance.NO_FREE_MEMORY,
        detail=f"free memory is kept for a guest that may be in a file: {saved_guest}",
    )


def _busy(detail: str) -> NotNow:
    return NotNow(hindrance=Hindrance.DOMAIN_BUSY, detail=detail)


def _mebibytes(frames: int) -> str:
    return f"{frames >> (20 - PAGE_SHIFT)} MiB"


def _frames(mfns: list[Mfn]) -> str:
    """``mfn 0x12`` or ``mfn 0x12 and 3 more``."""
    more = f" and {len(mfns) - 1} more" if len(mfns) > 1 else ""
    return f"mfn {mfns[0]:#x}{more}"
