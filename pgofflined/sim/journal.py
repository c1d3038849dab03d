"""A journal in memory, that survives the simulated death of the process that writes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pgofflined.ports import Hold, JobRecord, OpenJob, UnfinishedJob

if TYPE_CHECKING:
    from pgofflined.core.domains import DomainIdentity
    from pgofflined.core.moves import Group


@dataclass(eq=False)
class _Kept:
    record: JobRecord
    kept: Group | None = None
    hold: Hold | None = None
    has_begun: bool = False
    is_left: bool = False

    @property
    def group(self) -> Group | None:
        """What may have been changed."""
        return self.kept if self.has_begun else None


@dataclass(eq=False)
class MemoryJournal:
    """``ports.Journal``; ``kept`` is what another process would find."""

    kept: dict[DomainIdentity, _Kept] = field(default_factory=dict)
    aside: list[_Kept] = field(default_factory=list)

    def open(self, record: JobRecord) -> OpenJob:
        """Begin a job."""
        self.kept[record.domain] = _Kept(record)
        return _MemoryJob(self, record.domain)

    def unfinished(self) -> Sequence[UnfinishedJob]:
        """The jobs that were not closed."""
        return [
            UnfinishedJob(
                record=kept.record,
                hold=kept.hold,
                group=kept.group,
                job=_MemoryJob(self, domain),
            )
            for domain, kept in self.kept.items()
        ]

    def done_with(self, domain: DomainIdentity) -> None:
        """End a job that was left."""
        if domain in self.kept and self.kept[domain].is_left:
            left = self.kept.pop(domain)
            if left.group is not None:
                self.aside.append(left)


@dataclass(frozen=True, eq=False)
class _MemoryJob:
    journal: MemoryJournal
    domain: DomainIdentity

    def keep(self, group: Group) -> None:
        """Keep a group; the arrays are never written to by those who have them."""
        self.journal.kept[self.domain].kept = group

    def hold(self, cpu_time: int | None) -> None:
        """The guest stands still."""
        self.journal.kept[self.domain].hold = Hold(cpu_time=cpu_time)

    def begin(self) -> None:
        """What is kept counts."""
        self.journal.kept[self.domain].has_begun = True

    def settled(self) -> None:
        """It counts no more."""
        self.journal.kept[self.domain].has_begun = False

    def leave(self, *, damaged: bool = False) -> None:
        """Forget all but that there is a job, unless it is damaged."""
        kept = self.journal.kept[self.domain]
        kept.is_left = True
        if not damaged:
            kept.kept, kept.has_begun = None, False

    def close(self) -> None:
        """Forget the job."""
        self.journal.kept.pop(self.domain, None)

    def set_aside(self) -> None:
        """Keep it for a person."""
        self.journal.aside.append(self.journal.kept.pop(self.domain))
