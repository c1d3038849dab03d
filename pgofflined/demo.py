"""The daemon on a simulated host with a failing memory module, for a first look.

Everything but the host is real: records are decoded, the policy decides, the exchanger moves
guests off their pages, metrics are served.  Needs no Xen, no systemd and no root.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import logging
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC
from pathlib import Path
from typing import Final

from pgofflined.core.domains import DomainIdentity
from pgofflined.core.errors import PortError
from pgofflined.core.events import Event
from pgofflined.core.frames import PAGE_SIZE, Maddr
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
from pgofflined.journal_log import FieldHandler
from pgofflined.notify import NullNotifier
from pgofflined.relocation import KernelLinks
from pgofflined.relocation.relocator import BreakOff
from pgofflined.saving import Saves
from pgofflined.service import Service
from pgofflined.serving import CannotListen
from pgofflined.sim.clock import WallClock
from pgofflined.sim.dimm import FailingDimm
from pgofflined.sim.ends import SimulatedEnds
from pgofflined.sim.journal import MemoryJournal
from pgofflined.sim.scenarios import DemoHost, demo_host
from pgofflined.store import Store
from pgofflined.world import World

_ERROR_EVERY: Final = 0.4
# Every so many errors strike the PVH guest, whichever rows of the module are weak.
_PVH_TURN: Final = 5
_PVH_PFNS: Final = range(4096, 4099)
_SETTLE: Final = 20.0
_LOOK: Final = 0.1

_HIDDEN: Final = frozenset(
    kind.message_id
    for kind in (
        Event.ERROR_SEEN,  # a line about the verdict follows
        Event.PAGE_MARKED,
        Event.STOPPING,
    )
)
_WORDS: Final = {
    kind.message_id: word
    for kind, word in {
        Event.SOURCE_CHOSEN: "source",
        Event.PAGE_TO_RETIRE: "retire",
        Event.PAGE_OFFLINED: "offline",
        Event.PAGE_REFUSED: "refused",
        Event.PAGE_LEFT: "left",
        Event.EXCHANGE_DONE: "guest",
        Event.MIGRATION_DONE: "guest",
        Event.IDLE_SCRUB_HAZARD: "note",
    }.items()
}
_WORDS_OF_LOGGERS: Final = {
    "pgofflined.intake": "error",
    "pgofflined.relocation.telling": "guest",
}
_WARNING: Final = 4


class Screen:
    """Shows the daemon's journal as it is written: seconds, what it is about, the message."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def show(self, message: str, **fields: object) -> None:
        """Print one entry; takes what ``systemd.journal.send`` takes."""
        kind = str(fields.get("MESSAGE_ID", ""))
        if kind in _HIDDEN:
            return
        word = _WORDS.get(kind) or _WORDS_OF_LOGGERS.get(str(fields.get("LOGGER")))
        if word is None:
            word = "warning" if int(str(fields.get("PRIORITY"))) <= _WARNING else "info"
        self.say(f"{time.monotonic() - self._start:5.1f} s  {word:<8}{message}")

    def say(self, text: str) -> None:
        """Print a line of our own."""
        print(text, file=sys.stderr, flush=True)


class SimulatedRelocator:
    """Migrates a simulated guest to its own host."""

    def __init__(self, demo: DemoHost) -> None:
        self._host = demo.host

    async def save_and_restore(self, domain: DomainIdentity, directory: str) -> MigrationOutcome:
        """Save nothing: the demonstration's policy does not ask for it."""
        del domain, directory
        return NotMigrated(detail="guests of the simulated host are not saved")

    async def migrate(
        self, domain: DomainIdentity, name: str, target: str, time_limit: float, off: BreakOff
    ) -> MigrationOutcome:
        """Move the guest; takes as long as a small one does on a real host."""
        del name, target, time_limit, off
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
        "--port",
        type=_port,
        default=9709,
        help="port of the metrics on 127.0.0.1 (0: any free one)",
    )
    options = parser.parse_args(arguments)
    screen = Screen()
    _log_to(screen)
    demo = demo_host(clock=WallClock(), seed=options.seed)
    with tempfile.TemporaryDirectory(prefix="pgofflined-demo-") as folder:
        try:
            service = asyncio.run(_run(demo, screen, options.seconds, options.port, Path(folder)))
        except CannotListen as error:
            print(f"{error}\nor run the demo with --port 0", file=sys.stderr)
            return 1
    return _summarise(demo, service)


def _port(text: str) -> int:
    if text.isascii() and text.isdigit() and int(text) < 1 << 16:
        return int(text)
    raise argparse.ArgumentTypeError("give a number from 0 to 65535")


def _log_to(screen: Screen) -> None:
    logging.basicConfig(level=logging.WARNING, handlers=[FieldHandler(screen.show)], force=True)
    logging.getLogger("pgofflined").setLevel(logging.INFO)


def _policy(port: int, folder: Path) -> Policy:
    return replace(
        Policy(),
        exchange=ExchangePolicy(retry_first=2.0, retry_last=8.0, attempts=3),
        relocation=RelocationPolicy(
            target="localhost", free_memory_reserve=0, save_directory=str(folder / "saves")
        ),
        metrics=MetricsPolicy(listen=TcpAddress(host="127.0.0.1", port=port)),
        control=ControlPolicy(socket=str(folder / "control.sock")),
    )


async def _run(demo: DemoHost, screen: Screen, seconds: float, port: int, folder: Path) -> Service:
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
        journal=MemoryJournal(),
        notifier=NullNotifier(),
        ends=lambda: SimulatedEnds(demo.host),
        saves=Saves(notes=folder / "notes"),
    )
    service = Service(world, _policy(port, folder))
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    striking = asyncio.create_task(_strike(demo, screen, service, seconds, stop), name="module")
    striking.add_done_callback(lambda _: stop.set())
    try:
        await service.run(stop)
    except BaseException:
        striking.cancel()
        raise
    finally:
        world.store.close()
    await striking
    return service


async def _strike(
    demo: DemoHost, screen: Screen, service: Service, seconds: float, stop: asyncio.Event
) -> None:
    """Let the module fail for some seconds, then let what is under way come to its end."""
    await service.ready.wait()
    screen.say(
        f"A memory module under {len(demo.checkers)} PV guests and a PVH guest is failing; every "
        "PV guest\nchecks its memory all the time.  Ctrl-C ends this.\n"
        f"Metrics: http://127.0.0.1:{service.metrics_port}/metrics\n"
    )
    for maddr in itertools.islice(_addresses(demo), round(seconds / _ERROR_EVERY)):
        demo.telemetry.push_corrected(maddr)
        if await _comes_within(stop, _ERROR_EVERY):
            return
    screen.say("\nThe module gives no further errors.\n")
    give_up = time.monotonic() + _SETTLE
    while service.snapshot().oldest_unfinished is not None and time.monotonic() < give_up:
        if await _comes_within(stop, _LOOK):
            return


def _addresses(demo: DemoHost) -> Iterator[Maddr]:
    frames = [demo.host.frame_of(demo.pvh, pfn) for pfn in _PVH_PFNS]
    under_pvh = FailingDimm(frames, rows=1, stray=0.0).addresses()
    anywhere = demo.dimm.addresses()
    for turn in itertools.count(1):
        yield next(anywhere if turn % _PVH_TURN else under_pvh)


async def _comes_within(stop: asyncio.Event, seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            return await stop.wait()
    except TimeoutError:
        return False


def _summarise(demo: DemoHost, service: Service) -> int:
    snapshot = service.snapshot()
    states = ", ".join(f"{count} {phase}" for phase, count in snapshot.pages_by_phase.items())
    print(f"Errors reported: {sum(snapshot.reports.values())}")
    print(f"Pages taken in hand: {states or 'none'}")
    for entry in snapshot.pages:
        if entry.detail and entry.phase.value != "offlined":
            print(f"  mfn {entry.mfn:#x}: {entry.phase.value}: {entry.detail}")
    kib = snapshot.retired_frames * PAGE_SIZE // 1024
    print(f"Memory given up: {kib} KiB of {snapshot.cap_frames * PAGE_SIZE // 1024} KiB allowed")
    print(_pauses(service))
    wrong = 0
    print("Guests:")
    for domid, checker in demo.checkers.items():
        mismatches = checker.verify_all()
        wrong += len(mismatches)
        name = demo.host.domain(domid).name
        state = f"{len(mismatches)} PAGES WRONG" if mismatches else "every page as it should be"
        print(f"  d{domid} {name}: {state}")
    for domid, why in demo.host.crashes.items():
        print(f"  d{domid} CRASHED: {why}")
    return 1 if wrong or demo.host.crashes else 0


def _pauses(service: Service) -> str:
    def value(name: str, **labels: str) -> float:
        return service.metrics.registry.get_sample_value(f"pgofflined_{name}", labels) or 0.0

    times = value("guest_blackout_seconds_count")
    if not times:
        return "Pauses of guests: none"
    whole = value("guest_blackout_seconds_sum") / times
    ours = value("guest_blackout_own_seconds_sum") / times
    migrations = value("migrations_total", outcome="migrated")
    return (
        f"Pauses of guests: {times:.0f}, of {whole:.2f} s on average, {ours:.2f} s of it for us\n"
        f"Migrations: {migrations:.0f}"
    )
