"""The assembled service on a simulated host, for tests of what its users are promised.

Nothing is replaced but the host.  Waiting is for conditions: every change of a page is heard of.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field, replace
from datetime import UTC
from pathlib import Path

from pgofflined.aftercare import CareTimes
from pgofflined.core.book import PageEntry, Phase
from pgofflined.core.domains import DomainIdentity
from pgofflined.core.frames import Domid, Mfn, maddr_of
from pgofflined.core.machine import CpuVendor, Machine
from pgofflined.core.policy import (
    ControlPolicy,
    ExchangePolicy,
    MetricsPolicy,
    Policy,
    RetirePolicy,
)
from pgofflined.core.relocation_outcomes import Migrated, MigrationOutcome, NotMigrated
from pgofflined.core.units import AmountOfMemory
from pgofflined.notify import NullNotifier
from pgofflined.relocation import KernelLinks
from pgofflined.relocation.relocator import BreakOff
from pgofflined.saving import Saves
from pgofflined.service import Service
from pgofflined.sim.clock import WallClock
from pgofflined.sim.ends import SimulatedEnds
from pgofflined.sim.faults import Fault, FaultyHypervisor
from pgofflined.sim.host import HostSpec
from pgofflined.sim.journal import MemoryJournal
from pgofflined.sim.scenarios import SmallHost, small_host
from pgofflined.sim.telemetry import SimulatedTelemetry
from pgofflined.store import Store
from pgofflined.world import World

PATIENCE = 30.0

POLICY = Policy(
    retire=RetirePolicy(max_retired=AmountOfMemory(size=64 << 12)),
    exchange=ExchangePolicy(
        retry_first=0.05, retry_last=0.05, attempts=2, acknowledge_timeout=0.2, suspend_timeout=0.2
    ),
)


def retiring(policy: Policy = POLICY, **changes: object) -> Policy:
    """A policy with other keys of [retire]."""
    return replace(policy, retire=replace(policy.retire, **changes))  # type: ignore[arg-type]


def exchanging(policy: Policy = POLICY, **changes: object) -> Policy:
    """A policy with other keys of [exchange]."""
    return replace(policy, exchange=replace(policy.exchange, **changes))  # type: ignore[arg-type]


class SettableClock(WallClock):
    """Real time, and a date that somebody may set."""

    def __init__(self) -> None:
        super().__init__(speed=100.0)
        self.offset = 0.0

    def now(self) -> float:
        return super().now() + self.offset


class ToldStore(Store):
    """A store that tells of every change of a page."""

    changed: asyncio.Event

    def put_page(self, entry: PageEntry) -> None:
        super().put_page(entry)
        self.changed.set()


@dataclass
class SelfMigration:
    """Migrates guests of the simulated host to itself."""

    small: SmallHost
    asked: list[DomainIdentity] = field(default_factory=list)

    async def migrate(
        self, domain: DomainIdentity, name: str, target: str, time_limit: float, off: BreakOff
    ) -> MigrationOutcome:
        del name, target, time_limit, off
        self.asked.append(domain)
        await asyncio.to_thread(self.small.host.migrate_to_self, domain.domid)
        return Migrated()

    async def save_and_restore(self, domain: DomainIdentity, directory: str) -> MigrationOutcome:
        del domain, directory
        return NotMigrated(detail="nobody saves here")


@dataclass
class Whole:
    """A service at work."""

    small: SmallHost
    xen: FaultyHypervisor
    clock: SettableClock
    telemetry: SimulatedTelemetry
    service: Service
    store: ToldStore
    migration: SelfMigration

    def plain(self, which: int = 0, domid: Domid | None = None) -> Mfn:
        """A frame of a PV guest that nothing keeps from being exchanged."""
        domid = self.small.pv if domid is None else domid
        host = self.small.host
        return host.frame_of(domid, host.pv(domid).layout.plain[which])

    def granted(self, which: int = 0) -> Mfn:
        """A frame that the PV guest grants to dom0: refused as long as that lasts."""
        mfn = self.plain(which)
        pfn = self.small.host.m2p(mfn)
        assert pfn is not None
        self.small.host.grant(self.small.pv, pfn)
        return mfn

    def of_dom0(self, which: int = 0) -> Mfn:
        """A frame of dom0."""
        frames = self.small.host.frames
        return [Mfn(m) for m in range(frames.count) if frames.owner[m] == 0][which]

    async def corrected(self, *mfns: Mfn, times: int = 2) -> None:
        """Let corrected errors happen, and wait until all have been decided upon."""
        reports = self.service.counters.reports
        for _ in range(times):
            for mfn in mfns:
                before = reports.total()
                self.telemetry.push_corrected(maddr_of(mfn))
                await self.until(lambda before=before: reports.total() > before)  # type: ignore[misc]
        await asyncio.sleep(0)  # the last report is counted before it is decided upon

    async def until(self, is_so: Callable[[], bool]) -> None:
        """Wait for a condition, which some turn of the loop brings about."""
        async with asyncio.timeout(PATIENCE):
            while not is_so():  # noqa: ASYNC110 - what makes it so may tell nobody
                await asyncio.sleep(0.001)

    async def page(self, mfn: Mfn, *phases: Phase, reason: str | None = None) -> PageEntry:
        """The entry of a page, as soon as it stands there."""
        async with asyncio.timeout(PATIENCE):
            while True:
                self.store.changed.clear()
                entry = self.entry(mfn)
                if (
                    entry is not None
                    and entry.phase in phases
                    and (reason is None or entry.reason == reason)
                ):
                    return entry
                await self.store.changed.wait()

    def entry(self, mfn: Mfn) -> PageEntry | None:
        """The entry of a page now."""
        return self.service.retirer.ledger.book.get(mfn)

    def pages(self, mfns: Iterable[Mfn], phase: Phase) -> list[Mfn]:
        """Those that stand there now."""
        return [mfn for mfn in mfns if (entry := self.entry(mfn)) and entry.phase is phase]

    def hits(self, mfn: Mfn) -> int:
        """Errors of a page within the window."""
        return self.service.intake.history.hits(mfn, self.clock.monotonic())

    def suspended(self) -> list[int]:
        """The domains that were asked to suspend themselves, in order."""
        return [int(str(call.args[0])) for call in self.xen.trace.of("suspend")]

    def calls(self, method: str, mfn: Mfn) -> int:
        """How often something was done to a frame."""
        return sum(mfn in call.args for call in self.xen.trace.of(method))


@asynccontextmanager
async def at_work(
    folder: Path,
    policy: Policy = POLICY,
    *,
    spec: HostSpec | None = None,
    small: SmallHost | None = None,
    faults: Iterable[Fault] = (),
    earlier: Iterable[PageEntry] = (),
    times: CareTimes = CareTimes(),  # noqa: B008 - it does not change
) -> AsyncIterator[Whole]:
    """A service that runs; ``earlier`` are pages that a daemon before it had in hand."""
    clock = SettableClock()
    small = small or small_host(spec, clock=clock)
    xen = FaultyHypervisor(small.host, *faults)
    telemetry = SimulatedTelemetry()
    migration = SelfMigration(small)
    host = small.host
    with closing(ToldStore.open(folder / "state.db", "this")) as store:
        store.changed = asyncio.Event()
        for entry in earlier:
            store.put_page(entry)
        world = World(
            xen=xen,
            clock=clock,
            machine=Machine(
                vendor=CpuVendor.INTEL, family=6, physical_bits=46, max_mfn=host.max_mfn()
            ),
            sources=[lambda: telemetry],
            relocator=migration,
            links=KernelLinks(),
            zone=UTC,
            store=store,
            journal=MemoryJournal(),
            notifier=NullNotifier(),
            saves=Saves("this", notes=folder),
            ends=lambda: SimulatedEnds(host),
            times=times,
        )
        service = Service(world, as_tested(policy, folder))
        whole = Whole(small, xen, clock, telemetry, service, store, migration)
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(service.run(stop))
            await service.ready.wait()
            try:
                yield whole
            finally:
                stop.set()


def as_tested(policy: Policy, folder: Path) -> Policy:
    """A policy whose sockets lie in the test's folder."""
    return replace(
        policy,
        metrics=MetricsPolicy(listen=None),
        control=ControlPolicy(socket=str(folder / "control.sock")),
    )
