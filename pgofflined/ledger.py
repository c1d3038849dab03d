"""The book of pages with its side effects: every change is stored and told to the journal."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Protocol

from pgofflined.core.book import Book, Cause, PageEntry, Phase
from pgofflined.core.domains import DomainInfo
from pgofflined.core.events import Event
from pgofflined.core.frames import Domid, Mfn
from pgofflined.core.policy import Backoff
from pgofflined.journal_log import event
from pgofflined.ports import Clock

log = logging.getLogger(__name__)


class PageStore(Protocol):
    """Where entries are kept over a restart of the daemon."""

    def put_page(self, entry: PageEntry) -> None:
        """Keep an entry, replacing the page's earlier one."""
        ...


class Ledger:
    """Moves pages from phase to phase.  ``changed`` is given each entry as it is now."""

    def __init__(self, store: PageStore, clock: Clock, entries: Iterable[PageEntry] = ()) -> None:
        self.book = Book(tuple(entries))
        self.changed: Callable[[PageEntry], None] = lambda _entry: None
        self._store = store
        self._clock = clock
        # Waits in a row that were no tries; they begin anew with the daemon.
        self._waits: dict[Mfn, int] = {}

    def is_under_way(self, mfn: Mfn) -> bool:
        """Whether a page is in hand and not at its end."""
        entry = self.book.get(mfn)
        return entry is not None and not entry.phase.is_final

    def begin(self, mfn: Mfn, cause: Cause, reason: str) -> None:
        """Take a page in hand, for the first time or anew."""
        tell(logging.WARNING, Event.PAGE_TO_RETIRE, f"is to be retired: {reason}", mfn)
        known = self.book.get(mfn)
        self.put(
            PageEntry(
                mfn=mfn,
                cause=cause,
                phase=Phase.TRIAGE,
                since=self._clock.now(),
                marked=known is not None and known.marked,
                detail=reason,
            )
        )

    def begin_again(self) -> None:
        """Have everything unfinished looked at anew, as after a restart."""
        for entry in self.book:
            if not entry.phase.is_final:
                self._enter(entry.mfn, phase=Phase.TRIAGE, next_try=None)

    def hand_over(self, mfn: Mfn, domain: DomainInfo, phase: Phase, *, marked: bool = True) -> None:
        """Note the owner, whose job has the page now."""
        entry = self.book.change(mfn)
        # What another owner was refused says nothing of this one.
        same = entry.domain in (None, domain.identity)
        self._enter(
            mfn,
            attempts=entry.attempts if same else 0,
            phase=phase,
            marked=marked,
            domain=domain.identity,
            domain_name=domain.name,
            next_try=None,
        )

    def to_relocation(self, mfn: Mfn) -> None:
        """Give a page, whose owner is known, from the exchanges to the relocations."""
        self._enter(mfn, phase=Phase.RELOCATION, next_try=None)

    def offlined(self, mfn: Mfn, detail: str) -> None:
        """The page is out of use: the aim."""
        tell(logging.WARNING, Event.PAGE_OFFLINED, f"is offline: {detail}", mfn)
        self._enter(mfn, phase=Phase.OFFLINED, marked=True, reason="", detail=detail, next_try=None)

    def leave(self, mfn: Mfn, reason: str, detail: str, *, marked: bool) -> None:
        """Nothing more is going to be done about the page by itself."""
        tell(logging.WARNING, Event.PAGE_LEFT, f"stays where it is: {detail}", mfn)
        self._enter(
            mfn, phase=Phase.LEFT, marked=marked, reason=reason, detail=detail, next_try=None
        )

    def wait(
        self, mfn: Mfn, backoff: Backoff, reason: str, detail: str, *, marked: bool | None = None
    ) -> None:
        """Look at the page again later; no try of an exchange is lost.

        ``marked`` None keeps what is known of the mark.
        """
        waits = self._waits[mfn] = self._waits.get(mfn, 0) + 1
        delay = backoff.delay(waits)
        self._enter(
            mfn,
            phase=Phase.WAITING,
            marked=self.book.change(mfn).marked if marked is None else marked,
            reason=reason,
            detail=detail,
            next_try=self._clock.now() + (backoff.last if delay is None else delay),
        )

    def refused(
        self, mfn: Mfn, backoff: Backoff, reason: str, detail: str, *, marked: bool
    ) -> None:
        """Try the exchange that was refused again later, or leave the page after the last try."""
        attempts = self.book.change(mfn).attempts + 1
        delay = backoff.delay(attempts)
        if delay is None:
            again = f"after {attempts} tries; try again with `pgofflined offline {mfn:#x}`"
            self.leave(mfn, reason, f"{detail} ({again})", marked=marked)
            return
        self._enter(
            mfn,
            phase=Phase.WAITING,
            marked=marked,
            reason=reason,
            detail=detail,
            attempts=attempts,
            next_try=self._clock.now() + delay,
        )

    def due(self, limit: int) -> list[Mfn]:
        """Pages whose triage is due now."""
        now = self._clock.now()
        return [
            entry.mfn
            for entry in self.book
            if entry.phase is Phase.TRIAGE
            or (entry.phase is Phase.WAITING and (entry.next_try or 0.0) <= now)
        ][:limit]

    def seconds_to_next(self) -> float | None:
        """Seconds until the next page is due; None when nothing waits."""
        times = [entry.next_try for entry in self.book if entry.phase is Phase.WAITING]
        due = [time for time in times if time is not None]
        return max(0.0, min(due) - self._clock.now()) if due else None

    def put(self, entry: PageEntry) -> None:
        """Enter a whole entry."""
        self.book.put(entry)
        self._stored(entry)

    def _enter(self, mfn: Mfn, **changes: object) -> None:
        self._stored(self.book.change(mfn, **changes))

    def _stored(self, entry: PageEntry) -> None:
        if entry.phase.is_final:
            self._waits.pop(entry.mfn, None)
        self._store.put_page(entry)
        self.changed(entry)


def tell(
    level: int,
    kind: Event,
    what: str,
    mfn: Mfn,
    *,
    domid: Domid | None = None,
    job: str | None = None,
) -> None:
    """Log what happened to a page."""
    owner = "" if domid is None else f" of d{domid}"
    event(log, level, kind, f"mfn {mfn:#x}{owner} {what}", mfn=mfn, domid=domid, job=job)
