"""Looks after guests that a job had to leave although they may stand still because of us.

Only what is ours is undone: a suspend that our request may have led to and that nobody saves or
migrates the guest by, and our pause of a guest that has not run since.  Whoever has paused or
suspended a guest after that finds it so.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from uuid import UUID

from pgofflined.core.conditions import ConditionCode
from pgofflined.core.domains import DomainIdentity, DomainInfo, ShutdownReason
from pgofflined.core.errors import DomainGone, PortError
from pgofflined.core.events import Event
from pgofflined.core.outcomes import Standing
from pgofflined.core.recovery import Recovered, RecoveryReport
from pgofflined.journal_log import event
from pgofflined.letgo import by_hand, let_go, resume_only, told
from pgofflined.ports import Clock, DomainControl

log = logging.getLogger(__name__)

# The two limits of a request by default (``core.policy``), which are over when a job of this
# process leaves its guest.  Of another process it is known when it asked, and no more.
_LIMITS = 70.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CareTimes:
    """Seconds.

    ``interval``: between two looks at guests.  ``late``: for which a guest that was given up may
    still follow our request.  ``late_at_stop``: the same where the daemon is to end.  ``stop``: for
    which its end is put off at all, below the unit's TimeoutStopSec.

    Linux freezes its processes first and gives up after 20 s (``pm_freeze_timeout``,
    kernel/power/process.c), before a request is given up by us as a rule.  ``late`` is for a guest
    that was starved or paused meanwhile.  No time is too long for that, but a stop has to end:
    ``late_at_stop`` is six times what Linux takes, and the record stays for whatever runs next.
    """

    interval: float = 5.0
    late: float = 300.0
    late_at_stop: float = 120.0
    stop: float = 270.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StuckGuest:
    """Why a guest does not run because of us, and since when, in seconds since the epoch.

    ``code`` says whether we go on trying to let it run, or must not.
    """

    since: float
    text: str
    code: ConditionCode = ConditionCode.GUEST_STUCK


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftGuest:
    """A guest that is not seen to the end, and what a person can do.

    ``is_kept``: a later process knows of it and goes on.  ``is_ours``: that is for us to do.
    """

    domain: DomainIdentity
    text: str
    is_kept: bool
    is_ours: bool = True


class _Found(Enum):
    """What a look at a guest has shown."""

    ENDED = auto()
    """It needs nothing more, by what was done or because it is gone."""
    RUNS = auto()
    """It may still follow a request, until the time is over."""
    WAITS = auto()
    """It stands still, or may: it is looked after however long that lasts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    """One guest; all times in seconds of ``Clock.monotonic``.

    ``at_stop``: until when a stop waits for it while it runs.  ``is_ours``: whether it is for us to
    let it run; others are only shown.  ``is_kept``: whether a later process knows of it.
    """

    until: float
    at_stop: float
    stuck: StuckGuest | None = None
    standing: Standing = field(default_factory=Standing)
    is_ours: bool = True
    is_kept: bool = True
    stands: bool = False


class Aftercare:
    """Guests that may still follow our request to suspend, and those that could not be let go.

    There is no need to look where there is no such guest.  ``ended`` is told of a guest that needs
    nothing more; no exchange may begin in it before.  ``keep`` records a guest of whom no later
    process would know, and says whether one does now: else it is tried again.  ``crashed`` is told
    of one that has crashed meanwhile.  All three are called by ``look``.  ``under_way`` says which
    guest an exchange of this process is at work on, or has not ended: it is left to that until it
    has.

    Any thread may call any method; ``look`` one at a time.
    """

    def __init__(
        self,
        xen: DomainControl,
        clock: Clock,
        *,
        times: CareTimes,
        ended: Callable[[DomainIdentity], None],
        keep: Callable[[DomainInfo], bool] = lambda _: True,
        under_way: Callable[[DomainIdentity], bool] = lambda _: False,
        crashed: Callable[[DomainIdentity], None] = lambda _: None,
    ) -> None:
        self.times = times
        self._xen = xen
        self._ended = ended
        self._keep = keep
        self._under_way = under_way
        self._crashed = crashed
        self._clock = clock
        self._lock = threading.Lock()
        # Never changed, only replaced: it is read on the loop while a thread looks at guests.
        self._cases: Mapping[DomainIdentity, _Case] = {}

    def __bool__(self) -> bool:
        """Whether any guest needs looking after."""
        return bool(self._cases)

    @property
    def stuck(self) -> Mapping[DomainIdentity, StuckGuest]:
        """The guests that do not run because of us, as they were at the last look."""
        return {
            domain: case.stuck for domain, case in self._cases.items() if case.stuck is not None
        }

    @property
    def holds_up_a_stop(self) -> bool:
        """Whether there is a guest that the daemon must not end before."""
        now = self._clock.monotonic()
        return any(
            case.is_ours and (case.stuck is not None or case.stands or now < case.at_stop)
            for case in self._cases.values()
        )

    def left(self) -> Sequence[LeftGuest]:
        """The guests that are left to a person, should nobody go on looking."""
        return [
            LeftGuest(
                domain=domain,
                text=_left(domain, case),
                is_kept=case.is_ours and case.is_kept,
                is_ours=case.is_ours,
            )
            for domain, case in self._cases.items()
        ]

    def note(
        self,
        job: str,
        domain: DomainIdentity,
        *,
        stuck: str | None,
        may_suspend_late: bool,
        standing: Standing = Standing(),  # noqa: B008 - it does not change
        asked: float | None = None,
        is_kept: bool = True,
    ) -> None:
        """Take over a guest that a job left.

        ``asked`` is when its suspend was asked for, where the limits of that may not be over yet.
        ``is_kept``: the job's record tells a later process of it.
        """
        if stuck is None and not may_suspend_late:
            return
        since = self._clock.monotonic() if asked is None else asked + _LIMITS
        case = _Case(
            until=since + self.times.late if stuck is None else math.inf,
            at_stop=since + self.times.late_at_stop,
            stuck=self._stuck(stuck),
            standing=standing,
            is_kept=is_kept,
        )
        self._put(domain, case)
        if stuck is not None:
            message = (
                f"d{domain.domid} cannot be let go: {stuck}; we go on trying, meanwhile "
                f"{by_hand(domain.domid)}"
            )
            event(log, logging.CRITICAL, Event.GUEST_STUCK, message, domid=domain.domid, job=job)

    def leave_to_operator(self, domain: DomainIdentity, why: str) -> None:
        """Show a guest that is held and not for us to let run, until it runs or is gone.

        Whoever calls has told of it.
        """
        stuck = StuckGuest(since=self._clock.now(), text=why, code=ConditionCode.GUEST_HELD)
        case = _Case(until=math.inf, at_stop=-math.inf, stuck=stuck, is_ours=False)
        self._put(domain, case)

    def note_recovered(self, reports: Iterable[RecoveryReport]) -> None:
        """The same for jobs of an earlier process."""
        for report in reports:
            if report.outcome is Recovered.HELD:
                self.leave_to_operator(report.domain, report.detail)
            else:
                self.note(
                    "recovery",
                    report.domain,
                    stuck=report.stuck,
                    may_suspend_late=report.may_suspend_late,
                    standing=report.standing,
                    asked=report.asked,
                )

    def take_over(self, earlier: Aftercare) -> None:
        """Look after the guests of another of this process, which must not be used any more."""
        for domain, case in earlier._cases.items():
            self._put(domain, case)

    def _stuck(self, why: str | None) -> StuckGuest | None:
        return None if why is None else StuckGuest(since=self._clock.now(), text=why)

    def _put(self, domain: DomainIdentity, case: _Case) -> None:
        with self._lock:
            before = self._cases.get(domain)
            if before is not None and before.is_ours and case.is_ours:
                case = _joined(before, case)
            self._cases = {**self._cases, domain: case}

    def _replace(self, domain: DomainIdentity, old: _Case, new: _Case | None) -> bool:
        """Put another case in the place of one, or none, unless it was noted anew just now."""
        with self._lock:
            if self._cases.get(domain) is not old:
                return False
            others = {other: case for other, case in self._cases.items() if other != domain}
            self._cases = others if new is None else {**others, domain: new}
            return True

    def look(self) -> None:
        """Resume those that are suspended.  Makes hypercalls; for a thread."""
        for domain, case in self._cases.items():
            if self._under_way(domain):
                continue
            found, after = self._look_at(domain, case)
            is_over = self._clock.monotonic() >= case.until
            if found is _Found.ENDED or (found is _Found.RUNS and is_over):
                if self._replace(domain, case, None):
                    self._ended(domain)
            else:
                after = replace(after, stands=found is _Found.WAITS)
                if after != case:
                    self._replace(domain, case, after)

    def _look_at(self, domain: DomainIdentity, case: _Case) -> tuple[_Found, _Case]:
        domid = domain.domid
        try:
            if not case.is_ours:
                settled = is_settled(domain.uuid, self._xen.conditions())
                return (_Found.ENDED if settled else _Found.WAITS), case
            info = self._xen.condition(domid)
            if info.identity == domain and info.shutdown is ShutdownReason.CRASH:
                self._crashed(domain)
            if info.identity != domain or info.shutdown not in (None, ShutdownReason.SUSPEND):
                return _Found.ENDED, case
            stands = info.shutdown is ShutdownReason.SUSPEND or info.paused
            if not case.is_kept:
                case = replace(case, is_kept=self._keep(info))
            if stands and self._xen.somebody_at(domid) is not None:
                return _Found.WAITS, case  # it may stand still for him by now
        except DomainGone:
            return _Found.ENDED, case
        except PortError as error:
            log.warning("d%d may stand still because of us, and cannot be helped: %s", domid, error)
            return _Found.WAITS, case
        return self._let_go(info, case)

    def _let_go(self, info: DomainInfo, case: _Case) -> tuple[_Found, _Case]:
        """Take back what is ours of the guest's standing still, if anything."""
        domid, standing = info.domid, case.standing
        is_suspended = info.shutdown is ShutdownReason.SUSPEND
        if standing.cpu_time not in (None, info.cpu_time):
            return _Found.ENDED, case  # it has run since; who has stopped it again is not we
        if case.stuck is None and not is_suspended:
            if info.paused:
                # It can follow nothing as long as somebody has it paused.
                late = self._clock.monotonic() + self.times.late
                case = replace(case, until=max(case.until, late))
            return _Found.RUNS, case
        if not is_suspended and not (standing.paused and info.paused):
            return _Found.ENDED, case
        kept = let_go(self._xen, domid) if standing.paused else resume_only(self._xen, domid)
        told(self._xen, domid)
        if kept is not None:
            stuck = case.stuck or self._stuck(kept.text)
            return _Found.WAITS, replace(
                case, until=math.inf, stuck=stuck, standing=replace(standing, paused=kept.paused)
            )
        was = "was still suspended on our request" if case.stuck is None else "could not be let go"
        message = f"d{domid}, which {was}, was resumed"
        event(log, logging.WARNING, Event.GUEST_DID_NOT_SUSPEND, message, domid=domid)
        return _Found.ENDED, case


def is_settled(uuid: UUID, here: Iterable[DomainInfo]) -> bool:
    """Whether what was left to a person is done: one domain of the guest runs, or none is left.

    By its uuid, for a migration may have left two of them, or it may be another by now.
    """
    same = [info for info in here if info.uuid == uuid and not info.dying]
    return not same or (len(same) == 1 and same[0].shutdown is None and not same[0].paused)


def _joined(before: _Case, after: _Case) -> _Case:
    """What is known of one guest by two jobs."""
    return replace(
        after,
        until=max(before.until, after.until),
        at_stop=max(before.at_stop, after.at_stop),
        stuck=before.stuck or after.stuck,
        standing=before.standing if after.stuck is None else after.standing,
        is_kept=before.is_kept or after.is_kept,
        stands=before.stands,
    )


def _left(domain: DomainIdentity, case: _Case) -> str:
    domid = domain.domid
    if not case.is_ours:
        return "" if case.stuck is None else case.stuck.text
    if case.stuck is not None:
        return f"d{domid} does not run because of us ({case.stuck.text}): {by_hand(domid)}"
    hand = by_hand(domid, paused=False)
    if case.stands:
        return f"d{domid} may stand still because of us: if nobody saves or migrates it, {hand}"
    return (
        f"d{domid} has read our request to suspend and has not followed it: should it still do so, "
        f"nobody resumes it but you: {hand}"
    )
