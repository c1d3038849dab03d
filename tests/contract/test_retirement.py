"""A marked page that is exchanged leaves the host's memory, and can be given back."""

from __future__ import annotations

from pgofflined.core.offline import OfflineState, OnlineFlag
from pgofflined.ports import Hypervisor

from .guestmemory import GuestMemory, assert_runs, standing_still
from .moving import move_one


def test_marked_page_is_offlined_when_the_guest_has_left_it(
    hypervisor: Hypervisor, guest: GuestMemory
) -> None:
    with standing_still(hypervisor, guest.domid):
        moved = move_one(hypervisor, guest, mark=True)
    assert_runs(hypervisor, guest.domid)
    old = moved.page.mfn
    try:
        state, pfn = hypervisor.query(old), hypervisor.m2p(old)
    finally:
        reply = hypervisor.online(old)

    assert state == OfflineState.OFFLINED
    assert pfn is None
    assert reply == OnlineFlag.ONLINED
    assert not hypervisor.query(old) & OfflineState.OFFLINED
