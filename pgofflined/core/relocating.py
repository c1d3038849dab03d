"""The queue of domains that are to be migrated off their bad pages.

One job per domain, with all of the domain's bad pages: a migration moves every page, so it is
needed once however many are bad.  The queue decides whose turn it is and when to look again; it
acts on nothing and reads no clock.

Waits are counted on a clock that is never set.  The wall clock may be, so that it is asked for
maintenance windows only, anew each time, and for what people are shown.  A window says when a
migration may start; one that has started is not stopped by the window's end.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, tzinfo
from typing import Final

from pgofflined.core.domains import DomainIdentity
from pgofflined.core.frames import Mfn
from pgofflined.core.policy import Backoff, RelocationPolicy
from pgofflined.core.premigration import Hindrance
from pgofflined.core.schedule import next_opening
from pgofflined.core.status import JobStatus, PutOff

# A link that comes back is announced several times, and its routes follow a moment later.
_LINK_SETTLES: Final = 1.0
# Seconds after which the wall clock is asked again whether a window is open, for it may have been
# set, and after which it is seen whether a job that waits still has something to wait for.
_LOOK_AGAIN: Final = 300.0
# A save that fails has kept the guest still for as long as it took, so it is not tried often.
_SAVES: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Instant:
    """One moment by both clocks.

    ``wall``: seconds since the epoch, as the host's clock says.  ``steady``: seconds that only
    ever pass.
    """

    wall: float
    steady: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RelocationJob:
    """One domain.

    ``by_saving``: it is a PV domain, to be saved and restored.  Its memory is free in between and
    must not be given away, so that this is done while no other job runs.
    ``since`` is by the wall clock, ``due`` and ``look`` are by the steady one: when it may be
    tried (again), and when it is to be seen whether it still has something to wait for.
    ``is_over``: it was seen that it has not, so that no window is waited for.  ``attempts`` counts
    migrations that were started, ``deferrals`` how often in a row it was found hindered.
    ``put_off`` says why it was not begun, or begun again, until it is.
    """

    number: int
    domain: DomainIdentity
    name: str
    mfns: frozenset[Mfn]
    by_saving: bool
    since: float
    due: float
    look: float
    running: bool = False
    is_over: bool = False
    hindrance: Hindrance | None = None
    attempts: int = 0
    deferrals: int = 0
    detail: str = ""
    put_off: PutOff | None = None

    @property
    def label(self) -> str:
        """What the job is called in the journal and in `pgofflined jobs`."""
        return f"relocation-{self.number}"

    def state(self, now: Instant) -> str:
        """``running``, ``deferred``, ``waiting`` (for its next try) or ``due``."""
        if self.running:
            return "running"
        if self.hindrance is Hindrance.OUTSIDE_WINDOW:
            return "deferred"
        if self.due <= now.steady:
            return "due"
        return "waiting" if self.hindrance is None else "deferred"


class RelocationQueue:
    """All jobs that are not finished.  ``zone`` is the time zone of maintenance windows."""

    def __init__(self, policy: RelocationPolicy, zone: tzinfo) -> None:
        self._policy = policy
        self._zone = zone
        self._jobs: dict[DomainIdentity, RelocationJob] = {}
        self._numbers = 0
        self._failed_saves: dict[DomainIdentity, int] = {}

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def policy(self) -> RelocationPolicy:
        """The policy in force."""
        return self._policy

    def set_policy(self, policy: RelocationPolicy, now: Instant) -> None:
        """Put another policy in force; whatever was hindered under the old one is due again.

        Saves may fail as often as at first again: the operator has seen to something.
        """
        self._policy = policy
        self._failed_saves.clear()
        for job in self._resting():
            if job.hindrance is not None:
                self._put(replace(job, due=now.steady, hindrance=None, deferrals=0))
        self.look_again(now)

    def submit(
        self,
        domain: DomainIdentity,
        name: str,
        mfns: Iterable[Mfn],
        now: Instant,
        *,
        by_saving: bool = False,
    ) -> RelocationJob | None:
        """Add pages to the domain's job, or a job for the domain; None when there is no room.

        Pages may be added until the job is finished, also while the domain is migrated: it
        leaves those too.
        """
        job = self._jobs.get(domain)
        if job is not None:
            return self._put(replace(job, mfns=job.mfns.union(mfns)))
        if len(self._jobs) >= self._policy.max_queued:
            return None
        self._numbers += 1
        return self._put(
            RelocationJob(
                number=self._numbers,
                domain=domain,
                name=name,
                mfns=frozenset(mfns),
                by_saving=by_saving,
                since=now.wall,
                due=now.steady,
                look=now.steady + _LOOK_AGAIN,
            )
        )

    def job(self, domain: DomainIdentity) -> RelocationJob:
        """The job of a domain as it is now.  Raises KeyError where there is none."""
        return self._jobs[domain]

    def take(self, now: Instant) -> RelocationJob | None:
        """The job to look at now, which has a slot from here on; None when there is none."""
        closed = self.closed_for(now)
        if closed:
            for job in self._due(now):
                if not job.is_over and job.hindrance is not Hindrance.OUTSIDE_WINDOW:
                    self._put(_until_the_window_opens(job))
        ready = self._ready(now, closed)
        if not ready or self._is_full() or self._waits_to_be_alone(ready):
            return None
        first = min(ready, key=lambda job: job.number)
        return self._put(replace(first, running=True, is_over=False, hindrance=None, detail=""))

    def closed_for(self, now: Instant) -> float:
        """Seconds until a maintenance window opens, if the wall clock is not set; 0 in one."""
        local = datetime.fromtimestamp(now.wall, self._zone)
        opening = next_opening(self._policy.maintenance_windows, local)
        # An opening in the past or present comes back as the local time itself, which is rounded
        # to microseconds: turned back into seconds it might lie a little after now.
        return 0.0 if opening == local else max(0.0, opening.timestamp() - now.wall)

    def started(self, domain: DomainIdentity) -> RelocationJob:
        """Count a migration that is about to start."""
        job = self._jobs[domain]
        return self._put(replace(job, attempts=job.attempts + 1, deferrals=0, put_off=None))

    def defer(
        self, domain: DomainIdentity, hindrance: Hindrance, detail: str, now: Instant
    ) -> RelocationJob:
        """Give the slot back because of something that passes; no attempt is lost."""
        job = replace(self._jobs[domain], running=False)
        if hindrance is Hindrance.OUTSIDE_WINDOW:
            return self._put(_until_the_window_opens(replace(job, due=now.steady)))
        retry = self._policy.retry
        if hindrance in (Hindrance.NO_ROUTE, Hindrance.LINK_DOWN):
            # The kernel says when that has passed; this is for an event that was lost.
            delay = retry.last
        else:
            endless = Backoff(first=retry.first, last=retry.last)
            delay = endless.delay(job.deferrals + 1) or retry.last
        return self._put(
            replace(
                job,
                due=now.steady + delay,
                hindrance=hindrance,
                deferrals=job.deferrals + 1,
                detail=detail,
                put_off=_put_off(hindrance, detail),
            )
        )

    def failed(
        self, domain: DomainIdentity, detail: str, now: Instant, *, stood_still: bool = False
    ) -> RelocationJob | None:
        """Give the slot back after a try that failed; None when it was the last one.

        The job is then still there, for ``finish``.  ``stood_still``: the guest was suspended to be
        saved, for nothing.
        """
        job = self._jobs[domain]
        if stood_still:
            self._failed_saves[domain] = self._failed_saves.get(domain, 0) + 1
        delay = self._policy.retry.delay(job.attempts)
        if delay is None or self.may_not_be_saved(domain):
            return None
        put_off = PutOff(reason="failed", detail=detail)
        return self._put(
            replace(job, running=False, due=now.steady + delay, detail=detail, put_off=put_off)
        )

    def may_not_be_saved(self, domain: DomainIdentity) -> bool:
        """Whether saves of a domain have failed too often, also for pages it had before."""
        return self._failed_saves.get(domain, 0) >= _SAVES

    def finish(self, domain: DomainIdentity) -> RelocationJob:
        """Take a job out of the queue."""
        return self._jobs.pop(domain)

    def link_changed(self, now: Instant) -> None:
        """Look at what waits for a link or a route again, in a moment."""
        for job in self._resting():
            if job.hindrance is not None and job.hindrance.ends_with_link_event:
                self._put(replace(job, due=min(job.due, now.steady + _LINK_SETTLES)))

    def waits_for_link(self) -> bool:
        """Whether a change of links or routes would matter to any job."""
        return any(
            job.hindrance is not None and job.hindrance.ends_with_link_event
            for job in self._resting()
        )

    def look_again(self, now: Instant) -> None:
        """Have it seen at once whether the jobs still have something to wait for."""
        for job in self._resting():
            self._put(replace(job, look=now.steady))

    def to_look_at(self, now: Instant) -> Sequence[RelocationJob]:
        """The jobs of which that is to be seen now; not asked for again before some minutes."""
        jobs = [job for job in self._resting() if job.look <= now.steady]
        return [self._put(replace(job, look=now.steady + _LOOK_AGAIN)) for job in jobs]

    def hurry(self, domain: DomainIdentity, now: Instant) -> None:
        """A job was seen to have nothing to wait for; nothing happens where it has begun or ended.

        It gets a slot also outside the windows, so that it comes to its end.
        """
        job = self._jobs.get(domain)
        if job is not None and not job.running:
            self._put(replace(job, due=min(job.due, now.steady), is_over=True))

    def next_event(self, now: Instant) -> float | None:
        """When there is something to do by the steady clock; None: not before something happens."""
        times = [job.look for job in self._resting()] + self._turns(now)
        return max(now.steady, min(times)) if times else None

    def statuses(self, now: Instant) -> tuple[JobStatus, ...]:
        """All jobs in the order in which they came."""
        return tuple(
            JobStatus(
                job=job.label,
                kind="relocation",
                domid=job.domain.domid,
                domain_name=job.name,
                pages=len(job.mfns),
                state=job.state(now),
                since=job.since,
                attempts=job.attempts,
                next_try=self._next_try(job, now),
                detail=job.detail,
                put_off=job.put_off,
            )
            for job in sorted(self._jobs.values(), key=lambda job: job.number)
        )

    def note(self, domain: DomainIdentity, detail: str) -> None:
        """Say what a running job is at."""
        self._put(replace(self._jobs[domain], detail=detail))

    def _next_try(self, job: RelocationJob, now: Instant) -> float | None:
        """By the wall clock as it is now; None where nothing is waited for."""
        if job.running:
            return None
        wait = max(0.0, job.due - now.steady)
        if job.hindrance is Hindrance.OUTSIDE_WINDOW:
            wait = max(wait, self.closed_for(now))
        return now.wall + wait if wait else None

    def _turns(self, now: Instant) -> list[float]:
        """When ``take`` is to be called for a job."""
        closed = self.closed_for(now)
        ready = self._ready(now, closed)
        if self._is_full() or self._waits_to_be_alone(ready):
            return []
        if ready:
            return [now.steady]
        times = [job.due for job in self._resting() if job.due > now.steady]
        if self._due(now):
            # The looks see to it that a clock that is set meanwhile is noticed.
            times.append(now.steady + closed)
        return times

    def _due(self, now: Instant) -> list[RelocationJob]:
        return [job for job in self._resting() if job.due <= now.steady]

    def _ready(self, now: Instant, closed: float) -> list[RelocationJob]:
        return [job for job in self._due(now) if job.is_over or not closed]

    def _running(self) -> list[RelocationJob]:
        return [job for job in self._jobs.values() if job.running]

    def _is_full(self) -> bool:
        running = self._running()
        return len(running) >= self._policy.parallel or any(job.by_saving for job in running)

    def _waits_to_be_alone(self, ready: list[RelocationJob]) -> bool:
        """Whether the next job has to wait for those that run; none overtakes it meanwhile."""
        first = min(ready, key=lambda job: job.number, default=None)
        return first is not None and first.by_saving and bool(self._running())

    def _resting(self) -> list[RelocationJob]:
        return [job for job in self._jobs.values() if not job.running]

    def _put(self, job: RelocationJob) -> RelocationJob:
        self._jobs[job.domain] = job
        return job


def _until_the_window_opens(job: RelocationJob) -> RelocationJob:
    # What has hindered it before may have passed by then.
    detail = "outside the maintenance windows"
    return replace(
        job,
        hindrance=Hindrance.OUTSIDE_WINDOW,
        deferrals=0,
        detail=detail,
        put_off=_put_off(Hindrance.OUTSIDE_WINDOW, detail),
    )


def _put_off(hindrance: Hindrance, detail: str) -> PutOff:
    return PutOff(reason=hindrance.value, detail=detail, needs_person=hindrance.needs_person)
