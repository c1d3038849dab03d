"""The book of pages with its side effects: every change is stored and told to the journal."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Protocol

from pgofflined.core.book import Book, Cause, PageEntry, Phase
from pgofflined.core.domains import DomainInfo
from pgofflined.core.events import Event
from pgofflined.core.frames import Domid, Mfn
from pgofflined.core.policy import Backoff
from pgofflined.journal_log import event
from pgofflined.ports import Clock

log = logging.getLogger(__name__)

_ON_HOLD = "on_hold"


class PageStore(Protocol):
    """Where entries are kept over a restart of the daemon."""

    def put_page(self, entry: PageEntry) -> None:
        """Keep an entry, replacing the page's earlier one."""
        ...

    def remove_page(self, mfn: Mfn) -> None:
        """Keep the entry of a page no longer."""
        ...


class Ledger:
    """Moves pages from phase to phase.

    When a page is due, and since when it is under way, is known by the monotonic clock, whatever
    becomes of the host's date.
    ``changed`` is given each entry as it is now.
    """

    def __init__(
        self,
        store: PageStore,
        clock: Clock,
        entries: Iterable[PageEntry] = (),
        *,
        max_forgettable: int = 10_000,
    ) -> None:
        self.book = Book(entries, max_forgettable=max_forgettable)
        self.changed: Callable[[PageEntry], None] = lambda _entry: None
        self._store = store
        self._clock = clock
        # Waits in a row for the same reason that were no tries; they begin anew with the daemon.
        self._waits: dict[Mfn, tuple[str, int]] = {}
        self._due: dict[Mfn, float] = {}
        self._under_way: dict[Mfn, float] = {}
        now, steady = clock.now(), clock.monotonic()
        for entry in self.book.unfinished():
            # The date may have been set since; it is of this boot of the host all the same.
            age = min(max(0.0, now - entry.since), max(0.0, steady))
            self._under_way[entry.mfn] = steady - age

    def is_under_way(self, mfn: Mfn) -> bool:
        """Whether a page is in hand and not at its end."""
        entry = self.book.get(mfn)
        return entry is not None and not entry.phase.is_final

    def begin(self, mfn: Mfn, cause: Cause, reason: str) -> None:
        """Take a page in hand, for the first time or anew."""
        what = "has an uncorrected error" if cause is Cause.UNCORRECTED else "is to be retired"
        tell(logging.WARNING, Event.PAGE_TO_RETIRE, f"{what}: {reason}", mfn)
        known = self.book.get(mfn)
        self.put(
            PageEntry(
                mfn=mfn,
                cause=cause,
                phase=Phase.TRIAGE,
                since=self._clock.now(),
                # Of one that was out of use it is not said once more what it left behind.
                marked=known is not None and known.marked and known.phase is not Phase.OFFLINED,
                domain=known.domain if known is not None else None,
                domain_name=known.domain_name if known is not None else "",
                detail=reason,
            )
        )

    def begin_again(self) -> None:
        """Have everything unfinished looked at anew, as after a restart."""
        self.look_again(entry.mfn for entry in tuple(self.book.unfinished()))

    def look_again(self, mfns: Iterable[Mfn]) -> None:
        """Have pages looked at anew; what was refused to their owner so far still counts."""
        for mfn in mfns:
            self._enter(mfn, phase=Phase.TRIAGE, next_try=None)

    def unmark(self, mfn: Mfn) -> None:
        """A page has lost its mark, whatever else is true of it."""
        self._enter(mfn, marked=False)

    def disown(self, mfn: Mfn) -> None:
        """Whose a page is, is not known any more."""
        self._enter(mfn, domain=None, domain_name="")

    def forget(self, mfn: Mfn) -> None:
        """A page that was out of use is used again: what was known of it is not true any more."""
        self.book.remove(mfn)
        self._store.remove_page(mfn)

    def is_poisoned(self, mfn: Mfn) -> None:
        """A page that is in hand has had an uncorrected error: it is no predicted one any more."""
        self._enter(mfn, cause=Cause.UNCORRECTED)

    def hold(self, mfn: Mfn, detail: str) -> None:
        """Do nothing about a page until the policy changes (``release``)."""
        self._enter(mfn, phase=Phase.WAITING, reason=_ON_HOLD, detail=detail, next_try=None)

    def release(self) -> None:
        """Look at the pages that were held."""
        held = [entry for entry in self.book.in_phase(Phase.WAITING) if entry.reason == _ON_HOLD]
        self.look_again(entry.mfn for entry in held)

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

    def leave(
        self,
        mfn: Mfn,
        reason: str,
        detail: str,
        *,
        marked: bool,
        domain: DomainInfo | None = None,
    ) -> None:
        """Nothing more is going to be done about the page by itself.

        ``domain`` is its owner, where that is known anew.  The same once more is not said again.
        """
        entry = self.book.change(mfn)
        if (entry.reason, entry.detail, entry.marked) != (reason, detail, marked):
            tell(logging.WARNING, Event.PAGE_LEFT, f"stays where it is: {detail}", mfn)
        self._enter(
            mfn,
            phase=Phase.LEFT,
            marked=marked,
            reason=reason,
            detail=detail,
            next_try=None,
            **_owner(domain),
        )

    def wait(
        self,
        mfn: Mfn,
        backoff: Backoff,
        reason: str,
        detail: str,
        *,
        marked: bool | None = None,
        domain: DomainInfo | None = None,
    ) -> None:
        """Look at the page again later; no try of an exchange is lost.

        ``marked`` None keeps what is known of the mark, ``domain`` what is known of the owner.
        """
        waits = self.waits(mfn, reason) + 1
        self._waits[mfn] = (reason, waits)
        delay = backoff.delay(waits)
        self._enter_waiting(
            mfn,
            backoff.last if delay is None else delay,
            marked=self.book.change(mfn).marked if marked is None else marked,
            reason=reason,
            detail=detail,
            **_owner(domain),
        )

    def waits(self, mfn: Mfn, reason: str) -> int:
        """How often in a row a page has waited for this reason."""
        last, waits = self._waits.get(mfn, ("", 0))
        return waits if last == reason else 0

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
        self._enter_waiting(
            mfn, delay, marked=marked, reason=reason, detail=detail, attempts=attempts
        )

    def due(self, limit: int) -> list[Mfn]:
        """Pages whose triage is due now."""
        now = self._clock.monotonic()
        due = [entry.mfn for entry in self.book.in_phase(Phase.TRIAGE)]
        due += [mfn for mfn, time in self._due.items() if time <= now]
        return due[:limit]

    def seconds_to_next(self) -> float | None:
        """Seconds until the next page is due; None when nothing waits."""
        if not self._due:
            return None
        return max(0.0, min(self._due.values()) - self._clock.monotonic())

    def shown(self, entry: PageEntry) -> PageEntry:
        """An entry for people: its next try by the date as it is now."""
        due = self._due.get(entry.mfn)
        if due is None:
            return entry
        return replace(entry, next_try=self._clock.now() + due - self._clock.monotonic())

    def oldest_unfinished(self) -> float | None:
        """Since when the page is under way that has been so longest, by the date as it is now."""
        if not self._under_way:
            return None
        oldest = min(self._under_way.values())
        return self._clock.now() + oldest - self._clock.monotonic()

    def put(self, entry: PageEntry) -> None:
        """Enter a whole entry."""
        self.book.put(entry)
        self._stored(entry)

    def _enter_waiting(self, mfn: Mfn, seconds: float, **changes: object) -> None:
        next_try = self._clock.now() + seconds
        self._enter(mfn, phase=Phase.WAITING, next_try=next_try, **changes)
        self._due[mfn] = self._clock.monotonic() + seconds

    def _enter(self, mfn: Mfn, **changes: object) -> None:
        self._stored(self.book.change(mfn, **changes))

    def _stored(self, entry: PageEntry) -> None:
        if entry.next_try is None:
            self._due.pop(entry.mfn, None)
        if entry.phase.is_final:
            self._waits.pop(entry.mfn, None)
            self._under_way.pop(entry.mfn, None)
        else:
            self._under_way.setdefault(entry.mfn, self._clock.monotonic())
        self._store.put_page(entry)
        for mfn in self.book.surplus():
            self.book.remove(mfn)
            self._store.remove_page(mfn)
        self.changed(entry)


def _owner(domain: DomainInfo | None) -> dict[str, object]:
    return {} if domain is None else {"domain": domain.identity, "domain_name": domain.name}


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
