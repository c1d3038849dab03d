"""What a guest and those who talk to it notice of an exchange: the blackout, and nothing after."""

from __future__ import annotations

import json

import pytest

from .rig import devices
from .rig.guest import GuestSpec
from .rig.host import Host

pytestmark = [pytest.mark.e2e, pytest.mark.hosts("intel-native-noservice")]

TESTS = "cd /opt/pgofflined-tests && export OPENBLAS_NUM_THREADS=1 && python3 -m tests.e2e.dom0"
LISTENING = """
mkfifo /tmp/until
( {tests}.silence {address} < /tmp/until > /tmp/silence ) &
exec 9> /tmp/until; rm /tmp/until
( {command} )
exec 9>&-; wait; cat /tmp/silence
"""


TIMES = 4
# In an emulated host everything takes half as long again now and then.
NOISE = 1.5


@pytest.mark.slow
def test_neither_clocks_nor_network_of_a_guest_stall_beyond_the_blackout(host: Host) -> None:
    guest = host.start_guest(GuestSpec(name="pv", vcpus=2, network=True))
    host.run(f"{TESTS}.pages {guest.domid} data 20 > /tmp/pages", timeout=120)

    def watch(command: str) -> tuple[list[dict[str, float]], dict[str, float], float]:
        """What a command says, what was heard meanwhile, and the longest gap of the clock."""
        passes = len(guest.gaps())
        script = LISTENING.format(tests=TESTS, address=devices.address("pv"), command=command)
        lines = host.run(script, timeout=300).out.splitlines()
        *said, heard = [json.loads(line) for line in lines]
        guest.wait_passes(1)
        return said, heard, max(guest.gaps()[passes:]) / 1000

    # What the guest does for itself, before and after it stands still, is not ours.
    _, bare, bare_gap = watch(f"{TESTS}.suspend_only {guest.domid} {TIMES}")
    jobs, heard, gap = watch(
        f"{TESTS}.exchange_pages {guest.domid} {' '.join(['1'] * TIMES)} < /tmp/pages"
    )
    ours = max(job["ours"] for job in jobs)
    told = f"suspended only: {bare}, {bare_gap}; exchanges: {heard}, {gap}, of which ours {ours}"
    assert min(bare["answers"], heard["answers"]) > 100, told
    assert heard["longest"] <= NOISE * bare["longest"] + ours, told
    assert gap <= NOISE * bare_gap + ours, told
    guest.assert_clean()
