"""The service is stopped, or told to do nothing more, in the middle of its work."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from .daemon import POLICY, TESTS, Daemon, announce_suspend, frames, running
from .rig.guest import Guest, GuestSpec
from .rig.host import Host
from .rig.waiting import wait_until

# A guest needs longer than this to suspend itself, so that all of them follow too late.
LATE = POLICY.replace("[exchange]", '[exchange]\nsuspend_timeout = "100ms"')
# One guest that does not answer holds up all the others.
ONE_BY_ONE = POLICY.replace("[exchange]", "[exchange]\nworkers = 1").replace(
    'acknowledge_timeout = "5s"', 'acknowledge_timeout = "60s"'
)
DRY = ONE_BY_ONE.replace("[retire]", "[retire]\ndry_run = true")
NOT_THESE = ONE_BY_ONE + "\n[domains]\ndeny = ['first', 'next*']\n"

# What Linux logs when it is asked to suspend itself.
SUSPENDS = re.compile("Freezing user space processes")

pytestmark = [pytest.mark.e2e, pytest.mark.hosts("intel-native-noservice")]


def small(name: str) -> GuestSpec:
    """A guest that boots quickly."""
    return GuestSpec(name=name, memory_mib=96)


def stops(host: Host, policy: str, count: int | str, guests: list[Guest]) -> list[dict[str, Any]]:
    """Stop the service at so many moments of jobs; what stood still then."""
    names = " ".join(guest.spec.name for guest in guests)
    with running(host, policy):
        done = host.run(f"{TESTS}.stops {count} {names}", timeout=1600)
    told: list[dict[str, Any]] = [json.loads(line) for line in done.out.splitlines()]
    # Shown when the test fails, and with -rP.
    print(*told, sep="\n")
    return told


@pytest.mark.parametrize(
    "count", [4, pytest.param(15, marks=pytest.mark.slow)], ids=["a-few", "many"]
)
@pytest.mark.parametrize(
    "policy",
    [pytest.param(POLICY, id="in-time"), pytest.param(LATE, id="late", marks=pytest.mark.slow)],
)
def test_no_guest_stands_still_when_the_service_has_stopped_at_any_moment_of_a_job(
    host: Host, policy: str, count: int
) -> None:
    guests = [host.start_guest(small(name)) for name in ("one", "other")]
    told = stops(host, policy, count, guests)
    assert len(told) == count
    assert [stop for stop in told if stop["standing"] or stop["records"]] == []
    assert "suspended" in {stop["when"] for stop in told}
    for guest in guests:
        guest.wait_passes(1)
        guest.assert_clean()


@pytest.mark.slow
def test_a_stop_waits_for_a_guest_that_has_taken_the_request_and_not_followed_it(
    host: Host,
) -> None:
    guest = host.start_guest(small("one"))
    [stop] = stops(host, LATE, "late", [guest])
    assert (stop["standing"], stop["records"]) == ([], [])
    guest.wait_passes(1)
    guest.assert_clean()


@pytest.mark.slow
@pytest.mark.parametrize("policy", [DRY, NOT_THESE], ids=["dry-run", "denied"])
def test_no_guest_is_suspended_for_a_queued_job_after_the_policy_has_forbidden_it(
    host: Host, policy: str
) -> None:
    deaf = host.start_guest(GuestSpec(name="first", memory_mib=96, ignore_suspend=True))
    announce_suspend(host, deaf.domid)
    others = [host.start_guest(small(name)) for name in ("next", "next2")]
    guests = [deaf, *others]
    mfns = [frames(host, "data", guest.domid, 1)[0] for guest in guests]
    with running(host, ONE_BY_ONE) as daemon:
        # It takes no notice of the request, and the others' jobs wait for its job's end.
        daemon.offline(mfns[0])
        wait_until(
            lambda: daemon.status()["workers"]["busy"] == 1, timeout=30, what="its job to begin"
        )
        for mfn in mfns[1:]:
            daemon.offline(mfn)
        wait_until(lambda: queued(daemon) == 2, timeout=30, what="the jobs to be queued")
        daemon.reload(policy)
        # The first job's time is not over.
        assert daemon.status()["workers"]["busy"] == 1
        wait_until(
            lambda: daemon.status()["workers"]["busy"] == queued(daemon) == 0,
            timeout=180,
            what="the queue to be empty",
            interval=1,
        )
        # A pass takes half a second at least: more than one retry would be due in this time.
        deaf.wait_passes(40)
        for guest in guests:
            guest.wait_passes(1)
            assert not SUSPENDS.search(guest.console()), guest.spec.name
            guest.assert_clean()
        assert daemon.metric("guest_blackout_seconds_count") == 0
        for mfn in mfns:
            pending = daemon.state(mfn) == "OFFLINE_PENDING"
            assert daemon.page(mfn)["marked"] == pending, daemon.page(mfn)


def queued(daemon: Daemon) -> int:
    """How many pages wait for a worker."""
    return int(daemon.status()["workers"]["queued_pages"])
