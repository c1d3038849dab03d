"""Looks after guests that a job had to leave although they may stand still because of us."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from enum import Enum, auto

from pgofflined.core.domains import DomainIdentity, DomainInfo, ShutdownReason
from pgofflined.core.errors import DomainGone, PortError
from pgofflined.core.events import Event
from pgofflined.core.recovery import RecoveryReport
from pgofflined.journal_log import event
from pgofflined.letgo import let_go, told
from pgofflined.ports import Clock, DomainControl

log = logging.getLogger(__name__)

# Linux gives up freezing its processes after 20 s; a guest that has not followed our request to
# suspend after the exchange's own limit and this is not going to.
_LATE = 300.0


class _Found(Enum):
    """What a look at a guest has shown."""

    ENDED = auto()
    """It needs nothing more, by what was done or because it is gone."""
    RUNS = auto()
    """It may still follow a request, until the time is over."""
    WAITS = auto()
    """It stands still, or may: it is looked after however long that lasts."""


class Aftercare:
    """Guests that may still follow our request to suspend, and those that could not be let go.

    ``stuck`` says of the latter what keeps them.  ``interval`` is the time between two looks at
    them, in seconds; there is none where no guest needs one.  ``ended`` is told of a guest that
    needs nothing more; no exchange may begin in it before.
    """

    def __init__(
        self,
        xen: DomainControl,
        clock: Clock,
        *,
        interval: float,
        ended: Callable[[DomainIdentity], None],
    ) -> None:
        self.stuck: dict[DomainIdentity, str] = {}
        self.interval = interval
        self._xen = xen
        self._ended = ended
        self._clock = clock
        self._until: dict[DomainIdentity, float] = {}

    def __bool__(self) -> bool:
        """Whether any guest needs looking after."""
        return bool(self._until)

    def note(
        self, job: str, domain: DomainIdentity, *, stuck: str | None, may_suspend_late: bool
    ) -> None:
        """Take over a guest that a job left."""
        if may_suspend_late:
            self._until[domain] = self._clock.monotonic() + _LATE
        if stuck is not None:
            self._until[domain] = math.inf
            self.stuck[domain] = stuck
            message = (
                f"d{domain.domid} cannot be let go: {stuck}; we go on trying, meanwhile run "
                f"`xl unpause {domain.domid}` and, with Xen 4.20 or later, "
                f"`xl resume {domain.domid}`"
            )
            event(log, logging.CRITICAL, Event.GUEST_STUCK, message, domid=domain.domid, job=job)

    def note_recovered(self, reports: Iterable[RecoveryReport]) -> None:
        """The same for jobs of an earlier process."""
        for report in reports:
            self.note(
                "recovery",
                report.domain,
                stuck=report.stuck,
                may_suspend_late=report.may_suspend_late,
            )

    def look(self) -> None:
        """Resume those that are suspended.  Makes hypercalls; for a thread."""
        for domain, until in list(self._until.items()):
            found = self._look_at(domain)
            is_over = self._clock.monotonic() >= until
            if found is _Found.ENDED or (found is _Found.RUNS and is_over):
                self.stuck.pop(domain, None)
                # Unless it was noted anew just now.
                if self._until.get(domain) == until:
                    del self._until[domain]
                    self._ended(domain)

    def _look_at(self, domain: DomainIdentity) -> _Found:
        domid = domain.domid
        try:
            info = self._xen.condition(domid)
            if info.identity != domain:
                return _Found.ENDED
            if info.shutdown is ShutdownReason.SUSPEND and self._xen.somebody_at(domid) is not None:
                return _Found.WAITS  # it may stand still for him by now
            if domain in self.stuck:
                return self._let_go(info)
            if info.shutdown is not ShutdownReason.SUSPEND:
                return _Found.RUNS
            self._xen.resume(domid)
            self._xen.tell_resumed(domid)
        except DomainGone:
            return _Found.ENDED
        except PortError as error:
            log.warning("d%d may stand still because of us, and cannot be helped: %s", domid, error)
            return _Found.WAITS
        message = f"d{domid} was still suspended on our request and was resumed"
        event(log, logging.WARNING, Event.GUEST_DID_NOT_SUSPEND, message, domid=domid)
        return _Found.ENDED

    def _let_go(self, info: DomainInfo) -> _Found:
        """Try again to let a stuck guest go, unless it runs by somebody else."""
        domid = info.domid
        if info.shutdown is not ShutdownReason.SUSPEND and not info.paused:
            return _Found.ENDED
        problem = let_go(self._xen, domid)
        told(self._xen, domid)
        if problem is not None:
            return _Found.WAITS
        message = f"d{domid}, which could not be let go, runs again"
        event(log, logging.WARNING, Event.GUEST_DID_NOT_SUSPEND, message, domid=domid)
        return _Found.ENDED
