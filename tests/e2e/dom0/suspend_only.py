"""Suspends and resumes a PV domain, and nothing else: ... DOMID COUNT."""

from __future__ import annotations

import sys
import time

from pgofflined.core.frames import Domid
from pgofflined.ports import SuspendLimits
from pgofflined.xen.hypervisor import XenHypervisor

# As long as the guest is given between two exchanges.
_PAUSE_SECONDS = 1.0


def main(domid: Domid, count: int) -> None:
    """Do it."""
    xen = XenHypervisor()
    for _ in range(count):
        xen.suspend(domid, SuspendLimits())
        xen.resume(domid)
        xen.tell_resumed(domid)
        time.sleep(_PAUSE_SECONDS)


if __name__ == "__main__":
    main(Domid(int(sys.argv[1])), int(sys.argv[2]))
