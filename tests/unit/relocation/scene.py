"""A relocation service at work, with everything around it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC
from pathlib import Path

from pgofflined.core.domains import DomainIdentity, DomainInfo, GuestKind
from pgofflined.core.frames import Mfn
from pgofflined.core.policy import RelocationPolicy
from pgofflined.core.relocation_outcomes import (
    NotMigrated,
    RelocationOutcome,
)
from pgofflined.core.suspending import unless_announced
from pgofflined.relocation import RelocationService
from pgofflined.saving import Saves
from tests.unit.relocation.doubles import (
    FakeHost,
    FakeLinks,
    FakeRelocator,
    VirtualTime,
    guest,
    inline,
    quiet,
)

HERE = RelocationPolicy(target="localhost", retry_first=60, retry_last=600, attempts=3)
AWAY = replace(HERE, target="spare")
BROKEN_OFF = NotMigrated(detail="xl failed with status 1")


@dataclass
class World:
    """A service and everything around it."""

    service: RelocationService
    task: asyncio.Task[None]
    time: VirtualTime
    host: FakeHost
    relocator: FakeRelocator
    links: FakeLinks
    denied: dict[int, str]
    outcomes: list[RelocationOutcome] = field(default_factory=list)
    asked_in_vain: list[DomainIdentity] = field(default_factory=list)
    ended: list[tuple[DomainIdentity, str]] = field(default_factory=list)
    denied_asked: Callable[[], None] = lambda: None

    async def submit(self, domid: int, *mfns: int, uuid: int | None = None) -> DomainIdentity:
        if domid not in self.host.guests:
            self.host.add(guest(domid, uuid=uuid))
        self.host.mark(domid, *mfns)
        identity = self.host.guests[domid].identity
        assert self.service.submit(identity, f"guest{domid}", [Mfn(mfn) for mfn in mfns])
        await quiet()
        return identity

    def state(self) -> list[tuple[int, str]]:
        return [(job.domid, job.state) for job in self.service.snapshot()]


@asynccontextmanager
async def running(
    policy: RelocationPolicy = HERE, saves: Saves | None = None
) -> AsyncIterator[World]:
    time, host, relocator, links = VirtualTime(), FakeHost(), FakeRelocator(), FakeLinks()
    outcomes: list[RelocationOutcome] = []
    denied: dict[int, str] = {}
    asked_in_vain: list[DomainIdentity] = []
    ended: list[tuple[DomainIdentity, str]] = []

    def denial(info: DomainInfo) -> str | None:
        world.denied_asked()
        return denied.get(info.domid)

    service = RelocationService(
        policy=policy,
        xen=host,
        relocator=relocator,
        links=links,
        clock=time,
        zone=UTC,
        finished=lambda _, outcome: outcomes.append(outcome),
        poison=lambda info: host.poison.get(info.domid),
        is_poisoned=lambda mfn: mfn in host.poisoned,
        denial=denial,
        objection=unless_announced,
        asked_in_vain=asked_in_vain.append,
        ended=lambda domain, how: ended.append((domain, how)),
        sleep=time.sleep,
        in_thread=inline,
        saves=saves,
        stop_grace=20.0,
    )
    task = asyncio.create_task(service.run())
    world = World(
        service, task, time, host, relocator, links, denied, outcomes, asked_in_vain, ended
    )
    try:
        await quiet()
        yield world
    finally:
        for call in relocator.calls:
            if not call.outcome.done():
                call.outcome.cancel()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


SAVING = RelocationPolicy(save_restore=True, retry_first=60, retry_last=600, attempts=3, parallel=4)


@asynccontextmanager
async def saving(saves: Saves, directory: Path, **changes: object) -> AsyncIterator[World]:
    """A service whose policy lets it save guests, and the PV guest d7."""
    policy = replace(SAVING, save_directory=str(directory), **changes)  # type: ignore[arg-type]
    async with running(policy, saves) as world:
        world.host.add(guest(7, kind=GuestKind.PV))
        yield world


def by_saving(world: World, domid: int, mfn: int) -> DomainIdentity:
    identity = world.host.guests[domid].identity
    world.host.mark(domid, mfn)
    assert world.service.submit(identity, f"guest{domid}", [Mfn(mfn)], by_saving=True)
    return identity
