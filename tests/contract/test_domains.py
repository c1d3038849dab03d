"""Domains: what is known of them, pausing, suspending."""

from __future__ import annotations

from errno import EBUSY, EINVAL

import pytest

from pgofflined.core.domains import GuestKind, ShutdownReason
from pgofflined.core.errors import DomainGone, XenError
from pgofflined.core.frames import DOM0, Domid
from pgofflined.core.suspending import SuspendSupport
from pgofflined.ports import Hypervisor, SuspendLimits

from .guestmemory import assert_runs, paused, standing_still
from .hosts import ContractHost

UNUSED = Domid(0x7000)


def test_dom0_is_listed_first(hypervisor: Hypervisor, host: ContractHost) -> None:
    domids = [info.domid for info in hypervisor.domains()]

    assert domids[0] == DOM0
    assert host.pv in domids
    assert len(set(domids)) == len(domids)


def test_list_and_single_answers_agree(hypervisor: Hypervisor, host: ContractHost) -> None:
    listed = next(info for info in hypervisor.domains() if info.domid == host.pv)

    assert listed.identity == hypervisor.domain(host.pv).identity
    assert listed.kind == hypervisor.domain(host.pv).kind


def test_domains_are_listed_without_their_names_as_well(hypervisor: Hypervisor) -> None:
    listed = {info.identity: info.kind for info in hypervisor.domains()}

    assert {info.identity: info.kind for info in hypervisor.conditions()} == listed
    assert {info.name for info in hypervisor.conditions()} == {""}


def test_pv_guest_is_known_as_pv(hypervisor: Hypervisor, host: ContractHost) -> None:
    info = hypervisor.domain(host.pv)

    assert info.kind is GuestKind.PV
    assert not info.is_dom0
    assert 0 < info.tot_pages <= info.max_pages
    assert info.max_vcpu_id == 1
    assert info.name
    assert_runs(hypervisor, host.pv)


def test_dom0_is_pv(hypervisor: Hypervisor) -> None:
    info = hypervisor.domain(DOM0)

    assert info.kind is GuestKind.PV
    assert info.is_dom0


def test_domains_have_different_uuids(hypervisor: Hypervisor, host: ContractHost) -> None:
    assert hypervisor.domain(host.pv).uuid != hypervisor.domain(host.deaf).uuid


def test_unused_domid_is_gone(hypervisor: Hypervisor) -> None:
    with pytest.raises(DomainGone):
        hypervisor.domain(UNUSED)


def test_domain_that_is_gone_cannot_be_paused(hypervisor: Hypervisor) -> None:
    with pytest.raises(DomainGone):
        hypervisor.pause(UNUSED)


def test_domain_that_is_gone_cannot_be_suspended(hypervisor: Hypervisor) -> None:
    with pytest.raises(DomainGone):
        hypervisor.suspend(UNUSED, SuspendLimits())


def test_pauses_are_counted(hypervisor: Hypervisor, host: ContractHost) -> None:
    with paused(hypervisor, host.pv):
        with paused(hypervisor, host.pv):
            assert hypervisor.domain(host.pv).paused
        assert hypervisor.domain(host.pv).paused
    assert not hypervisor.domain(host.pv).paused


def test_unpause_without_a_pause_is_refused(hypervisor: Hypervisor, host: ContractHost) -> None:
    with pytest.raises(XenError) as caught:
        hypervisor.unpause(host.pv)
    assert caught.value.errno == EINVAL


def test_dom0_cannot_pause_itself(hypervisor: Hypervisor) -> None:
    with pytest.raises(XenError) as caught:
        hypervisor.pause(DOM0)
    assert caught.value.errno == EINVAL


def test_suspended_guest_says_so_and_runs_on_after_resume(
    hypervisor: Hypervisor, host: ContractHost
) -> None:
    before = hypervisor.domain(host.pv)
    with standing_still(hypervisor, host.pv):
        assert hypervisor.domain(host.pv).shutdown is ShutdownReason.SUSPEND

    assert_runs(hypervisor, host.pv)
    assert hypervisor.domain(host.pv).identity == before.identity


def test_guest_can_be_suspended_again_and_again(hypervisor: Hypervisor, host: ContractHost) -> None:
    for _ in range(3):
        with standing_still(hypervisor, host.pv):
            pass
        assert_runs(hypervisor, host.pv)


def test_suspended_guest_is_not_suspended_twice(hypervisor: Hypervisor, host: ContractHost) -> None:
    with standing_still(hypervisor, host.pv), pytest.raises(XenError) as caught:
        hypervisor.suspend(host.pv, SuspendLimits())
    assert caught.value.errno == EBUSY


def test_resume_of_a_running_guest_does_nothing(hypervisor: Hypervisor, host: ContractHost) -> None:
    hypervisor.resume(host.pv)

    assert_runs(hypervisor, host.pv)


def test_linux_guests_announce_that_they_suspend_themselves(
    hypervisor: Hypervisor, host: ContractHost
) -> None:
    assert hypervisor.suspend_support(host.pv) is SuspendSupport.ANNOUNCED
    with standing_still(hypervisor, host.pv):
        assert hypervisor.suspend_support(host.pv) is SuspendSupport.ANNOUNCED


def test_nothing_is_withdrawn_where_nothing_was_asked(
    hypervisor: Hypervisor, host: ContractHost
) -> None:
    assert not hypervisor.withdraw_suspend(host.pv)
    with standing_still(hypervisor, host.pv):
        assert not hypervisor.withdraw_suspend(host.pv)


def test_nobody_saves_a_guest_that_we_have_suspended(
    hypervisor: Hypervisor, host: ContractHost
) -> None:
    assert hypervisor.somebody_at(host.pv) is None
    with standing_still(hypervisor, host.pv):
        assert hypervisor.somebody_at(host.pv) is None
