"""What is needed of the hypervisor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from pgofflined.core.domains import DomainInfo
from pgofflined.core.errors import PortError
from pgofflined.core.frames import Domid, Mfn, Pfn
from pgofflined.core.offline import OfflineReply, OfflineState, OnlineFlag
from pgofflined.core.suspending import SuspendSupport
from pgofflined.core.xenversion import XenVersion

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pgofflined.core.moves import Chosen, PteWrites

    FrameArray = NDArray[np.uint64]
    Words = NDArray[np.uint64]
    TypeArray = NDArray[np.uint32]


def nothing() -> None:
    """What is called back where nobody wants it."""


BY_NAME_ONLY: Final = "a migration, of which its name in xenstore"
"""How ``DomainControl.somebody_at`` begins where no process is at work on the domain any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SuspendLimits:
    """Seconds that a guest has to acknowledge the request, then to reach the suspended state; and
    for which it may then be kept, as far as that is for us to choose."""

    acknowledge: float = 10.0
    suspend: float = 30.0
    blackout: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class VcpuFrames:
    """``roots`` are the L4 tables in the vCPUs' control registers, ``tables`` the frames of their
    GDTs."""

    roots: frozenset[Mfn]
    tables: frozenset[Mfn]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Swapped:
    """The answer to an exchange of several frames, done in their order.

    ``new`` are the frames that came for the first ones; ``error`` says what became of the one
    after them, None where all were exchanged.  What follows was not tried.
    """

    new: FrameArray
    error: PortError | None = None


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

    def held_back(self) -> Mapping[Mfn, OfflineState]:
        """Every frame of the host that is marked, broken or out of use.

        Asks about each frame, which takes seconds for each TiB.
        """
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

    def placed(self) -> AbstractContextManager[None]:
        """Keep this thread where ``offline`` may be called from, for several calls in a row.

        Raises OfflineCallUnsafe where there is no such place.
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

    def m2p_search(self, pfns: FrameArray) -> FrameArray:
        """Every frame of the host whose M2P entry is one of ``pfns``, whoever owns it.

        Reads the whole M2P: 8 bytes for each frame of the host.
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

    def conditions(self) -> Sequence[DomainInfo]:
        """All domains as ``domains`` gives them, only without their names.

        Xen alone is asked, so that it can be told while xenstored is down.
        """
        ...

    def condition(self, domid: Domid) -> DomainInfo:
        """One domain as ``domain`` gives it, only quicker and without its name.

        Raises DomainGone.
        """
        ...

    def suspend_support(self, domid: Domid) -> SuspendSupport:
        """Whether the guest has announced that it suspends itself when asked.

        To be looked at before ``suspend`` and before a toolstack is told to save or migrate it: a
        guest without that support may crash.  A domain that is gone is silent, or DomainGone.
        """
        ...

    def suspend(self, domid: Domid, limits: SuspendLimits) -> None:
        """Ask the guest to suspend itself and wait until it has.

        Raises SuspendNotAsked before anything was asked, GuestDidNotSuspend after the request has
        been withdrawn, GuestEnded when it ended after it was asked, DomainGone before.  A guest
        that suspends just as the request is withdrawn counts as suspended.
        """
        ...

    def withdraw_suspend(self, domid: Domid) -> bool:
        """Take a request to suspend back that nobody has read; whether there was one."""
        ...

    def serves(self, domid: Domid) -> str | None:
        """What other domains need the domain for ("serves ..."); None for nothing known."""
        ...

    def somebody_at(self, domid: Domid) -> str | None:
        """The process that saves or migrates the domain for somebody, in words; None for none.

        A domain that a migration has renamed, and left, counts as well (``BY_NAME_ONLY``).
        """
        ...

    def resume(self, domid: Domid, before: Callable[[], None] = nothing) -> None:
        """Let a suspended guest run on in the same domain (cooperative resume).

        Does nothing for a domain that is not suspended.  ``before`` is called when all is done but
        the call that lets it run, which may return long after that.  ``tell_resumed`` is to follow.
        """
        ...

    def tell_resumed(self, domid: Domid) -> None:
        """Tell xenstored that a domain was resumed, by whomever, so that it notices its next end.

        Nothing is told of one that is suspended.  What cannot be told is logged: the guest runs.
        """
        ...

    def pause(self, domid: Domid) -> None:
        """Pause every vCPU and wait until none runs (counted; pair it with one unpause)."""
        ...

    def unpause(self, domid: Domid) -> None:
        """Take one pause back."""
        ...

    def vcpu_frames(self, domid: Domid) -> VcpuFrames:
        """Frames that a PV domain's vCPUs have loaded at this moment."""
        ...

    def has_devices(self, domid: Domid) -> bool:
        """Whether devices of the host are assigned to the domain: they know frames by number."""
        ...


class FrameWindow(Protocol):
    """Frames of a domain that stay mapped while several looks are taken at them."""

    def read(self, rows: NDArray[np.intp]) -> Words:
        """Copies as they are now, of frames by their place among those of the window."""
        ...

    def words(self, rows: NDArray[np.intp], indexes: FrameArray) -> Words:
        """Single words as they are now: word ``indexes[i]`` of the frame at ``rows[i]``."""
        ...

    def differing(self, rows: NDArray[np.intp], contents: Words) -> Chosen:
        """Which of some frames do not hold now what ``contents`` has for each."""
        ...


class ForeignMemory(Protocol):
    """Contents and use of a domain's frames."""

    def read_frames(self, domid: Domid, mfns: FrameArray) -> Words:
        """Contents of frames of a domain, in order.  Raises XenError if any cannot be mapped."""
        ...

    def write_frames(
        self, domid: Domid, mfns: FrameArray, contents: Words, slots: PteWrites
    ) -> None:
        """Write whole frames, all different, then words of these or others; none is a page table.

        Raises XenError, EINVAL for a word outside its frame, before anything is written; PortError
        where contents read back differently.
        """
        ...

    def window(self, domid: Domid, mfns: FrameArray) -> AbstractContextManager[FrameWindow]:
        """Map frames for reading, as long as the block lasts.  Raises XenError as ``read_frames``.

        A frame that is mapped is referred to: Xen exchanges none of them meanwhile.
        """
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

    def shared_frames(self, domid: Domid) -> FrameArray:
        """Xen's own frames that the domain may map: its shared_info and its grant table."""
        ...


class PageTableControl(Protocol):
    """Changes of a paused PV domain's page tables through the hypervisor."""

    def update_ptes(self, domid: Domid, writes: PteWrites) -> None:
        """Set entries of the domain's page tables, verified by Xen, in order.

        Both the table's and the entry's owner are the domain (PFD and FD).  Raises XenError
        with ``done`` when one is refused; those before it have taken effect.
        """
        ...

    def pin_tables(self, domid: Domid, mfns: FrameArray, level: int) -> None:
        """Have Xen keep frames validated as page tables of a level (MMUEXT_PIN_L*_TABLE).

        In order; raises XenError with ``done`` when one is refused.
        """
        ...

    def unpin_tables(self, domid: Domid, mfns: FrameArray) -> None:
        """Take the pins of page tables back (MMUEXT_UNPIN_TABLE), as ``pin_tables``."""
        ...


class FrameExchange(Protocol):
    """XENMEM_exchange."""

    def exchange(self, domid: Domid, mfns: FrameArray, pfns: FrameArray) -> Swapped:
        """Swap frames of a PV domain for fresh ones, which M2P then notes at ``pfns``.

        The contents of the new frames are not those of the old ones.  A frame is refused with
        XenError: EINVAL when anything still refers to it, ENOMEM when no frame is free.
        """
        ...


class Hypervisor(
    FrameControl, DomainControl, ForeignMemory, PageTableControl, FrameExchange, Protocol
):
    """A whole host."""
