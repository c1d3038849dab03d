"""Which of the pages that were left are to be looked at anew, and on which occasion."""

from __future__ import annotations

from dataclasses import replace
from errno import EIO
from uuid import UUID

import pytest

from pgofflined.core.book import Cause, PageEntry, Phase
from pgofflined.core.domains import DomainIdentity
from pgofflined.core.errors import XenError
from pgofflined.core.frames import Domid
from pgofflined.ports import Hypervisor
from pgofflined.sim.faults import Fault, FaultyHypervisor
from pgofflined.sim.scenarios import SmallHost, small_host
from pgofflined.unresolved import Found, Occasion, look_once_more

NOTHING = Found(offlined=(), to_triage=())
GONE = DomainIdentity(Domid(77), UUID(int=77))
ALWAYS = set(Occasion)
NEVER: set[Occasion] = set()


def looked(entries: list[PageEntry], xen: Hypervisor, occasion: Occasion) -> Found:
    """What was found out; Xen can be asked."""
    found = look_once_more(entries, xen, occasion)
    assert found is not None
    return found


def page(small: SmallHost, *, marked: bool) -> PageEntry:
    """A page of a guest that lives; Xen has its mark if it says so."""
    mfn = small.host.frame_of(small.pv, small.host.pv(small.pv).layout.plain[0])
    if marked:
        small.host.offline(mfn)
    return PageEntry(
        mfn=mfn,
        cause=Cause.CORRECTED,
        phase=Phase.LEFT,
        since=1.0,
        marked=marked,
        domain=small.host.domain(small.pv).identity,
        reason="granted",
    )


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize(
    ("changes", "occasions"),
    [
        ({}, {Occasion.POLICY_CHANGED}),
        ({"reason": "denied"}, {Occasion.POLICY_CHANGED}),
        ({"reason": "no_relocation"}, {Occasion.POLICY_CHANGED}),
        ({"domain": GONE}, ALWAYS),
        ({"domain": GONE, "reason": "damaged"}, ALWAYS),
        ({"reason": "damaged"}, NEVER),
        ({"reason": "not_ram"}, NEVER),
        ({"reason": "xen", "domain": None}, NEVER),
    ],
)
def test_a_page_goes_back_to_triage_when_something_has_changed(
    *, marked: bool, changes: dict[str, object], occasions: set[Occasion]
) -> None:
    for occasion in Occasion:
        small = small_host()
        entry = replace(page(small, marked=marked), **changes)  # type: ignore[arg-type]
        found = looked([entry], small.host, occasion)
        wanted = (entry.mfn,) if occasion in occasions else ()
        assert found == Found(offlined=(), to_triage=wanted), occasion


def test_whose_owner_could_not_be_told_is_looked_for_slowly() -> None:
    small = small_host()
    entry = replace(page(small, marked=False), domain=None, reason="unfixed_xen")
    asked = {occasion for occasion in Occasion if looked([entry], small.host, occasion).to_triage}
    assert asked == {Occasion.SLOWLY, Occasion.POLICY_CHANGED}


@pytest.mark.parametrize("occasion", list(Occasion))
def test_a_page_that_is_out_of_use_is_told_on_every_occasion(occasion: Occasion) -> None:
    small = small_host()
    entry = page(small, marked=True)
    small.host.destroy(small.pv)
    found = look_once_more([entry], small.host, occasion)
    assert found == Found(offlined=(entry.mfn,), to_triage=())


@pytest.mark.parametrize("occasion", list(Occasion))
def test_a_mark_that_somebody_took_back_is_noticed(occasion: Occasion) -> None:
    small = small_host()
    entry = page(small, marked=True)
    small.host.online(entry.mfn)
    assert looked([entry], small.host, occasion).to_triage == (entry.mfn,)


@pytest.mark.parametrize("occasion", list(Occasion))
@pytest.mark.parametrize("state", ["marked", "broken", "neither"])
def test_a_page_with_an_uncorrected_error_is_to_be_held_back_always(
    occasion: Occasion, state: str
) -> None:
    small = small_host()
    entry = replace(page(small, marked=state == "marked"), cause=Cause.UNCORRECTED)
    if state == "broken":
        small.host.poison(entry.mfn, known=True)
    found = looked([entry], small.host, occasion)
    assert found.to_triage == ((entry.mfn,) if state == "neither" else ())


@pytest.mark.parametrize("method", ["conditions", "query"])
def test_a_xen_that_cannot_be_asked_changes_nothing(method: str) -> None:
    small = small_host()
    entry = replace(page(small, marked=True), domain=GONE)
    fault = Fault(method=method, error=XenError(EIO, op=method))
    deaf = FaultyHypervisor(small.host, fault)
    told = look_once_more([entry], deaf, Occasion.POLICY_CHANGED)
    assert told == (None if method == "conditions" else NOTHING)
    assert looked([entry], deaf, Occasion.POLICY_CHANGED).to_triage == (entry.mfn,)


@pytest.mark.parametrize("occasion", list(Occasion))
@pytest.mark.parametrize("domain", ["living", "gone", "unknown"])
def test_a_page_that_waits_for_its_next_try_does_not_wait_for_an_owner_that_has_gone(
    occasion: Occasion, domain: str
) -> None:
    small = small_host()
    entry = replace(page(small, marked=True), phase=Phase.WAITING)
    if domain != "living":
        entry = replace(entry, domain=GONE if domain == "gone" else None)
    found = looked([entry], small.host, occasion)
    assert found.to_triage == ((entry.mfn,) if domain == "gone" else ())


def test_a_page_that_xen_cannot_be_asked_about_keeps_no_other_from_being_looked_at() -> None:
    small = small_host()
    entry = replace(page(small, marked=True), domain=GONE)
    xen = FaultyHypervisor(small.host, Fault(method="query", error=XenError(EIO, op="query")))
    other = replace(entry, mfn=small.host.frame_of(small.pvh, 5))
    found = looked([entry, other], xen, Occasion.SLOWLY)
    assert found == Found(offlined=(), to_triage=(other.mfn,))
