"""The book of pages that the daemon has taken in hand, and what has become of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum

from pgofflined.core.domains import DomainIdentity
from pgofflined.core.frames import Mfn


class Cause(StrEnum):
    """Why a page is to go."""

    CORRECTED = "corrected"
    OPERATOR = "operator"
    UNCORRECTED = "uncorrected"


class Phase(StrEnum):
    """Where a page stands.

    ``TRIAGE``: its owner is to be found.  ``EXCHANGE`` and ``RELOCATION``: a job of its owner
    has it.  ``WAITING``: a later try is due.  ``OFFLINED``: out of use, the aim.  ``LEFT``: not
    to be moved by us; the reason says why and what the operator can do.
    """

    TRIAGE = "triage"
    EXCHANGE = "exchange"
    RELOCATION = "relocation"
    WAITING = "waiting"
    OFFLINED = "offlined"
    LEFT = "left"

    @property
    def is_final(self) -> bool:
        """Whether nothing more is going to happen to the page by itself."""
        return self in (Phase.OFFLINED, Phase.LEFT)


@dataclass(frozen=True, slots=True, kw_only=True)
class PageEntry:
    """One page.  Times are seconds since the epoch.

    ``marked``: Xen holds it offline-pending or offlined on our word, so it counts against the
    cap.  ``reason`` is a short code, ``detail`` a sentence for people.  ``attempts`` counts
    exchanges that its owner was refused, and that are to be tried again.
    """

    mfn: Mfn
    cause: Cause
    phase: Phase
    since: float
    marked: bool = False
    domain: DomainIdentity | None = None
    domain_name: str = ""
    reason: str = ""
    detail: str = ""
    attempts: int = 0
    next_try: float | None = None


class Book:
    """All entries by mfn.  Plain state: whoever changes it also stores it."""

    def __init__(self, entries: Iterator[PageEntry] | tuple[PageEntry, ...] = ()) -> None:
        self._entries = {entry.mfn: entry for entry in entries}

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[PageEntry]:
        return iter(tuple(self._entries.values()))

    def __contains__(self, mfn: object) -> bool:
        return mfn in self._entries

    def get(self, mfn: Mfn) -> PageEntry | None:
        """The entry of a page, if it has one."""
        return self._entries.get(mfn)

    def put(self, entry: PageEntry) -> None:
        """Enter a page, or what has become of it."""
        self._entries[entry.mfn] = entry

    def change(self, mfn: Mfn, **changes: object) -> PageEntry:
        """Replace fields of an entry.  Raises KeyError for a page without one."""
        entry = replace(self._entries[mfn], **changes)  # type: ignore[arg-type]
        self._entries[mfn] = entry
        return entry

    def remove(self, mfn: Mfn) -> None:
        """Forget a page; nothing happens if it is not there."""
        self._entries.pop(mfn, None)

    def marked(self) -> int:
        """Frames that Xen holds back, or will, on our word."""
        return sum(entry.marked for entry in self._entries.values())

    def by_phase(self) -> Counter[Phase]:
        """How many pages stand where."""
        return Counter(entry.phase for entry in self._entries.values())

    def oldest_unfinished(self) -> float | None:
        """When the page that has been under way longest was taken in hand."""
        times = [entry.since for entry in self._entries.values() if not entry.phase.is_final]
        return min(times, default=None)
