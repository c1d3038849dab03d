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


def test_neither_clocks_nor_network_of_a_guest_stall_beyond_the_blackout(host: Host) -> None:
    guest = host.start_guest(GuestSpec(name="pv", vcpus=2, network=True))
    host.run(f"{TESTS}.pages {guest.domid} data 20 > /tmp/pages", timeout=120)
    address = devices.address("pv")

    def listen(command: str) -> list[dict[str, float]]:
        script = LISTENING.format(tests=TESTS, address=address, command=command)
        return [json.loads(line) for line in host.run(script, timeout=300).out.splitlines()]

    # The same work in dom0, without a suspend.
    [quiet] = listen(f"{TESTS}.pages {guest.domid} data 20 > /tmp/others")
    passes = len(guest.gaps())
    *jobs, heard = listen(f"{TESTS}.exchange_pages {guest.domid} 1 1 1 1 < /tmp/pages")
    blackout = max(job["whole"] for job in jobs)
    guest.wait_passes(1)
    gap = max(guest.gaps()[passes:]) / 1000
    told = f"blackout {blackout}, {heard}, without any {quiet}, gap of the clock {gap}"
    assert heard["answers"] > 100, told
    # In an emulated host everything waits now and then, with and without us.
    assert heard["longest"] <= blackout + max(quiet["longest"], 0.1), told
    assert gap <= blackout + max(quiet["longest"], 0.1), told
    guest.assert_clean()
