"""The contract of the ports, kept by real Xen: the suite of tests/contract, run in dom0."""

from __future__ import annotations

import pytest

from .rig.guest import GuestSpec
from .rig.host import Host
from .rig.nested import tried_again_after_triple_faults

pytestmark = pytest.mark.e2e


@pytest.mark.xen_complains  # Xen logs each question for a frame that is not the domain's.
@pytest.mark.hosts("intel-native-noservice", "intel417-native-noservice")
def test_xen_keeps_the_contract_for_pv(host: Host) -> None:
    pv = host.start_guest(GuestSpec(name="pv", vcpus=2))
    deaf = host.start_guest(GuestSpec(name="deaf", vcpus=1, memory_mib=96, ignore_suspend=True))
    run(host, f"PGOFFLINED_PV_DOMID={pv.domid} PGOFFLINED_DEAF_DOMID={deaf.domid}", "not pvh")
    for guest in (pv, deaf):
        guest.wait_passes(1)
        guest.assert_clean()


@pytest.mark.xen_complains
@pytest.mark.hosts("amd-mcelog-noservice")
@tried_again_after_triple_faults
def test_xen_keeps_the_contract_for_pvh(host: Host) -> None:
    pv = host.start_guest(GuestSpec(name="pv", vcpus=2))
    pvh = host.start_guest(GuestSpec(name="pvh", kind="pvh", vcpus=2))
    run(host, f"PGOFFLINED_PV_DOMID={pv.domid} PGOFFLINED_PVH_DOMID={pvh.domid}", "pvh")
    for guest in (pv, pvh):
        guest.wait_passes(1)
        guest.assert_clean()


def run(host: Host, environment: str, which: str) -> None:
    """Run a part of the suite; its last line must say that tests passed and nothing else."""
    done = host.run(
        f"cd /opt/pgofflined-tests && PGOFFLINED_BACKEND=xen {environment} "
        f"python3 -m pytest -q -p no:cacheprovider -k '{which}' tests/contract",
        timeout=600,
        check=False,
    )
    last = done.out.strip().splitlines()[-1]
    assert done.status == 0, done.out[-6000:]
    assert "passed" in last
    assert "skipped" not in last
