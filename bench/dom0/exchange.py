"""Exchanges pages of a running PV domain, as the daemon would: exchange.py DOMID COUNT ... < PAGES.

Standard input is a JSON list of [pfn, mfn], as tests.e2e.dom0.pages prints it.  Each COUNT of
them becomes one job, in one suspend.  Prints one JSON object for each job.
"""

from __future__ import annotations

import faulthandler
import json
import sys
import time
from collections import Counter

from pgofflined.core.frames import Domid, Mfn
from pgofflined.core.offline import OfflineState
from pgofflined.core.outcomes import Refusal
from pgofflined.daemon import HostClock
from pgofflined.exchanger import exchange
from pgofflined.ports import SuspendLimits
from pgofflined.xen.hypervisor import XenHypervisor

# The guest finishes what it does after a resume before it is suspended again.
_PAUSE_SECONDS = 1.0

# A program that hangs is to say where before the rig kills it.
_TALK_AFTER_SECONDS = 100.0


def main(domid: Domid, counts: list[int], pages: list[tuple[int, int]]) -> None:
    """Do the jobs, one after the other."""
    xen = XenHypervisor()
    left = [Mfn(mfn) for _, mfn in pages]
    for count in counts:
        job, left = left[:count], left[count:]
        if len(job) < count:
            raise SystemExit("there are not enough pages for these jobs")
        print(json.dumps(_job(xen, domid, job)), flush=True)
        time.sleep(_PAUSE_SECONDS)


def _job(xen: XenHypervisor, domid: Domid, mfns: list[Mfn]) -> dict[str, object]:
    identity = xen.domain(domid).identity
    replies = {}
    with xen.placed():
        for mfn in mfns:
            if xen.query(mfn) & OfflineState.BROKEN:
                raise SystemExit(f"{mfn:#x} is broken; marking it would crash its owner")
            replies[mfn] = xen.offline(mfn)
    report = exchange(identity, mfns, xen=xen, clock=HostClock(), limits=SuspendLimits())
    kinds = Counter(type(result).__name__.lower() for result in report.results)
    return {
        "pages": len(mfns),
        "results": kinds,
        "details": [
            f"{result.mfn:#x}: {result.reason}: {result.detail}; marking it gave"
            f" {replies[result.mfn]}, it is {xen.query(result.mfn)} now"
            for result in report.results
            if isinstance(result, Refusal)
        ],
        "whole": report.blackout.whole if report.blackout else None,
        "ours": report.blackout.ours if report.blackout else None,
        "stuck": report.stuck,
    }


if __name__ == "__main__":
    faulthandler.dump_traceback_later(_TALK_AFTER_SECONDS, exit=True)
    main(
        Domid(int(sys.argv[1])),
        [int(word) for word in sys.argv[2:]],
        json.load(sys.stdin),
    )
