"""Frames of the host: offline states, M2P, figures."""

from __future__ import annotations

from contextlib import nullcontext
from errno import EINVAL

import numpy as np
import pytest

from pgofflined.core.errors import XenError
from pgofflined.core.frames import DOM0, Mfn
from pgofflined.core.offline import OfflineFlag, OfflineReply, OfflineState, OnlineFlag
from pgofflined.ports import Hypervisor

from .guestmemory import GuestMemory
from .hosts import ContractHost


def test_version_is_one_that_is_supported(hypervisor: Hypervisor) -> None:
    version = hypervisor.version()

    assert (version.major, version.minor) >= (4, 14)


def test_every_frame_of_a_guest_lies_below_the_hosts_last(
    hypervisor: Hypervisor, guest: GuestMemory
) -> None:
    last = hypervisor.max_mfn()

    assert guest.own_frames().max() <= last


def test_some_frames_are_free(hypervisor: Hypervisor) -> None:
    assert 0 < hypervisor.free_frames() < hypervisor.total_frames() <= hypervisor.max_mfn() + 1


def test_page_in_use_is_online(hypervisor: Hypervisor, guest: GuestMemory) -> None:
    page = guest.data_pages()[0]

    assert hypervisor.query(page.mfn) == OfflineState.ONLINE


def test_query_beyond_the_hosts_memory_is_refused(hypervisor: Hypervisor) -> None:
    beyond = Mfn(hypervisor.max_mfn() + (1 << 20))

    with pytest.raises(XenError) as caught:
        hypervisor.query(beyond)
    assert caught.value.errno == EINVAL


def test_m2p_agrees_with_the_guests_p2m(hypervisor: Hypervisor, guest: GuestMemory) -> None:
    for page in guest.data_pages()[:16]:
        assert hypervisor.m2p(page.mfn) == page.pfn


def test_m2p_names_no_pfn_for_shared_info(hypervisor: Hypervisor, host: ContractHost) -> None:
    shared_info = hypervisor.domain(host.pv).shared_info

    assert hypervisor.m2p(shared_info) is None


def test_m2p_beyond_the_hosts_memory_names_no_pfn(hypervisor: Hypervisor) -> None:
    assert hypervisor.m2p(Mfn(hypervisor.max_mfn() + (1 << 30))) is None


def test_offlining_an_owned_page_leaves_it_pending_and_names_the_owner(
    hypervisor: Hypervisor, guest: GuestMemory
) -> None:
    page = guest.data_pages()[0]
    try:
        reply = hypervisor.offline(page.mfn)
        state = hypervisor.query(page.mfn)
    finally:
        hypervisor.online(page.mfn)

    pending = OfflineFlag.OWNED | OfflineFlag.PENDING
    assert reply == OfflineReply(flags=pending, owner=guest.domid)
    assert state == OfflineState.OFFLINE_PENDING


def test_offlining_twice_gives_the_same_answer(hypervisor: Hypervisor, guest: GuestMemory) -> None:
    page = guest.data_pages()[0]
    try:
        first, second = hypervisor.offline(page.mfn), hypervisor.offline(page.mfn)
    finally:
        hypervisor.online(page.mfn)

    assert first == second


@pytest.mark.parametrize("together", [False, True])
def test_many_pages_of_one_guest_can_be_marked(
    hypervisor: Hypervisor,
    guest: GuestMemory,
    together: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    pages = guest.data_pages()[:20]
    try:
        with hypervisor.placed() if together else nullcontext():
            owners = {hypervisor.offline(page.mfn).owner for page in pages}
    finally:
        for page in pages:
            hypervisor.online(page.mfn)

    assert owners == {guest.domid}


def test_marked_pages_are_found_among_all_frames(
    hypervisor: Hypervisor, guest: GuestMemory
) -> None:
    before = hypervisor.held_back()
    mfn = guest.data_pages()[0].mfn
    assert mfn not in before
    hypervisor.offline(mfn)

    found = hypervisor.held_back()

    assert found == {**before, mfn: OfflineState.OFFLINE_PENDING}
    hypervisor.online(mfn)
    assert hypervisor.held_back() == before


def test_online_takes_a_mark_back(hypervisor: Hypervisor, guest: GuestMemory) -> None:
    page = guest.data_pages()[0]
    hypervisor.offline(page.mfn)

    assert hypervisor.online(page.mfn) == OnlineFlag.ONLINED
    assert hypervisor.query(page.mfn) == OfflineState.ONLINE


def test_online_of_an_unmarked_page_does_nothing(
    hypervisor: Hypervisor, guest: GuestMemory
) -> None:
    page = guest.data_pages()[0]

    assert hypervisor.online(page.mfn) == OnlineFlag.NONE
    assert hypervisor.query(page.mfn) == OfflineState.ONLINE


def test_a_mark_survives_a_pause_and_leaves_the_contents_alone(
    hypervisor: Hypervisor, guest: GuestMemory
) -> None:
    page = guest.data_pages()[0]
    hypervisor.pause(guest.domid)
    try:
        before = guest.read(page.mfn)
        hypervisor.offline(page.mfn)
        after = guest.read(page.mfn)
        hypervisor.online(page.mfn)
    finally:
        hypervisor.unpause(guest.domid)

    assert np.array_equal(before, after)


def test_shared_info_of_dom0_is_owned_by_dom0(hypervisor: Hypervisor) -> None:
    assert hypervisor.query(hypervisor.domain(DOM0).shared_info) == OfflineState.ONLINE
