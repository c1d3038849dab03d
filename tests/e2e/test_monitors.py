"""xl's monitors of the guests on a Xen before 4.20, over exchanges by the daemon."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from .daemon import UNIT, Daemon, frames, running
from .rig.guest import Guest, GuestSpec
from .rig.host import Host
from .rig.waiting import wait_until

DROP_IN = f"/run/systemd/system/{UNIT}.d"
TESTS = "cd /opt/pgofflined-tests && python3 -m tests.e2e.dom0"

# The xl processes whose parent is init: the file that each has created its guest from, its number
# and its state.
MONITORS = """
import json, os
found = []
for pid in filter(str.isdecimal, os.listdir("/proc")):
    try:
        words = open(f"/proc/{pid}/cmdline").read().split("\\0")
        status = dict(line.split(":", 1) for line in open(f"/proc/{pid}/status"))
    except OSError:
        continue
    if os.path.basename(words[0]) == "xl" and status["PPid"].strip() == "1":
        found.append([words[2], int(pid), status["State"].split()[0]])
print(json.dumps(found))
"""

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.hosts("intel417-native-noservice")]


def monitor(host: Host, name: str) -> tuple[int, str] | None:
    """Number and state of the process that monitors a guest; None where there is none."""
    told = json.loads(host.run(["python3", "-I", "-S", "-c", MONITORS]).out)
    found = [(pid, state) for file, pid, state in told if file.endswith(f"/{name}.cfg")]
    assert len(found) <= 1, told
    return found[0] if found else None


def waiting(host: Host, name: str) -> int:
    """Number of the monitor that waits for its guest's end."""
    found = monitor(host, name)
    assert found is not None
    pid, state = found
    assert state == "S"
    return pid


@contextmanager
def never_restarted(host: Host) -> Iterator[None]:
    """The service is not started again when it fails."""
    host.run(["mkdir", "-p", DROP_IN])
    host.write_text(f"{DROP_IN}/never.conf", "[Service]\nRestart=no\n")
    host.run(["systemctl", "daemon-reload"])
    try:
        yield
    finally:
        if host.lost is None:
            host.run(["rm", "-r", DROP_IN])
            host.run(["systemctl", "daemon-reload"])


def spec(name: str) -> GuestSpec:
    """A guest that boots quickly, and that xl starts again when it reboots."""
    return GuestSpec(name=name, memory_mib=96, restarts=True)


def test_xl_takes_a_suspend_for_the_guests_end_where_nobody_prevents_it(host: Host) -> None:
    # What the others are about: a checkpoint suspends the guest and lets it run on.
    guest = host.start_guest(spec("it"))
    waiting(host, "it")
    host.run("xl save -c it /run/rig-guests/saved && rm /run/rig-guests/saved", timeout=120)
    wait_until(lambda: monitor(host, "it") is None, timeout=60, what="the monitor's end")
    guest.wait_passes(1)
    guest.assert_clean()


def test_a_guest_whose_page_was_retired_is_still_started_again_when_it_reboots(host: Host) -> None:
    guest = host.start_guest(spec("it"))
    before, pid = guest.domid, waiting(host, "it")
    [mfn] = frames(host, "paired-data", before, 1)
    with running(host) as daemon:
        daemon.offline(mfn)
        daemon.wait_for(mfn, "offlined")
        assert daemon.metric("guest_blackout_seconds_count") == 1
        assert waiting(host, "it") == pid
    guest.wait_passes(1)
    guest.assert_clean()
    host.run(["xl", "reboot", "it"])
    wait_until(lambda: len(guest.boot_ids()) > 1, timeout=120, what="the guest to boot again")
    assert guest.domid != before
    guest.wait_passes(1)
    assert guest.trouble() == []


def kill_in_an_exchange(host: Host, daemon: Daemon, guest: Guest) -> None:
    """The daemon is killed in the moment in which the guest stands still for an exchange."""
    [mfn] = frames(host, "paired-data", guest.domid, 1)
    host.run(
        f"{TESTS}.kill_when_suspended {guest.domid} {daemon.pid()} > /tmp/killed & "
        "until grep -q watching /tmp/killed; do sleep 0.1; done; "
        f"pgofflined offline {mfn:#x} || true; wait",
        timeout=120,
    )
    assert '"suspended": true' in host.read_text("/tmp/killed")  # noqa: S108 - in dom0


def test_monitors_that_a_killed_daemon_has_stopped_go_on_without_a_next_one(host: Host) -> None:
    guest, other = host.start_guest(spec("it")), host.start_guest(spec("other"))
    pid = waiting(host, "other")
    with never_restarted(host), running(host) as daemon:
        kill_in_an_exchange(host, daemon, guest)
        wait_until(
            lambda: host.run(["systemctl", "is-failed", UNIT], check=False).out.strip() == "failed",
            timeout=60,
            what="the service to have failed",
        )
        wait_until(
            lambda: monitor(host, "other") == (pid, "S"), timeout=180, what="the monitor to go on"
        )
        # Its guest stands still until the next daemon.
        host.run(["systemctl", "start", UNIT], timeout=120)
        guest.wait_passes(1)
    guest.assert_clean()
    other.assert_clean()
    assert waiting(host, "other") == pid


def test_a_guest_keeps_its_monitor_where_a_next_daemon_lets_it_go(host: Host) -> None:
    guest, other = host.start_guest(spec("it")), host.start_guest(spec("other"))
    pids = waiting(host, "it"), waiting(host, "other")
    with running(host) as daemon:
        kill_in_an_exchange(host, daemon, guest)
        guest.wait_passes(1)
        wait_until(
            lambda: monitor(host, "other") == (pids[1], "S"), timeout=60, what="them to go on"
        )
        assert waiting(host, "it") == pids[0]
    guest.assert_clean()
    other.assert_clean()
