"""Guests whose records are full of lies, on real Xen."""

from __future__ import annotations

import json

import pytest

from .rig.guest import GuestSpec
from .rig.host import Host

pytestmark = [pytest.mark.e2e, pytest.mark.hosts("intel-native-noservice")]

# These pages are not what the lie is about, or the lie is not believed, or it is true: Linux maps
# its list for more pages than it has.
HARMLESS = {
    "the p2m is longer than the guest",
    "the p2m names a page, another guest's",
    "the p2m names a page, Xen's",
    "the p2m names a page, its own twice",
}


def test_lies_in_a_guests_records_end_in_a_refusal_and_harm_nobody(host: Host) -> None:
    victim = host.start_guest(GuestSpec(name="victim", memory_mib=96))
    guest = host.start_guest(GuestSpec(name="pv", vcpus=2))
    done = host.run(
        f"cd /opt/pgofflined-tests && python3 -m tests.e2e.dom0.lies {guest.domid} {victim.domid}",
        timeout=300,
    )
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert len(rows) >= 18
    assert [row for row in rows if not row["runs"] or not row["well"]] == []
    believed = {row["lie"] for row in rows if row["outcome"] != "guest_layout"}
    assert believed <= HARMLESS
    # Nobody is suspended in vain for a lie that is seen through before.
    assert [row for row in rows if row["suspended"] and row["lie"] not in HARMLESS] == []
    for one in (guest, victim):
        one.wait_passes(2)
        one.assert_clean()
