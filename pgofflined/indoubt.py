"""Guests that a migration has left to a person: they may run elsewhere, or in two copies.

They are looked at and shown until that is settled, over a restart of the daemon as well.  Nothing
here lets a guest run: that could ruin its disks.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Final, Protocol

import msgspec

from pgofflined.aftercare import StuckGuest, is_settled
from pgofflined.core.aftermath import Stuck, after_failure
from pgofflined.core.book import Book, Phase
from pgofflined.core.conditions import ConditionCode
from pgofflined.core.domains import DomainIdentity, DomainInfo, GuestKind
from pgofflined.core.errors import DomainGone, PortError
from pgofflined.core.events import Event
from pgofflined.core.relocation_outcomes import RelocationReason
from pgofflined.journal_log import event
from pgofflined.ports import BY_NAME_ONLY, Clock, DomainControl

log = logging.getLogger(__name__)

_IN_DOUBT: Final = "guests_in_doubt"
_RESTARTED: Final = "this daemon was restarted while it migrated a guest, or was about to: "


class FactStore(Protocol):
    """What is kept over a restart of the daemon."""

    def get_meta(self, key: str) -> str | None:
        """A value by its key."""
        ...

    def set_meta(self, key: str, value: str) -> None:
        """Keep a value."""
        ...


class _Stored(msgspec.Struct, frozen=True, kw_only=True):
    domain: DomainIdentity
    since: float
    text: str


class GuestsInDoubt:
    """``before`` are guests that an earlier daemon was migrating, or about to: of those it is seen
    how that ended.  ``target`` says where guests are migrated to.

    Any thread may call any method but ``keep``, which is for the store's own; ``look`` makes
    hypercalls.
    """

    def __init__(
        self,
        xen: DomainControl,
        clock: Clock,
        store: FactStore | None = None,
        *,
        before: Iterable[DomainIdentity] = (),
        target: Callable[[], str | None] = lambda: None,
    ) -> None:
        self._xen = xen
        self._clock = clock
        self._store = store
        self._target = target
        self._lock = threading.Lock()
        # Both are replaced as a whole: they are read on the loop while a thread looks at guests.
        self._cases: Mapping[DomainIdentity, StuckGuest] = _load(store)
        self._before = frozenset(before)
        self._kept = self._cases
        self._is_blind = False

    def __bool__(self) -> bool:
        """Whether there is any guest to look at."""
        return bool(self._cases or self._before)

    @property
    def stuck(self) -> Mapping[DomainIdentity, StuckGuest]:
        """The guests that wait for a person, as they were at the last look."""
        return self._cases

    def note(self, domain: DomainIdentity, why: str) -> None:
        """A migration has left a guest to a person; whoever calls has told of it."""
        case = StuckGuest(since=self._clock.now(), text=why, code=ConditionCode.GUEST_IN_DOUBT)
        with self._lock:
            self._cases = {**self._cases, domain: case}

    def is_migrated(self, domain: DomainIdentity) -> None:
        """A migration of our own begins, whose end is told: nothing is left of an earlier one."""
        with self._lock:
            self._before -= {domain}

    def look(self) -> None:
        """See which guests are settled, and how migrations of an earlier daemon have ended."""
        if not self:
            return
        # One that is noted from here on is looked at the next time.
        noted = self._cases
        try:
            here = self._xen.conditions()
            for domain in self._before:
                self._see(domain, here)
        except PortError as error:
            if not self._is_blind:
                log.warning("what became of guests that were migrated cannot be seen: %s", error)
            self._is_blind = True
            return
        self._is_blind = False
        with self._lock:
            self._cases = {
                domain: case
                for domain, case in self._cases.items()
                if domain not in noted or not is_settled(domain.uuid, here)
            }

    def keep(self) -> None:
        """Store which guests there are; for the store's thread."""
        cases = self._cases
        if self._store is None or cases == self._kept:
            return
        self._kept = cases
        stored = [
            _Stored(domain=domain, since=case.since, text=_storable(case.text))
            for domain, case in cases.items()
        ]
        self._store.set_meta(_IN_DOUBT, msgspec.json.encode(stored).decode())

    def _see(self, domain: DomainIdentity, here: Sequence[DomainInfo]) -> None:
        """See whether a migration of an earlier daemon is over, and whether a person has to act."""
        same = [info for info in here if info.uuid == domain.uuid and not info.dying]
        if any(self._is_migrated_by_somebody(info) for info in same):
            return
        self.is_migrated(domain)
        # What is left of a save of a PV guest is told by its note.
        if domain in self._cases or any(info.kind is GuestKind.PV for info in same):
            return
        # Whoever has paused it: a migration does not pause what it leaves here.
        own = next((replace(info, paused=False) for info in same if info.identity == domain), None)
        aftermath = after_failure(
            domain,
            own,
            [info for info in same if info.identity != domain],
            target=self._target() or "the target of its migration",
            in_doubt=True,
        )
        if isinstance(aftermath, Stuck):
            what = _RESTARTED + aftermath.what
            self.note(domain, what)
            event(log, logging.CRITICAL, Event.GUEST_IN_DOUBT, what, domid=domain.domid)

    def _is_migrated_by_somebody(self, info: DomainInfo) -> bool:
        """Whether a process is at it; by its name alone the guest is nobody's any more."""
        try:
            somebody = self._xen.somebody_at(info.domid)
        except DomainGone:
            return False
        return somebody is not None and not somebody.startswith(BY_NAME_ONLY)


def migrated_before(book: Book) -> frozenset[DomainIdentity]:
    """The guests that an earlier daemon was migrating, or about to, or has left in doubt."""
    entries = [
        *book.in_phase(Phase.RELOCATION),
        *(
            entry
            for entry in book.in_phase(Phase.LEFT)
            if entry.reason == RelocationReason.GUEST_STUCK
        ),
    ]
    return frozenset(entry.domain for entry in entries if entry.domain is not None)


def _load(store: FactStore | None) -> Mapping[DomainIdentity, StuckGuest]:
    stored = None if store is None else store.get_meta(_IN_DOUBT)
    if stored is None:
        return {}
    try:
        found = msgspec.json.decode(stored, type=list[_Stored])
    except msgspec.MsgspecError as error:
        log.error("what was stored of guests that migrations have left cannot be read: %s", error)
        return {}
    code = ConditionCode.GUEST_IN_DOUBT
    return {one.domain: StuckGuest(since=one.since, text=one.text, code=code) for one in found}


def _storable(text: str) -> str:
    # Names that were no UTF-8 carry lone surrogates, which JSON cannot hold.
    return text.encode("utf-8", "backslashreplace").decode()
