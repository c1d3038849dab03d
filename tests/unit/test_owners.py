"""Whose a page is, and which domains Xen has hit."""

from __future__ import annotations

from dataclasses import replace
from errno import EIO
from typing import TYPE_CHECKING
from uuid import UUID

import numpy as np
import pytest

from pgofflined.core.domains import DomainInfo
from pgofflined.core.errors import DomainGone, XenError
from pgofflined.core.frames import DOM0, Domid, Mfn
from pgofflined.core.xenversion import XenVersion
from pgofflined.owners import (
    find_pv_owner,
    find_special_owner,
    named,
    named_if_possible,
    what_of_broken,
)
from pgofflined.sim.faults import Fault, FaultyHypervisor
from pgofflined.sim.frames import FrameState
from pgofflined.sim.host import HostSpec
from pgofflined.sim.scenarios import SmallHost, small_host
from pgofflined.uncorrected import UncorrectedErrors

if TYPE_CHECKING:
    from pgofflined.ports import FrameArray


class Kept:
    """What is kept over a restart."""

    def __init__(self) -> None:
        self.meta: dict[str, str] = {}
        self.writes = 0

    def get_meta(self, key: str) -> str | None:
        return self.meta.get(key)

    def set_meta(self, key: str, value: str) -> None:
        self.meta[key] = value
        self.writes += 1


@pytest.fixture
def small() -> SmallHost:
    return small_host()


def test_only_a_pv_domain_is_named_as_the_owner(small: SmallHost) -> None:
    host = small.host
    other = host.add_pv()
    for domid in (small.pv, other):
        mfn = host.frame_of(domid, host.pv(domid).layout.plain[0])
        found = find_pv_owner(mfn, host)
        assert found is not None
        assert found.domid == domid
    dom0s = find_pv_owner(Mfn(int(np.flatnonzero(host.frames.owner == DOM0)[0])), host)
    assert dom0s is not None
    assert dom0s.is_dom0
    assert find_pv_owner(host.frame_of(small.pvh, 5), host) is None
    free = Mfn(int(np.flatnonzero(host.frames.state == FrameState.FREE)[0]))
    assert find_pv_owner(free, host) is None


def test_a_domain_that_goes_meanwhile_hides_no_other_owner(small: SmallHost) -> None:
    host = small.host
    other = host.add_pv()
    mfn = host.frame_of(other, host.pv(other).layout.plain[0])
    gone = host.domain(small.pv)
    host.destroy(small.pv)

    class Late(FaultyHypervisor):
        """Still names the domain that has gone."""

        def conditions(self) -> list[DomainInfo]:
            return [gone, *super().conditions()]

    found = find_pv_owner(mfn, Late(host))
    assert found is not None
    assert found.domid == other


def test_an_owner_is_named_as_long_as_it_is_the_same_domain(small: SmallHost) -> None:
    host = small.host
    owner = host.domain(small.pv)
    nameless = replace(owner, name="")
    assert named(nameless, host) == owner
    assert named_if_possible(nameless, host) == owner
    later = replace(nameless, uuid=UUID(int=99))
    assert named(later, host) is None
    assert named_if_possible(later, host) == later
    host.destroy(small.pv)
    assert named(nameless, host) is None
    assert named_if_possible(nameless, host) == nameless


def test_an_owner_whose_name_nobody_can_tell_is_told_without_it(small: SmallHost) -> None:
    nameless = replace(small.host.domain(small.pv), name="")
    fault = Fault(method="domain", times=10, error=XenError(EIO, op="domain"))
    xen = FaultyHypervisor(small.host, fault)
    assert named_if_possible(nameless, xen) == nameless
    with pytest.raises(XenError):
        named(nameless, xen)


class Lending(FaultyHypervisor):
    """Every domain has a grant table beside its shared_info."""

    def __init__(self, small: SmallHost, *faults: Fault) -> None:
        super().__init__(small.host, *faults)

    def shared_frames(self, domid: Domid) -> FrameArray:
        own = super().shared_frames(domid)
        return np.append(own, np.uint64(grant_table(domid)))


def grant_table(domid: Domid) -> Mfn:
    return Mfn(0x20 + domid)


def everybody(_domain: DomainInfo) -> bool:
    return True


def test_a_page_that_xen_has_lent_a_suspected_pv_domain_is_its(small: SmallHost) -> None:
    xen = Lending(small)
    other = small.host.add_pv()
    for domid in (small.pv, other):
        for mfn in (small.host.simulated(domid).shared_info, grant_table(domid)):
            found = find_special_owner(mfn, xen, everybody)
            assert found is not None
            assert found.domid == domid
            assert find_special_owner(mfn, xen, lambda _domain: False) is None
    pvh = small.host.simulated(small.pvh).shared_info
    assert find_special_owner(pvh, xen, everybody) is None
    plain = small.host.frame_of(small.pv, 5)
    assert find_special_owner(plain, xen, everybody) is None


def test_of_dom0_only_the_shared_info_is_known(small: SmallHost) -> None:
    xen = Lending(small)
    found = find_special_owner(small.host.domain(DOM0).shared_info, xen, everybody)
    assert found is not None
    assert found.is_dom0
    # Xen tells the frames of others only.
    assert find_special_owner(grant_table(DOM0), xen, everybody) is None
    assert DOM0 not in {call.args[0] for call in xen.trace.of("shared_frames")}


def test_one_whose_lent_pages_cannot_be_told_counts_as_the_owner(small: SmallHost) -> None:
    other = small.host.add_pv()
    mfn = grant_table(other)
    gone = Lending(small, Fault(method="shared_frames", error=DomainGone(small.pv)))
    found = find_special_owner(mfn, gone, everybody)
    assert found is not None
    assert found.domid == other
    deaf = Lending(small, Fault(method="shared_frames", error=XenError(EIO, op="resource")))
    found = find_special_owner(mfn, deaf, everybody)
    assert found is not None
    assert found.domid == small.pv


def test_what_is_to_be_done_about_a_broken_page_is_what_does_no_harm(small: SmallHost) -> None:
    host = small.host
    reboot = "move the other guests away and reboot the host"
    assert what_of_broken(host.domain(DOM0), host) == f"it is dom0's: {reboot}"
    of_pv = what_of_broken(host.domain(small.pv), host)
    assert of_pv.startswith(f"it is d{small.pv}'s, and to destroy a PV guest")
    assert of_pv.endswith(f"may hang the host: leave it as it is, {reboot}")
    of_others = what_of_broken(None, host)
    assert of_others == "it goes out of use when its owner ends: restart that guest"
    old = small_host(HostSpec(version=XenVersion(4, 17, 7))).host
    assert what_of_broken(None, old).startswith("when its owner ends, this Xen's allocator may be")
    assert what_of_broken(None, old).endswith(f"damaged: before that, {reboot}")
    assert what_of_broken(old.domain(DOM0), old) == f"it is dom0's: {reboot}"


def test_only_the_domain_that_xen_has_hit_is_wedged(small: SmallHost) -> None:
    errors = UncorrectedErrors(Kept())
    domain, other = (small.host.domain(domid).identity for domid in (small.pv, small.pvh))
    assert not errors.is_wedged(domain)
    errors.add_wedged(domain)
    assert errors.is_wedged(domain)
    assert not errors.is_wedged(other)
    # A later domain with its number is another one.
    assert not errors.is_wedged(replace(domain, uuid=UUID(int=99)))


def test_whoever_has_the_number_is_wedged_where_xen_told_no_more(small: SmallHost) -> None:
    kept = Kept()
    domain = small.host.domain(small.pv).identity
    UncorrectedErrors(kept).add_wedged_domid(domain.domid)
    # Also for the next process, and nobody else.
    errors = UncorrectedErrors(kept)
    assert errors.is_wedged(domain)
    assert errors.is_wedged(replace(domain, uuid=UUID(int=99)))
    assert not errors.is_wedged(replace(domain, domid=Domid(domain.domid + 1)))


def test_what_is_known_already_is_not_written_again(small: SmallHost) -> None:
    kept = Kept()
    errors = UncorrectedErrors(kept)
    for _ in range(2):
        errors.add_wedged(small.host.domain(small.pv).identity)
    assert kept.writes == 1
    for _ in range(2):
        errors.add(Mfn(7))
    assert kept.writes == 2
    errors.remove(Mfn(8))
    assert kept.writes == 2
