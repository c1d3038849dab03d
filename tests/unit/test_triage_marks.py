"""What triage says of a page's mark where it cannot be set, taken back, or kept for its owner."""

from __future__ import annotations

import logging
from dataclasses import replace
from errno import EPERM

import pytest

from pgofflined.core.errors import DomainGone, OfflineCallUnsafe
from pgofflined.sim.faults import Fault, FaultyHypervisor
from pgofflined.sim.scenarios import small_host
from pgofflined.triage import Later, LaterReason, Left, LeftReason, triage

from .test_triage import OPEN, UNFIXED
from .test_triage import _pv_frame as pv_frame


def test_a_page_that_has_its_mark_already_keeps_it_where_no_call_can_be_made() -> None:
    small = small_host()
    mfn = pv_frame(small)
    small.host.offline(mfn)
    unsafe = OfflineCallUnsafe("no thread may make the call")
    disposition = triage(
        mfn, FaultyHypervisor(small.host, Fault(method="offline", error=unsafe)), OPEN
    )
    assert isinstance(disposition, Left)
    assert (disposition.reason, disposition.marked) == (LeftReason.UNSAFE_CALL, True)


@pytest.mark.parametrize("method", ["condition", "domain"])
def test_a_page_whose_owner_goes_as_it_is_looked_up_stays_marked(method: str) -> None:
    small = small_host()
    mfn = small.host.frame_of(small.pvh, 5)
    gone = Fault(method=method, times=10, error=DomainGone(small.pvh))
    disposition = triage(mfn, FaultyHypervisor(small.host, gone), OPEN)
    assert isinstance(disposition, Later)
    assert (disposition.reason, disposition.marked) == (LaterReason.OWNER_CHANGED, True)
    assert disposition.detail == f"its owner d{small.pvh} has just gone"


def test_why_a_denied_page_stays_marked_is_told_with_the_command_that_helps(
    caplog: pytest.LogCaptureFixture,
) -> None:
    small = small_host()
    mfn = pv_frame(small)
    small.host.offline(mfn)
    xen = FaultyHypervisor(small.host, Fault(method="online", times=10**6, errno=EPERM))
    triage(mfn, xen, replace(OPEN, denial=lambda _domain: "domains.deny has it"))
    [told] = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert told.startswith(
        f"mfn {mfn:#x} of d{small.pv} stays marked, although domains.deny has it: the mark could "
        "not be taken back ("
    )
    assert "EPERM" in told
    assert told.endswith(f"); `xen-hptool mem-online {mfn:x}` does it")


def test_a_mark_that_may_damage_the_allocator_and_cannot_be_taken_back_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    small = small_host(UNFIXED)
    mfn = pv_frame(small)
    small.host.offline(mfn)
    xen = FaultyHypervisor(small.host, Fault(method="online", times=10**6, errno=EPERM))
    triage(mfn, xen, OPEN)
    [told] = [record.getMessage() for record in caplog.records if record.levelno > logging.ERROR]
    assert told.startswith(f"the mark of mfn {mfn:#x} could not be taken back (")
    assert "EPERM" in told
    assert told.endswith(f"take it back with `xen-hptool mem-online {mfn:x}`")
