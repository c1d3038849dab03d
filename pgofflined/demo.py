"""The daemon on a simulated host with a failing memory module, for a first look.

Everything but the host is real: records are decoded, the policy decides, the exchanger moves
guests off their pages, metrics are served.  Needs no Xen, no systemd and no root.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import logging
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC
from pathlib import Path

from pgofflined.core.domains import DomainIdentity
from pgofflined.core.errors import PortError
from pgofflined.core.frames import PAGE_SIZE
from pgofflined.core.machine import CpuVendor, Machine
from pgofflined.core.policy import (
    ControlPolicy,
    ExchangePolicy,
    MetricsPolicy,
    Policy,
    RelocationPolicy,
    TcpAddress,
)
from pgofflined.core.relocation_outcomes import Migrated, MigrationOutcome, NotMigrated
from pgofflined.journal_log import setup_logging
from pgofflined.notify import NullNotifier
from pgofflined.relocation import KernelLinks
from pgofflined.service import Service, World
from pgofflined.serving import CannotListen
from pgofflined.sim.clock import WallClock
from pgofflined.sim.scenarios import DemoHost, demo_host
from pgofflined.store import Store

_ERROR_EVERY = 0.25
_SETTLE = 5.0


class SimulatedRelocator:
    """Migrates a simulated guest to its own host."""

    def __init__(self, demo: DemoHost) -> None:
        self._host = demo.host

    async def migrate(
        self, domain: DomainIdentity, name: str, target: str, time_limit: float
    ) -> MigrationOutcome:
        """Move the guest; takes as long as a small one does on a real host."""
        del name, target, time_limit
        await asyncio.sleep(2.0)
        try:
            self._host.migrate_to_self(domain.domid)
        except PortError as error:
            return NotMigrated(detail=str(error))
        return Migrated()


def main(arguments: Sequence[str]) -> int:
    """Run the demo; 0 if every guest still has its memory at the end."""
    parser = argparse.ArgumentParser(prog="pgofflined demo", description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="how long errors keep coming")
    parser.add_argument("--seed", type=int, default=1, help="another failing module")
    parser.add_argument(
        "--port", type=int, default=9709, help="port of the metrics on 127.0.0.1 (0: any free one)"
    )
    options = parser.parse_args(arguments)
    setup_logging(logging.INFO)
    demo = demo_host(clock=WallClock(), seed=options.seed)
    with tempfile.TemporaryDirectory(prefix="pgofflined-demo-") as folder:
        try:
            service = asyncio.run(_run(demo, options.seconds, options.port, Path(folder)))
        except CannotListen as error:
            print(f"{error}\nor run the demo with --port 0", file=sys.stderr)
            return 1
    return _summarise(demo, service)


def _policy(port: int, folder: Path) -> Policy:
    return replace(
        Policy(),
        exchange=ExchangePolicy(retry_first=2.0, retry_last=8.0, attempts=3),
        relocation=RelocationPolicy(target="localhost", free_memory_reserve=0),
        metrics=MetricsPolicy(listen=TcpAddress(host="127.0.0.1", port=port)),
        control=ControlPolicy(socket=str(folder / "control.sock")),
    )


async def _run(demo: DemoHost, seconds: float, port: int, folder: Path) -> Service:
    host = demo.host
    world = World(
        xen=host,
        clock=host.clock,
        machine=Machine(vendor=CpuVendor.INTEL, family=6, physical_bits=46, max_mfn=host.max_mfn()),
        sources=[lambda: demo.telemetry],
        relocator=SimulatedRelocator(demo),
        links=KernelLinks(),
        zone=UTC,
        store=Store.open(folder / "state.db", "demo"),
        notifier=NullNotifier(),
    )
    service = Service(world, _policy(port, folder))
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(service.run(stop), name="service")
        tasks.create_task(_strike(demo, service, seconds, stop), name="module")
        await running
    world.store.close()
    return service


async def _strike(demo: DemoHost, service: Service, seconds: float, stop: asyncio.Event) -> None:
    """Let the module fail for some seconds, then let what is under way come to its end."""
    await service.ready.wait()
    print(
        f"A memory module under {len(demo.checkers)} PV guests and a PVH guest is failing.\n"
        f"Metrics: http://127.0.0.1:{service.metrics_port}/metrics\n",
        file=sys.stderr,
    )
    for maddr in itertools.islice(demo.dimm.addresses(), int(seconds / _ERROR_EVERY)):
        demo.telemetry.push_corrected(maddr)
        await asyncio.sleep(_ERROR_EVERY)
    print("\nThe module gives no further errors; finishing.\n", file=sys.stderr)
    await asyncio.sleep(_SETTLE)
    stop.set()


def _summarise(demo: DemoHost, service: Service) -> int:
    snapshot = service.snapshot()
    print("\nErrors:", sum(snapshot.reports.values()))
    print("Pages by where they stand:")
    for phase, count in sorted(snapshot.pages_by_phase.items()):
        print(f"  {phase:<12}{count}")
    for entry in snapshot.pages:
        if entry.detail and entry.phase.value != "offlined":
            print(f"  mfn {entry.mfn:#x}: {entry.phase.value}: {entry.detail}")
    kib = snapshot.retired_frames * PAGE_SIZE // 1024
    print(f"Memory given up: {kib} KiB of {snapshot.cap_frames * PAGE_SIZE // 1024} KiB allowed")
    wrong = 0
    print("Guests:")
    for domid, checker in demo.checkers.items():
        mismatches = checker.verify_all()
        wrong += len(mismatches)
        name = demo.host.domain(domid).name
        state = f"{len(mismatches)} PAGES WRONG" if mismatches else "every page as it should be"
        print(f"  d{domid} {name}: {state}")
    return 1 if wrong or demo.host.crashes else 0
