"""What became of a domain that was to be migrated off its bad pages."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from pgofflined.core.domains import DomainIdentity
from pgofflined.core.frames import Domid, Mfn


class RelocationReason(StrEnum):
    """Why a domain was not migrated, or not with the wanted effect."""

    DISABLED = "disabled"
    DENIED = "denied"
    NO_TARGET = "no_target"
    TARGET_IS_THIS_HOST = "target_is_this_host"
    XEN_FREE_LISTS = "xen_free_lists"
    DOMAIN_GONE = "domain_gone"
    NOT_HVM = "not_hvm"
    NOT_SAVABLE = "not_savable"
    HAS_DEVICES = "has_devices"
    NO_SUSPEND_SUPPORT = "no_suspend_support"
    BROKEN = "broken"
    UNCORRECTED = "uncorrected"
    NOT_PENDING = "not_pending"
    GAVE_UP = "gave_up"
    GUEST_STUCK = "guest_stuck"
    PAGES_REMAIN = "pages_remain"


@dataclass(frozen=True, slots=True, kw_only=True)
class Relocated:
    """Every page of the job is offlined.

    ``new_domid`` is what the guest is called now on this host, None where it runs on another
    or where nothing had to be migrated.  ``attempts`` counts migrations (0: the pages went
    by themselves), ``seconds`` is the duration of the one that succeeded.  ``stuck`` says what
    keeps the guest from running at its new place; an operator has to act then.
    """

    domain: DomainIdentity
    mfns: frozenset[Mfn]
    new_domid: Domid | None
    attempts: int
    seconds: float
    stuck: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NotRelocated:
    """Nothing more is going to happen to these pages here.

    ``offlined`` holds those of the job that are out of use all the same, ``mfns`` those that
    are not.  ``stuck`` says what keeps the guest from running; an operator has to act then.
    """

    domain: DomainIdentity
    mfns: frozenset[Mfn]
    offlined: frozenset[Mfn]
    reason: RelocationReason
    detail: str
    attempts: int
    stuck: str | None = None


RelocationOutcome = Relocated | NotRelocated


@dataclass(frozen=True, slots=True, kw_only=True)
class Migrated:
    """The toolstack says that the guest runs at the target and is gone here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NotMigrated:
    """The migration failed, and the guest is not at the target as far as the toolstack says.

    The toolstack has tried to let the guest run on; whether it does is for the caller to see.
    ``may_run_there``: it did so when the target might have started the guest already; where the
    guest is then seen to stand still, the same holds as for ``InDoubt``.
    ``was_asked``: the toolstack has asked it to suspend itself, or may have, so that it may do so
    late.
    """

    detail: str
    timed_out: bool = False
    may_run_there: bool = False
    was_asked: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class InDoubt:
    """The migration broke off when the target may already have started the guest.

    Nobody may resume it here by guessing: two running instances would ruin its disks.
    """

    detail: str


MigrationOutcome = Migrated | NotMigrated | InDoubt
