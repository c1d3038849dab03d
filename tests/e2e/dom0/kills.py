"""Kills the process that exchanges pages of a PV domain, and has another one end the job.

    ... DOMID calls KIND BATCH [held]     at every call of an exchange, before and after it;
                                          with `held`, only from the suspend on
    ... DOMID instants KIND BATCH COUNT   at random instants

KIND is what tests.e2e.dom0.pages understands.  Prints one JSON object for each kill: where it was,
how the job ended, and what became of the pages.  The marks of pages that stayed are taken back.
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from enum import IntEnum

from pgofflined.core.domains import ShutdownReason
from pgofflined.core.frames import Domid, Mfn
from pgofflined.core.offline import OfflineFlag, OfflineState
from pgofflined.core.outcomes import Damaged, Exchanged, ExchangeReport
from pgofflined.core.policy import ExchangePolicy
from pgofflined.daemon import HostClock
from pgofflined.exchanging import Exchanging
from pgofflined.jobstore import JobStore
from pgofflined.sim.faults import Fault, FaultyHypervisor, Moment
from pgofflined.xen.hypervisor import XenHypervisor

from .aftercare import look_after
from .exchange_pages import JOBS, run_job
from .pages import of_pv_guest

# What hangs is to say where, child or parent.
_CHILD_SECONDS = 60
_KILL_SECONDS = 120
_MOMENTS = (Moment.BEFORE, Moment.AFTER)
_PAUSE_SECONDS = 0.2
_HELD_SECONDS = 0.1
# After so many calls in a row that no exchange has reached, there are no more of them.
_ENDED_BEFORE = 3
# So often are other pages drawn where all were refused.
_REFUSED_PAGES = 20


class _End(IntEnum):
    """How an exchange that was to be killed ended; the status of the process."""

    KILLED = -signal.SIGKILL
    EXCHANGED = 0
    REFUSED = 3


class Driver:
    """Marks pages, has them exchanged by a child that is killed, and looks what is left."""

    def __init__(self, domid: Domid, kind: str, batch: int) -> None:
        JOBS.mkdir(mode=0o700, exist_ok=True)
        self._xen = XenHypervisor()
        self._domid = domid
        self._kind = kind
        self._batch = batch

    def calls(self, *, held: bool) -> None:
        """Kill at every call, or at those from the suspend on only.

        Exchanges differ in how many calls they have, so one that ends before the call is reached
        does not mean that there is none.
        """
        nth = self._calls_before_the_suspend() if held else 0
        ended = 0
        while ended < _ENDED_BEFORE:
            nth += 1
            killed = [self._kill_at_call(nth, moment) for moment in _MOMENTS]
            ended = 0 if any(killed) else ended + 1

    def _calls_before_the_suspend(self) -> int:
        """By a rehearsal in which the suspend fails, with pages that are not refused before it."""
        for _ in range(_REFUSED_PAGES):
            mfns = self._mark()
            xen = FaultyHypervisor(self._xen, Fault(method="suspend"))
            journal = JobStore(JOBS)
            look_after(self._xen, journal, [run_job(xen, self._domid, mfns, journal)])
            self._end({"rehearsal": True, "killed": False}, mfns)
            if "suspend" in xen.trace.methods:
                return xen.trace.methods.index("suspend")
        raise SystemExit("all the pages that were drawn are refused before the suspend")

    def instants(self, count: int) -> None:
        """Kill at random instants of the time that an exchange takes."""
        began = time.monotonic()
        self._run_child(self._mark(), lambda mfns: run_job(XenHypervisor(), self._domid, mfns))
        longest = (time.monotonic() - began) * 1.1
        for number in range(count):
            after = random.uniform(0, longest)  # noqa: S311 - no secret hangs on it
            mfns = self._mark()
            child = _fork(lambda mfns=mfns: run_job(XenHypervisor(), self._domid, mfns))  # type: ignore[misc]
            if number % 2:
                # Every other one while the guest stands still, which is a small part of the time.
                self._wait_until_suspended(child)
                after = random.uniform(0, _HELD_SECONDS)  # noqa: S311 - no secret hangs on it
            # The instant itself is what is drawn: there is no condition to wait for.
            time.sleep(after)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            self._end({"after": round(after, 4), "held": bool(number % 2)}, mfns)

    def _wait_until_suspended(self, child: int) -> None:
        """Watch the guest as long as the child lives, which refuses some pages before."""
        while self._xen.condition(self._domid).shutdown is not ShutdownReason.SUSPEND:
            if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                return

    def _kill_at_call(self, nth: int, moment: Moment) -> bool:
        """Whether there was such a call."""

        def job(mfns: list[Mfn]) -> ExchangeReport:
            die = Fault(nth=nth, moment=moment, act=lambda: os.kill(os.getpid(), signal.SIGKILL))
            return run_job(FaultyHypervisor(XenHypervisor(), die), self._domid, mfns)

        for _ in range(_REFUSED_PAGES):
            mfns = self._mark()
            end = self._run_child(mfns, job)
            self._end({"call": nth, "moment": moment.name, "killed": end is _End.KILLED}, mfns)
            if end is not _End.REFUSED:
                return end is _End.KILLED
        raise SystemExit("all the pages that were drawn are refused")

    def _run_child(self, mfns: list[Mfn], job: Callable[[list[Mfn]], ExchangeReport]) -> _End:
        """How it ended.  A child that fails ends us too."""
        _, status = os.waitpid(_fork(lambda: job(mfns)), 0)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            return _End.KILLED
        code = os.waitstatus_to_exitcode(status)
        if code not in (_End.EXCHANGED, _End.REFUSED):
            raise SystemExit(f"the exchange failed with status {code}; see above")
        return _End(code)

    def _mark(self) -> list[Mfn]:
        signal.alarm(_KILL_SECONDS)
        found = of_pv_guest(self._xen, self._domid, self._kind)
        marked: list[Mfn] = []
        with self._xen.placed():
            while len(marked) < self._batch:
                mfn = Mfn(random.choice(found)[1])  # noqa: S311 - no secret hangs on it
                if self._xen.query(mfn) is not OfflineState.ONLINE:
                    continue
                # What was of Xen's image at boot cannot be marked.
                if self._xen.offline(mfn).flags & OfflineFlag.PENDING:
                    marked.append(mfn)
        return marked

    def _end(self, where: dict[str, object], mfns: list[Mfn]) -> None:
        """What a daemon does when it starts; by a child, so that nothing of us is left in it."""
        began = time.monotonic()
        journal = JobStore(JOBS)
        work = Exchanging(
            xen=self._xen,
            journal=journal,
            clock=HostClock(),
            policy=ExchangePolicy,
            poisoned=frozenset,
        )
        reports = work.recover()
        took = time.monotonic() - began
        look_after(self._xen, journal, reports)
        states = [self._xen.query(mfn) for mfn in mfns]
        for mfn, state in zip(mfns, states, strict=True):
            if state is OfflineState.OFFLINE_PENDING:
                self._xen.online(mfn)
        info = self._xen.domain(self._domid)
        told = {
            "ended": [report.outcome.value for report in reports],
            "stuck": [report.stuck for report in reports if report.stuck],
            "damaged": [
                str(result)
                for report in reports
                for result in report.results
                if isinstance(result, Damaged)
            ],
            "states": [state.name for state in states],
            "runs": info.shutdown is None and not info.paused,
            "left": [path.name for path in JOBS.iterdir()],
            "seconds": round(took, 3),
        }
        print(json.dumps(where | told), flush=True)
        time.sleep(_PAUSE_SECONDS)


def _fork(act: Callable[[], ExchangeReport]) -> int:
    child = os.fork()
    if child:
        return child
    signal.alarm(_CHILD_SECONDS)
    code = 1
    try:
        moved = any(isinstance(result, Exchanged) for result in act().results)
        code = _End.EXCHANGED if moved else _End.REFUSED
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        os._exit(code)


def main(domid: Domid, what: str, kind: str, batch: int, rest: list[str]) -> None:
    """Do the kills."""
    driver = Driver(domid, kind, batch)
    if what == "calls":
        driver.calls(held=rest == ["held"])
    else:
        driver.instants(int(rest[0]))


if __name__ == "__main__":
    # A signal, and no thread: children are forked here.  For the same reason numpy is to have none
    # (OPENBLAS_NUM_THREADS=1).
    faulthandler.register(signal.SIGALRM, chain=True)
    main(
        Domid(int(sys.argv[1])),
        sys.argv[2],
        sys.argv[3],
        int(sys.argv[4]),
        sys.argv[5:],
    )
