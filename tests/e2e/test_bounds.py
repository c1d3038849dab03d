"""How much is retired at most, on real Xen."""

from __future__ import annotations

import pytest

from .daemon import POLICY, Daemon, frames, running
from .rig.guest import GuestSpec
from .rig.host import Host
from .rig.waiting import wait_until

CAP = 8
CAPPED = POLICY.replace('max_retired = "64MiB"', f'max_retired = "{CAP * 4}KiB"')
BURST = 30
BANKS = 20

pytestmark = [pytest.mark.e2e, pytest.mark.hosts("intel-native-noservice")]


def is_settled(daemon: Daemon) -> bool:
    """Whether no page is under way, and some have come to their end."""
    status = daemon.status()
    under_way = [page for page in status["pages"] if page["state"] not in ("offlined", "left")]
    return not under_way and status["pages_by_state"].get("offlined", 0) >= CAP


def assert_capped(daemon: Daemon, mfns: list[int]) -> None:
    """So many pages have gone, and for no other has anything been done."""
    wait_until(lambda: is_settled(daemon), timeout=300, what="the pages to be retired", interval=1)
    assert daemon.status()["retired_frames"] == CAP
    questions = [{"request": "query", "mfn": f"{mfn:#x}"} for mfn in mfns]
    states = [answer["state"] for answer in daemon.ask_all(questions)]
    assert sorted(states) == sorted(["OFFLINED"] * CAP + ["ONLINE"] * (len(mfns) - CAP))


def test_a_burst_of_errors_on_thirty_pages_retires_no_more_than_the_cap(host: Host) -> None:
    guest = host.start_guest(GuestSpec(name="pv", vcpus=2))
    mfns = frames(host, "data", guest.domid, BURST)
    with running(host, CAPPED) as daemon:
        # Each page twice, as many at a time as there are banks.
        errors = mfns * 2
        for start in range(0, len(errors), BANKS):
            daemon.inject_ce(*errors[start : start + BANKS])
        assert_capped(daemon, mfns)
    guest.wait_passes(2)
    guest.assert_clean()


@pytest.mark.slow
def test_an_operator_who_asks_for_thirty_pages_at_once_gets_no_more_than_the_cap(
    host: Host,
) -> None:
    guest = host.start_guest(GuestSpec(name="pv", vcpus=2))
    mfns = frames(host, "data", guest.domid, BURST)
    with running(host, CAPPED) as daemon:
        requests = [{"request": "offline", "mfn": f"{mfn:#x}", "wait": False} for mfn in mfns]
        taken = [answer["fate"] != "refused" for answer in daemon.ask_all(requests)]
        assert_capped(daemon, mfns)
        assert sum(taken) == CAP
    guest.wait_passes(2)
    guest.assert_clean()
