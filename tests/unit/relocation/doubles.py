"""A clock that only tests move, and a small host and toolstack that do as they are told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TypeVar
from uuid import UUID

from pgofflined.core.domains import DomainIdentity, DomainInfo, GuestKind, ShutdownReason
from pgofflined.core.errors import DomainGone
from pgofflined.core.frames import Domid, Mfn
from pgofflined.core.offline import OfflineState
from pgofflined.core.premigration import Route, Way
from pgofflined.core.relocation_outcomes import Migrated, MigrationOutcome
from pgofflined.core.suspending import SuspendSupport
from pgofflined.core.xenversion import XenVersion
from pgofflined.ports import nothing
from pgofflined.relocation.relocator import BreakOff

T = TypeVar("T")

NOON = datetime(2025, 3, 5, 12, 0, tzinfo=UTC).timestamp()
PENDING = OfflineState.OFFLINE_PENDING


async def quiet() -> None:
    """Let everything run that can without time passing."""
    for _ in range(40):
        await asyncio.sleep(0)


async def inline(call: Callable[[], T], /) -> T:
    """In place of a thread."""
    return call()


class VirtualTime:
    """A clock whose sleepers wake as the test moves it."""

    def __init__(self) -> None:
        self._now = NOON
        self._set_by = 0.0
        self._sleepers: list[tuple[float, asyncio.Future[None]]] = []

    def now(self) -> float:
        return self._now + self._set_by

    def set_by(self, seconds: float) -> None:
        """Set the wall clock, as `date -s` does; nobody is told."""
        self._set_by += seconds

    def monotonic(self) -> float:
        return self._now

    def wait(self, seconds: float) -> None:
        self._now += seconds

    async def sleep(self, seconds: float) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._sleepers.append((self._now + seconds, future))
        await future

    @property
    def sleepers(self) -> list[float]:
        """Seconds from now at which something wants to wake."""
        return sorted(at - self._now for at, future in self._sleepers if not future.done())

    async def advance(self, seconds: float) -> None:
        await quiet()
        end = self._now + seconds
        while True:
            self._sleepers = [entry for entry in self._sleepers if not entry[1].done()]
            due = [entry for entry in self._sleepers if entry[0] <= end]
            if not due:
                break
            at, future = min(due, key=lambda entry: entry[0])
            self._now = max(self._now, at)
            future.set_result(None)
            await quiet()
        self._now = end
        await quiet()


def guest(domid: int, *, uuid: int | None = None, kind: GuestKind = GuestKind.PVH) -> DomainInfo:
    return DomainInfo(
        domid=Domid(domid),
        uuid=UUID(int=domid if uuid is None else uuid),
        name=f"guest{domid}",
        kind=kind,
        dying=False,
        paused=False,
        shutdown=None,
        tot_pages=1000,
        max_pages=1024,
        max_vcpu_id=0,
        shared_info=Mfn(1),
        cpu_time=0,
    )


class FakeHost:
    """Domains that own pages; a page goes offline when its owner goes."""

    def __init__(self) -> None:
        self.guests: dict[int, DomainInfo] = {}
        self.states: dict[int, OfflineState] = {}
        self.owners: dict[int, int] = {}
        self.free = 1 << 20
        self.xen = XenVersion(4, 20, 4)
        self.resumed: list[int] = []
        self.resume_works = True
        self.somebody: str | None = None
        self.serving: str | None = None
        self.poison: dict[int, str] = {}
        self.poisoned: set[Mfn] = set()
        self.devices: set[int] = set()
        self.support = SuspendSupport.ANNOUNCED
        self.queried = 0
        self.looked_at: Callable[[], None] = lambda: None

    def add(self, info: DomainInfo, *mfns: int) -> DomainInfo:
        self.guests[info.domid] = info
        self.mark(info.domid, *mfns)
        return info

    def mark(self, domid: int, *mfns: int) -> None:
        for mfn in mfns:
            self.states[mfn] = PENDING
            self.owners[mfn] = domid

    def change(self, domid: int, **changes: object) -> None:
        self.guests[domid] = replace(self.guests[domid], **changes)  # type: ignore[arg-type]

    def destroy(self, domid: int, *, free: bool = True) -> None:
        del self.guests[domid]
        if free:
            self.free_pages(domid)

    def free_pages(self, domid: int) -> None:
        for mfn, owner in self.owners.items():
            if owner == domid:
                self.states[mfn] = OfflineState.OFFLINED

    def move(self, domid: int, new: int) -> None:
        """The end of a migration to this host."""
        old = self.guests[domid]
        self.destroy(domid)
        self.add(replace(old, domid=Domid(new)))

    def version(self) -> XenVersion:
        return self.xen

    def free_frames(self) -> int:
        self.looked_at()
        return self.free

    def query(self, mfn: Mfn) -> OfflineState:
        if self.queried:
            raise OSError(self.queried, "no")
        return self.states[mfn]

    def domains(self) -> Sequence[DomainInfo]:
        return tuple(self.guests.values())

    def domain(self, domid: Domid) -> DomainInfo:
        if domid not in self.guests:
            raise DomainGone(domid)
        return self.guests[domid]

    def somebody_at(self, domid: Domid) -> str | None:
        assert domid in self.guests
        return self.somebody

    def serves(self, domid: Domid) -> str | None:
        assert domid in self.guests
        return self.serving

    def suspend_support(self, domid: Domid) -> SuspendSupport:
        assert domid in self.guests
        return self.support

    def has_devices(self, domid: Domid) -> bool:
        assert domid in self.guests
        return domid in self.devices

    def resume(self, domid: Domid, before: Callable[[], None] = nothing) -> None:
        before()
        assert self.domain(domid).shutdown is ShutdownReason.SUSPEND
        self.resumed.append(domid)
        if self.resume_works:
            self.change(domid, shutdown=None)

    def tell_resumed(self, domid: Domid) -> None:
        assert domid in self.resumed


@dataclass
class Call:
    """One migration; it goes on until the test ends it."""

    domain: DomainIdentity
    target: str
    time_limit: float
    outcome: asyncio.Future[MigrationOutcome] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )
    cancelled: bool = False
    off: BreakOff = field(default_factory=BreakOff)

    async def end(self, outcome: MigrationOutcome | None = None) -> None:
        self.outcome.set_result(Migrated() if outcome is None else outcome)
        await quiet()


class FakeRelocator:
    """Notes every migration and waits for the test to end it."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    async def migrate(
        self, domain: DomainIdentity, name: str, target: str, time_limit: float, off: BreakOff
    ) -> MigrationOutcome:
        del name
        return await self._go_on(Call(domain, target, time_limit, off=off))

    async def save_and_restore(self, domain: DomainIdentity, directory: str) -> MigrationOutcome:
        return await self._go_on(Call(domain, directory, 0.0))

    async def _go_on(self, call: Call) -> MigrationOutcome:
        self.calls.append(call)
        try:
            return await call.outcome
        except asyncio.CancelledError:
            call.cancelled = True
            raise

    @property
    def running(self) -> list[int]:
        return [call.domain.domid for call in self.calls if not call.outcome.done()]


class FakeLinks:
    """One way, which the test changes."""

    def __init__(self) -> None:
        self.found: Way = Route(
            address="192.0.2.1", interface="eth0", up=True, carrier=True, local=False
        )
        self.changed: Callable[[], None] | None = None
        self.asked = 0

    async def way(self, target: str) -> Way:
        del target
        self.asked += 1
        return self.found

    def watch(self, changed: Callable[[], None]) -> None:
        self.changed = changed

    def unwatch(self) -> None:
        self.changed = None
