"""Stops the service at random moments of exchanges: ... COUNT NAME [NAME ...]

For each of COUNT stops a page of one of the PV guests is given to the running service; the stop
comes at a random instant of the time that a job takes, every other time when the guest has just
suspended itself.  Prints one JSON object for each: what of the guests stands still when the service
has stopped, and the records that are left.  Then the service is started again.
"""

from __future__ import annotations

import faulthandler
import json
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

from pgofflined.core.domains import ShutdownReason
from pgofflined.core.errors import DomainGone
from pgofflined.core.frames import Domid, Mfn
from pgofflined.core.offline import OfflineState
from pgofflined.xen.hypervisor import XenHypervisor

from .pages import RNG, of_pv_guest

_UNIT = "pgofflined.service"
_JOBS = Path("/run/pgofflined/jobs")
_SOCKET = "/run/pgofflined/control.sock"
# Longer than a job takes from the request to its end.
_JOB_SECONDS = 3.0
_SUSPEND_SECONDS = 10.0
# For so long the guests are looked at when the service has stopped: one that has taken a request
# follows it within this time.
_WATCH_SECONDS = 3.0
_LOOK_SECONDS = 0.2
_TALK_AFTER_SECONDS = 1500.0


def main(count: int, names: list[str]) -> None:
    """Do the stops."""
    xen = XenHypervisor()
    domids = [domain.domid for domain in xen.domains() if domain.name in names]
    for number in range(count):
        domid = domids[number % len(domids)]
        _offline(_page(xen, domid))
        when = "suspended" if number % 2 and _wait_until_suspended(xen, domid) else "any"
        # The instant itself is what is drawn: there is no condition to wait for.
        time.sleep(random.uniform(0, _JOB_SECONDS) if when == "any" else 0)  # noqa: S311
        began = time.monotonic()
        _systemctl("stop")
        took = time.monotonic() - began
        standing = _standing(xen, domids)
        told = {
            "when": when,
            "seconds": round(took, 1),
            "standing": standing,
            "records": sorted(path.name for path in _JOBS.iterdir()),
        }
        print(json.dumps(told), flush=True)
        _systemctl("start")


def _page(xen: XenHypervisor, domid: Domid) -> Mfn:
    """A page of plain memory, for which nothing is under way."""
    found = of_pv_guest(xen, domid, "data")
    while True:
        mfn = Mfn(found[RNG.integers(len(found))][1])
        if xen.query(mfn) is OfflineState.ONLINE:
            return mfn


def _offline(mfn: Mfn) -> None:
    with socket.socket(socket.AF_UNIX) as asking:
        asking.connect(_SOCKET)
        asking.sendall(json.dumps({"request": "offline", "mfn": f"{mfn:#x}"}).encode() + b"\n")
        answer = json.loads(asking.makefile().readline())
    if answer["fate"] in ("refused", "unresolved"):
        raise SystemExit(f"the service does not take {mfn:#x}: {answer}")


def _wait_until_suspended(xen: XenHypervisor, domid: Domid) -> bool:
    until = time.monotonic() + _SUSPEND_SECONDS
    while time.monotonic() < until:
        if xen.condition(domid).shutdown is ShutdownReason.SUSPEND:
            return True
    return False


def _standing(xen: XenHypervisor, domids: list[Domid]) -> list[str]:
    """The guests that stand still at the end of a time in which none runs on by itself."""
    until = time.monotonic() + _WATCH_SECONDS
    while True:
        found = [state for domid in domids if (state := _state(xen, domid))]
        if time.monotonic() >= until:
            return found
        time.sleep(_LOOK_SECONDS)


def _state(xen: XenHypervisor, domid: Domid) -> str:
    try:
        info = xen.condition(domid)
    except DomainGone:
        return f"d{domid} is gone"
    if info.shutdown is not None:
        return f"d{domid}: {info.shutdown.name.lower()}"
    return f"d{domid}: paused" if info.paused else ""


def _systemctl(what: str) -> None:
    subprocess.run(["systemctl", what, _UNIT], check=True, stdout=sys.stderr)


if __name__ == "__main__":
    faulthandler.dump_traceback_later(_TALK_AFTER_SECONDS, exit=True)
    main(int(sys.argv[1]), sys.argv[2:])
