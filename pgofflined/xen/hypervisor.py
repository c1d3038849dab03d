"""The host that we run on, as ``ports.Hypervisor``."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pgofflined.core.domains import DomainInfo
from pgofflined.core.frames import Domid, Mfn, Pfn
from pgofflined.core.offline import OfflineReply, OfflineState, OnlineFlag
from pgofflined.core.xenversion import XenVersion
from pgofflined.ports import PteWrite, SuspendLimits
from pgofflined.xen.control import Control, probe_interface, read_version
from pgofflined.xen.domains import Domains
from pgofflined.xen.exchange import Exchange
from pgofflined.xen.frames import Frames
from pgofflined.xen.libs import ForeignPages, XenCall
from pgofflined.xen.pagetables import PageTables
from pgofflined.xen.placement import LinuxThread, Placement
from pgofflined.xen.suspension import Suspension
from pgofflined.xen.vcpus import Dom0Vcpus

if TYPE_CHECKING:
    from pgofflined.ports import FrameArray, Hypervisor, TypeArray, Words
    from pgofflined.xen.memory import Memory


class XenHypervisor:
    """Xen, seen from dom0.  Methods may be called from any thread; their contracts are the ports'.

    Opening it asks the hypervisor for its version and for the interface that it speaks.  Raises
    PortError when this is no dom0, the libraries are missing, or the release is not known.
    """

    def __init__(self) -> None:
        self._call = XenCall()
        version = read_version(self._call)
        self._control = Control(self._call, probe_interface(self._call, version))
        self._pages = ForeignPages()
        self._placement = Placement(Dom0Vcpus(self._call, self._control), LinuxThread())
        self._frames = Frames(
            call=self._call,
            control=self._control,
            pages=self._pages,
            placement=self._placement,
            version=version,
        )
        self._domains = Domains(self._call, self._control)
        self._suspension = Suspension(call=self._call, control=self._control, domains=self._domains)
        self._tables = PageTables(self._call)
        self._exchange = Exchange(self._call)
        self._memory: Memory | None = None
        self._memory_lock = threading.Lock()

    def close(self) -> None:
        """Let go of the hypervisor; no call may follow."""
        self._pages.close()
        self._call.close()

    def version(self) -> XenVersion:
        """Version of the running hypervisor."""
        return self._frames.version()

    def max_mfn(self) -> Mfn:
        """Highest frame of the host."""
        return self._frames.max_mfn()

    def total_frames(self) -> int:
        """Frames of memory that the host has."""
        return self._frames.total_frames()

    def free_frames(self) -> int:
        """Frames that the hypervisor could hand out now."""
        return self._frames.free_frames()

    def query(self, mfn: Mfn) -> OfflineState:
        """Offline state of a frame."""
        return self._frames.query(mfn)

    def offline(self, mfn: Mfn) -> OfflineReply:
        """Mark a frame for offlining, off pCPU 0."""
        return self._frames.offline(mfn)

    @contextmanager
    def placed(self) -> Iterator[None]:
        """Keep this thread in place for several ``offline`` calls, which makes each cheaper.

        Raises OfflineCallUnsafe where there is no safe place.
        """
        with self._placement.placed():
            yield

    def online(self, mfn: Mfn) -> OnlineFlag:
        """Take a mark back, or give an offlined frame back."""
        return self._frames.online(mfn)

    def m2p(self, mfn: Mfn) -> Pfn | None:
        """The pfn that the M2P notes for a frame."""
        return self._frames.m2p(mfn)

    def domains(self) -> Sequence[DomainInfo]:
        """All domains, dom0 first."""
        return self._domains.domains()

    def domain(self, domid: Domid) -> DomainInfo:
        """One domain."""
        return self._domains.domain(domid)

    def suspend(self, domid: Domid, limits: SuspendLimits) -> None:
        """Ask the guest to suspend itself and wait until it has."""
        self._suspension.suspend(domid, limits)

    def resume(self, domid: Domid) -> None:
        """Let a suspended guest run on."""
        self._suspension.resume(domid)

    def pause(self, domid: Domid) -> None:
        """Pause every vCPU."""
        self._domains.pause(domid)

    def unpause(self, domid: Domid) -> None:
        """Take one pause back."""
        self._domains.unpause(domid)

    def _foreign_memory(self) -> Memory:
        """Loaded with the first exchange: an idle daemon has no use for numpy."""
        with self._memory_lock:
            if self._memory is None:
                from pgofflined.xen.memory import Memory

                self._memory = Memory(call=self._call, control=self._control, pages=self._pages)
            return self._memory

    def read_frames(self, domid: Domid, mfns: FrameArray) -> Words:
        """Copies of frames of a domain."""
        return self._foreign_memory().read_frames(domid, mfns)

    def write_words(self, domid: Domid, mfn: Mfn, index: int, words: Words) -> None:
        """Write words into a frame that is no page table."""
        self._foreign_memory().write_words(domid, mfn, index, words)

    def page_types(self, domid: Domid, mfns: FrameArray) -> TypeArray:
        """XEN_DOMCTL_PFINFO_* words of frames."""
        return self._foreign_memory().page_types(domid, mfns)

    def granted_frames(self, domid: Domid) -> FrameArray:
        """Frames that the domain's grant table offers."""
        return self._foreign_memory().granted_frames(domid)

    def update_ptes(self, domid: Domid, writes: Sequence[PteWrite]) -> None:
        """Set entries of the domain's page tables."""
        self._tables.update_ptes(domid, writes)

    def exchange(self, domid: Domid, mfn: Mfn, pfn: Pfn) -> Mfn:
        """Swap one frame for a fresh one."""
        return self._exchange.exchange(domid, mfn, pfn)


if TYPE_CHECKING:

    def _fulfils(host: XenHypervisor) -> Hypervisor:
        return host
