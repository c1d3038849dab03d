"""Pages with uncorrected errors that nobody has used yet, about which Xen itself does nothing."""

from __future__ import annotations

import re

import pytest

from .daemon import Daemon, frames, running
from .rig.guest import Guest, GuestSpec
from .rig.host import Host
from .rig.waiting import wait_until

MCELOG = "intel-mcelog-noservice"
NATIVE = "intel-native-noservice"

# What Linux logs when it is asked to suspend itself.
SUSPENDS = re.compile("Freezing user space processes")

pytestmark = pytest.mark.e2e


def assert_untouched(daemon: Daemon, guest: Guest, mfn: int) -> None:
    """The guest still has the page, and nobody has had it stand still for it."""
    assert daemon.ask("query", mfn=f"{mfn:#x}")["owner"].startswith(f"d{guest.domid} ")
    assert not SUSPENDS.search(guest.console())
    assert daemon.metric("guest_blackout_seconds_count") == 0
    assert daemon.metric("jobs_total", kind="exchange", outcome="done") == 0


@pytest.mark.hosts(MCELOG, NATIVE)
def test_a_poisoned_page_is_marked_and_never_moved_and_goes_with_its_guest(host: Host) -> None:
    guest = host.start_guest(GuestSpec(name="pv", vcpus=2))
    [mfn] = frames(host, "data", guest.domid, 1)
    with running(host) as daemon:
        daemon.inject_ucna(mfn)
        wait_until(
            lambda: daemon.state(mfn) == "OFFLINE_PENDING",
            timeout=30,
            what="Xen to be told that the page is to go",
            interval=1,
        )
        page = daemon.page(mfn)
        assert (page["cause"], page["marked"]) == ("uncorrected", True), page
        assert daemon.attention(f"{mfn:#x}", str(mfn)) != []
        # Neither more errors nor an operator have it copied.
        daemon.inject_ce(mfn)
        daemon.inject_ce(mfn)
        daemon.request_offline(mfn)
        # A pass takes half a second at least: a job would have come to its end in this time.
        guest.wait_passes(20)
        assert_untouched(daemon, guest, mfn)
        guest.assert_clean()
        guest.destroy()
        daemon.wait_for(mfn, "offlined")
        assert daemon.state(mfn) == "OFFLINED"
        assert daemon.attention(f"{mfn:#x}", str(mfn)) == []


@pytest.mark.hosts(NATIVE)
def test_a_poisoned_page_that_is_free_is_taken_out_at_once(host: Host) -> None:
    [mfn] = frames(host, "free", 0, 1)
    with running(host) as daemon:
        daemon.inject_ucna(mfn)
        daemon.wait_for(mfn, "offlined", limit=30)
        assert daemon.state(mfn) == "OFFLINED"
        assert daemon.attention(f"{mfn:#x}", str(mfn)) == []
