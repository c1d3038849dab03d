"""Exchanges pages of a running PV domain, as the daemon would: ... DOMID COUNT [COUNT ...] < PAGES.

Standard input is a JSON list of [pfn, mfn], as tests.e2e.dom0.pages prints it.  Each COUNT of
them becomes one job, in one suspend.  For pages that were refused, others go in a further job,
until COUNT have moved.  Prints one JSON object for each job.

There have to be some pages more than the jobs need: Xen refuses to mark frames that its image
took at boot, also those of its initialisation code, which it has given to the heap since and
which a guest may own.
"""

from __future__ import annotations

import faulthandler
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict

from pgofflined.core.frames import Domid, Mfn
from pgofflined.core.offline import OfflineFlag, OfflineState
from pgofflined.core.outcomes import Exchanged, ExchangeReport, Refusal
from pgofflined.daemon import HostClock
from pgofflined.exchanger import exchange
from pgofflined.jobstore import JobStore
from pgofflined.ports import Hypervisor, SuspendLimits
from pgofflined.xen.hypervisor import XenHypervisor

JOBS = Path("/run/pgofflined-tests")

# The guest finishes what it does after a resume before it is suspended again.
_PAUSE_SECONDS = 1.0

# A program that hangs is to say where before the rig kills it.
_TALK_AFTER_SECONDS = 240.0


def main(domid: Domid, counts: list[int], pages: list[tuple[int, int]]) -> None:
    """Do the jobs, one after the other."""
    xen = XenHypervisor()
    left = iter([Mfn(mfn) for _, mfn in pages])
    for count in counts:
        wanted = count
        while wanted:
            job = _mark(xen, left, wanted)
            if len(job) < wanted:
                raise SystemExit("there are not enough pages for these jobs")
            report = _exchange(xen, domid, job)
            print(json.dumps(report), flush=True)
            wanted -= report["exchanged"]
            time.sleep(_PAUSE_SECONDS)


def _mark(xen: XenHypervisor, mfns: Iterator[Mfn], count: int) -> list[Mfn]:
    """The first ``count`` pages that Xen lets us mark, marked."""
    marked: list[Mfn] = []
    with xen.placed():
        while len(marked) < count and (mfn := next(mfns, None)) is not None:
            if xen.query(mfn) & OfflineState.BROKEN:
                raise SystemExit(f"{mfn:#x} is broken; marking it would crash its owner")
            reply = xen.offline(mfn)
            if reply.flags & OfflineFlag.PENDING:
                marked.append(mfn)
            elif not reply.flags & OfflineFlag.XENPAGE:
                raise SystemExit(f"marking {mfn:#x} gave {reply}")
    return marked


def run_job(
    xen: Hypervisor, domid: Domid, mfns: list[Mfn], journal: JobStore | None = None
) -> ExchangeReport:
    """Exchange marked pages in one suspend."""
    return exchange(
        xen.domain(domid).identity,
        mfns,
        xen=xen,
        journal=journal or JobStore(JOBS),
        clock=HostClock(),
        limits=SuspendLimits(),
        # The rig's guests are Linux, which announces nothing after a restore or a migration.
        objection=lambda *_: None,
    )


class Report(TypedDict):
    """One job: how many pages it had and moved, which it refused, and the guest's pause in s."""

    pages: int
    exchanged: int
    offlined: int
    refused: list[str]
    whole: float
    ours: float


def _exchange(xen: XenHypervisor, domid: Domid, mfns: list[Mfn]) -> Report:
    report = run_job(xen, domid, mfns)
    refused = [result for result in report.results if isinstance(result, Refusal)]
    moved = [result for result in report.results if isinstance(result, Exchanged)]
    if len(refused) + len(moved) < len(mfns) or report.stuck is not None:
        raise SystemExit(f"the guest is harmed: {report}")
    if report.blackout is None:
        raise SystemExit(f"the guest was not suspended: {report}")
    return {
        "pages": len(mfns),
        "exchanged": len(moved),
        "offlined": sum(bool(xen.query(result.old) & OfflineState.OFFLINED) for result in moved),
        "refused": [f"{result.mfn:#x}: {result.reason}: {result.detail}" for result in refused],
        "whole": report.blackout.whole,
        "ours": report.blackout.ours,
    }


if __name__ == "__main__":
    faulthandler.dump_traceback_later(_TALK_AFTER_SECONDS, exit=True)
    main(
        Domid(int(sys.argv[1])),
        [int(word) for word in sys.argv[2:]],
        json.load(sys.stdin),
    )
