"""PVH guests: what the ports give, and what they refuse."""

from __future__ import annotations

from errno import EOPNOTSUPP

import numpy as np
import pytest

from pgofflined.core.domains import GuestKind, ShutdownReason
from pgofflined.core.errors import XenError
from pgofflined.core.frames import Mfn, Pfn
from pgofflined.core.moves import PteWrite
from pgofflined.core.suspending import SuspendSupport
from pgofflined.ports import Hypervisor, SuspendLimits
from tests.single import set_ptes, swap

from .guestmemory import assert_runs, paused
from .hosts import ContractHost

# RAM of every guest: above the first page, below the smallest guest's end.
GFN = 0x80


def test_pvh_guest_is_known_as_pvh(hypervisor: Hypervisor, host: ContractHost) -> None:
    assert hypervisor.domain(host.pvh).kind is GuestKind.PVH


def test_pvh_guest_announces_that_it_suspends_itself(
    hypervisor: Hypervisor, host: ContractHost
) -> None:
    assert hypervisor.suspend_support(host.pvh) is SuspendSupport.ANNOUNCED


def test_contents_are_read_by_guest_frame(hypervisor: Hypervisor, host: ContractHost) -> None:
    gfns = np.array([GFN, GFN + 1], dtype=np.uint64)
    with paused(hypervisor, host.pvh):
        first = hypervisor.read_frames(host.pvh, gfns)
        second = hypervisor.read_frames(host.pvh, gfns)

    assert np.array_equal(first, second)


def test_console_ring_is_granted_by_guest_frame(hypervisor: Hypervisor, host: ContractHost) -> None:
    granted = hypervisor.granted_frames(host.pvh).tolist()

    assert host.console_ring(host.pvh) in granted


def test_exchange_is_refused(hypervisor: Hypervisor, host: ContractHost) -> None:
    with pytest.raises(XenError) as caught:
        swap(hypervisor, host.pvh, Mfn(GFN), Pfn(GFN))
    assert caught.value.errno == EOPNOTSUPP
    assert_runs(hypervisor, host.pvh)


def test_page_table_updates_are_refused(hypervisor: Hypervisor, host: ContractHost) -> None:
    with paused(hypervisor, host.pvh), pytest.raises(XenError) as caught:
        set_ptes(hypervisor, host.pvh, [PteWrite(table=Mfn(GFN), index=0, value=0)])
    assert caught.value.errno == EOPNOTSUPP


def test_a_guest_is_suspended_and_runs_on(hypervisor: Hypervisor, host: ContractHost) -> None:
    hypervisor.suspend(host.pvh, SuspendLimits())
    try:
        assert hypervisor.condition(host.pvh).shutdown is ShutdownReason.SUSPEND
    finally:
        hypervisor.resume(host.pvh)
        hypervisor.tell_resumed(host.pvh)
    assert_runs(hypervisor, host.pvh)
