"""Marks frames of one PV domain with a call each, then takes the marks back: … MFN [MFN …].

Begins on dom0's vCPU 0, from where the calls must not be made.
"""

from __future__ import annotations

import json
import os
import sys

from pgofflined.core.frames import Mfn
from pgofflined.core.offline import OfflineFlag, OfflineState
from pgofflined.xen.hypervisor import XenHypervisor


def main(mfns: list[Mfn]) -> None:
    """Print how many were marked, and how many are online in the end."""
    os.sched_setaffinity(0, {0})
    xen = XenHypervisor()
    marked = sum(bool(xen.offline(mfn).flags & OfflineFlag.PENDING) for mfn in mfns)
    for mfn in mfns:
        xen.online(mfn)
    online = sum(xen.query(mfn) is OfflineState.ONLINE for mfn in mfns)
    print(json.dumps({"marked": marked, "online": online, "cpus": list(os.sched_getaffinity(0))}))


if __name__ == "__main__":
    main([Mfn(int(word)) for word in sys.argv[1:]])
