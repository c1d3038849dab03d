"""A stop of the daemon leaves no guest that stands still because of it, or says so and keeps it.

Everything is the service's own, on a simulated host; the records are files, as on a real one.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field, replace
from datetime import UTC
from pathlib import Path

import pytest

from pgofflined.aftercare import CareTimes
from pgofflined.core.book import Cause, Phase
from pgofflined.core.domains import DomainIdentity, ShutdownReason
from pgofflined.core.events import Event
from pgofflined.core.frames import Mfn
from pgofflined.core.machine import CpuVendor, Machine
from pgofflined.core.policy import (
    ControlPolicy,
    ExchangePolicy,
    MetricsPolicy,
    Policy,
    RelocationPolicy,
)
from pgofflined.core.relocation_outcomes import MigrationOutcome, NotMigrated
from pgofflined.exchanging import RECOVERY_TRIES
from pgofflined.jobstore import JobStore
from pgofflined.leftovers import Leftovers
from pgofflined.notify import NullNotifier
from pgofflined.ports import SuspendLimits
from pgofflined.relocation import KernelLinks, Relocator
from pgofflined.relocation.relocator import BreakOff
from pgofflined.service import Service
from pgofflined.sim.faults import Fault, FaultyHypervisor, Killed, Moment
from pgofflined.sim.guests import Answer, SimulatedDomain, SuspendBehaviour
from pgofflined.sim.scenarios import SmallHost, small_host
from pgofflined.sim.telemetry import SimulatedTelemetry
from pgofflined.store import Store
from pgofflined.world import World
from tests.crash.killing import MortalJournal
from tests.unit.test_service_saves import saves_in

SPEED = 200.0
NEVER = 10**6
POLICY = Policy(
    exchange=ExchangePolicy(attempts=1, acknowledge_timeout=20, suspend_timeout=20),
    metrics=MetricsPolicy(listen=None),
)


class FastClock:
    """The machine's time, so much faster."""

    def now(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic() * SPEED

    def wait(self, seconds: float) -> None:
        time.sleep(max(0.0, seconds) / SPEED)


@dataclass
class NoMover:
    """Saves that come to nothing after the guest was asked."""

    begun: asyncio.Event = field(default_factory=asyncio.Event)

    async def save_and_restore(self, domain: DomainIdentity, directory: str) -> MigrationOutcome:
        del domain, directory
        self.begun.set()
        return NotMigrated(detail="no", was_asked=True)

    async def migrate(
        self, domain: DomainIdentity, name: str, target: str, time_limit: float, off: BreakOff
    ) -> MigrationOutcome:
        raise AssertionError((domain, name, target, time_limit, off))


@dataclass
class Scene:
    """A host with one guest, a service, and the records of its jobs."""

    small: SmallHost
    xen: FaultyHypervisor
    service: Service
    leftovers: Leftovers
    jobs: Path
    stop: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def guest(self) -> SimulatedDomain:
        return self.small.host.simulated(self.small.pv)

    @property
    def identity(self) -> DomainIdentity:
        return self.small.host.domain(self.small.pv).identity

    def runs(self) -> bool:
        info = self.small.host.domain(self.small.pv)
        return info.shutdown is None and not info.paused

    def has_followed(self) -> bool:
        """Whether it has come to suspend itself, if only to be resumed."""
        self.runs()
        return self.guest.suspends_at is None

    def retire_a_page(self) -> Mfn:
        layout = self.small.host.pv(self.small.pv).layout
        mfn = self.small.host.frame_of(self.small.pv, layout.plain[0])
        self.service.retirer.take(mfn, Cause.OPERATOR, "asked for")
        return mfn

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():  # noqa: ASYNC110 - threads change what is asked for
            await asyncio.sleep(0.001)

    async def until_refused(self) -> None:
        """The job has been given up."""
        mfn = self.retire_a_page()
        book = self.service.retirer.ledger.book
        phases = (Phase.WAITING, Phase.LEFT, Phase.OFFLINED)
        await self.until(lambda: (entry := book.get(mfn)) is not None and entry.phase in phases)

    def records(self) -> list[str]:
        return [path.name for path in self.jobs.glob("*.job")]

    def next_process(self) -> None:
        """It starts, and looks after guests as long as there is any reason to."""
        left = self.jobs.with_name("left")
        shutil.copytree(self.jobs, left)
        later = leftovers(self.small, left)
        later.recover()
        assert later.see_out()
        assert list(left.glob("*.job")) == []


def leftovers(small: SmallHost, jobs: Path, xen: FaultyHypervisor | None = None) -> Leftovers:
    host = small.host
    return Leftovers(
        xen or host, JobStore(jobs), host.clock, frozenset, CareTimes(interval=0.005, stop=5000)
    )


def told(caplog: pytest.LogCaptureFixture, kind: Event) -> list[str]:
    """Messages of a kind that are critical."""
    return [
        record.getMessage()
        for record in caplog.records
        if getattr(record, "pgofflined_fields", {}).get("MESSAGE_ID") == kind.message_id
        and record.levelno == logging.CRITICAL
    ]


@asynccontextmanager
async def serving(
    folder: Path,
    *plan: Fault,
    before: Callable[[SmallHost, Path], None] = lambda _small, _jobs: None,
    relocator: Relocator | None = None,
    stop: float = 20.0,
    late_at_stop: float = 120.0,
) -> AsyncIterator[Scene]:
    """The service at work; it has ended when the block has."""
    small = small_host(clock=FastClock())
    host, jobs = small.host, folder / "jobs"
    before(small, jobs)
    xen = FaultyHypervisor(host, *plan)
    policy = replace(
        POLICY,
        control=ControlPolicy(socket=str(folder / "control.sock")),
        relocation=RelocationPolicy(
            save_restore=True, save_directory=str(folder), free_memory_reserve=0
        ),
    )
    with closing(Store.open(folder / "state.db", "this")) as store:
        world = World(
            xen=xen,
            clock=host.clock,
            machine=Machine(
                vendor=CpuVendor.INTEL, family=6, physical_bits=46, max_mfn=host.max_mfn()
            ),
            sources=[SimulatedTelemetry],
            relocator=relocator or NoMover(),
            links=KernelLinks(),
            zone=UTC,
            store=store,
            journal=JobStore(jobs),
            notifier=NullNotifier(),
            saves=saves_in(folder, host.domain(small.pv).identity),
            times=CareTimes(interval=0.01, late_at_stop=late_at_stop, stop=stop),
        )
        left = leftovers(small, jobs, xen)
        left.recover()
        service = Service(world, policy)
        left.hand_over(service.retirer.care)
        scene = Scene(small=small, xen=xen, service=service, leftovers=left, jobs=jobs)
        async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
            running = tasks.create_task(service.run(scene.stop))
            await service.ready.wait()
            try:
                yield scene
            finally:
                scene.stop.set()
            await running


def late(seconds: float) -> SuspendBehaviour:
    return SuspendBehaviour(suspend_after=20 + seconds)


async def test_a_guest_that_follows_late_is_resumed_before_the_daemon_ends(tmp_path: Path) -> None:
    async with serving(tmp_path) as scene:
        scene.guest.behaviour = late(40)
        await scene.until_refused()
        assert scene.guest.suspends_at is not None
        due = scene.guest.suspends_at
    assert scene.small.host.clock.monotonic() > due
    assert scene.runs()
    assert scene.guest.cpu_time, "it was suspended, and let run again"
    assert scene.records() == []


async def test_a_guest_that_is_asked_when_the_stop_comes_is_seen_to_the_end(tmp_path: Path) -> None:
    async with serving(tmp_path) as scene:
        scene.guest.behaviour = late(40)
        scene.retire_a_page()
        await scene.until(lambda: bool(scene.xen.trace.of("suspend")))
    assert scene.runs()
    assert scene.guest.cpu_time
    assert scene.records() == []


async def test_a_guest_that_does_not_follow_in_time_is_told_of_and_left_to_the_next_process(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(tmp_path, late_at_stop=0.0) as scene:
        scene.guest.behaviour = late(60)
        await scene.until_refused()
    assert scene.runs()
    [line] = told(caplog, Event.GUEST_LEFT)
    domid = scene.small.pv
    assert f"d{domid} has read our request" in line
    assert f"xl resume {domid}" in line
    assert "before Xen 4.20" in line
    assert len(scene.records()) == 1
    scene.next_process()
    assert scene.has_followed()
    assert scene.runs()


async def test_a_guest_that_cannot_be_let_go_at_first_is_before_the_daemon_ends(
    tmp_path: Path,
) -> None:
    async with serving(tmp_path, Fault(method="resume", times=35)) as scene:
        await scene.until_refused()
        assert not scene.runs()
    assert scene.runs()
    assert scene.records() == []


@pytest.mark.parametrize("method", ["resume", "unpause"])
async def test_a_guest_that_cannot_be_let_go_in_time_is_by_the_next_process(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    async with serving(tmp_path, Fault(method=method, times=NEVER), stop=0.1) as scene:
        await scene.until_refused()
        [one] = scene.service.retirer.care.stuck.values()
        assert one.since <= time.time()
    assert not scene.runs()
    line = told(caplog, Event.GUEST_LEFT)[-1]
    domid = scene.small.pv
    assert f"could not {method} it" in line
    assert f"xl unpause {domid}" in line
    assert f"xl resume {domid}" in line
    scene.next_process()
    assert scene.runs()


async def test_a_guest_that_somebody_saves_is_left_to_the_next_process(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    failing = Fault(method="resume", times=10)
    async with serving(tmp_path, failing, stop=0.1) as scene:

        def begin() -> None:
            scene.guest.somebody = "process 5 (xl save)"

        scene.xen.plan.append(Fault(method="tell_resumed", act=begin))
        await scene.until_refused()
    assert not scene.runs()
    assert told(caplog, Event.GUEST_LEFT)
    scene.guest.somebody = None
    scene.next_process()
    assert scene.runs()


def killed_in_an_exchange(small: SmallHost, jobs: Path) -> None:
    """An earlier daemon's end: the guest is held, in the middle of a change."""
    from pgofflined.exchanger import exchange

    host = small.host
    layout = host.pv(small.pv).layout
    mfn = host.frame_of(small.pv, layout.plain[3])
    host.offline(mfn)
    xen = FaultyHypervisor(host, Fault(method="exchange", moment=Moment.AFTER, kills=True))
    dead = jobs.with_name("dead")
    with pytest.raises(Killed):
        exchange(
            host.domain(small.pv).identity,
            [mfn],
            xen=xen,
            journal=MortalJournal(JobStore(dead), xen),
            clock=host.clock,
            limits=SuspendLimits(),
        )
    # This process, which is not really dead, still holds the locks of the records in there.
    shutil.copytree(dead, jobs)


async def test_a_recovery_that_is_tried_again_is_ended_before_the_daemon_ends(
    tmp_path: Path,
) -> None:
    failing = Fault(method="condition", times=NEVER)
    async with serving(tmp_path, failing, before=killed_in_an_exchange) as scene:
        assert not scene.runs()
        scene.xen.plan.clear()
    assert scene.runs()
    assert scene.records() == []
    scene.small.host.check_invariants()


async def test_a_recovery_that_does_not_come_to_its_end_is_left_to_the_next_process(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    deaf = Fault(method="condition", times=NEVER)
    async with serving(tmp_path, deaf, before=killed_in_an_exchange, stop=0.0) as scene:
        pass
    info = scene.small.host.domain(scene.small.pv)
    assert (info.shutdown, info.paused) == (ShutdownReason.SUSPEND, True)
    line = told(caplog, Event.GUEST_LEFT)[-1]
    assert f"xl unpause {scene.small.pv}" in line
    scene.next_process()
    assert scene.runs()
    scene.small.host.check_invariants()


async def test_a_guest_whose_save_has_failed_is_looked_after_until_the_daemon_ends(
    tmp_path: Path,
) -> None:
    mover = NoMover()
    async with serving(tmp_path, relocator=mover) as scene:
        await save_in_vain(scene, mover)
        scene.guest.suspends_at = scene.small.host.clock.monotonic() + 40
    assert scene.has_followed()
    assert scene.runs()
    assert scene.records() == []


async def test_a_guest_whose_save_has_failed_is_known_to_the_next_process(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mover = NoMover()
    async with serving(tmp_path, relocator=mover, late_at_stop=0.0) as scene:
        await save_in_vain(scene, mover)
        await scene.until(lambda: bool(scene.records()))
    assert told(caplog, Event.GUEST_LEFT)
    scene.guest.suspends_at = scene.small.host.clock.monotonic() + 40
    scene.next_process()
    assert scene.has_followed()
    assert scene.runs()


async def save_in_vain(scene: Scene, mover: NoMover) -> None:
    layout = scene.small.host.pv(scene.small.pv).layout
    mfn = scene.small.host.frame_of(scene.small.pv, layout.plain[5])
    scene.small.host.offline(mfn)
    scene.service.relocation.submit(scene.identity, "pv", [mfn], by_saving=True)
    await mover.begun.wait()
    await scene.until(lambda: bool(scene.service.retirer.aftercare))


async def test_a_fault_of_our_own_loses_no_guest_that_is_in_the_middle_of_an_exchange(
    tmp_path: Path,
) -> None:
    def fault() -> None:
        raise RuntimeError("a fault of our own")

    with pytest.raises(ExceptionGroup):  # noqa: PT012 - it comes while the block waits
        async with serving(tmp_path, stop=5000) as scene:
            scene.guest.behaviour = late(40)
            scene.retire_a_page()
            await scene.until(lambda: bool(scene.xen.trace.of("suspend")))
            # The next page that is looked at ends the retirer, while a guest is being asked.
            scene.xen.plan.append(Fault(method="query", times=NEVER, act=fault))
            scene.service.retirer.take(Mfn(5), Cause.OPERATOR, "asked for")
            await scene.stop.wait()
    await asyncio.to_thread(scene.leftovers.see_out)
    assert scene.runs()
    assert scene.has_followed()
    assert scene.guest.cpu_time
    assert scene.records() == []


async def test_a_guest_that_will_never_read_the_request_does_not_hold_up_a_stop(
    tmp_path: Path,
) -> None:
    async with serving(tmp_path) as scene:
        scene.guest.behaviour = SuspendBehaviour(answer=Answer.IGNORES)
        await scene.until_refused()
        began = time.monotonic()
    assert time.monotonic() - began < 5
    assert scene.records() == []


def test_recovery_gives_up_within_the_time_that_a_stop_has() -> None:
    from pgofflined.exchanging import RECOVERY_SECONDS

    assert CareTimes().stop / 2 > RECOVERY_TRIES * RECOVERY_SECONDS
