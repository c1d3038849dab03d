"""Kills a process at the moment when a domain has suspended itself: ... DOMID PID.

Prints whether the domain stood still when the process was dead.
"""

from __future__ import annotations

import json
import os
import signal
import sys

from pgofflined.core.domains import ShutdownReason
from pgofflined.core.frames import Domid
from pgofflined.xen.hypervisor import XenHypervisor

_SECONDS = 60


def main(domid: Domid, pid: int) -> None:
    """Watch and kill."""
    # Nobody waits for a domain that does not suspend itself.
    signal.alarm(_SECONDS)
    xen = XenHypervisor()
    print("watching", flush=True)
    while xen.condition(domid).shutdown is not ShutdownReason.SUSPEND:
        pass
    os.kill(pid, signal.SIGKILL)
    info = xen.condition(domid)
    print(json.dumps({"suspended": info.shutdown is ShutdownReason.SUSPEND}))


if __name__ == "__main__":
    main(Domid(int(sys.argv[1])), int(sys.argv[2]))
