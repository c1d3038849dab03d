"""Exchanges every page of a list once: ... DOMID BATCH < PAGES.

Standard input is a JSON list of [pfn, mfn], as tests.e2e.dom0.pages prints it.  BATCH of them go in
one suspend.  Prints one JSON object for each page: what became of it; and one for each job.  The
marks of refused pages are taken back.
"""

from __future__ import annotations

import faulthandler
import json
import sys
from typing import assert_never

from pgofflined.core.frames import Domid, Mfn
from pgofflined.core.offline import OfflineFlag, OfflineState
from pgofflined.core.outcomes import Damaged, Exchanged, PageResult, Refusal, page_of
from pgofflined.xen.hypervisor import XenHypervisor

from .exchange_pages import run_job

# A program that hangs is to say where before the rig kills it.
_TALK_AFTER_SECONDS = 1500.0


def main(domid: Domid, batch: int, pages: list[tuple[int, int]]) -> None:
    """Do the jobs, one after the other."""
    xen = XenHypervisor()
    for start in range(0, len(pages), batch):
        some = pages[start : start + batch]
        marked = [Mfn(mfn) for _, mfn in some if _mark(xen, Mfn(mfn))]
        if not marked:
            continue
        report = run_job(xen, domid, marked)
        for result in report.results:
            print(json.dumps(_told(xen, result)), flush=True)
            if isinstance(result, Refusal):
                xen.online(result.mfn)
        ours = report.blackout.ours if report.blackout is not None else None
        print(json.dumps({"pages": len(marked), "ours": ours, "stuck": report.stuck}), flush=True)


def _mark(xen: XenHypervisor, mfn: Mfn) -> bool:
    """Mark a page; tells those that Xen itself had at boot, which it does not let us mark."""
    if xen.query(mfn) & OfflineState.BROKEN:
        raise SystemExit(f"{mfn:#x} is broken; marking it would crash its owner")
    reply = xen.offline(mfn)
    if reply.flags & OfflineFlag.PENDING:
        return True
    print(json.dumps({"mfn": mfn, "outcome": "not_marked", "detail": str(reply)}), flush=True)
    return False


def _told(xen: XenHypervisor, result: PageResult) -> dict[str, object]:
    mfn = page_of(result)
    match result:
        case Exchanged(old=old):
            offlined = bool(xen.query(old) & OfflineState.OFFLINED)
            return {"mfn": mfn, "outcome": "exchanged" if offlined else "not_offlined"}
        case Refusal(reason=reason, detail=detail):
            return {"mfn": mfn, "outcome": reason.value, "detail": detail}
        case Damaged(detail=detail):
            return {"mfn": mfn, "outcome": "damaged", "detail": detail}
        case _:
            assert_never(result)


if __name__ == "__main__":
    faulthandler.dump_traceback_later(_TALK_AFTER_SECONDS, exit=True)
    main(Domid(int(sys.argv[1])), int(sys.argv[2]), json.load(sys.stdin))
