"""Stops the service at random moments of exchanges: ... COUNT NAME [NAME ...]

For each of COUNT stops a page of one of the PV guests is given to the running service; the stop
comes at a random instant of the time that a job takes, every other time when the guest has just
suspended itself.  Prints one JSON object for each: what of the guests stands still when the service
has stopped, and the records that are left.  Then the service is started again.

With "late" for COUNT it is one stop, while the first guest has taken the request and is paused, so
that it cannot follow it: until the service has ended or is seen to wait for the guest.
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
from pgofflined.xen.store import StorePort, open_store

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
# Stopping, a service that waits for nobody has ended by then.
_END_SECONDS = 40.0
# So often is a guest caught between taking the request and following it.
_TRIES = 20


def main(count: str, names: list[str]) -> None:
    """Do the stops."""
    xen = XenHypervisor()
    domids = [domain.domid for domain in xen.domains() if domain.name in names]
    if count == "late":
        _stop_before_it_follows(xen, domids)
    else:
        _stop_at_random(xen, domids, int(count))


def _stop_at_random(xen: XenHypervisor, domids: list[Domid], count: int) -> None:
    for number in range(count):
        domid = domids[number % len(domids)]
        _offline(_page(xen, domid))
        when = "suspended" if number % 2 and _wait_until_suspended(xen, domid) else "any"
        # The instant itself is what is drawn: there is no condition to wait for.
        time.sleep(random.uniform(0, _JOB_SECONDS) if when == "any" else 0)  # noqa: S311
        began = time.monotonic()
        _systemctl("stop")
        _tell(xen, domids, when, time.monotonic() - began)
        _systemctl("start")


def _stop_before_it_follows(xen: XenHypervisor, domids: list[Domid]) -> None:
    domid = domids[0]
    for _ in range(_TRIES):
        with open_store() as store:
            _offline(_page(xen, domid))
            caught = _pause_when_it_has_taken(xen, store, domid)
        if caught:
            break
    else:
        raise SystemExit(f"d{domid} has always followed the request at once")
    began = time.monotonic()
    try:
        _systemctl("stop", "--no-block")
        while _is_there() and time.monotonic() < began + _END_SECONDS:
            time.sleep(_LOOK_SECONDS)
    finally:
        xen.unpause(domid)
    _systemctl("stop")
    _tell(xen, domids, "late", time.monotonic() - began)


def _pause_when_it_has_taken(xen: XenHypervisor, store: StorePort, domid: Domid) -> bool:
    """Pause the guest as soon as it has taken a request; whether it had not followed it yet."""
    node = f"/local/domain/{domid}/control/shutdown"
    until = time.monotonic() + _SUSPEND_SECONDS
    while store.read(node) != b"suspend":
        if time.monotonic() > until:
            return False
    while store.read(node) == b"suspend":
        pass
    xen.pause(domid)
    if xen.condition(domid).shutdown is None:
        return True
    xen.unpause(domid)
    return False


def _is_there() -> bool:
    done = subprocess.run(["systemctl", "is-active", _UNIT], stdout=subprocess.PIPE, check=False)
    return done.stdout.strip() != b"inactive"


def _tell(xen: XenHypervisor, domids: list[Domid], when: str, seconds: float) -> None:
    told = {
        "when": when,
        "seconds": round(seconds, 1),
        "standing": _standing(xen, domids),
        "records": sorted(path.name for path in _JOBS.iterdir()),
    }
    print(json.dumps(told), flush=True)


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
        request = {"request": "offline", "mfn": f"{mfn:#x}", "wait": False}
        asking.sendall(json.dumps(request).encode() + b"\n")
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


def _systemctl(*what: str) -> None:
    subprocess.run(["systemctl", *what, _UNIT], check=True, stdout=sys.stderr)


if __name__ == "__main__":
    faulthandler.dump_traceback_later(_TALK_AFTER_SECONDS, exit=True)
    main(sys.argv[1], sys.argv[2:])
