"""The record of an exchange that is under way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from pgofflined.core.domains import DomainIdentity
from pgofflined.core.frames import Mfn

if TYPE_CHECKING:
    # numpy comes with it, which a daemon that has nothing to do need not hold.
    from pgofflined.core.moves import Group


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRecord:
    """An exchange job as it is kept: of which domain, and what was true of it at the start.

    ``cpu_time`` are the nanoseconds that its vCPUs had run; a domain that has run for less, or
    whose shared_info is another frame, is not the same one.  ``began`` is in seconds of
    ``Clock.monotonic``, which a later process of the same boot shares.  Where the record could be
    read no further, ``shared_info`` is None, ``cpu_time`` 0 and ``began`` minus infinity.
    """

    domain: DomainIdentity
    shared_info: Mfn | None
    cpu_time: int
    began: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """A guest that stands still for us, and the processor time in ns that it had used until then.

    It has suspended itself for us, and is perhaps paused.  None: its processor time is not known.
    """

    cpu_time: int | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class UnfinishedJob:
    """A job that was not ended: ``group`` is what may have been left changed.

    Without ``hold`` the guest had been asked to suspend at most.  ``unreadable`` says why it cannot
    be read what may have been left changed; ``group`` is None then, and means nothing.
    """

    record: JobRecord
    hold: Hold | None
    group: Group | None
    job: OpenJob
    unreadable: str | None = None


class OpenJob(Protocol):
    """The record of a job that is under way.

    What a method has kept survives the death of the process.  Failures are PortErrors.
    """

    def keep(self, group: Group) -> None:
        """Keep what is to be changed from ``begin`` on, in place of what was kept before.

        What has not changed since costs nothing.  The arrays must not be written to any more.
        """
        ...

    def hold(self, cpu_time: int | None) -> None:
        """The guest stands still for us, with what it has used till then; None: not known yet.

        Before it is paused.
        """
        ...

    def begin(self) -> None:
        """The guest's memory may be changed from here on, as far as the kept group says."""
        ...

    def settled(self) -> None:
        """The guest's memory is whole: what was kept counts no more."""
        ...

    def leave(self, *, damaged: bool = False) -> None:
        """The guest may stand still because of us, but its memory is whole: keep no more than that.

        With ``damaged`` it will never be whole, and all is kept.  ``Journal.done_with`` ends the
        job, as ``close`` or as ``set_aside`` would.
        """
        ...

    def close(self) -> None:
        """The guest runs: forget the job, leaving nothing of the guest's contents behind."""
        ...

    def set_aside(self) -> None:
        """The guest could not be put right: keep the record where no later process takes it up."""
        ...


class Journal(Protocol):
    """Where exchange jobs are kept until the guest runs again."""

    def open(self, record: JobRecord) -> OpenJob:
        """Begin a job.  Raises PortError where it cannot be kept: it must not be begun then."""
        ...

    def unfinished(self) -> Sequence[UnfinishedJob]:
        """The jobs that earlier processes left."""
        ...

    def done_with(self, domain: DomainIdentity) -> None:
        """The guest of a job that was left (``leave``) runs, or is gone; nothing without one."""
        ...
