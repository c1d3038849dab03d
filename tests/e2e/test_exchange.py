"""The exchanger on real Xen: any page, and a process that is killed at any moment."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from .daemon import frames, running
from .rig.guest import Guest, GuestSpec
from .rig.host import Host
from .rig.waiting import wait_until

NATIVE = "intel-native-noservice"
OLDER = "intel417-native-noservice"
TESTS = "cd /opt/pgofflined-tests && python3 -m tests.e2e.dom0"
LIMIT = 1500.0

# What a page of a guest can be refused for, and is true of a few of them.
TRUE_REASONS = {
    "granted": "the rings of console and xenstore, and those of devices",
    "root_in_use": "the address spaces that the vCPUs are in",
    "descriptor_table": "the vCPUs' GDTs",
    "other_references": "the areas that vCPUs have registered with Xen",
    "not_marked": "memory that Xen's image had at boot",
}

TOLD_IN_SHORT = {"exchanged", *TRUE_REASONS}

pytestmark = [pytest.mark.e2e, pytest.mark.hosts(NATIVE)]


def exchange_each(host: Host, guest: Guest, kind: str, count: int, batch: int) -> Counter[str]:
    """Exchange pages of a guest once; how many had which outcome."""
    host.run(f"{TESTS}.pages {guest.domid} {kind} {count} > /tmp/pages", timeout=LIMIT)
    return Counter(row["outcome"] for row in exchange_chosen(host, guest, batch))


def exchange_chosen(host: Host, guest: Guest, batch: int) -> list[dict[str, Any]]:
    """Exchange the pages that /tmp/pages names; what became of each."""
    done = host.run(f"{TESTS}.exchange_each {guest.domid} {batch} < /tmp/pages", timeout=LIMIT)
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert [row for row in rows if row.get("stuck")] == []
    pages = [row for row in rows if "outcome" in row]
    # Shown when the test fails, and with -rP.
    print(*(row for row in pages if row["outcome"] not in TOLD_IN_SHORT), sep="\n")
    print(dict(Counter(row["outcome"] for row in pages)))
    return pages


def assert_refused_only_for(outcomes: Counter[str], *reasons: str) -> None:
    assert set(outcomes) - {"exchanged"} <= set(reasons), outcomes


def test_a_thousand_random_pages_of_a_busy_guest_are_exchanged(host: Host) -> None:
    guest = host.start_guest(GuestSpec(name="pv", vcpus=2, disk=True))
    outcomes = exchange_each(host, guest, "any", 1000, 50)
    assert outcomes.total() == 1000
    assert_refused_only_for(outcomes, *TRUE_REASONS)
    # The disk's ring and buffers are a part of what is granted.
    assert outcomes["exchanged"] >= 990, outcomes
    guest.wait_passes(2)
    guest.assert_clean()


def test_every_page_table_of_a_guest_is_exchanged_unless_a_vcpu_is_in_it(host: Host) -> None:
    guest = host.start_guest(GuestSpec(name="pv", vcpus=2))
    exchange_page_tables(host, guest)


def exchange_page_tables(host: Host, guest: Guest) -> None:
    # Few at a time: emulated, 16 of them are as long as a guest may be kept.
    host.run(f"{TESTS}.pages {guest.domid} table 10000 > /tmp/pages", timeout=LIMIT)
    rows = exchange_chosen(host, guest, 4)
    outcomes = Counter(row["outcome"] for row in rows)
    assert outcomes.total() > 100
    assert_refused_only_for(outcomes, "root_in_use", "not_marked")
    # A vCPU is in one address space, with a root for the kernel and one for the user.  The jobs saw
    # it in several, one after the other; one job that looks at all of these sees it in one.
    roots = [[0, row["mfn"]] for row in rows if row["outcome"] == "root_in_use"]
    host.write_text("/tmp/pages", json.dumps(roots))  # noqa: S108 - in dom0
    again = Counter(row["outcome"] for row in exchange_chosen(host, guest, len(roots) or 1))
    assert_refused_only_for(again, "root_in_use")
    assert again["root_in_use"] <= 2 * 2 + 1, again
    guest.wait_passes(2)
    guest.assert_clean()


@pytest.mark.slow
def test_pages_of_a_busy_guest_with_an_older_kernel_are_exchanged(host: Host) -> None:
    spec = GuestSpec(name="pv", vcpus=2, older_kernel=True, disk=True, network=True)
    guest = host.start_guest(spec)
    outcomes = exchange_each(host, guest, "any", 200, 50)
    assert outcomes.total() == 200
    assert_refused_only_for(outcomes, *TRUE_REASONS)
    assert outcomes["exchanged"] >= 180, outcomes
    exchange_page_tables(host, guest)


@pytest.mark.slow
@pytest.mark.hosts(OLDER)
def test_pages_of_a_guest_on_an_older_xen_are_exchanged(host: Host) -> None:
    guest = host.start_guest(GuestSpec(name="pv", vcpus=2))
    outcomes = exchange_each(host, guest, "paired", 48, 16)
    assert outcomes.total() == 48
    assert_refused_only_for(outcomes, *TRUE_REASONS)
    assert outcomes["exchanged"] >= 40, outcomes
    guest.wait_passes(2)
    guest.assert_clean()


def kills(host: Host, guest: Guest, what: str) -> list[dict[str, Any]]:
    """Kill exchanges; what came of each."""
    done = host.run(
        f"export OPENBLAS_NUM_THREADS=1; {TESTS}.kills {guest.domid} {what}", timeout=LIMIT
    )
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert [row for row in rows if not row["runs"]] == []
    assert [row for row in rows if row["stuck"] or row["damaged"] or row["left"]] == []
    assert {ended for row in rows for ended in row["ended"]} <= {"finished", "nothing_to_do"}
    states = {state for row in rows for state in row["states"]}
    assert states <= {"OFFLINED", "OFFLINE_PENDING"}
    return rows


@pytest.mark.parametrize(
    ("kind", "batch"), [("data", 8), pytest.param("table", 1, marks=pytest.mark.slow)]
)
def test_an_exchange_that_is_killed_at_any_call_is_ended_by_another_process(
    host: Host, kind: str, batch: int
) -> None:
    guest = host.start_guest(GuestSpec(name="pv", vcpus=2))
    # Before the suspend there is nothing to end; it is the calls from there on that count.
    rows = kills(host, guest, f"calls {kind} {batch} held")
    assert sum(row["killed"] for row in rows) >= 25
    assert sum("finished" in row["ended"] for row in rows) >= 20
    guest.wait_passes(2)
    guest.assert_clean()


@pytest.mark.slow
def test_a_hundred_exchanges_that_are_killed_at_random_instants_harm_no_guest(host: Host) -> None:
    guest = host.start_guest(GuestSpec(name="pv", vcpus=2))
    rows = kills(host, guest, "instants any 4 100")
    assert len(rows) == 100
    # Half of them are while the guest stands still, save for pages that are refused before.
    assert sum("finished" in row["ended"] for row in rows) >= 25
    guest.wait_passes(2)
    guest.assert_clean()


def test_a_daemon_that_is_killed_while_a_guest_stands_still_is_followed_by_one_that_helps_it(
    host: Host,
) -> None:
    guest = host.start_guest(GuestSpec(name="pv", vcpus=2))
    [mfn] = frames(host, "data", guest.domid, 1)
    with running(host) as daemon:
        before = daemon.pid()
        killer = (
            f"{TESTS}.kill_when_suspended {guest.domid} {before} > /tmp/killed & "
            "until grep -q watching /tmp/killed; do sleep 0.1; done; "
            f"pgofflined offline {mfn:#x} || true; wait"
        )
        host.run(killer, timeout=120)
        assert '"suspended": true' in host.read_text("/tmp/killed")  # noqa: S108 - in dom0
        wait_until(
            lambda: "an exchange was cut off" in daemon.journal(),
            timeout=120,
            what="the word on what the killed one has left",
        )
        # Already before the next one starts is the guest let go.
        daemon.wait_for_the_next(before)
        daemon.wait_for(mfn, "offlined")
        assert daemon.state(mfn) == "OFFLINED"
        assert host.run("ls /run/pgofflined/jobs").out == ""
    guest.wait_passes(2)
    guest.assert_clean()
