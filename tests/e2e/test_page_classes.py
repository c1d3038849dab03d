"""Which share of a guest's pages can be exchanged: docs/page-classes.md has the table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .rig.guest import GuestSpec
from .rig.host import Host

pytestmark = [pytest.mark.e2e, pytest.mark.hosts("intel-native-noservice")]

TABLE = Path(__file__).parents[2] / "build" / "page-classes.md"
REFUSED = ("granted", "root_in_use", "descriptor_table", "maps_others")
HANDLED = ("data", "l1", "l2", "l3", "l4")
KERNELS = {"6.1": True, "6.12": False}


def classes(host: Host, kernel: str, vcpus: int, *, busy: bool) -> dict[str, int]:
    """Pages of each class in such a guest."""
    name = f"pv{kernel.replace('.', '')}x{vcpus}{'b' if busy else ''}"
    spec = GuestSpec(name=name, vcpus=vcpus, older_kernel=KERNELS[kernel], disk=busy, network=busy)
    guest = host.start_guest(spec)
    guest.wait_passes(1)
    done = host.run(
        f"cd /opt/pgofflined-tests && python3 -m tests.e2e.dom0.page_classes {guest.domid}",
        timeout=120,
    )
    guest.assert_clean()
    guest.destroy()
    found: dict[str, int] = json.loads(done.out)
    return found


@pytest.mark.slow
def test_nearly_all_pages_of_linux_guests_can_be_exchanged(host: Host) -> None:
    lines = [
        f"| kernel | vCPUs | devices | pages | {' | '.join((*HANDLED, *REFUSED))} | refused |",
        "|---" * (5 + len(HANDLED) + len(REFUSED)) + "|",
    ]
    shares: dict[bool, list[float]] = {False: [], True: []}
    for kernel in KERNELS:
        for vcpus in (1, 2, 4):
            for busy in (False, True):
                found = classes(host, kernel, vcpus, busy=busy)
                total = sum(found.values())
                share = sum(found[name] for name in REFUSED) / total
                shares[busy].append(share)
                devices = "disk, network" if busy else "none"
                counts = " | ".join(str(found[name]) for name in (*HANDLED, *REFUSED))
                lines.append(
                    f"| {kernel} | {vcpus} | {devices} | {total} | {counts} | {share:.2%} |"
                )
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text("\n".join(lines) + "\n")
    # Of 128 MiB; what is refused does not grow with the guest.
    assert max(shares[False]) < 0.001, lines
    assert max(shares[True]) < 0.05, lines
