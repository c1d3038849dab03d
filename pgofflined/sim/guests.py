"""Domains of a simulated host: how they answer, what they grant, what refers to their frames."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING
from uuid import UUID

from pgofflined.core.domains import DomainInfo, GuestKind, ShutdownReason
from pgofflined.core.frames import Domid, Mfn, Pfn
from pgofflined.core.suspending import SuspendSupport
from pgofflined.sim.frames import FrameType

if TYPE_CHECKING:
    from pgofflined.ports import FrameArray
    from pgofflined.sim.pvguest import PvGuest


class Answer(Enum):
    """What a guest makes of the request to suspend."""

    SUSPENDS = "suspends"
    IGNORES = "never acknowledges"
    STALLS = "acknowledges and never suspends"
    AT_WITHDRAWAL = "suspends just as the request is withdrawn"
    DIES = "is destroyed meanwhile"
    REBOOTS = "comes back under the same domid with another uuid"
    CRASHES = "crashes on the way"
    CRASHES_READING = "crashes as it reads the request, which stays where it is (Mini-OS)"
    POWERS_OFF = "takes the request for one to power off"


@dataclass(frozen=True, slots=True, kw_only=True)
class SuspendBehaviour:
    """How a guest answers a request to suspend, and the seconds that it takes.

    A guest that needs longer to suspend than it is given still does so when its time has come:
    a request that was acknowledged cannot be withdrawn.
    """

    answer: Answer = Answer.SUSPENDS
    acknowledge_after: float = 0.01
    suspend_after: float = 0.2


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Hold:
    """A reference to a frame from outside all page tables, and who has it.

    ``lasting`` ones outlive the domain until they are released; those ``of_ours`` do so also where
    backends let go by themselves.
    """

    mfn: Mfn
    why: str
    kind: FrameType = FrameType.NONE
    lasting: bool = False
    of_ours: bool = False


@dataclass(slots=True, kw_only=True)
class Grant:
    """One entry of a grant table: a guest frame offered to a domain, perhaps mapped there."""

    pfn: Pfn
    to: Domid
    mapping: Hold | None = None


@dataclass(slots=True, kw_only=True)
class SimulatedDomain:
    """One domain.  ``gfns`` is the p2m that Xen keeps for PVH and HVM (mfn by gfn, ~0 missing).

    ``unread_request``: control/shutdown has a request to suspend.  ``somebody``: who saves or
    migrates it.  ``thought_shut_down``: xenstored has seen it so, and notices no further end of it
    before it is told otherwise.  ``pod_lock_is_broken``: the next offline call for a page of it
    hangs the host.
    """

    domid: Domid
    uuid: UUID
    name: str
    kind: GuestKind
    vcpus: int
    max_pages: int
    shared_info: Mfn
    rebuild: Callable[[], None]
    behaviour: SuspendBehaviour = field(default_factory=SuspendBehaviour)
    suspend_support: SuspendSupport = SuspendSupport.ANNOUNCED
    pv: PvGuest | None = None
    gfns: FrameArray | None = None
    tot_pages: int = 0
    pauses: int = 0
    shutdown: ShutdownReason | None = None
    dying: bool = False
    resume_pending: bool = False
    suspends_at: float | None = None
    crash_reason: str | None = None
    has_devices: bool = False
    unread_request: bool = False
    thought_shut_down: bool = False
    pod_lock_is_broken: bool = False
    somebody: str | None = None
    cpu_time: int = 0
    activity: Callable[[], None] | None = None
    grants: list[Grant] = field(default_factory=list)
    holds: list[Hold] = field(default_factory=list)

    @property
    def runs(self) -> bool:
        """Whether its vCPUs may run now."""
        return not self.pauses and self.shutdown is None and not self.dying

    @property
    def suspended(self) -> bool:
        """Whether it suspended itself."""
        return self.shutdown is ShutdownReason.SUSPEND

    @property
    def guest_frames(self) -> FrameArray:
        """The p2m that Xen keeps.  Raises ValueError for PV, which has its own."""
        if self.gfns is None:
            raise ValueError(f"d{self.domid} is a PV domain")
        return self.gfns

    def info(self) -> DomainInfo:
        """What getdomaininfo and xenstore say of it."""
        return DomainInfo(
            domid=self.domid,
            uuid=self.uuid,
            name=self.name,
            kind=self.kind,
            dying=self.dying,
            paused=self.pauses > 0,
            shutdown=self.shutdown,
            tot_pages=self.tot_pages,
            max_pages=self.max_pages,
            max_vcpu_id=self.vcpus - 1,
            shared_info=self.shared_info,
            cpu_time=self.cpu_time,
        )
