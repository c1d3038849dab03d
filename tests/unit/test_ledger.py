"""The book with its side effects."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import pytest

from pgofflined.core.book import Cause, PageEntry, Phase
from pgofflined.core.events import Event
from pgofflined.core.frames import Domid, Mfn
from pgofflined.core.policy import Backoff
from pgofflined.ledger import Ledger, tell
from pgofflined.sim.clock import ManualClock

from .relocation.doubles import guest

PAGE = Mfn(0x10)
SOON = Backoff(first=2.0, last=300.0)
TRIES = Backoff(first=60.0, last=3600.0, attempts=3)


class Kept:
    """What a restart of the daemon finds."""

    def __init__(self) -> None:
        self.entries: dict[Mfn, PageEntry] = {}

    def put_page(self, entry: PageEntry) -> None:
        self.entries[entry.mfn] = entry

    def remove_page(self, mfn: Mfn) -> None:
        del self.entries[mfn]


def ledger_of(kept: Kept) -> Ledger:
    return Ledger(kept, ManualClock(), tuple(kept.entries.values()))


def begun(kept: Kept) -> Ledger:
    ledger = ledger_of(kept)
    ledger.begin(PAGE, Cause.CORRECTED, "two errors")
    ledger.hand_over(PAGE, guest(7), Phase.EXCHANGE)
    return ledger


def wait(ledger: Ledger) -> float:
    """Wait for something that has nothing to do with an exchange; for so long."""
    ledger.wait(PAGE, SOON, "cannot_ask_xen", "no answer")
    return ledger.seconds_to_next() or 0.0


def refuse(ledger: Ledger) -> None:
    ledger.refused(PAGE, TRIES, "granted", "it is granted", marked=True)


def test_waits_grow_and_are_no_tries() -> None:
    kept = Kept()
    ledger = begun(kept)
    assert [wait(ledger) for _ in range(9)] == [2, 4, 8, 16, 32, 64, 128, 256, 300]
    assert kept.entries[PAGE].attempts == 0
    refuse(ledger)
    assert (kept.entries[PAGE].attempts, kept.entries[PAGE].phase) == (1, Phase.WAITING)
    assert ledger.seconds_to_next() == 60


def test_the_last_try_is_the_last_also_of_a_daemon_that_was_restarted() -> None:
    kept = Kept()
    ledger = begun(kept)
    refuse(ledger)
    refuse(ledger)
    assert kept.entries[PAGE].phase is Phase.WAITING
    ledger = ledger_of(kept)
    ledger.begin_again()
    ledger.hand_over(PAGE, guest(7), Phase.EXCHANGE)
    refuse(ledger)
    assert kept.entries[PAGE].phase is Phase.LEFT
    assert "after 3 tries" in kept.entries[PAGE].detail


def test_what_one_guest_was_refused_is_no_try_of_the_next_owner() -> None:
    kept = Kept()
    ledger = begun(kept)
    refuse(ledger)
    ledger.hand_over(PAGE, replace(guest(8), domid=Domid(8)), Phase.EXCHANGE)
    assert kept.entries[PAGE].attempts == 0


def test_a_page_taken_in_hand_anew_is_tried_and_waited_for_as_at_first() -> None:
    kept = Kept()
    ledger = begun(kept)
    wait(ledger)
    refuse(ledger)
    ledger.leave(PAGE, "granted", "it is granted", marked=True)
    ledger.begin(PAGE, Cause.OPERATOR, "asked for")
    assert kept.entries[PAGE].attempts == 0
    assert wait(ledger) == 2


def test_a_page_taken_in_hand_anew_keeps_its_mark_and_its_owner() -> None:
    kept = Kept()
    ledger = begun(kept)
    ledger.leave(PAGE, "granted", "it is granted", marked=True)
    ledger.begin(PAGE, Cause.OPERATOR, "asked for")
    entry = kept.entries[PAGE]
    assert (entry.marked, entry.domain, entry.domain_name) == (True, guest(7).identity, "guest7")
    assert (entry.cause, entry.phase, entry.detail) == (Cause.OPERATOR, Phase.TRIAGE, "asked for")
    ledger.begin(Mfn(0x11), Cause.CORRECTED, "two errors")
    other = kept.entries[Mfn(0x11)]
    assert (other.marked, other.domain, other.domain_name) == (False, None, "")
    assert other.since == ManualClock().now()


@pytest.mark.parametrize(
    "end",
    [
        lambda ledger: ledger.begin(PAGE, Cause.OPERATOR, "asked for"),
        lambda ledger: ledger.look_again([PAGE]),
        lambda ledger: ledger.hold(PAGE, "dry run"),
        lambda ledger: ledger.hand_over(PAGE, guest(7), Phase.EXCHANGE),
        lambda ledger: ledger.to_relocation(PAGE),
        lambda ledger: ledger.offlined(PAGE, "it was free"),
        lambda ledger: ledger.leave(PAGE, "granted", "it is granted", marked=True),
    ],
    ids=["begin", "look_again", "hold", "hand_over", "to_relocation", "offlined", "leave"],
)
def test_a_page_with_which_something_else_happens_does_not_wait_any_more(
    end: Callable[[Ledger], None],
) -> None:
    kept = Kept()
    ledger = begun(kept)
    wait(ledger)
    assert kept.entries[PAGE].next_try == ManualClock().now() + 2
    end(ledger)
    assert kept.entries[PAGE].next_try is None
    assert ledger.seconds_to_next() is None
    assert ledger.shown(kept.entries[PAGE]) == kept.entries[PAGE]


def test_a_page_that_is_out_of_use_has_its_mark_and_no_reason() -> None:
    kept = Kept()
    ledger = begun(kept)
    ledger.wait(PAGE, SOON, "scrubbing", "it is free", marked=False)
    ledger.offlined(PAGE, "it was free")
    entry = kept.entries[PAGE]
    assert (entry.phase, entry.marked, entry.reason, entry.detail) == (
        *(Phase.OFFLINED, True, "", "it was free"),
    )
    assert not ledger.is_under_way(PAGE)


def test_a_page_is_given_to_the_relocations_with_its_owner() -> None:
    kept = Kept()
    ledger = begun(kept)
    assert (kept.entries[PAGE].phase, kept.entries[PAGE].marked) == (Phase.EXCHANGE, True)
    ledger.to_relocation(PAGE)
    entry = kept.entries[PAGE]
    assert (entry.phase, entry.domain, entry.domain_name) == (
        *(Phase.RELOCATION, guest(7).identity, "guest7"),
    )
    assert ledger.is_under_way(PAGE)
    assert not ledger.is_under_way(Mfn(0x11))


@pytest.mark.parametrize(
    "different",
    [
        {"reason": "denied"},
        {"detail": "it is granted twice"},
        {"marked": False},
    ],
)
def test_why_a_page_stays_is_said_again_only_when_it_has_changed(
    different: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    ledger = begun(Kept())
    caplog.clear()
    same: dict[str, object] = {"reason": "granted", "detail": "it is granted", "marked": True}
    for _ in range(3):
        ledger.leave(PAGE, **same)  # type: ignore[arg-type]
    assert caplog.messages == ["mfn 0x10 stays where it is: it is granted"]
    ledger.leave(PAGE, **{**same, **different})  # type: ignore[arg-type]
    assert len(caplog.records) == 2


def test_a_page_that_is_left_with_another_owner_has_that_one() -> None:
    kept = Kept()
    ledger = begun(kept)
    ledger.leave(PAGE, "granted", "it is granted", marked=True)
    assert kept.entries[PAGE].domain == guest(7).identity
    ledger.leave(PAGE, "denied", "it is denied", marked=False, domain=guest(8))
    entry = kept.entries[PAGE]
    assert (entry.domain, entry.domain_name) == (guest(8).identity, guest(8).name)
    assert not entry.marked


def test_a_wait_keeps_what_is_known_of_the_mark_or_says_it_anew() -> None:
    kept = Kept()
    ledger = begun(kept)
    for known, marked in ((None, True), (False, False), (None, False), (True, True)):
        ledger.wait(PAGE, SOON, "anonymous", "it has no owner", marked=known)
        entry = kept.entries[PAGE]
        assert (entry.phase, entry.reason, entry.detail) == (
            *(Phase.WAITING, "anonymous", "it has no owner"),
        )
        assert entry.marked is marked
    ledger.refused(PAGE, TRIES, "granted", "it is granted", marked=False)
    entry = kept.entries[PAGE]
    assert (entry.reason, entry.detail, entry.marked) == ("granted", "it is granted", False)


def test_waits_are_counted_for_one_reason_in_a_row() -> None:
    ledger = begun(Kept())
    assert ledger.waits(PAGE, "cannot_ask_xen") == 0
    wait(ledger)
    assert wait(ledger) == 4
    assert ledger.waits(PAGE, "cannot_ask_xen") == 2
    assert ledger.waits(PAGE, "anonymous") == 0
    ledger.wait(PAGE, SOON, "anonymous", "it has no owner")
    assert ledger.waits(PAGE, "anonymous") == 1
    assert wait(ledger) == 2


def test_after_the_last_of_its_waits_a_page_waits_as_long_again() -> None:
    ledger = begun(Kept())
    twice = Backoff(first=2.0, last=5.0, attempts=2)
    for seconds in (2, 5, 5):
        ledger.wait(PAGE, twice, "not_confirmed", "Xen has yet to take it out")
        assert ledger.seconds_to_next() == seconds


def test_pages_are_due_when_they_are_new_or_have_waited_and_no_more_than_asked_for() -> None:
    clock = ManualClock()
    ledger = Ledger(Kept(), clock)
    pages = [Mfn(number) for number in range(4)]
    for mfn in pages:
        ledger.begin(mfn, Cause.CORRECTED, "two errors")
    assert ledger.due(10) == pages
    assert ledger.due(3) == pages[:3]
    assert ledger.seconds_to_next() is None
    ledger.wait(pages[0], Backoff(first=60, last=60), "granted", "it is granted")
    ledger.wait(pages[1], Backoff(first=2, last=2), "granted", "it is granted")
    assert ledger.due(10) == pages[2:]
    assert ledger.seconds_to_next() == 2
    clock.wait(2)
    assert ledger.due(10) == [*pages[2:], pages[1]]
    assert ledger.seconds_to_next() == 0
    clock.wait(1)
    assert ledger.seconds_to_next() == 0
    assert ledger.shown(ledger.book.change(pages[0])).next_try == clock.now() + 57


class SetClock(ManualClock):
    """A clock whose date somebody sets."""

    offset = 0.0

    def now(self) -> float:
        return super().now() + self.offset


def test_the_next_try_is_shown_by_the_date_as_it_is_now() -> None:
    clock = SetClock()
    ledger = Ledger(Kept(), clock)
    ledger.begin(PAGE, Cause.CORRECTED, "two errors")
    ledger.wait(PAGE, Backoff(first=60, last=60), "granted", "it is granted")
    clock.wait(10)
    clock.offset = -86_400.0
    assert ledger.shown(ledger.book.change(PAGE)).next_try == clock.now() + 50


def test_how_long_a_page_is_under_way_is_told_by_no_date() -> None:
    clock = SetClock()
    ledger = Ledger(Kept(), clock)
    assert ledger.oldest_unfinished() is None
    ledger.begin(PAGE, Cause.CORRECTED, "two errors")
    clock.wait(10)
    ledger.begin(Mfn(0x11), Cause.CORRECTED, "two errors")
    for offset in (0.0, -86_400.0, 86_400.0):
        clock.offset = offset
        assert ledger.oldest_unfinished() == clock.now() - 10
    ledger.wait(PAGE, Backoff(first=60, last=60), "granted", "it is granted")
    clock.wait(5)
    assert ledger.oldest_unfinished() == clock.now() - 15
    ledger.leave(PAGE, "granted", "it is granted", marked=True)
    assert ledger.oldest_unfinished() == clock.now() - 5
    # From when it is taken up again, not from when it was first.
    ledger.look_again([PAGE])
    ledger.offlined(Mfn(0x11), "it is out of use")
    assert ledger.oldest_unfinished() == clock.now()
    ledger.offlined(PAGE, "it is out of use")
    assert ledger.oldest_unfinished() is None


@pytest.mark.parametrize(("since", "age"), [(-40.0, 40.0), (+86_400.0, 0.0), (-86_400.0, 100.0)])
def test_how_long_a_page_was_under_way_before_a_restart_is_no_longer_than_the_host(
    since: float, age: float
) -> None:
    clock = SetClock()
    clock.wait(100 - clock.monotonic())
    entry = PageEntry(
        mfn=PAGE, cause=Cause.CORRECTED, phase=Phase.WAITING, since=clock.now() + since
    )
    ledger = Ledger(Kept(), clock, [entry])
    assert ledger.oldest_unfinished() == clock.now() - age


def test_pages_that_are_held_are_looked_at_when_that_ends_and_others_are_not() -> None:
    kept = Kept()
    ledger = begun(kept)
    other = Mfn(0x11)
    ledger.begin(other, Cause.CORRECTED, "two errors")
    ledger.hold(other, "this is a dry run")
    wait(ledger)
    assert (kept.entries[other].phase, kept.entries[other].detail) == (
        *(Phase.WAITING, "this is a dry run"),
    )
    ledger.release()
    assert kept.entries[other].phase is Phase.TRIAGE
    assert kept.entries[PAGE].phase is Phase.WAITING


def test_what_the_book_forgets_is_not_kept_either() -> None:
    kept = Kept()
    ledger = Ledger(kept, ManualClock(), max_forgettable=2)
    for number in range(4):
        ledger.begin(Mfn(number), Cause.CORRECTED, "two errors")
        ledger.leave(Mfn(number), "dom0", "it is dom0's", marked=False)
    assert set(kept.entries) == {2, 3} == {entry.mfn for entry in ledger.book}


def test_a_page_that_is_in_hand_can_become_one_with_an_uncorrected_error() -> None:
    kept = Kept()
    ledger = begun(kept)
    ledger.is_poisoned(PAGE)
    assert (kept.entries[PAGE].cause, kept.entries[PAGE].phase) == (
        *(Cause.UNCORRECTED, Phase.EXCHANGE),
    )


@pytest.mark.parametrize(
    ("cause", "what"),
    [
        (Cause.CORRECTED, "is to be retired"),
        (Cause.OPERATOR, "is to be retired"),
        (Cause.UNCORRECTED, "has an uncorrected error"),
    ],
)
def test_the_journal_tells_why_a_page_is_taken_in_hand(
    cause: Cause, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    ledger_of(Kept()).begin(PAGE, cause, "so it is")
    assert caplog.messages == [f"mfn 0x10 {what}: so it is"]


def test_what_is_told_of_a_page_names_its_owner_also_where_that_is_dom0(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tell(logging.ERROR, Event.PAGE_LEFT, "stays", PAGE, domid=Domid(0), job="x1")
    [record] = caplog.records
    assert record.getMessage() == "mfn 0x10 of d0 stays"
    assert record.levelno == logging.ERROR
    fields = {"MESSAGE_ID": Event.PAGE_LEFT.message_id, "MFN": "0x10", "DOMID": "0", "JOB": "x1"}
    assert record.__dict__["pgofflined_fields"].items() >= fields.items()
