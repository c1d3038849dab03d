"""Offline states of a simulated host's frames (xen/common/page_alloc.c)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from errno import EINVAL
from typing import TYPE_CHECKING

import numpy as np

from pgofflined.core.domains import GuestKind
from pgofflined.core.frames import DOMID_INVALID, DOMID_XEN, Domid, Mfn, Pfn
from pgofflined.core.offline import OfflineFlag, OfflineReply, OfflineState, OnlineFlag
from pgofflined.core.xenversion import XenVersion
from pgofflined.sim.errors import HostHangs, Refused
from pgofflined.sim.frames import INVALID_M2P, NOBODY, FrameState
from pgofflined.sim.host import HostState

if TYPE_CHECKING:
    from pgofflined.ports import FrameArray


class SimulatedFrameControl(HostState):
    """``ports.FrameControl``."""

    def version(self) -> XenVersion:
        """Version of the simulated hypervisor."""
        return self.spec.version

    def max_mfn(self) -> Mfn:
        """Highest frame of the host."""
        return Mfn(self.frames.count - 1)

    def total_frames(self) -> int:
        """Frames that are memory."""
        return int(self.frames.ram.sum())

    def free_frames(self) -> int:
        """Frames in the heap."""
        with self.call("physinfo"):
            return self.frames.free_count

    def query(self, mfn: Mfn) -> OfflineState:
        """query_page_offline()."""
        with self.call("page_offline_op(query)", mfn=mfn):
            frames = self.frames
            if not frames.valid(mfn) or not frames.ram[mfn]:
                raise Refused(EINVAL)
            state = OfflineState.ONLINE
            if frames.state[mfn] == FrameState.OFFLINING:
                state |= OfflineState.OFFLINE_PENDING
            if frames.broken[mfn]:
                state |= OfflineState.BROKEN
            if frames.state[mfn] == FrameState.OFFLINED:
                state |= OfflineState.OFFLINED
            return state

    def held_back(self) -> Mapping[Mfn, OfflineState]:
        """query_page_offline() of one frame after the other."""
        frames = self.frames
        held = np.isin(frames.state, (FrameState.OFFLINING, FrameState.OFFLINED)) | frames.broken
        return {
            Mfn(mfn): self.query(Mfn(mfn)) for mfn in np.flatnonzero(held & frames.ram).tolist()
        }

    def offline(self, mfn: Mfn) -> OfflineReply:
        """offline_page(), in the order of its checks."""
        with self.call("page_offline_op(offline)", mfn=mfn):
            frames = self.frames
            if not frames.valid(mfn):
                raise Refused(EINVAL)
            if frames.image[mfn]:
                return _reply(OfflineFlag.XENPAGE | OfflineFlag.FAILED, DOMID_XEN)
            if not frames.ram[mfn]:
                return _reply(OfflineFlag.FAILED | OfflineFlag.NOT_CONV_RAM)
            owner = int(frames.owner[mfn])
            if frames.broken[mfn] and owner != NOBODY:
                self.crash(owner, f"offline call for its broken mfn {mfn:#x}")
                return _reply(OfflineFlag.AGAIN)
            if frames.state[mfn] == FrameState.FREE:
                frames.take_out(mfn)
            if frames.state[mfn] == FrameState.OFFLINED:
                return _reply(OfflineFlag.OFFLINED)
            frames.state[mfn] = FrameState.OFFLINING
            if owner != NOBODY and frames.refs[mfn]:
                domain = self.by_domid.get(Domid(owner))
                if domain is not None and domain.pod_lock_is_broken:
                    raise HostHangs(owner)
                return _reply(OfflineFlag.OWNED | OfflineFlag.PENDING, Domid(owner))
            if frames.special[mfn]:
                return _reply(OfflineFlag.XENPAGE | OfflineFlag.PENDING, DOMID_XEN)
            # The mark stays although the call says that it failed.
            return _reply(OfflineFlag.ANONYMOUS | OfflineFlag.FAILED, DOMID_INVALID)

    @contextmanager
    def placed(self) -> Iterator[None]:
        """Every call is made from a good place here."""
        with self.call("placement"):
            pass
        yield

    def online(self, mfn: Mfn) -> OnlineFlag:
        """online_page()."""
        with self.call("page_offline_op(online)", mfn=mfn):
            frames = self.frames
            if not frames.valid(mfn):
                raise Refused(EINVAL)
            if frames.broken[mfn]:
                return OnlineFlag.FAILED | OnlineFlag.BROKEN
            match FrameState(int(frames.state[mfn])):
                case FrameState.OFFLINED:
                    frames.state[mfn] = FrameState.INUSE
                    frames.release(mfn, dirty=False)
                    return OnlineFlag.ONLINED
                case FrameState.OFFLINING:
                    frames.state[mfn] = FrameState.INUSE
                    return OnlineFlag.ONLINED
                case FrameState.INUSE | FrameState.FREE:
                    return OnlineFlag.NONE

    def m2p(self, mfn: Mfn) -> Pfn | None:
        """Xen's M2P entry; PVH and HVM frames have theirs as well."""
        with self.call("m2p", mfn=mfn):
            if not self.frames.valid(mfn):
                return None
            entry = int(self.frames.m2p[mfn])
            return None if entry == INVALID_M2P else Pfn(entry)

    def m2p_search(self, pfns: FrameArray) -> FrameArray:
        """Frames whose M2P entry is one of ``pfns``."""
        with self.call("m2p"):
            return np.flatnonzero(np.isin(self.frames.m2p, pfns)).astype(np.uint64)

    def break_frame(self, mfn: Mfn) -> None:
        """What Xen does by itself after an uncorrected error in a frame (mc_memerr_dhandler).

        The owner crashes unless it is dom0 or an HVM-class guest.
        """
        with self.lock:
            frames = self.frames
            self.poison(mfn, known=True)
            owner = int(frames.owner[mfn])
            if frames.state[mfn] == FrameState.FREE:
                frames.take_out(mfn)
            elif frames.state[mfn] == FrameState.INUSE:
                frames.state[mfn] = FrameState.OFFLINING
            domain = self.by_domid.get(Domid(owner))
            if domain is not None and owner and domain.kind is GuestKind.PV:
                self.crash(owner, f"uncorrected error in its mfn {mfn:#x}")


def _reply(flags: OfflineFlag, owner: Domid | None = None) -> OfflineReply:
    return OfflineReply(flags=flags, owner=owner)
