"""What comes next for a page that was not exchanged."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pgofflined.core.ladder import HandOver, LookAgain, SaveRestore, TryAgain, next_rung
from pgofflined.core.outcomes import RefusalReason
from pgofflined.core.policy import Policy

PLAIN = Policy()
SAVING = replace(PLAIN, relocation=replace(PLAIN.relocation, save_restore=True))
LAST = PLAIN.exchange.attempts


@pytest.mark.parametrize("reason", RefusalReason)
def test_no_guest_is_saved_unless_the_policy_says_so(reason: RefusalReason) -> None:
    for tries in (1, LAST, LAST + 1):
        assert not isinstance(next_rung(reason, tries, PLAIN, marked=True), SaveRestore)
        off = replace(SAVING, relocation=replace(SAVING.relocation, enabled=False))
        assert not isinstance(next_rung(reason, tries, off, marked=True), SaveRestore)


def test_what_may_pass_is_tried_again_before_a_guest_is_saved() -> None:
    for tries in range(1, LAST):
        assert next_rung(RefusalReason.GRANTED, tries, SAVING, marked=True) == TryAgain()
    assert next_rung(RefusalReason.GRANTED, LAST, SAVING, marked=True) == SaveRestore()
    # Where nobody is saved, the last of the tries is told of as that.
    assert next_rung(RefusalReason.GRANTED, LAST, PLAIN, marked=True) == TryAgain()


def test_what_does_not_pass_is_not_tried_again() -> None:
    assert next_rung(RefusalReason.SHARED_INFO, 1, SAVING, marked=True) == SaveRestore()
    assert next_rung(RefusalReason.SHARED_INFO, 1, PLAIN, marked=True) == HandOver()


def test_a_guest_is_not_saved_for_a_page_that_would_not_leave_the_host() -> None:
    assert next_rung(RefusalReason.SHARED_INFO, 1, SAVING, marked=False) == HandOver()


@pytest.mark.parametrize(
    "reason",
    [
        *(RefusalReason.BROKEN, RefusalReason.HAS_DEVICES, RefusalReason.NO_SUSPEND),
        *(RefusalReason.NOT_PV, RefusalReason.INTERNAL, RefusalReason.DOMAIN_BUSY),
        *(RefusalReason.NOT_KEPT, RefusalReason.BLACKOUT_LIMIT),
        *(RefusalReason.NO_SUSPEND_SUPPORT, RefusalReason.SUSPEND_UNANNOUNCED),
    ],
)
def test_a_guest_is_not_saved_in_vain(reason: RefusalReason) -> None:
    for tries in (1, LAST, LAST + 1):
        assert not isinstance(next_rung(reason, tries, SAVING, marked=True), SaveRestore)


def test_a_page_that_changed_hands_is_looked_at_again() -> None:
    assert next_rung(RefusalReason.DOMAIN_GONE, LAST, SAVING, marked=True) == LookAgain()
