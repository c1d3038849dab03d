"""What the daemon does for guests that may follow a request to suspend late."""

from __future__ import annotations

import time
from collections.abc import Sequence

from pgofflined.aftercare import Aftercare, CareTimes
from pgofflined.core.outcomes import ExchangeReport
from pgofflined.core.recovery import RecoveryReport
from pgofflined.daemon import HostClock
from pgofflined.ports import Journal
from pgofflined.xen.hypervisor import XenHypervisor

# A guest that has read the request follows it within so many seconds.
_LATE_SECONDS = 4.0
_INTERVAL = 0.2


def look_after(
    xen: XenHypervisor, journal: Journal, reports: Sequence[ExchangeReport | RecoveryReport]
) -> None:
    """Look at the guests of some jobs until none needs it, or the time is over."""
    aftercare = Aftercare(xen, HostClock(), times=CareTimes(), ended=journal.done_with)
    for report in reports:
        aftercare.note(
            "tests",
            report.domain,
            stuck=report.stuck,
            may_suspend_late=report.may_suspend_late,
            standing=report.standing,
        )
    until = time.monotonic() + _LATE_SECONDS
    while aftercare and time.monotonic() < until:
        aftercare.look()
        time.sleep(_INTERVAL)
    # As after the five minutes that a daemon takes: none of them is going to follow any more.
    for report in reports:
        journal.done_with(report.domain)
