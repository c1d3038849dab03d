"""Has the admin do something in the middle of exchanges of a guest's pages: ... NAME < STEPS

STEPS is a JSON list of objects, one for each exchange of one page:

    moment   when the command is started
        survey     while the guest is looked at
        asking     right before it is asked to suspend itself
        suspended  while it stands still because of us, before Xen exchanges the page
        resumed    when it runs again, before xenstored is told
    command  what the admin does, a list of words.  Some wait for the guest to take a request,
             which it cannot while it stands still
    until    how far the command has to come before the exchange goes on
        ended      it is over
        asked      it has written a request into the guest's control/shutdown
        taken      the guest has taken that request
    then     what the admin does when both are over; may be left out

Prints one JSON object for each step: what became of the page and of the guest, and how the command
ended.  The mark of a page that stayed is taken back.
"""

from __future__ import annotations

import faulthandler
import json
import subprocess
import sys
from collections.abc import Callable
from typing import NotRequired, TypedDict, assert_never

from pgofflined.core.errors import DomainGone
from pgofflined.core.frames import Domid, Mfn
from pgofflined.core.offline import OfflineFlag, OfflineState
from pgofflined.core.outcomes import Damaged, Exchanged, ExchangeReport, Refusal
from pgofflined.daemon import HostClock
from pgofflined.exchanger import exchange
from pgofflined.jobstore import JobStore
from pgofflined.ports import SuspendLimits
from pgofflined.sim.faults import Fault, FaultyHypervisor, Moment
from pgofflined.xen.hypervisor import XenHypervisor
from pgofflined.xen.store import open_store

from .aftercare import look_after
from .exchange_pages import JOBS
from .pages import RNG, of_pv_guest

MOMENTS = {
    "survey": ("page_types", Moment.BEFORE),
    "asking": ("suspend", Moment.BEFORE),
    "suspended": ("exchange", Moment.BEFORE),
    "resumed": ("resume", Moment.AFTER),
}
# A guest that is paused does not answer; no need to wait for long.
_LIMITS = SuspendLimits(acknowledge=3.0)
_COMMAND_SECONDS = 120.0
_TALK_AFTER_SECONDS = 200.0


class Admin:
    """Runs one command beside us, and waits until it has come far enough."""

    def __init__(self, xen: XenHypervisor, domid: Domid, until: str, command: list[str]) -> None:
        self._xen = xen
        self._domid = domid
        self._reached: Callable[[str | None], bool] = {
            "ended": lambda _: False,
            "asked": bool,
            "taken": self._taken,
        }[until]
        self._command = command
        self._process: subprocess.Popen[str] | None = None
        self._was_asked = False

    def act(self) -> None:
        """Start the command."""
        self._process = subprocess.Popen(
            self._command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        node = f"/local/domain/{self._domid}/control/shutdown"
        with open_store() as store:
            while self._process.poll() is None:
                value = store.read(node)
                if self._reached(value.decode() if value is not None else None):
                    return

    def end(self) -> tuple[int, str]:
        """How the command ended, and what it said."""
        if self._process is None:
            raise SystemExit("the exchange ended before the moment came")
        said, _ = self._process.communicate(timeout=_COMMAND_SECONDS)
        return self._process.returncode, said

    def _taken(self, value: str | None) -> bool:
        self._was_asked |= bool(value)
        return self._was_asked and not value


class Step(TypedDict):
    """See above."""

    moment: str
    command: list[str]
    until: str
    then: NotRequired[list[str]]


def main(name: str, steps: list[Step]) -> None:
    """Do the exchanges, one after the other."""
    xen = XenHypervisor()
    for step in steps:
        [domid] = [domain.domid for domain in xen.domains() if domain.name == name]
        print(json.dumps(_interfere(xen, domid, step)), flush=True)
        if "then" in step:
            subprocess.run(step["then"], check=True, stdout=sys.stderr)


def _interfere(xen: XenHypervisor, domid: Domid, step: Step) -> dict[str, object]:
    admin = Admin(xen, domid, step["until"], step["command"])
    method, when = MOMENTS[step["moment"]]
    mfn = _mark(xen, domid)
    journal = JobStore(JOBS)
    report = exchange(
        xen.domain(domid).identity,
        [mfn],
        xen=FaultyHypervisor(xen, Fault(method=method, moment=when, act=admin.act)),
        journal=journal,
        clock=HostClock(),
        limits=_LIMITS,
        # The rig's guests are Linux, which announces nothing after a restore or a migration.
        objection=lambda *_: None,
    )
    status, said = admin.end()
    look_after(xen, journal, [report])
    if xen.query(mfn) & OfflineState.OFFLINE_PENDING:
        xen.online(mfn)
    return {
        **_told(report),
        "moment": step["moment"],
        "state": _state(xen, domid),
        "status": status,
        "said": said,
    }


def _state(xen: XenHypervisor, domid: Domid) -> str:
    try:
        info = xen.condition(domid)
    except DomainGone:
        return "gone"
    if info.dying:
        return "gone"
    if info.shutdown is not None:
        return info.shutdown.name.lower()
    return "paused" if info.paused else "runs"


def _mark(xen: XenHypervisor, domid: Domid) -> Mfn:
    """A page of plain memory, marked."""
    JOBS.mkdir(mode=0o700, exist_ok=True)
    found = of_pv_guest(xen, domid, "data")
    while True:
        mfn = Mfn(found[RNG.integers(len(found))][1])
        # What was of Xen's image at boot cannot be marked.
        if xen.offline(mfn).flags & OfflineFlag.PENDING:
            return mfn


def _told(report: ExchangeReport) -> dict[str, object]:
    [result] = report.results
    outcome, detail = "exchanged", ""
    match result:
        case Exchanged():
            pass
        case Refusal(reason=reason):
            outcome, detail = reason.value, result.detail
        case Damaged():
            outcome, detail = "damaged", result.detail
        case _:
            assert_never(result)
    return {
        "outcome": outcome,
        "detail": detail,
        "stuck": report.stuck,
        "records": [path.name for path in JOBS.iterdir()],
    }


if __name__ == "__main__":
    faulthandler.dump_traceback_later(_TALK_AFTER_SECONDS, exit=True)
    main(sys.argv[1], json.load(sys.stdin))
