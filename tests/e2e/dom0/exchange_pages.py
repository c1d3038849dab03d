"""Marks frames of a PV domain and exchanges them in one job: … DOMID MFN [MFN …].

Prints JSON: what became of each frame, and the guest's pause.
"""

from __future__ import annotations

import json
import sys

from pgofflined.core.frames import Domid, Mfn
from pgofflined.core.outcomes import Exchanged
from pgofflined.daemon import HostClock
from pgofflined.exchanger import exchange
from pgofflined.ports import SuspendLimits
from pgofflined.xen.hypervisor import XenHypervisor


def main(domid: Domid, mfns: list[Mfn]) -> None:
    """Mark, exchange, print."""
    xen = XenHypervisor()
    with xen.placed():
        for mfn in mfns:
            xen.offline(mfn)
    report = exchange(
        xen.domain(domid).identity, mfns, xen=xen, clock=HostClock(), limits=SuspendLimits()
    )
    results = [
        {"exchanged": isinstance(result, Exchanged), "text": str(result)}
        for result in report.results
    ]
    states = [xen.query(mfn).name for mfn in mfns]
    pause = report.blackout.whole if report.blackout is not None else None
    ours = report.blackout.ours if report.blackout is not None else None
    answer = {"results": results, "states": states, "stuck": report.stuck}
    print(json.dumps(answer | {"blackout": pause, "ours": ours}))


if __name__ == "__main__":
    main(Domid(int(sys.argv[1])), [Mfn(int(word)) for word in sys.argv[2:]])
