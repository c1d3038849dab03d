from __future__ import annotations

from errno import EINVAL

import numpy as np
import pytest

from pgofflined.core.domains import ShutdownReason
from pgofflined.core.errors import XenError
from pgofflined.core.frames import DOM0, DOMID_INVALID, DOMID_XEN, Domid, Mfn
from pgofflined.core.offline import OfflineFlag, OfflineReply, OfflineState, OnlineFlag
from pgofflined.core.xenversion import XenVersion
from pgofflined.sim.frames import FrameState
from pgofflined.sim.host import HostSpec
from pgofflined.sim.scenarios import SmallHost, small_host

IMAGE, HEAP, IO, OF_DOM0 = Mfn(3), Mfn(20), Mfn(50), Mfn(70)


@pytest.fixture
def small() -> SmallHost:
    return small_host()


def free_frame(small: SmallHost) -> Mfn:
    return Mfn(int(np.flatnonzero(small.host.frames.state == FrameState.FREE)[1000]))


def reply(flags: OfflineFlag, owner: int | None = None) -> OfflineReply:
    return OfflineReply(flags=flags, owner=None if owner is None else Domid(owner))


def test_page_of_the_hypervisors_image_cannot_go(small: SmallHost) -> None:
    flags = OfflineFlag.XENPAGE | OfflineFlag.FAILED

    assert small.host.offline(IMAGE) == reply(flags, DOMID_XEN)
    assert small.host.query(IMAGE) == OfflineState.ONLINE


def test_page_of_the_hypervisors_heap_stays_pending(small: SmallHost) -> None:
    flags = OfflineFlag.XENPAGE | OfflineFlag.PENDING

    assert small.host.offline(HEAP) == reply(flags, DOMID_XEN)
    assert small.host.query(HEAP) == OfflineState.OFFLINE_PENDING


def test_what_is_no_conventional_ram_is_said_to_be_none(small: SmallHost) -> None:
    assert small.host.offline(IO) == reply(OfflineFlag.FAILED | OfflineFlag.NOT_CONV_RAM)
    with pytest.raises(XenError) as caught:
        small.host.query(IO)
    assert caught.value.errno == EINVAL


def test_frame_that_the_host_does_not_have_is_an_error(small: SmallHost) -> None:
    beyond = Mfn(small.host.max_mfn() + 1)
    for call in (small.host.offline, small.host.online, small.host.query):
        with pytest.raises(XenError) as caught:
            call(beyond)
        assert caught.value.errno == EINVAL


def test_page_of_dom0_is_owned_by_dom0(small: SmallHost) -> None:
    assert small.host.offline(OF_DOM0) == reply(OfflineFlag.OWNED | OfflineFlag.PENDING, DOM0)


def test_page_of_a_pvh_guest_is_owned_by_it(small: SmallHost) -> None:
    mfn = small.host.frame_of(small.pvh, 9)

    assert small.host.offline(mfn) == reply(OfflineFlag.OWNED | OfflineFlag.PENDING, small.pvh)
    assert small.host.m2p(mfn) == 9


def test_page_without_an_owner_yet_fails_but_stays_marked(small: SmallHost) -> None:
    mfn = small.host.frames.allocate()
    flags = OfflineFlag.ANONYMOUS | OfflineFlag.FAILED

    assert small.host.offline(mfn) == reply(flags, DOMID_INVALID)
    assert small.host.query(mfn) == OfflineState.OFFLINE_PENDING


def test_free_page_is_taken_at_once(small: SmallHost) -> None:
    mfn, before = free_frame(small), small.host.free_frames()

    assert small.host.offline(mfn) == reply(OfflineFlag.OFFLINED)
    assert small.host.query(mfn) == OfflineState.OFFLINED
    assert small.host.free_frames() == before - 1
    assert small.host.corrupted is None
    assert not small.host.idle_scrub_spinning


def test_free_page_taken_from_an_unfixed_hypervisor_corrupts_its_heap() -> None:
    small = small_host(HostSpec(version=XenVersion(4, 17, 7)))
    small.host.offline(free_frame(small))

    assert small.host.corrupted is not None


def test_offlined_page_comes_back_by_online(small: SmallHost) -> None:
    mfn, before = free_frame(small), small.host.free_frames()
    small.host.offline(mfn)

    assert small.host.online(mfn) == OnlineFlag.ONLINED
    assert small.host.query(mfn) == OfflineState.ONLINE
    assert small.host.free_frames() == before


def test_broken_page_never_comes_back(small: SmallHost) -> None:
    mfn = free_frame(small)
    small.host.break_frame(mfn)

    assert small.host.query(mfn) == OfflineState.OFFLINED | OfflineState.BROKEN
    assert small.host.online(mfn) == OnlineFlag.FAILED | OnlineFlag.BROKEN


def test_offlining_a_broken_page_crashes_its_owner(small: SmallHost) -> None:
    mfn = small.host.frame_of(small.pv, 9)
    small.host.poison(mfn, known=True)

    assert small.host.offline(mfn) == reply(OfflineFlag.AGAIN)
    assert small.host.domain(small.pv).shutdown is ShutdownReason.CRASH
    assert small.pv in small.host.crashes


def test_error_that_xen_handles_crashes_a_pv_owner_and_spares_a_pvh_one(
    small: SmallHost,
) -> None:
    small.host.break_frame(small.host.frame_of(small.pv, 9))
    small.host.break_frame(small.host.frame_of(small.pvh, 9))

    assert list(small.host.crashes) == [small.pv]
