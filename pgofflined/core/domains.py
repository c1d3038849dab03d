"""What is known of a domain, and which kind of owner it makes."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, StrEnum
from uuid import UUID

from pgofflined.core.frames import DOM0, Domid, Mfn

# XEN_DOMINF_* flags, xen/include/public/domctl.h.
DOMINF_DYING = 1 << 0
DOMINF_HVM = 1 << 1
DOMINF_SHUTDOWN = 1 << 2
DOMINF_PAUSED = 1 << 3
_DOMINF_SHUTDOWN_SHIFT = 16

# XEN_X86_EMU_LAPIC, xen/include/public/arch-x86/xen.h: the only emulation of a PVH domain.
EMU_LAPIC = 1 << 0


class GuestKind(StrEnum):
    """How a domain is virtualised, as far as moving its memory is concerned."""

    PV = "pv"
    PVH = "pvh"
    HVM = "hvm"


class ShutdownReason(Enum):
    """SHUTDOWN_* codes, xen/include/public/sched.h."""

    POWEROFF = 0
    REBOOT = 1
    SUSPEND = 2
    CRASH = 3
    WATCHDOG = 4
    SOFT_RESET = 5
    UNKNOWN = 255


@dataclass(frozen=True, slots=True)
class DomainIdentity:
    """Domids are used again after a reboot, so a job pins its domain by both."""

    domid: Domid
    uuid: UUID


def identities_to_text(domains: Iterable[DomainIdentity]) -> str:
    """Domains as they are stored."""
    return " ".join(sorted(f"{domain.domid}:{domain.uuid}" for domain in domains))


def identities_from_text(text: str) -> set[DomainIdentity]:
    """The domains of such a text.  What cannot be read is left out."""
    found = set()
    for part in text.split():
        domid, _, uuid = part.partition(":")
        with suppress(ValueError):
            found.add(DomainIdentity(Domid(int(domid)), UUID(uuid)))
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainInfo:
    """One domain as XEN_DOMCTL_getdomaininfo and xenstore describe it.

    ``shutdown`` is the reason while the domain is shut down (suspended included), else None.
    ``paused`` says that a toolstack paused it.  ``shared_info`` is the frame of its shared_info
    page.  ``tot_pages``/``max_pages`` count 4 KiB pages.  ``max_vcpu_id`` is the highest vCPU
    number.  ``name`` comes from xenstore and may be empty.  ``cpu_time`` counts the nanoseconds
    that its vCPUs have run; it never decreases.
    """

    domid: Domid
    uuid: UUID
    name: str
    kind: GuestKind
    dying: bool
    paused: bool
    shutdown: ShutdownReason | None
    tot_pages: int
    max_pages: int
    max_vcpu_id: int
    shared_info: Mfn
    cpu_time: int

    @property
    def identity(self) -> DomainIdentity:
        """What tells this domain from a later one with the same domid."""
        return DomainIdentity(self.domid, self.uuid)

    @property
    def is_dom0(self) -> bool:
        """Whether this is the domain that we run in."""
        return self.domid == DOM0


def shutdown_reason(flags: int) -> ShutdownReason | None:
    """The shutdown reason in a getdomaininfo flags word, None while the domain runs."""
    if not flags & DOMINF_SHUTDOWN:
        return None
    code = (flags >> _DOMINF_SHUTDOWN_SHIFT) & 0xFF
    try:
        return ShutdownReason(code)
    except ValueError:
        return ShutdownReason.UNKNOWN


def guest_kind(flags: int, emulation_flags: int) -> GuestKind:
    """PV, PVH or HVM from getdomaininfo's flags and the x86 emulation flags."""
    if not flags & DOMINF_HVM:
        return GuestKind.PV
    return GuestKind.PVH if emulation_flags in (0, EMU_LAPIC) else GuestKind.HVM
