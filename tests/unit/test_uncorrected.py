"""Frames that must not be read, and whose they are."""

from __future__ import annotations

from dataclasses import replace
from errno import EIO
from uuid import UUID

import numpy as np
import pytest

from pgofflined.core.book import Book, Cause, PageEntry, Phase
from pgofflined.core.domains import DomainIdentity
from pgofflined.core.errors import XenError
from pgofflined.core.frames import Domid, Mfn
from pgofflined.ports import Hypervisor
from pgofflined.sim.faults import Fault, FaultyHypervisor
from pgofflined.sim.frames import INVALID_M2P, FrameState
from pgofflined.sim.scenarios import SmallHost, small_host
from pgofflined.uncorrected import UncorrectedErrors, known_owners, poison_of, stored_poison


class Kept:
    def __init__(self) -> None:
        self.meta: dict[str, str] = {}

    def get_meta(self, key: str) -> str | None:
        return self.meta.get(key)

    def set_meta(self, key: str, value: str) -> None:
        self.meta[key] = value


def pv_page(small: SmallHost) -> Mfn:
    return small.host.frame_of(small.pv, small.host.pv(small.pv).layout.plain[0])


def blamed(
    small: SmallHost,
    mfn: Mfn,
    *,
    xen: Hypervisor | None = None,
    owners: dict[Mfn, DomainIdentity] | None = None,
) -> set[Domid]:
    """The guests that may not be read for a frame's sake."""
    found = set()
    for domain in small.host.domains():
        what = poison_of(domain, frozenset({mfn}), xen or small.host, owners or {})
        if what is not None:
            assert f"{mfn:#x}" in what
            assert f"d{domain.domid}" in what
            found.add(domain.domid)
    return found


def test_only_the_owner_of_a_pv_page_is_kept_from_being_read() -> None:
    small = small_host()
    small.host.add_pv()
    mfn = pv_page(small)
    assert blamed(small, mfn) == {small.pv}
    # Its owner cannot deny it.
    small.host.set_m2p(mfn, int(INVALID_M2P))
    assert blamed(small, mfn) == {small.pv}


def test_any_pvh_guest_may_own_a_page_whose_owner_xen_has_not_named() -> None:
    small = small_host()
    other = small.host.add_hvm(name="other")
    mfn = small.host.frame_of(small.pvh, 5)
    assert blamed(small, mfn) == {small.pvh, other}
    owner = small.host.domain(small.pvh).identity
    assert blamed(small, mfn, owners={mfn: owner}) == {small.pvh, other}
    small.host.offline(mfn)
    assert blamed(small, mfn, owners={mfn: owner}) == {small.pvh}


def test_the_reason_ends_when_the_page_is_out_of_use() -> None:
    small = small_host()
    mfn = pv_page(small)
    small.host.offline(mfn)
    assert blamed(small, mfn) == {small.pv}
    owner = small.host.domain(small.pv).identity
    small.host.destroy(small.pv)
    assert blamed(small, mfn, owners={mfn: owner}) == set()


def test_nobody_is_kept_from_anything_for_a_free_page_or_for_what_is_no_memory() -> None:
    small = small_host()
    free = Mfn(int(np.flatnonzero(small.host.frames.state == FrameState.FREE)[0]))
    device = Mfn(int(np.flatnonzero(~small.host.frames.ram)[0]))
    assert blamed(small, free) == set()
    assert blamed(small, device) == set()
    assert blamed(small, Mfn(small.host.frames.count + 7)) == set()


@pytest.mark.parametrize("method", ["query", "page_types", "m2p"])
def test_a_guest_is_not_read_where_xen_cannot_be_asked(method: str) -> None:
    small = small_host()
    mfn = small.host.frame_of(small.pvh, 5)
    fault = Fault(method=method, times=10**6, error=XenError(EIO, op=method))
    with pytest.raises(XenError):
        blamed(small, mfn, xen=FaultyHypervisor(small.host, fault))


def test_what_is_known_is_known_after_a_restart() -> None:
    kept = Kept()
    small = small_host()
    errors = UncorrectedErrors(kept)
    before = errors.poisoned
    errors.add(Mfn(9))
    errors.add(Mfn(7))
    errors.add(Mfn(9))
    errors.remove(Mfn(9))
    errors.add_wedged(small.host.domain(small.pv).identity)
    assert before == frozenset(), "others may be reading it"
    again = UncorrectedErrors(kept)
    assert again.poisoned == {7} == stored_poison(kept)
    assert again.wedged == {small.host.domain(small.pv).identity}


@pytest.mark.parametrize("nonsense", ["{", '["x"]', "[[1]]"])
def test_stored_nonsense_is_told_and_done_without(
    nonsense: str, caplog: pytest.LogCaptureFixture
) -> None:
    kept = Kept()
    kept.meta = {"poisoned": nonsense, "wedged": nonsense}
    errors = UncorrectedErrors(kept)
    assert errors.poisoned == frozenset()
    assert errors.wedged == frozenset()
    assert [text.split(" cannot be read: ")[0] for text in caplog.messages] == [
        *("what was stored of uncorrected errors", "what was stored of domains that Xen has hit"),
    ]
    assert all(
        text.split(" cannot be read: ")[1] not in ("", "None", "%s") for text in caplog.messages
    )


def test_where_nothing_was_stored_nothing_is_told(caplog: pytest.LogCaptureFixture) -> None:
    errors = UncorrectedErrors(Kept())
    assert (errors.poisoned, errors.wedged) == (frozenset(), frozenset())
    assert caplog.messages == []


def test_the_book_knows_the_owners_of_marked_pages_as_far_as_xen_has_named_them() -> None:
    owner = DomainIdentity(Domid(7), UUID(int=7))
    known = PageEntry(
        mfn=Mfn(1),
        cause=Cause.UNCORRECTED,
        phase=Phase.LEFT,
        since=1.0,
        marked=True,
        domain=owner,
    )
    book = Book(
        [
            known,
            replace(known, mfn=Mfn(2), marked=False),
            replace(known, mfn=Mfn(3), domain=None),
            replace(known, mfn=Mfn(4)),
        ]
    )
    poisoned = frozenset(map(Mfn, (1, 2, 3, 5)))
    assert known_owners(book, poisoned) == {Mfn(1): owner}
