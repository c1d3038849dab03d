"""Looks after guests that a job had to leave although they may stand still because of us."""

from __future__ import annotations

import logging
import math

from pgofflined.core.domains import DomainIdentity, DomainInfo, ShutdownReason
from pgofflined.core.errors import DomainGone, PortError
from pgofflined.core.events import Event
from pgofflined.journal_log import event
from pgofflined.letgo import let_go, told
from pgofflined.ports import Clock, DomainControl, Journal

log = logging.getLogger(__name__)

# Linux gives up freezing its processes after 20 s; a guest that has not followed our request to
# suspend after the exchange's own limit and this is not going to.
_LATE = 300.0


class Aftercare:
    """Guests that may still follow our request to suspend, and those that could not be let go.

    ``stuck`` says of the latter what keeps them.  ``interval`` is the time between two looks at
    them, in seconds; there is none where no guest needs one.
    """

    def __init__(
        self, xen: DomainControl, journal: Journal, clock: Clock, *, interval: float
    ) -> None:
        self.stuck: dict[DomainIdentity, str] = {}
        self.interval = interval
        self._xen = xen
        self._journal = journal
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

    def look(self) -> None:
        """Resume those that are suspended.  Makes hypercalls; for a thread."""
        for domain, until in list(self._until.items()):
            if self._needs_no_more(domain):
                self.stuck.pop(domain, None)
                self._end(domain)
            elif self._clock.monotonic() >= until:
                self._end(domain)

    def _end(self, domain: DomainIdentity) -> None:
        del self._until[domain]
        self._journal.done_with(domain)

    def _needs_no_more(self, domain: DomainIdentity) -> bool:
        domid = domain.domid
        try:
            info = self._xen.condition(domid)
            if info.identity != domain:
                return True
            if info.shutdown is ShutdownReason.SUSPEND and self._xen.somebody_at(domid) is not None:
                return False  # it may stand still for him by now
            if domain in self.stuck:
                return self._is_let_go(info)
            if info.shutdown is not ShutdownReason.SUSPEND:
                return False
            self._xen.resume(domid)
            self._xen.tell_resumed(domid)
        except DomainGone:
            return True
        except PortError as error:
            log.warning("d%d may stand still because of us, and cannot be helped: %s", domid, error)
            return False
        message = f"d{domid} was still suspended on our request and was resumed"
        event(log, logging.WARNING, Event.GUEST_DID_NOT_SUSPEND, message, domid=domid)
        return True

    def _is_let_go(self, info: DomainInfo) -> bool:
        """Try again to let a stuck guest go; whether it runs, by us or by somebody else."""
        domid = info.domid
        if info.shutdown is not ShutdownReason.SUSPEND and not info.paused:
            return True
        problem = let_go(self._xen, domid)
        told(self._xen, domid)
        if problem is not None:
            return False
        message = f"d{domid}, which could not be let go, runs again"
        event(log, logging.WARNING, Event.GUEST_DID_NOT_SUSPEND, message, domid=domid)
        return True
