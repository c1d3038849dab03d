"""The book with its side effects."""

from __future__ import annotations

from dataclasses import replace

from pgofflined.core.book import Cause, PageEntry, Phase
from pgofflined.core.frames import Domid, Mfn
from pgofflined.core.policy import Backoff
from pgofflined.ledger import Ledger
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
