"""Pages that cannot be exchanged: their guest is saved and restored, on real Xen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePath

import pytest

from .daemon import POLICY, UNIT, running
from .rig.guest import Guest, GuestSpec
from .rig.host import Host
from .rig.waiting import wait_until

NOTES, SAVES = "/var/lib/pgofflined/notes", "/var/lib/pgofflined/saves"
SAVING = f"{POLICY}save_restore = true\n"
# Stands before xl in the mover's PATH.
BIN = "/run/rig-guests/bin"
SYSTEM_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
# What it says when it goes on would end it, were it a pipe of the daemon's that it says it to.
WAITS_AT_THE_SAVE = (
    'if [ "$1" = save ]; then\n'
    f"    touch {BIN}/begun\n"
    f"    while [ ! -e {BIN}/go-on ]; do sleep 1; done\n"
    "    echo goes on || exit 1\n"
    "fi\n"
)

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.hosts("intel-native-noservice")]


def ring_of(host: Host, guest: Guest) -> int:
    """The page of the guest's console, which dom0 has mapped through its grant."""
    told = host.run(["xenstore-read", f"/local/domain/{guest.domid}/console/ring-ref"]).out
    return int(told)


def left_in(host: Host, directory: str) -> list[str]:
    return host.run(["ls", directory]).out.split()


def is_ready(host: Host) -> bool:
    return host.run(["systemctl", "is-active", UNIT], check=False).out.strip() == "active"


@contextmanager
def before_xl(host: Host, script: str) -> Iterator[None]:
    """Have the mover run this before xl, with xl's arguments."""
    host.run(["mkdir", "-p", BIN])
    host.run(f"rm -f {BIN}/*")
    host.write_text(f"{BIN}/xl", f'#!/bin/sh\n{script}PATH={SYSTEM_PATH} exec xl "$@"\n')
    host.run(["chmod", "755", f"{BIN}/xl"])
    host.run(["systemctl", "set-environment", f"PATH={BIN}:{SYSTEM_PATH}"])
    try:
        yield
    finally:
        host.run(["systemctl", "unset-environment", "PATH"])


def test_a_guest_is_saved_and_restored_off_a_page_that_cannot_be_exchanged(host: Host) -> None:
    guest = host.start_guest(GuestSpec(name="pv", vcpus=2))
    before, ring = guest.domid, ring_of(host, guest)
    with running(host, SAVING) as daemon:
        daemon.offline(ring)
        daemon.wait_for(ring, "offlined", limit=300)
        assert daemon.state(ring) == "OFFLINED"
        assert guest.domid != before
        guest.wait_passes(2)
        guest.assert_clean(migrated=True)
        assert daemon.metric("migrations_total", outcome="migrated") == 1
        assert (left_in(host, NOTES), left_in(host, SAVES)) == (["lock"], [])
        assert daemon.status()["attention"] == [
            line for line in daemon.status()["attention"] if "a save of" not in line["text"]
        ]
    # What xl left behind to look after the guest is none of the service's, and lives.
    assert host.run(["pgrep", "-fc", "xl restore"]).out.strip() != "0"


def test_a_guest_whose_mover_is_killed_when_it_is_saved_is_left_to_a_person(host: Host) -> None:
    guest = host.start_guest(GuestSpec(name="pv", vcpus=2))
    ring = ring_of(host, guest)
    uuid = host.run(["xl", "vm-list"]).out
    uuid = next(line.split()[0] for line in uuid.splitlines() if line.split()[-1] == "pv")
    file, note, log = f"{SAVES}/{uuid}.state", f"{NOTES}/{uuid}.save", f"{NOTES}/{uuid}.log"
    # The guest is destroyed by now, and in its file only: the mover is killed there.
    killed_at_the_restore = 'if [ "$1" = restore ]; then kill -9 $PPID; exit 1; fi\n'
    with before_xl(host, killed_at_the_restore), running(host, SAVING) as daemon:
        daemon.offline(ring)
        daemon.wait_for(ring, "left", limit=300)
        assert not guest.exists()
        told = [line for line in daemon.status()["attention"] if file in line["text"]]
        assert told, daemon.status()["attention"]
        killed = daemon.pid()
        host.run(["systemctl", "kill", "--signal=KILL", UNIT])
        wait_until(
            lambda: daemon.pid() not in (0, killed) and is_ready(host),
            timeout=60,
            what="the next daemon",
            interval=1,
        )
        wait_until(
            lambda: any(
                f"xl restore {file}" in one["text"] for one in daemon.status()["attention"]
            ),
            timeout=60,
            what="the next daemon to tell of the save",
            interval=1,
        )
        assert left_in(host, SAVES) == [f"{uuid}.state"]
        assert not guest.exists()
    # What the person is told to do.
    host.run(["xl", "restore", file], timeout=120)
    host.run(["rm", file, note, log])
    guest.wait_passes(2)
    guest.assert_clean(migrated=True)


def test_a_guest_is_restored_though_the_daemon_is_restarted_when_it_is_saved(host: Host) -> None:
    guest = host.start_guest(GuestSpec(name="pv", vcpus=2))
    before, ring = guest.domid, ring_of(host, guest)
    with before_xl(host, WAITS_AT_THE_SAVE), running(host, SAVING) as daemon:
        daemon.offline(ring)
        wait_until(lambda: "begun" in left_in(host, BIN), timeout=300, what="the save", interval=1)
        host.run(["systemctl", "restart", UNIT], timeout=300)
        wait_until(
            lambda: any("is being saved" in one["text"] for one in daemon.status()["attention"]),
            timeout=60,
            what="the next daemon to tell of the save",
            interval=1,
        )
        assert guest.domid == before
        host.run(["touch", f"{BIN}/go-on"])
        # The note goes last.
        wait_until(
            lambda: left_in(host, NOTES) == ["lock"],
            timeout=300,
            what="the mover to be through",
            interval=1,
        )
        assert left_in(host, SAVES) == []
        assert guest.domid != before
        guest.wait_passes(2)
        guest.assert_clean(migrated=True)
        wait_until(
            lambda: daemon.state(ring) == "OFFLINED", timeout=60, what="the page to be offline"
        )


# In place of the real one, which is masked here: it is the order that counts.
XENDOMAINS = "/etc/systemd/system/xendomains.service"
DOWN = "/run/systemd/system/rig-down.target"
STAND_IN = """\
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/true
ExecStop=/bin/sh -c "xl list > /run/rig-guests/when-stopped"
"""


@contextmanager
def xendomains(host: Host) -> Iterator[None]:
    """A service of that name which notes, when it is stopped, what guests there are."""
    host.run(["rm", XENDOMAINS])
    host.write_text(XENDOMAINS, STAND_IN)
    host.run("systemctl daemon-reload && systemctl start xendomains.service")
    try:
        yield
    finally:
        host.run(["rm", "-f", XENDOMAINS, DOWN])
        host.run("systemctl mask xendomains.service && systemctl daemon-reload")


def state_of(host: Host, units: str) -> list[str]:
    return host.run(["systemctl", "show", "--value", "--property=ActiveState", units]).out.split()


def test_who_ends_all_guests_at_a_shutdown_waits_for_a_save(host: Host) -> None:
    guest = host.start_guest(GuestSpec(name="pv", vcpus=2))
    before, ring = guest.domid, ring_of(host, guest)
    with before_xl(host, WAITS_AT_THE_SAVE), xendomains(host), running(host, SAVING) as daemon:
        daemon.offline(ring)
        wait_until(lambda: "begun" in left_in(host, BIN), timeout=300, what="the save", interval=1)
        # As shutdown.target has it: all are stopped in one transaction, which orders them.
        [save] = host.run(
            "systemctl list-units --plain --no-legend 'pgofflined-save-*.service' | cut -d' ' -f1"
        ).out.split()
        host.write_text(DOWN, f"[Unit]\nConflicts=xendomains.service {save}\n")
        host.run(f"systemctl daemon-reload && systemctl start --no-block {PurePath(DOWN).name}")
        wait_until(
            lambda: state_of(host, "pgofflined-save-*.service") == ["deactivating"],
            timeout=60,
            what="the mover to be told to stop",
            interval=1,
        )
        assert state_of(host, "xendomains.service") == ["active"]
        host.run(["touch", f"{BIN}/go-on"])
        wait_until(
            lambda: state_of(host, "xendomains.service") == ["inactive"],
            timeout=300,
            what="xendomains to be stopped",
            interval=1,
        )
        assert guest.domid != before
        rows = [row.split() for row in host.read_text("/run/rig-guests/when-stopped").splitlines()]
        assert ["pv", str(guest.domid)] in [row[:2] for row in rows]
        assert (left_in(host, NOTES), left_in(host, SAVES)) == (["lock"], [])
        guest.wait_passes(2)
        guest.assert_clean(migrated=True)
