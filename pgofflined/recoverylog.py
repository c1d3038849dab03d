"""What the journal says of jobs that were cut off."""

from __future__ import annotations

import logging
from typing import assert_never

from pgofflined.core.events import Event
from pgofflined.core.recovery import Recovered, RecoveryReport
from pgofflined.journal_log import event

log = logging.getLogger(__name__)


def tell(report: RecoveryReport) -> None:
    """Log what became of a job that was cut off."""
    domid, job = report.domain.domid, "recovery"
    message = f"an exchange was cut off: {report.detail}"
    match report.outcome:
        case Recovered.CRASHED:
            event(log, logging.CRITICAL, Event.GUEST_ENDED, report.detail, domid=domid, job=job)
        case Recovered.NOTHING_TO_DO | Recovered.GONE:
            event(log, logging.INFO, Event.JOB_RECOVERED, message, domid=domid, job=job)
        case Recovered.FINISHED:
            event(log, logging.WARNING, Event.JOB_RECOVERED, message, domid=domid, job=job)
        case Recovered.NOT_YET:
            log.error("%s; the guest is held, and it is tried again", message)
        case Recovered.BUSY:
            if report.results:
                event(log, logging.CRITICAL, Event.JOB_NOT_RECOVERED, message, domid=domid, job=job)
            else:
                log.warning("%s; then it is tried again", message)
        case Recovered.LEFT_ALONE | Recovered.STANDS_STILL | Recovered.HELD:
            event(log, logging.CRITICAL, Event.JOB_NOT_RECOVERED, message, domid=domid, job=job)
        case _:
            assert_never(report.outcome)
    for page in report.damaged:
        what = (
            f"mfn {page.old:#x} of d{domid} could not be put right: {page.detail}; "
            "restart it at once"
        )
        event(log, logging.CRITICAL, Event.PAGE_DAMAGED, what, domid=domid, job=job)
