"""What the project needs of a host, as protocols that Xen and the simulated host both fulfil.

Every method is synchronous and may be called from any thread.  Failures are those of
``pgofflined.core.errors``.  Frame arrays are one-dimensional ``uint64``; page contents are
``uint64`` arrays of shape (number of frames, 512) and always *copies*: no mapping of foreign
memory outlives a call, so that our own mappings can never be the reference that makes Xen
refuse an exchange.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from pgofflined.core.domains import DomainInfo
from pgofflined.core.frames import Domid, Mfn, Pfn
from pgofflined.core.offline import OfflineReply, OfflineState, OnlineFlag
from pgofflined.core.xenversion import XenVersion

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    FrameArray = NDArray[np.uint64]
    Words = NDArray[np.uint64]
    TypeArray = NDArray[np.uint32]


@dataclass(frozen=True, slots=True, kw_only=True)
class PteWrite:
    """One page-table entry to be set: the table's frame, the entry's index, its whole value."""

    table: Mfn
    index: int
    value: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SuspendLimits:
    """Seconds that a guest has to acknowledge the request, then to reach the suspended state."""

    acknowledge: float = 10.0
    suspend: float = 30.0


class FrameControl(Protocol):
    """The state of host frames."""

    def version(self) -> XenVersion:
        """Version of the running hypervisor."""
        ...

    def max_mfn(self) -> Mfn:
        """Highest frame of the host (XENMEM_maximum_ram_page)."""
        ...

    def total_frames(self) -> int:
        """Frames of memory that the host has (physinfo); there may be holes below ``max_mfn``."""
        ...

    def free_frames(self) -> int:
        """Frames that the hypervisor could hand out now, dirty ones included (physinfo)."""
        ...

    def query(self, mfn: Mfn) -> OfflineState:
        """Offline state of a frame; changes nothing, takes no lock of a domain."""
        ...

    def offline(self, mfn: Mfn) -> OfflineReply:
        """Mark a frame for offlining, from a vCPU that cannot be on pCPU 0.

        The caller has queried the frame and seen that it is not broken: for a broken and owned
        frame Xen crashes the owner.  Raises OfflineCallUnsafe where no such vCPU can be had; the
        call has then not been made.  Where Xen fails the call with an errno but explains itself
        in the status word (its own image, not conventional RAM), the reply is given, not the
        error.
        """
        ...

    def online(self, mfn: Mfn) -> OnlineFlag:
        """Take a pending mark back, or give an offlined frame back to the allocator."""
        ...

    def m2p(self, mfn: Mfn) -> Pfn | None:
        """The guest frame that Xen's M2P notes for mfn; None where it notes none (free or Xen's).

        An entry says nothing of the owner, and a PV guest has some influence over its own: check
        it against the owner's p2m.
        """
        ...


class DomainControl(Protocol):
    """The domains of the host and their running."""

    def domains(self) -> Sequence[DomainInfo]:
        """All domains, dom0 first."""
        ...

    def domain(self, domid: Domid) -> DomainInfo:
        """One domain.  Raises DomainGone."""
        ...

    def suspend(self, domid: Domid, limits: SuspendLimits) -> None:
        """Ask the guest to suspend itself and wait until it has.

        Raises GuestDidNotSuspend after the request has been withdrawn, DomainGone when it ended
        meanwhile.  A guest that suspends just as the request is withdrawn counts as suspended.
        """
        ...

    def resume(self, domid: Domid) -> None:
        """Let a suspended guest run on in the same domain (cooperative resume), tell xenstored.

        Does nothing for a domain that is not suspended.
        """
        ...

    def pause(self, domid: Domid) -> None:
        """Pause every vCPU and wait until none runs (counted; pair it with one unpause)."""
        ...

    def unpause(self, domid: Domid) -> None:
        """Take one pause back."""
        ...


class ForeignMemory(Protocol):
    """Contents and use of a domain's frames."""

    def read_frames(self, domid: Domid, mfns: FrameArray) -> Words:
        """Contents of frames of a domain, in order.  Raises XenError if any cannot be mapped."""
        ...

    def write_words(self, domid: Domid, mfn: Mfn, index: int, words: Words) -> None:
        """Write 64-bit words into a frame that is no page table, from word ``index`` on."""
        ...

    def page_types(self, domid: Domid, mfns: FrameArray) -> TypeArray:
        """XEN_DOMCTL_PFINFO_* words of frames (see ``core.pages``), in order.

        PV domains only.  A frame that is not the domain's reads as PFINFO_XTAB.
        """
        ...

    def granted_frames(self, domid: Domid) -> FrameArray:
        """Frames (gfns) that entries of the domain's grant table offer, mapped or not, sorted.

        Both table versions; whole-page and sub-page entries of every type but invalid, plus the
        frames of the grant status if any entry is still in use.
        """
        ...


class PageTableControl(Protocol):
    """Changes of a paused PV domain's page tables through the hypervisor."""

    def update_ptes(self, domid: Domid, writes: Sequence[PteWrite]) -> None:
        """Set entries of the domain's page tables, verified by Xen, in order.

        Both the table's and the entry's owner are the domain (PFD and FD).  Raises XenError
        with ``done`` when one is refused; those before it have taken effect.
        """
        ...


class FrameExchange(Protocol):
    """XENMEM_exchange."""

    def exchange(self, domid: Domid, mfn: Mfn, pfn: Pfn) -> Mfn:
        """Swap one frame of a PV domain for a fresh one, which M2P then notes at pfn.

        Gives the new frame; its contents are not those of the old one.  Raises XenError: EINVAL
        when anything still refers to the frame, ENOMEM when no frame is free.
        """
        ...


class Hypervisor(
    FrameControl,
    DomainControl,
    ForeignMemory,
    PageTableControl,
    FrameExchange,
    Protocol,
):
    """A whole host."""


class Clock(Protocol):
    """The two times that are needed, so that tests can set them."""

    def now(self) -> float:
        """Seconds since the epoch."""
        ...

    def monotonic(self) -> float:
        """Seconds that never run backwards."""
        ...


class TelemetrySource(Protocol):
    """Where machine-check records come from.

    ``read`` gives every record that is there, raw, and takes it from the source; it does not
    wait.  ``lost`` says how many further records the source knows to have been lost since the
    last call.
    """

    @property
    def name(self) -> str:
        """``native``, ``mcelog`` or ``simulated``."""
        ...

    def fileno(self) -> int:
        """File descriptor that is readable when there may be records."""
        ...

    def read(self) -> TelemetryBatch:
        """Everything that is there now.  Raises PortError when the source is broken for good."""
        ...

    def close(self) -> None:
        """Let go of the descriptor."""
        ...


class RecordFormat:
    """Names of the raw layouts that ``core.telemetry`` decodes."""

    MC_INFO = "mc_info"  # struct mc_info, xen/include/public/arch-x86/xen-mca.h
    XEN_MCE = "xen_mce"  # struct xen_mce of Linux's /dev/mcelog under Xen


@dataclass(frozen=True, slots=True, kw_only=True)
class TelemetryBatch:
    """Raw records in their order, all of one format, and the records lost before them."""

    format: str
    records: tuple[bytes, ...]
    lost: int = 0
