"""A release is replaced while a guest stands still for one of its exchanges, on real Xen."""

from __future__ import annotations

import pytest

from .daemon import JOBS, TESTS, UNIT, Daemon, running
from .rig.guest import Guest, GuestSpec
from .rig.host import Host
from .rig.waiting import wait_until

BEFORE = 3
UNKNOWN = 99

pytestmark = [pytest.mark.e2e, pytest.mark.hosts("intel-native-noservice")]


def upgrade(host: Host, guest: Guest, stage: str, version: int) -> int:
    """The other release is killed at a stage of an exchange, then ours starts; the page."""
    host.run(["systemctl", "stop", UNIT])
    done = host.run(
        f"export OPENBLAS_NUM_THREADS=1; {TESTS}.older_record {guest.domid} {stage} {version}",
        timeout=120,
    )
    assert stands_still(host, guest)
    host.run(["systemctl", "start", UNIT], timeout=300)
    return int(done.out)


def state_of(host: Host, guest: Guest) -> str:
    """What xl shows of it: the third letter is for a pause, the fourth for a suspend."""
    return host.run(["xl", "list", guest.spec.name]).out.split()[-2]


def stands_still(host: Host, guest: Guest) -> bool:
    return state_of(host, guest)[2:4] != "--"


def records(host: Host) -> list[str]:
    return host.run(["ls", JOBS]).out.split()


def test_a_guest_that_the_release_before_left_standing_still_runs_on_whole(host: Host) -> None:
    guest = host.start_guest(GuestSpec(name="pv", vcpus=2))
    with running(host) as daemon:
        for stage in ("asked", "held", "cleared", "exchanged"):
            mfn = upgrade(host, guest, stage, BEFORE)
            wait_until(lambda: records(host) == [], timeout=60, what=f"{stage} ends")
            assert not stands_still(host, guest), stage
            moved = "OFFLINED" if stage == "exchanged" else "OFFLINE_PENDING"
            assert daemon.state(mfn) == moved
            guest.wait_passes(1)
            guest.assert_clean()


@pytest.mark.slow
def test_a_guest_of_an_unknown_record_runs_on_where_its_memory_is_whole(host: Host) -> None:
    guest = host.start_guest(GuestSpec(name="pv", vcpus=2))
    with running(host):
        for stage in ("asked", "held"):
            upgrade(host, guest, stage, UNKNOWN)
            wait_until(
                lambda: not stands_still(host, guest), timeout=60, what=f"the end of {stage}"
            )
            guest.wait_passes(1)
            guest.assert_clean()


@pytest.mark.slow
def test_a_guest_of_an_unknown_record_is_held_where_its_memory_was_being_changed(
    host: Host,
) -> None:
    guest = host.start_guest(GuestSpec(name="pv", vcpus=2))
    with running(host) as daemon:
        domid = guest.domid
        upgrade(host, guest, "exchanged", UNKNOWN)
        wait_until(lambda: told_of(daemon, domid), timeout=60, what="the alert", interval=1)
        assert stands_still(host, guest)
        # A restart does not forget it, nor does the daemon that stops let it go.
        host.run(["systemctl", "restart", UNIT], timeout=300)
        wait_until(lambda: told_of(daemon, domid), timeout=60, what="the alert", interval=1)
        assert stands_still(host, guest)
        guest.destroy()
        wait_until(lambda: not told_of(daemon, domid), timeout=60, what="the end of the alert")


def told_of(daemon: Daemon, domid: int) -> list[str]:
    """What the operator is told of the guest."""
    return daemon.attention(f"d{domid} ", f'"domid": {domid}')
