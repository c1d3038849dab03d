"""What operators read of a failure: what, where, and with which errno."""

from __future__ import annotations

from errno import EBUSY, EEXIST, EINVAL

import pytest

from pgofflined.core.domains import ShutdownReason
from pgofflined.core.errors import (
    DomainGone,
    GuestDidNotSuspend,
    GuestEnded,
    SourceUnavailable,
    XenError,
)
from pgofflined.core.frames import Domid, Mfn


def test_a_failure_says_what_where_and_with_which_errno() -> None:
    for error, text in (
        (XenError(EBUSY, op="pin"), "pin failed with EBUSY"),
        (XenError(EBUSY, op="pin", domid=Domid(0)), "pin failed with EBUSY (d0)"),
        (XenError(EBUSY, op="pin", mfn=Mfn(0)), "pin failed with EBUSY (mfn 0x0)"),
        (
            XenError(EINVAL, op="query", domid=Domid(7), mfn=Mfn(0x1A)),
            "query failed with EINVAL (d7, mfn 0x1a)",
        ),
        (XenError(9999, op="pin"), "pin failed with 9999"),
        (DomainGone(Domid(7)), "d7 is gone"),
        (
            SourceUnavailable(EEXIST, source="native", reason="it is bound"),
            "the native source is unavailable (EEXIST): it is bound",
        ),
        (
            SourceUnavailable(9999, source="native", reason="it is bound"),
            "the native source is unavailable (9999): it is bound",
        ),
    ):
        assert str(error) == text


def test_a_failed_call_keeps_what_its_caller_needs() -> None:
    error = XenError(EBUSY, op="exchange", domid=Domid(7), mfn=Mfn(0x1A))
    assert (error.errno, error.op, error.domid, error.mfn, error.done) == (
        *(EBUSY, "exchange", 7, 0x1A, 0),
    )
    assert XenError(EBUSY, op="exchange", done=3).done == 3
    assert DomainGone(Domid(7)).domid == 7
    assert SourceUnavailable(EEXIST, source="native", reason="it is bound").errno == EEXIST
    assert SourceUnavailable(EEXIST, source="native", reason="it is bound").source == "native"


@pytest.mark.parametrize(
    ("stage", "what"),
    [
        ("acknowledge", "did not take notice of the request to suspend itself"),
        ("suspend", "took notice of the request to suspend itself, but did not"),
        ("neither", "neither"),
    ],
)
def test_a_guest_that_does_not_suspend_says_how_far_it_came(stage: str, what: str) -> None:
    error = GuestDidNotSuspend(Domid(7), stage=stage, seconds=2.5)
    assert str(error) == f"d7 {what} within 2.5 s; it runs on"
    assert (error.domid, error.stage, error.seconds) == (7, stage, 2.5)


@pytest.mark.parametrize(
    ("reason", "what"),
    [(None, "is gone"), (ShutdownReason.REBOOT, "has shut down (reboot)")],
)
def test_a_guest_that_ends_when_asked_to_suspend_says_how(
    reason: ShutdownReason | None, what: str
) -> None:
    error = GuestEnded(Domid(7), reason)
    assert str(error) == f"d7 {what} after it was asked to suspend itself"
    assert (error.domid, error.reason) == (7, reason)
