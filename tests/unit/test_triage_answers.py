"""Triage, answer by answer of Xen; and pages with an uncorrected error."""

from __future__ import annotations

from dataclasses import replace
from errno import EPERM

import numpy as np
import pytest

from pgofflined.core.errors import DomainGone, OfflineCallUnsafe, XenError
from pgofflined.core.frames import DOM0, DOMID_COW, DOMID_IO, DOMID_XEN, Domid, Mfn
from pgofflined.core.offline import OfflineFlag, OfflineReply, OfflineState
from pgofflined.owners import find_pv_owner
from pgofflined.sim.faults import Fault, FaultyHypervisor
from pgofflined.sim.frames import INVALID_M2P
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
    triage,
)

from .test_triage import OPEN, UNFIXED
from .test_triage import _free_frame as free_frame
from .test_triage import _pv_frame as pv_frame
from .test_triage import _triage as traced_triage


class Answering(FaultyHypervisor):
    """A Xen that answers offline calls with what the simulated one has no occasion for."""

    def __init__(self, host: SimulatedHost, reply: OfflineReply) -> None:
        super().__init__(host)
        self.reply = reply

    def offline(self, mfn: Mfn) -> OfflineReply:
        super().offline(mfn)
        return self.reply


def _owned_by(small: SmallHost, owner: Domid) -> Mfn:
    frames = small.host.frames
    mfn = frames.allocate()
    frames.assign(np.array([mfn], dtype=np.uint64), owner)
    return mfn


def _described(disposition: Disposition) -> tuple[object, bool]:
    assert isinstance(disposition, Left | Later)
    return disposition.reason, disposition.marked


def test_what_is_no_memory_of_the_host_is_left_and_any_other_failure_is_the_callers() -> None:
    small = small_host()
    beyond = Mfn(small.host.frames.count + 7)
    disposition, methods = traced_triage(small, beyond)
    assert _described(disposition) == (LeftReason.NOT_RAM, False)
    assert methods == ["query"]
    failing = FaultyHypervisor(small.host, Fault(method="query", errno=EPERM))
    with pytest.raises(XenError, match="EPERM"):
        triage(pv_frame(small), failing, OPEN)


def test_the_mark_of_a_page_that_cannot_be_offlined_safely_just_now_is_not_set() -> None:
    small = small_host()
    unsafe = OfflineCallUnsafe("no thread may make the call")
    xen = FaultyHypervisor(small.host, Fault(method="offline", error=unsafe))
    disposition = triage(pv_frame(small), xen, OPEN)
    assert _described(disposition) == (LeftReason.UNSAFE_CALL, False)
    assert isinstance(disposition, Left)
    assert disposition.detail == "no thread may make the call"


def test_a_page_that_breaks_under_our_call_is_said_to_have_cost_its_owner() -> None:
    small = small_host()
    mfn = pv_frame(small)
    breaks = Fault(method="offline", act=lambda: small.host.poison(mfn, known=True))
    disposition = triage(mfn, FaultyHypervisor(small.host, breaks), OPEN)
    assert _described(disposition) == (LeftReason.BROKEN, True)
    assert isinstance(disposition, Left)
    assert "crashed its owner" in disposition.detail


def test_a_page_that_xen_broke_is_held_pending() -> None:
    small = small_host()
    mfn = small.host.frame_of(small.pvh, 5)
    small.host.break_frame(mfn)
    assert _described(traced_triage(small, mfn)[0]) == (LeftReason.BROKEN, True)


@pytest.mark.parametrize(
    ("owner", "reason"),
    [
        (DOM0, LeftReason.DOM0),
        (DOMID_XEN, LeftReason.XEN),
        (DOMID_IO, LeftReason.IO),
        (DOMID_COW, LeftReason.SHARED),
    ],
)
def test_a_page_of_none_that_can_be_moved_is_left_with_its_mark(
    owner: Domid, reason: LeftReason
) -> None:
    small = small_host()
    mfn = _owned_by(small, owner)
    small.host.frames.special[mfn] = owner == DOMID_XEN
    reply = OfflineReply(flags=OfflineFlag.OWNED | OfflineFlag.PENDING, owner=owner)
    xen = Answering(small.host, reply)
    # It became its owner's after it was looked for.
    xen.plan.append(Fault(method="page_types", times=10**6, error=DomainGone(owner)))
    assert _described(triage(mfn, xen, OPEN)) == (reason, True)


@pytest.mark.parametrize(
    ("flags", "marked"),
    [
        (OfflineFlag.XENPAGE | OfflineFlag.PENDING, True),
        (OfflineFlag.XENPAGE | OfflineFlag.FAILED, False),
    ],
)
def test_of_a_page_of_xens_own_it_is_known_whether_it_holds_the_mark(
    *, flags: OfflineFlag, marked: bool
) -> None:
    small = small_host()
    mfn = _owned_by(small, DOMID_XEN)
    xen = Answering(small.host, OfflineReply(flags=flags, owner=DOMID_XEN))
    assert _described(triage(mfn, xen, OPEN)) == (LeftReason.XEN, marked)


@pytest.mark.parametrize(
    "reply",
    [
        OfflineReply(flags=OfflineFlag.OWNED, owner=Domid(1)),
        OfflineReply(flags=OfflineFlag.PENDING, owner=Domid(1)),
        OfflineReply(flags=OfflineFlag.OWNED | OfflineFlag.PENDING, owner=None),
        OfflineReply(flags=OfflineFlag.NONE, owner=None),
    ],
)
def test_an_answer_that_is_not_understood_is_never_acted_on(reply: OfflineReply) -> None:
    small = small_host()
    disposition = triage(small.host.frame_of(small.pvh, 5), Answering(small.host, reply), OPEN)
    assert _described(disposition) == (LeftReason.NOT_UNDERSTOOD, False)
    assert isinstance(disposition, Left)
    assert str(reply.flags) in disposition.detail


def test_a_page_that_is_being_handed_out_is_looked_at_again() -> None:
    small = small_host()
    mfn = small.host.frames.allocate()
    disposition, _ = traced_triage(small, mfn)
    assert _described(disposition) == (LaterReason.ANONYMOUS, True)


def test_a_page_whose_owner_goes_right_after_the_mark_is_looked_at_again() -> None:
    small = small_host()
    mfn = small.host.frame_of(small.pvh, 5)
    gone = Fault(method="domain", error=DomainGone(small.pvh))
    disposition = triage(mfn, FaultyHypervisor(small.host, gone), OPEN)
    assert _described(disposition) == (LaterReason.OWNER_CHANGED, True)


@pytest.mark.parametrize("poisoned", [False, True])
def test_a_page_of_a_guest_that_has_crashed_waits_for_its_end(*, poisoned: bool) -> None:
    small = small_host()
    mfn = small.host.frame_of(small.pvh, 5)
    small.host.crash(small.pvh, "a test")
    disposition = triage(mfn, small.host, OPEN, poisoned=poisoned)
    assert _described(disposition) == (LaterReason.OWNER_ENDING, True)


def test_a_page_of_a_pv_guest_that_has_crashed_is_not_even_marked() -> None:
    small = small_host()
    mfn = pv_frame(small)
    small.host.crash(small.pv, "a test")
    disposition, methods = traced_triage(small, mfn)
    assert _described(disposition) == (LaterReason.OWNER_ENDING, False)
    assert "offline" not in methods


def test_where_pages_are_marked_when_they_are_scrubbed_a_pv_page_has_no_mark_yet() -> None:
    small = small_host()
    mfn = pv_frame(small)
    later = replace(OPEN, mark_pv_later=lambda _mfn: True)
    disposition, methods = traced_triage(small, mfn, later)
    assert isinstance(disposition, ToExchange)
    assert not disposition.marked
    assert "offline" not in methods
    marked, _ = traced_triage(small, mfn)
    assert isinstance(marked, ToExchange)
    assert marked.marked


def test_a_denied_pv_page_loses_the_mark_that_it_had() -> None:
    small = small_host()
    mfn = pv_frame(small)
    small.host.offline(mfn)
    rules = replace(OPEN, denial=lambda _domain: "denied")
    disposition, methods = traced_triage(small, mfn, rules)
    assert _described(disposition) == (LeftReason.DENIED, False)
    assert isinstance(disposition, Left)
    assert disposition.domain is not None
    assert disposition.domain.domid == small.pv
    assert small.host.query(mfn) is OfflineState.ONLINE
    # Nothing is taken back that is not there.
    _, methods = traced_triage(small, mfn, rules)
    assert "online" not in methods


# Pages with an uncorrected error.


def _poisoned(small: SmallHost, mfn: Mfn, rules: Rules = OPEN) -> tuple[Disposition, list[str]]:
    traced = FaultyHypervisor(small.host)
    return triage(mfn, traced, rules, poisoned=True), traced.trace.methods


@pytest.mark.parametrize("kind", ["pv", "pvh"])
def test_an_owned_page_with_an_uncorrected_error_is_marked_whatever_the_policy_says(
    kind: str,
) -> None:
    small = small_host()
    mfn = pv_frame(small) if kind == "pv" else small.host.frame_of(small.pvh, 5)
    rules = replace(OPEN, denial=lambda _domain: "denied", mark_pv_later=lambda _mfn: True)
    disposition, _ = _poisoned(small, mfn, rules)
    assert _described(disposition) == (LeftReason.UNCORRECTED, True)
    assert isinstance(disposition, Left)
    assert disposition.domain is not None
    assert disposition.domain.name == kind
    assert small.host.query(mfn) is OfflineState.OFFLINE_PENDING


def test_a_free_page_with_an_uncorrected_error_goes_out_of_use_at_once() -> None:
    small = small_host()
    assert isinstance(_poisoned(small, free_frame(small.host))[0], Offlined)


def test_not_even_an_uncorrected_error_has_a_page_marked_of_a_guest_that_xen_has_broken() -> None:
    small = small_host()
    rules = replace(OPEN, wedged=lambda domain: domain.domid == small.pv)
    disposition, methods = _poisoned(small, pv_frame(small), rules)
    assert _described(disposition) == (LaterReason.OWNER_ENDING, False)
    assert "offline" not in methods


def test_where_the_mark_would_damage_xens_heap_the_operator_is_told_how_to_keep_the_page_away() -> (
    None
):
    small = small_host(UNFIXED)
    for mfn, whose, domid in (
        (pv_frame(small), f"d{small.pv} has it", small.pv),
        (small.host.frame_of(small.pvh, 5), "it is in use or Xen's own", None),
        (free_frame(small.host), "it is free, or Xen's own", None),
    ):
        disposition, methods = _poisoned(small, mfn)
        assert _described(disposition) == (LeftReason.UNFIXED_XEN, False)
        assert isinstance(disposition, Left)
        assert f"badpage={mfn:#x}" in disposition.detail
        assert whose in disposition.detail
        assert (disposition.domain and disposition.domain.domid) == domid
        assert "offline" not in methods


def test_on_an_unfixed_xen_a_page_is_left_that_cannot_be_taken_out() -> None:
    small = small_host(UNFIXED)
    for mfn, why in (
        (free_frame(small.host), "it is free, or Xen's own"),
        (small.host.frame_of(small.pvh, 5), "its guest would have to end"),
    ):
        disposition, _ = traced_triage(small, mfn)
        assert isinstance(disposition, Left)
        assert disposition.detail.startswith(why)
    mfn = pv_frame(small)
    small.host.set_m2p(Mfn(mfn ^ 1), int(INVALID_M2P))
    disposition, methods = traced_triage(small, mfn)
    assert _described(disposition) == (LeftReason.UNFIXED_XEN, False)
    assert isinstance(disposition, Left)
    assert disposition.detail.startswith("its neighbour is free")
    assert "offline" not in methods


def test_the_owner_is_found_although_other_guests_end_meanwhile() -> None:
    small = small_host()
    other = small.host.add_pv()
    mfn = small.host.frame_of(other, small.host.pv(other).layout.plain[0])
    # The second domain that is asked about the frame; dom0 is the first.
    xen = FaultyHypervisor(
        small.host, Fault(method="page_types", nth=2, error=DomainGone(small.pv))
    )
    owner = find_pv_owner(mfn, xen)
    assert owner is not None
    assert owner.domid == other
    # No HVM-class guest is asked: what is said of its frames does not tell whose they are.
    assert {call.args[0] for call in xen.trace.of("page_types")} == {DOM0, small.pv, other}


def test_a_mark_is_taken_back_only_where_it_would_damage_xens_heap() -> None:
    for spec, state in ((UNFIXED, OfflineState.ONLINE), (None, OfflineState.OFFLINE_PENDING)):
        small = small_host(spec)
        mfn = small.host.frame_of(small.pvh, 5)
        small.host.offline(mfn)
        _, methods = traced_triage(small, mfn)
        assert small.host.query(mfn) is state
        assert ("online" in methods) is (spec is UNFIXED)


def test_on_an_unfixed_xen_a_page_is_marked_when_its_guest_is_held_and_not_before() -> None:
    small = small_host(UNFIXED)
    mfn = pv_frame(small)
    if small.host.m2p(Mfn(mfn ^ 1)) is None:
        small.host.set_m2p(Mfn(mfn ^ 1), 1)
    disposition, methods = traced_triage(small, mfn)
    assert isinstance(disposition, ToExchange)
    assert not disposition.marked
    assert "offline" not in methods


def test_no_further_page_of_dom0_is_marked_after_xen_has_broken_one_of_it() -> None:
    small = small_host()
    mfn = next(Mfn(m) for m in range(small.host.frames.count) if small.host.frames.owner[m] == DOM0)
    rules = Rules(denial=lambda _domain: None, wedged=lambda domain: domain.is_dom0)
    traced = FaultyHypervisor(small.host)
    disposition = triage(mfn, traced, rules, poisoned=True)
    assert _described(disposition) == (LeftReason.DOM0, False)
    assert "offline" not in traced.trace.methods


def test_a_page_whose_mark_cannot_be_taken_back_is_said_to_be_marked(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for owner in ("pv", "neighbour", "pvh", "poisoned"):
        small = small_host(UNFIXED)
        mfn = small.host.frame_of(small.pvh, 5) if owner == "pvh" else pv_frame(small)
        if (small.host.m2p(Mfn(mfn ^ 1)) is None) is not (owner == "neighbour"):
            small.host.set_m2p(Mfn(mfn ^ 1), int(INVALID_M2P) if owner == "neighbour" else 1)
        small.host.offline(mfn)
        xen = FaultyHypervisor(small.host, Fault(method="online", times=10**6, errno=EPERM))
        disposition = triage(mfn, xen, OPEN, poisoned=owner == "poisoned")
        assert isinstance(disposition, ToExchange if owner == "pv" else Left)
        assert disposition.marked
        assert "offline" not in xen.trace.methods
        assert f"xen-hptool mem-online {mfn:x}" in caplog.records[-1].getMessage()


def test_a_denied_page_whose_mark_cannot_be_taken_back_is_said_to_be_marked(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rules = replace(OPEN, denial=lambda domain: f"{domain.name} is denied")
    for of_pv in (True, False):
        small = small_host()
        mfn = pv_frame(small) if of_pv else small.host.frame_of(small.pvh, 5)
        small.host.offline(mfn)
        xen = FaultyHypervisor(small.host, Fault(method="online", times=10**6, errno=EPERM))
        assert _described(triage(mfn, xen, rules)) == (LeftReason.DENIED, True)
        assert f"xen-hptool mem-online {mfn:x}" in caplog.records[-1].getMessage()


def test_the_mark_of_a_denied_page_that_has_gone_out_of_use_meanwhile_is_left() -> None:
    small = small_host()
    mfn = pv_frame(small)
    small.host.offline(mfn)

    def ends(_domain: object) -> str:
        small.host.destroy(small.pv)
        return "it is denied"

    triage(mfn, small.host, replace(OPEN, denial=ends))
    assert small.host.query(mfn) is OfflineState.OFFLINED


@pytest.mark.parametrize("who", ["dom0", "pv", "pvh"])
def test_whose_a_broken_page_is_is_told_where_xen_tells_it(who: str) -> None:
    small = small_host()
    host = small.host
    mfn, owner = {
        "dom0": (next(Mfn(m) for m in range(host.frames.count) if host.frames.owner[m] == 0), DOM0),
        "pv": (pv_frame(small), small.pv),
        "pvh": (host.frame_of(small.pvh, 5), None),
    }[who]
    host.poison(mfn, known=True)
    disposition = triage(mfn, host, OPEN)
    assert isinstance(disposition, Left)
    found = disposition.domain
    assert (None if found is None else (found.domid, found.name)) == (
        None if owner is None else (owner, host.domain(owner).name)
    )
    told = {"dom0": "it is dom0's", "pv": "leave it as it is", "pvh": "restart that guest"}[who]
    assert disposition.detail.startswith("Xen holds it for broken while somebody owns it; ")
    assert told in disposition.detail


@pytest.mark.parametrize("why", ["wedged", "crashed", "dying", "nothing"])
def test_a_page_that_xen_has_lent_a_guest_is_marked_unless_that_may_hang_the_host(why: str) -> None:
    small = small_host()
    mfn = Mfn(small.host.simulated(small.pv).shared_info)
    rules = replace(OPEN, wedged=lambda domain: why == "wedged" and domain.domid == small.pv)
    if why == "crashed":
        small.host.crash(small.pv, "by a test")
    small.host.simulated(small.pv).dying = why == "dying"
    for poisoned in (True, False):
        disposition, methods = (
            _poisoned(small, mfn, rules) if poisoned else traced_triage(small, mfn, rules)
        )
        if why == "nothing":
            assert "offline" in methods
            continue
        assert isinstance(disposition, Later)
        assert "offline" not in methods
        assert disposition.domain is not None
        assert disposition.domain.domid == small.pv
        words = {"wedged": "could hang the host", "crashed": "has crashed", "dying": "taken apart"}
        assert words[why] in disposition.detail
        is_dying = disposition.reason is LaterReason.OWNER_DYING
        assert is_dying is (why == "dying")


def test_the_mark_of_a_page_whose_owner_cannot_be_named_is_booked() -> None:
    small = small_host()
    mfn = small.host.frame_of(small.pvh, 5)
    fault = Fault(method="domain", times=10, error=XenError(EPERM, op="name"))
    disposition = triage(mfn, FaultyHypervisor(small.host, fault), OPEN)
    assert _described(disposition) == (LaterReason.OWNER_UNNAMED, True)
    assert small.host.query(mfn) is OfflineState.OFFLINE_PENDING
