"""Pages of a guest that gives memory back and takes it again, on real Xen."""

from __future__ import annotations

import json
from typing import Any

import pytest

from .daemon import running
from .rig.guest import Guest, GuestSpec
from .rig.host import Host
from .rig.waiting import wait_until
from .test_exchange import TESTS, TRUE_REASONS, exchange_chosen

SMALL, LARGE, WHOLE = 104, 120, 128
"""MiB; the checker leaves as much to the guest's kernel as it is to give back, and more."""

ENOUGH, TURNS = "/run/rig-guests/enough", "/run/rig-guests/turns"

# Pages that left the guest since they were chosen.
GONE_REASONS = {
    "not_marked": "free by then: taken out at once",
    "not_pending": "the same, between our mark and our look",
    "not_the_domains": "the same, and the survey came first",
    "out_of_date": "between survey and suspend",
}

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.hosts("intel-native-noservice")]


def own_pages(host: Host, guest: Guest) -> dict[int, int]:
    """The guest's mfn for each of its pfns that has one."""
    told = host.run(f"{TESTS}.pages {guest.domid} any 1000000", timeout=60).out
    return dict(json.loads(told))


def balloon(host: Host, guest: Guest, mib: int) -> None:
    """Have the guest give memory back, or take it, and wait until it has."""
    host.run(["xl", "mem-set", guest.spec.name, f"{mib}m"])
    wait_until(
        lambda: abs(_mib(host, guest) - mib) <= 1,
        timeout=30,
        what=f"the guest to have {mib} MiB",
        interval=0.5,
    )


def _mib(host: Host, guest: Guest) -> int:
    line = host.run(["xl", "list", guest.spec.name]).out.splitlines()[-1]
    return int(line.split()[2])


def exchange_some(
    host: Host, guest: Guest, pages: dict[int, int], count: int
) -> list[dict[str, Any]]:
    """Exchange so many of the pages, spread over all; what became of each."""
    some = list(pages.items())[:: len(pages) // count][:count]
    host.write_text("/tmp/pages", json.dumps(some))  # noqa: S108 - in dom0
    return exchange_chosen(host, guest, 12)


def test_pages_of_a_guest_that_balloons_are_retired_or_refused_for_what_is_true(host: Host) -> None:
    guest = host.start_guest(GuestSpec(name="pv", memory_mib=WHOLE, leave_mib=48))
    before = own_pages(host, guest)
    balloon(host, guest, SMALL)
    after = own_pages(host, guest)
    given = sorted({before[pfn] for pfn in before.keys() - after.keys()} - set(after.values()))
    assert len(given) > 1000

    # What it has given back is free, and goes without the guest noticing.
    with running(host) as daemon:
        for mfn in given[:2]:
            daemon.offline(mfn)
            daemon.wait_for(mfn, "offlined")
            assert daemon.state(mfn) == "OFFLINED"
        assert daemon.metric("guest_blackout_seconds_count") == 0

    # What it has is exchanged, its p2m having holes now; and so while it gives and takes.
    rows = exchange_some(host, guest, after, 16)
    assert {row["outcome"] for row in rows} <= {"exchanged", *TRUE_REASONS}
    assert sum(row["outcome"] == "exchanged" for row in rows) >= 12, rows
    host.run(
        f"rm -f {ENOUGH} {TURNS}; (until [ -e {ENOUGH} ]; do "
        f"xl mem-set pv {LARGE}m; xl mem-set pv {SMALL}m; echo >> {TURNS}; done; "
        f"rm {ENOUGH}) "
        "> /dev/null 2>&1 &"
    )
    try:
        rows = exchange_some(host, guest, after, 48)
    finally:
        host.run(["touch", ENOUGH])
    # Its last turn would undo ours.
    wait_until(
        lambda: host.run(["test", "-e", ENOUGH], check=False).status,
        timeout=30,
        what="the admin to have done with it",
    )
    assert len(host.read_text(TURNS)) > 1
    assert {row["outcome"] for row in rows} <= {"exchanged", *TRUE_REASONS, *GONE_REASONS}
    assert sum(row["outcome"] == "exchanged" for row in rows) >= 24, rows

    balloon(host, guest, LARGE)
    guest.wait_passes(1)
    guest.assert_clean()
