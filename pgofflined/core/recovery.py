"""What became of an exchange job that an earlier process left."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from pgofflined.core.domains import DomainIdentity
from pgofflined.core.frames import Domid
from pgofflined.core.outcomes import Damaged, PageResult, Standing


class Recovered(StrEnum):
    """How a job that was cut off ended."""

    NOTHING_TO_DO = "nothing_to_do"
    """The guest runs, with its memory whole."""
    FINISHED = "finished"
    """The guest still stood still; its memory was made whole and it was let go."""
    NOT_YET = "not_yet"
    """The guest is held until it can be put right; to be tried again."""
    BUSY = "busy"
    """Somebody saves or migrates the guest: nothing was done; to be tried again."""
    STANDS_STILL = "stands_still"
    """The guest stands still, and for whom cannot be told: nothing was done."""
    HELD = "held"
    """It may be in the middle of a change that cannot be read: it must not run, and is a person's.

    It is looked at again, for he may have ended it.
    """
    LEFT_ALONE = "left_alone"
    """Somebody else has let the guest go meanwhile, or changed it: nothing can be put right."""
    CRASHED = "crashed"
    """The guest has crashed since it was asked to suspend itself."""
    GONE = "gone"
    """The guest is gone."""


def crashed_when_asked(domid: Domid) -> str:
    """What is said of a guest that has crashed some time after we asked it to suspend itself."""
    return (
        f"d{domid} has crashed since pgofflined asked it to suspend itself, or had it asked, which "
        "is a likely cause; start it again"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryReport:
    """``results`` are those of the pages that the job may have been changing when it was cut off.

    ``is_whole`` says whether the guest's memory is whole now.  ``stuck``, ``may_suspend_late`` and
    ``standing`` are as in ``ExchangeReport``.  ``asked`` is when the guest was asked to suspend, in
    seconds of ``Clock.monotonic``; None where that is not known.
    """

    domain: DomainIdentity
    outcome: Recovered
    detail: str
    results: tuple[PageResult, ...] = ()
    stuck: str | None = None
    may_suspend_late: bool = False
    standing: Standing = field(default_factory=Standing)
    asked: float | None = None
    is_whole: bool = False

    @property
    def needs_a_person(self) -> bool:
        """Whether somebody has to see to the guest, and nothing else tells of it from now on.

        A guest that is held, or stuck, has a record on, and whoever finds that tells of it.
        """
        ends = (Recovered.LEFT_ALONE, Recovered.STANDS_STILL, Recovered.CRASHED)
        return self.outcome in ends or (self.outcome is Recovered.BUSY and bool(self.results))

    @property
    def damaged(self) -> tuple[Damaged, ...]:
        """Pages whose guest has lost them."""
        return tuple(result for result in self.results if isinstance(result, Damaged))
