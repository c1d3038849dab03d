"""Exchanges while the admin does something with the same guest, on real Xen.

Whoever comes second waits or gives up.  No guest is left standing still by us, and wherever it
lives, it has its memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from .daemon import POLICY, frames, running
from .rig.guest import GuestSpec
from .rig.host import Host
from .rig.waiting import wait_until

SAVED = "/run/rig-guests/saved"
PAUSE = ("xl pause it", "ended", "xl unpause it")
SAVE = (f"xl save it {SAVED}", "asked", f"xl restore {SAVED}")
# The empty word: the other side is started here, without ssh.
MIGRATE = ("xl migrate -s '' it 'xl migrate-receive'", "asked", "")
PIPE, SAVING = "/run/rig-guests/pipe", "/run/rig-guests/saving"
END_SAVING = f"if [ -e {SAVING} ]; then kill $(cat {SAVING}); rm {SAVING}; fi"
GONE = {"domain_gone"}
BUSY = {"domain_busy", *GONE}

pytestmark = [pytest.mark.e2e, pytest.mark.hosts("intel-native-noservice")]


def interfere(host: Host, *steps: tuple[str, str, str, str]) -> list[dict[str, Any]]:
    """Exchange a page for each step (moment, command, until, then); what came of it.

    See tests/e2e/dom0/interfere.py.
    """
    words = [
        {"moment": moment, "command": ["sh", "-c", command], "until": until}
        | ({"then": ["sh", "-c", then]} if then else {})
        for moment, command, until, then in steps
    ]
    done = host.run(
        "cd /opt/pgofflined-tests && python3 -m tests.e2e.dom0.interfere it",
        stdin=json.dumps(words).encode(),
        timeout=240,
    )
    told: list[dict[str, Any]] = [json.loads(line) for line in done.out.splitlines()]
    assert len(told) == len(steps)
    for step in told:
        assert (step["stuck"], step["records"]) == (None, []), str(step)
    return told


def outcomes(told: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """What became of pages and guest, where the admin's commands have succeeded."""
    assert [step for step in told if step["status"]] == [], str(told)
    return [(step["outcome"], step["state"]) for step in told]


def spec(**more: Any) -> GuestSpec:  # noqa: ANN401 - as GuestSpec has them
    """A guest that boots quickly."""
    return GuestSpec(name="it", memory_mib=96, **more)


def test_a_guest_that_the_admin_pauses_stays_paused_until_he_lets_it_go(host: Host) -> None:
    guest = host.start_guest(spec())
    told = interfere(host, ("asking", *PAUSE), ("suspended", *PAUSE), ("resumed", *PAUSE))
    assert outcomes(told) == [
        ("no_suspend", "paused"),
        ("exchanged", "paused"),
        ("exchanged", "paused"),
    ]
    guest.wait_passes(1)
    guest.assert_clean()


def test_a_guest_that_the_admin_saves_is_saved_whole(host: Host) -> None:
    guest = host.start_guest(spec())
    told = interfere(host, ("survey", *SAVE), ("suspended", *SAVE), ("resumed", *SAVE))
    assert told[0]["outcome"] in BUSY, str(told)
    assert outcomes(told)[1:] == [("exchanged", "gone")] * 2
    guest.wait_passes(1)
    guest.assert_clean(migrated=True)


def test_a_guest_that_the_admin_is_saving_is_not_resumed_in_the_middle(host: Host) -> None:
    guest = host.start_guest(spec())
    command, _, then = SAVE
    told = interfere(host, ("asking", command, "taken", then))
    assert told[0]["outcome"] in BUSY, str(told)
    guest.wait_passes(1)
    guest.assert_clean(migrated=True)


@contextmanager
def saving(host: Host) -> Iterator[None]:
    """An xl that is to save the guest, and waits for whoever reads what it writes."""
    host.run(
        f"rm -f {PIPE}; mkfifo {PIPE}; xl save it {PIPE} > {SAVING}.log 2>&1 & echo $! > {SAVING}"
    )
    try:
        yield
    finally:
        host.run(END_SAVING)


def test_a_guest_that_an_xl_is_about_to_save_is_not_asked_until_that_has_ended(host: Host) -> None:
    guest = host.start_guest(spec())
    [mfn] = frames(host, "data", guest.domid, 1)
    with saving(host), running(host, POLICY.replace("attempts = 2", "attempts = 50")) as daemon:
        daemon.offline(mfn)
        page = daemon.wait_for(mfn, "waiting")
        assert page["reason"] == "domain_busy", page
        assert f"xl save it {PIPE})" in page["detail"], page
        assert daemon.metric("guest_blackout_seconds_count") == 0
        host.run(END_SAVING)
        daemon.wait_for(mfn, "offlined")
    guest.wait_passes(1)
    guest.assert_clean()


def test_a_guest_whose_migration_xen_refuses_runs_on_where_it_is(host: Host) -> None:
    # Debian's Xen has no shadow page tables, and a PV guest is not migrated without.
    assert "shadow" not in host.run(["xl", "info", "virt_caps"]).out
    guest = host.start_guest(spec())
    told = interfere(host, ("survey", *MIGRATE), ("suspended", *MIGRATE), ("resumed", *MIGRATE))
    assert [(step["outcome"], step["state"]) for step in told] == [("exchanged", "runs")] * 3
    assert 0 not in [step["status"] for step in told], str(told)
    guest.wait_passes(1)
    guest.assert_clean()


@pytest.mark.slow
def test_a_guest_that_the_admin_reboots_boots_again_and_can_be_destroyed(host: Host) -> None:
    guest = host.start_guest(spec(restarts=True))
    before = guest.domid
    [told] = interfere(host, ("suspended", "xl reboot it", "asked", ""))
    assert (told["outcome"], told["status"]) == ("exchanged", 0), str(told)
    wait_until(lambda: len(guest.boot_ids()) > 1, timeout=120, what="the guest to boot again")
    assert guest.domid != before
    guest.wait_passes(1)
    assert guest.trouble() == []
    [told] = interfere(host, ("suspended", "xl destroy it", "ended", ""))
    assert (told["outcome"] in GONE, told["status"]) == (True, 0), str(told)
    assert not guest.exists()


@pytest.mark.parametrize(
    ("moment", "command", "until"),
    [("survey", "xl destroy it", "ended"), ("asking", "xl shutdown it", "taken")],
    ids=["destroyed", "shut-down"],
)
def test_a_guest_that_the_admin_ends_ends(
    host: Host, moment: str, command: str, until: str
) -> None:
    guest = host.start_guest(spec())
    [told] = interfere(host, (moment, command, until, ""))
    # A guest that has taken a request to shut down may still suspend on its way.
    assert told["outcome"] in {*BUSY, "exchanged"}, str(told)
    assert told["status"] == 0, str(told)
    wait_until(lambda: not guest.exists(), timeout=60, what="the guest to end")
