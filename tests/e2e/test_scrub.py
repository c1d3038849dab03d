"""Retired pages that leave an idle CPU searching, and those that do not (docs/xen-bugs.md)."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from .daemon import POLICY, frames, running
from .rig.guest import Guest, GuestSpec
from .rig.host import Host

AFTER_SCRUB = POLICY.replace("[exchange]", '[exchange]\nmark = "after_scrub"\nscrub_wait = "5s"')
WINDOW = 10.0

# No other test uses this host: on theirs a CPU may search already.
pytestmark = [pytest.mark.e2e, pytest.mark.hosts("intel-native")]


def processor_seconds(host: Host) -> float:
    """Processor time that the emulated host has used."""
    fields = Path(f"/proc/{host.pid()}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def busy_cpus(host: Host, guest: Guest) -> float:
    """How many CPUs the host keeps busy while its only guest is paused."""
    host.run(["xl", "pause", guest.spec.name])
    try:
        began, used = time.monotonic(), processor_seconds(host)
        # What is measured is what happens in this time.
        time.sleep(WINDOW)
        return (processor_seconds(host) - used) / (time.monotonic() - began)
    finally:
        host.run(["xl", "unpause", guest.spec.name])


@pytest.mark.slow
@pytest.mark.spoils_host
def test_pages_marked_after_they_are_scrubbed_leave_no_idle_cpu_searching(host: Host) -> None:
    guest = host.start_guest(GuestSpec(name="pv", vcpus=2))
    before = busy_cpus(host, guest)
    with running(host, AFTER_SCRUB) as daemon:
        for mfn in frames(host, "data", guest.domid, 10):
            daemon.offline(mfn)
            daemon.wait_for(mfn, "offlined")
            assert daemon.state(mfn) == "OFFLINED"
        assert daemon.metric("idle_scrub_pages") == 0
    scrubbed = busy_cpus(host, guest)
    [other] = frames(host, "data", guest.domid, 1)
    with running(host) as daemon:
        daemon.offline(other)
        daemon.wait_for(other, "offlined")
        assert daemon.metric("idle_scrub_pages") == 1
    searching = busy_cpus(host, guest)
    # The page that was marked first shows that a CPU which searches would have been seen.
    told = f"busy CPUs: {before:.2f} before, {scrubbed:.2f} after ten, {searching:.2f} in the end"
    assert searching - scrubbed > 0.5, told
    assert scrubbed - before < 0.25, told
    guest.wait_passes(2)
    guest.assert_clean()
