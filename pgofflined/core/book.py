"""The book of pages that the daemon has taken in hand, and what has become of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import islice
from typing import Final

from pgofflined.core.domains import DomainIdentity
from pgofflined.core.frames import Mfn

NOT_RAM: Final = "not_ram"
"""Reason of a page that turned out to be no memory."""


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

    ``marked``: Xen holds it offline-pending or offlined on our word.  ``reason`` is a short code,
    ``detail`` a sentence for people.  ``attempts`` counts exchanges that its owner was refused, and
    that are to be tried again.  ``next_try`` is for people: the clock may be set meanwhile.
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

    @property
    def is_counted(self) -> bool:
        """Whether the page uses up some of ``retire.max_retired``.

        From when it is taken in hand, marked or not, so that a burst cannot go beyond the limit.
        Pages with an uncorrected error are lost to the host whatever the limit says.
        """
        return self.cause is not Cause.UNCORRECTED and (self.marked or not self.phase.is_final)

    @property
    def may_be_forgotten(self) -> bool:
        """Whether nothing is lost with the entry: Xen holds nothing back that only it explains."""
        if self.cause is Cause.UNCORRECTED:
            return self.phase is Phase.OFFLINED or self.reason == NOT_RAM
        return self.phase is Phase.LEFT and not self.marked


class Book:
    """All entries by mfn.  Plain state: whoever changes it also stores it.

    Of entries that may be forgotten, ``max_forgettable`` are kept; how many others there are is
    bounded by ``retire.max_retired``, and by the frames that had an uncorrected error.
    """

    def __init__(self, entries: Iterable[PageEntry] = (), *, max_forgettable: int = 10_000) -> None:
        self._entries: dict[Mfn, PageEntry] = {}
        self._by_phase: dict[Phase, dict[Mfn, None]] = {phase: {} for phase in Phase}
        # In the order in which they became so.
        self._forgettable: dict[Mfn, None] = {}
        self._max_forgettable = max_forgettable
        self._marked = 0
        self._counted = 0
        for entry in entries:
            self.put(entry)

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[PageEntry]:
        return iter(tuple(self._entries.values()))

    def __contains__(self, mfn: object) -> bool:
        return mfn in self._entries

    def __getitem__(self, mfn: Mfn) -> PageEntry:
        """The entry of a page that has one.  Raises KeyError."""
        return self._entries[mfn]

    def get(self, mfn: Mfn) -> PageEntry | None:
        """The entry of a page, if it has one."""
        return self._entries.get(mfn)

    def put(self, entry: PageEntry) -> None:
        """Enter a page, or what has become of it."""
        self._leave_indexes(entry.mfn)
        self._entries[entry.mfn] = entry
        self._by_phase[entry.phase][entry.mfn] = None
        self._marked += entry.marked
        self._counted += entry.is_counted
        if entry.may_be_forgotten:
            self._forgettable[entry.mfn] = None

    def change(self, mfn: Mfn, **changes: object) -> PageEntry:
        """Replace fields of an entry.  Raises KeyError for a page without one."""
        entry = replace(self._entries[mfn], **changes)  # type: ignore[arg-type]
        self.put(entry)
        return entry

    def remove(self, mfn: Mfn) -> None:
        """Forget a page; nothing happens if it is not there."""
        self._leave_indexes(mfn)
        self._entries.pop(mfn, None)

    def surplus(self) -> tuple[Mfn, ...]:
        """Pages to forget for the book to keep its bounds, the oldest first."""
        excess = len(self._forgettable) - self._max_forgettable
        return tuple(islice(self._forgettable, max(0, excess)))

    def marked(self) -> int:
        """Frames that Xen holds back, or will, on our word."""
        return self._marked

    def counted(self) -> int:
        """Frames that use up ``retire.max_retired``."""
        return self._counted

    def in_phase(self, *phases: Phase) -> Iterator[PageEntry]:
        """The entries that stand there; the book must not change meanwhile."""
        for phase in phases:
            for mfn in self._by_phase[phase]:
                yield self._entries[mfn]

    def unfinished(self) -> Iterator[PageEntry]:
        """The entries that are under way; the book must not change meanwhile."""
        return self.in_phase(*(phase for phase in Phase if not phase.is_final))

    def by_phase(self) -> Counter[Phase]:
        """How many pages stand where."""
        return Counter({phase: len(pages) for phase, pages in self._by_phase.items() if pages})

    def _leave_indexes(self, mfn: Mfn) -> None:
        entry = self._entries.get(mfn)
        if entry is None:
            return
        del self._by_phase[entry.phase][mfn]
        self._forgettable.pop(mfn, None)
        self._marked -= entry.marked
        self._counted -= entry.is_counted
