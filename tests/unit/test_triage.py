from __future__ import annotations

import pytest

from pgofflined.core.domains import DomainInfo
from pgofflined.core.frames import DOM0, Domid, Mfn
from pgofflined.core.offline import OfflineState
from pgofflined.core.xenversion import XenVersion
from pgofflined.owners import find_pv_owner
from pgofflined.ports import Hypervisor
from pgofflined.sim.faults import FaultyHypervisor
from pgofflined.sim.frames import FrameState
from pgofflined.sim.host import HostSpec
from pgofflined.sim.machine import SimulatedHost
from pgofflined.sim.scenarios import SmallHost, small_host
from pgofflined.triage import (
    Disposition,
    Later,
    LaterReason,
    Left,
    LeftReason,
    Offlined,
    Rules,
    ToExchange,
    ToRelocate,
    triage,
)

OPEN = Rules(denial=lambda _domain: None, wedged=lambda _domain: False)
UNFIXED = HostSpec(version=XenVersion(4, 17, 7))


def _pv_frame(small: SmallHost, which: int = 0) -> Mfn:
    return small.host.frame_of(small.pv, small.host.pv(small.pv).layout.plain[which])


def _free_frame(host: SimulatedHost) -> Mfn:
    return next(
        Mfn(mfn) for mfn in range(host.frames.count) if host.frames.state[mfn] == FrameState.FREE
    )


def _triage(small: SmallHost, mfn: Mfn, rules: Rules = OPEN) -> tuple[Disposition, list[str]]:
    traced = FaultyHypervisor(small.host)
    return triage(mfn, traced, rules), traced.trace.methods


def test_a_page_of_a_pv_guest_is_marked_and_goes_to_the_exchange() -> None:
    small = small_host()
    mfn = _pv_frame(small)
    disposition, _ = _triage(small, mfn)
    assert isinstance(disposition, ToExchange)
    assert disposition.domain.domid == small.pv
    assert small.host.query(mfn) is OfflineState.OFFLINE_PENDING


def test_a_page_of_a_pvh_guest_is_marked_and_goes_to_migration() -> None:
    small = small_host()
    mfn = small.host.frame_of(small.pvh, 5)
    disposition, _ = _triage(small, mfn)
    assert isinstance(disposition, ToRelocate)
    assert disposition.domain.domid == small.pvh


def test_the_state_is_queried_before_anything_else() -> None:
    small = small_host()
    _, methods = _triage(small, _pv_frame(small))
    assert methods[0] == "query"


def test_a_broken_page_is_never_marked_so_that_its_owner_is_not_crashed() -> None:
    small = small_host()
    mfn = _pv_frame(small)
    small.host.poison(mfn, known=True)
    disposition, methods = _triage(small, mfn)
    assert isinstance(disposition, Left)
    assert disposition.reason is LeftReason.BROKEN
    assert "offline" not in methods
    assert small.host.crashes == {}


def test_a_free_page_is_taken_out_at_once() -> None:
    small = small_host()
    mfn = _free_frame(small.host)
    disposition, _ = _triage(small, mfn)
    assert isinstance(disposition, Offlined)
    assert small.host.query(mfn) is OfflineState.OFFLINED
    assert small.host.corrupted is None


def test_a_free_page_is_left_alone_where_xen_would_corrupt_its_heap() -> None:
    small = small_host(UNFIXED)
    disposition, methods = _triage(small, _free_frame(small.host))
    assert isinstance(disposition, Left)
    assert disposition.reason is LeftReason.UNFIXED_XEN
    assert "offline" not in methods
    assert small.host.corrupted is None


def test_an_hvm_guests_page_is_not_marked_where_its_freeing_would_corrupt_the_heap() -> None:
    small = small_host(UNFIXED)
    disposition, methods = _triage(small, small.host.frame_of(small.pvh, 5))
    assert isinstance(disposition, Left)
    assert disposition.reason is LeftReason.UNFIXED_XEN
    assert "offline" not in methods


def test_on_an_unfixed_xen_a_pv_page_goes_only_while_its_neighbour_is_in_use() -> None:
    small = small_host(UNFIXED)
    host = small.host
    owned = [Mfn(int(mfn)) for mfn in host.pv(small.pv).mfns() if mfn < host.frames.count]
    paired = next(m for m in owned if host.m2p(Mfn(m ^ 1)) is not None and host.m2p(m) is not None)
    disposition, _ = _triage(small, paired)
    assert isinstance(disposition, ToExchange)


def test_a_page_of_dom0_is_reported_and_not_marked() -> None:
    small = small_host()
    mfn = next(Mfn(m) for m in range(small.host.frames.count) if small.host.frames.owner[m] == DOM0)
    disposition, methods = _triage(small, mfn)
    assert isinstance(disposition, Left)
    assert disposition.reason is LeftReason.DOM0
    assert not disposition.marked
    assert "offline" not in methods


@pytest.mark.parametrize(
    ("mfn", "reason"), [(3, LeftReason.XEN), (20, LeftReason.XEN), (50, LeftReason.NOT_RAM)]
)
def test_pages_of_xen_and_of_io_are_left(mfn: int, reason: LeftReason) -> None:
    small = small_host()
    disposition, _ = _triage(small, Mfn(mfn))
    assert isinstance(disposition, Left)
    assert disposition.reason is reason


def test_a_denied_pv_domain_is_not_even_marked() -> None:
    small = small_host()
    rules = Rules(denial=lambda domain: f"{domain.name} is denied", wedged=lambda _domain: False)
    disposition, methods = _triage(small, _pv_frame(small), rules)
    assert isinstance(disposition, Left)
    assert (disposition.reason, disposition.detail) == (LeftReason.DENIED, "pv is denied")
    assert "offline" not in methods


def test_the_mark_of_a_denied_pvh_domain_is_taken_back() -> None:
    small = small_host()
    rules = Rules(denial=lambda _domain: "denied", wedged=lambda _domain: False)
    mfn = small.host.frame_of(small.pvh, 5)
    disposition, _ = _triage(small, mfn, rules)
    assert isinstance(disposition, Left)
    assert not disposition.marked
    assert small.host.query(mfn) is OfflineState.ONLINE


def test_a_domain_in_which_xen_broke_a_page_is_never_marked_again() -> None:
    # Xen's own pass may have left a lock behind that hangs the host at the next call.
    small = small_host()
    rules = Rules(denial=lambda _domain: None, wedged=lambda domain: domain.domid == small.pv)
    disposition, methods = _triage(small, _pv_frame(small), rules)
    assert isinstance(disposition, Later)
    assert disposition.reason is LaterReason.OWNER_ENDING
    assert "offline" not in methods


def test_a_page_that_is_offlined_already_is_done() -> None:
    small = small_host()
    mfn = _free_frame(small.host)
    small.host.offline(mfn)
    disposition, methods = _triage(small, mfn)
    assert isinstance(disposition, Offlined)
    assert methods == ["query"]


def test_the_owner_of_a_pv_page_is_found_without_a_mark() -> None:
    small = small_host()
    mfn = _pv_frame(small)
    xen: Hypervisor = small.host
    owner = find_pv_owner(mfn, xen)
    assert isinstance(owner, DomainInfo)
    assert owner.domid == small.pv
    assert small.host.query(mfn) is OfflineState.ONLINE


def test_a_pvh_page_has_no_pv_owner() -> None:
    small = small_host()
    assert find_pv_owner(small.host.frame_of(small.pvh, 5), small.host) is None
    assert small.pvh != Domid(0)
