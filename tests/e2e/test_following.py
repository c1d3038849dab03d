"""What the daemon knows of pages follows what happens around it, on real Xen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from .daemon import POLICY, Daemon, frames, running
from .rig.guest import Guest, GuestSpec
from .rig.host import Host
from .rig.nested import tried_again_after_triple_faults
from .rig.waiting import wait_until

NATIVE = "intel-native-noservice"
AMD = "amd-mcelog-noservice"

ONE_TRY = POLICY.replace("attempts = 2", "attempts = 1")
MANY_TRIES = POLICY.replace("attempts = 2", "attempts = 1000")
NO_TARGET = POLICY.replace('target = "localhost"', 'target = ""')
SAVED = "/run/rig-guests/saved"
ALL_IS_WELL = "All is well"

pytestmark = pytest.mark.e2e


def console_ring(host: Host, guest: Guest) -> int:
    """A page of a PV guest that cannot be exchanged: dom0 has it mapped through a grant."""
    told = host.run(["xenstore-read", f"/local/domain/{guest.domid}/console/ring-ref"]).out
    return int(told)


def shown(host: Host) -> str:
    """What people see."""
    return host.run(["pgofflined", "status"]).out


@contextmanager
def clock_moved(host: Host, there: str, back: str) -> Iterator[None]:
    """Somebody sets dom0's clock."""
    host.run(["date", "--set", there])
    try:
        yield
    finally:
        host.run(["date", "--set", back])


def tries(daemon: Daemon, mfn: int) -> int:
    """How often the exchange of a page was refused so far."""
    return int(daemon.page(mfn)["attempts"])


@pytest.mark.hosts(NATIVE)
def test_a_page_that_waits_is_tried_again_in_its_time_whatever_becomes_of_the_clock(
    host: Host,
) -> None:
    guest = host.start_guest(GuestSpec(name="pv", vcpus=2))
    ring = console_ring(host, guest)
    with running(host, MANY_TRIES) as daemon:
        daemon.offline(ring)
        daemon.wait_for(ring, "waiting")
        with clock_moved(host, "-1 day", "+1 day"):
            wait_for_tries(daemon, ring)
            assert ALL_IS_WELL not in shown(host)
        wait_for_tries(daemon, ring)


def wait_for_tries(daemon: Daemon, mfn: int) -> None:
    """Wait for the next tries, each of which is due after 5 s."""
    before = tries(daemon, mfn)
    wait_until(
        lambda: tries(daemon, mfn) >= before + 3, timeout=60, what="the next tries", interval=1
    )


@pytest.mark.hosts(NATIVE)
@pytest.mark.parametrize(
    "moved",
    [
        pytest.param(True, marks=pytest.mark.slow, id="moved-by-hand"),
        pytest.param(False, id="ended"),
    ],
)
def test_a_page_that_was_left_is_known_to_be_offline_when_its_guest_has_gone_off_it(
    host: Host, *, moved: bool
) -> None:
    guest = host.start_guest(GuestSpec(name="pv", vcpus=2, memory_mib=96))
    ring = console_ring(host, guest)
    with running(host, ONE_TRY) as daemon:
        daemon.offline(ring)
        assert daemon.wait_for(ring, "left")["reason"] == "granted"
        assert ALL_IS_WELL not in shown(host)
        if moved:
            host.run(f"xl save pv {SAVED} && xl restore {SAVED} && rm {SAVED}", timeout=180)
        else:
            guest.destroy()
        assert daemon.state(ring) == "OFFLINED"
        daemon.wait_for(ring, "offlined")
        assert daemon.metric("pages", state="offlined") == 1
        assert daemon.attention(f"{ring:#x}") == []


@pytest.mark.slow
@pytest.mark.hosts(NATIVE)
def test_a_page_that_xen_has_allocated_to_nobody_is_xens(host: Host) -> None:
    guest = host.start_guest(GuestSpec(name="pv", vcpus=2, memory_mib=96))
    [mfn] = frames(host, "anonymous", guest.domid, 1)
    with running(host) as daemon:
        daemon.offline(mfn)
        page = daemon.wait_for(mfn, "left", limit=300)
        assert (page["reason"], page["marked"]) == ("xen", True), page
        assert daemon.state(mfn) == "OFFLINE_PENDING"
        guest.wait_passes(1)
        guest.assert_clean()
        # Xen frees it with the guest that it has it for.
        guest.destroy()
        daemon.wait_for(mfn, "offlined")
        assert daemon.state(mfn) == "OFFLINED"


@pytest.mark.hosts(AMD)
@tried_again_after_triple_faults
def test_a_page_that_was_left_for_want_of_a_target_is_taken_up_when_there_is_one(
    host: Host,
) -> None:
    guest = host.start_guest(GuestSpec(name="pvh", kind="pvh", vcpus=2))
    before = guest.domid
    [mfn] = frames(host, "hvm", before, 1)
    with running(host, NO_TARGET) as daemon:
        daemon.offline(mfn)
        assert daemon.wait_for(mfn, "left")["reason"] == "no_relocation"
        daemon.reload(POLICY)
        daemon.wait_for(mfn, "offlined", limit=300)
        assert daemon.state(mfn) == "OFFLINED"
        assert guest.domid != before
        guest.wait_passes(2)
        guest.assert_clean(migrated=True)


@pytest.mark.hosts(AMD)
@tried_again_after_triple_faults
def test_a_page_that_was_left_is_known_to_be_offline_when_its_guest_was_migrated_by_hand(
    host: Host,
) -> None:
    guest = host.start_guest(GuestSpec(name="pvh", kind="pvh", vcpus=2))
    [mfn] = frames(host, "hvm", guest.domid, 1)
    with running(host, NO_TARGET) as daemon:
        daemon.offline(mfn)
        assert daemon.wait_for(mfn, "left")["reason"] == "no_relocation"
        host.run("xl migrate -s '' pvh 'xl migrate-receive'", timeout=300)
        assert daemon.state(mfn) == "OFFLINED"
        daemon.wait_for(mfn, "offlined")
        guest.wait_passes(2)
        guest.assert_clean(migrated=True)
