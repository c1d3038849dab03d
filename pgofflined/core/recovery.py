"""What became of an exchange job that an earlier process left."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from pgofflined.core.domains import DomainIdentity
from pgofflined.core.outcomes import PageResult


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
    LEFT_ALONE = "left_alone"
    """Somebody else has let the guest go meanwhile, or changed it: nothing can be put right."""
    GONE = "gone"
    """The guest is gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryReport:
    """``results`` are those of the pages that the job may have been changing when it was cut off.

    ``is_whole`` says whether the guest's memory is whole now.  ``stuck`` and ``may_suspend_late``
    are as in ``ExchangeReport``.
    """

    domain: DomainIdentity
    outcome: Recovered
    detail: str
    results: tuple[PageResult, ...] = ()
    stuck: str | None = None
    may_suspend_late: bool = False
    is_whole: bool = False
