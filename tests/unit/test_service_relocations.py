"""What the running service does with a guest that waits to be migrated, on the simulated host."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from pgofflined.core.book import Cause, PageEntry, Phase
from pgofflined.core.domains import DomainIdentity, DomainInfo
from pgofflined.core.frames import Mfn
from pgofflined.core.offline import OfflineState
from pgofflined.core.policy import DomainPolicy, Policy, RelocationPolicy, RetirePolicy
from pgofflined.core.relocation_outcomes import MigrationOutcome, NotMigrated
from pgofflined.core.schedule import MaintenanceWindow, parse_window
from pgofflined.relocation.relocator import BreakOff
from pgofflined.service import Service
from pgofflined.sim.clock import WallClock
from pgofflined.sim.scenarios import DemoHost, demo_host
from pgofflined.store import Store

from .test_savewatch import service_of

DAY = 24 * 3600.0
FAILS = NotMigrated(detail="the line broke")


class HostClock(WallClock):
    """The time of day can be set, as by `date -s`."""

    set_by = 0.0

    def now(self) -> float:
        return super().now() + self.set_by


@dataclass
class Toolstack:
    """Fails at once, or when it is broken off, and says how often it was called."""

    calls: list[str] = field(default_factory=list)
    at_once: bool = True
    broken_off: list[str | None] = field(default_factory=list)

    async def migrate(
        self, domain: DomainIdentity, name: str, target: str, time_limit: float, off: BreakOff
    ) -> MigrationOutcome:
        del domain, name, time_limit
        self.calls.append(target)
        if not self.at_once:
            await off.asked.wait()
            self.broken_off.append(off.why)
        return FAILS

    async def save_and_restore(self, domain: DomainIdentity, directory: str) -> MigrationOutcome:
        raise AssertionError((domain, directory))


@dataclass
class Bench:
    """A service, one page of whose PVH guest is to go."""

    service: Service
    demo: DemoHost
    clock: HostClock
    toolstack: Toolstack
    policy: Policy
    guest: DomainInfo
    mfn: Mfn

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():  # noqa: ASYNC110 - a job that waits tells nobody
            await asyncio.sleep(0.01)

    async def until_the_job_is(self, state: str) -> None:
        await self.until(
            lambda: [job.state for job in self.service.relocation.snapshot()] == [state]
        )

    async def until_there_is_no_job(self) -> PageEntry:
        await self.until(lambda: not self.service.relocation.snapshot())
        return self.entry()

    def entry(self, mfn: Mfn | None = None) -> PageEntry:
        entry = self.service.retirer.ledger.book.get(self.mfn if mfn is None else mfn)
        assert entry is not None
        return entry

    def retire(self) -> None:
        self.service.retirer.take(self.mfn, Cause.OPERATOR, "as a test wishes")


def closed_now() -> tuple[MaintenanceWindow, ...]:
    """A window that opens in twelve hours."""
    opens = datetime.now(UTC) + timedelta(hours=12)
    return (parse_window(f"{opens:%H:%M}-{opens + timedelta(hours=1):%H:%M}"),)


@asynccontextmanager
async def bench_at(folder: Path, **relocation: object) -> AsyncIterator[Bench]:
    clock = HostClock()
    demo = demo_host(clock=clock, seed=1)
    guest = demo.host.domain(demo.pvh)
    wanted = RelocationPolicy(target="localhost", free_memory_reserve=0)
    wanted = replace(wanted, **relocation)  # type: ignore[arg-type]
    policy = Policy(relocation=wanted)
    toolstack = Toolstack()
    mfn = demo.host.frame_of(demo.pvh, 5)
    with closing(Store.open(folder / "state.db", "this")) as store:
        service = service_of(demo, folder, store, policy=policy, relocator=toolstack)
        stop = asyncio.Event()
        async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
            tasks.create_task(service.run(stop))
            await service.ready.wait()
            yield Bench(service, demo, clock, toolstack, policy, guest, mfn)
            stop.set()


@pytest.mark.parametrize("set_by", [-DAY, DAY])
async def test_a_clock_that_is_set_puts_no_migration_off(tmp_path: Path, set_by: float) -> None:
    async with bench_at(tmp_path, retry_first=0.2, retry_last=0.2, attempts=3) as bench:
        bench.retire()
        await bench.until_the_job_is("waiting")
        bench.clock.set_by = set_by
        await bench.until(lambda: len(bench.toolstack.calls) == 3)
        assert (await bench.until_there_is_no_job()).reason == "gave_up"


FORBIDDING: dict[str, tuple[Callable[[Policy], Policy], str]] = {
    "relocation.enabled": (
        lambda policy: replace(policy, relocation=replace(policy.relocation, enabled=False)),
        "disabled",
    ),
    "relocation.target": (
        lambda policy: replace(policy, relocation=replace(policy.relocation, target="")),
        "no_target",
    ),
    "retire.dry_run": (
        lambda policy: replace(policy, retire=RetirePolicy(dry_run=True)),
        "on_hold",
    ),
    "retire.enabled": (
        lambda policy: replace(policy, retire=RetirePolicy(enabled=False)),
        "on_hold",
    ),
    "domains.deny": (
        lambda policy: replace(policy, domains=DomainPolicy(deny=("mail",))),
        "denied",
    ),
}


@pytest.mark.parametrize("waits_for", ["its window", "its next try"])
@pytest.mark.parametrize("how", FORBIDDING)
async def test_a_reload_that_forbids_it_ends_what_waits_and_nothing_is_begun(
    tmp_path: Path, how: str, waits_for: str
) -> None:
    change, reason = FORBIDDING[how]
    wait = {"maintenance_windows": closed_now()} if waits_for == "its window" else {}
    async with bench_at(tmp_path, retry_first=3600.0, **wait) as bench:
        bench.retire()
        await bench.until_the_job_is("deferred" if wait else "waiting")
        begun = len(bench.toolstack.calls)
        bench.service.apply(change(bench.policy))
        await bench.until_there_is_no_job()
        await bench.until(lambda: bench.entry().reason == reason)
        entry = bench.entry()
        assert entry.phase is (Phase.WAITING if reason == "on_hold" else Phase.LEFT)
        # What Xen has of its mark, so has the book; a page that is not to be touched has none.
        pending = OfflineState.OFFLINE_PENDING in bench.demo.host.query(entry.mfn)
        assert entry.marked == pending == (reason != "denied")
        assert len(bench.toolstack.calls) == begun


@pytest.mark.parametrize("waits_for", ["its window", "its next try"])
async def test_a_guest_that_was_migrated_by_hand_is_waited_for_no_longer(
    tmp_path: Path, waits_for: str
) -> None:
    wait = {"maintenance_windows": closed_now()} if waits_for == "its window" else {}
    async with bench_at(tmp_path, retry_first=3600.0, **wait) as bench:
        bench.retire()
        await bench.until_the_job_is("deferred" if wait else "waiting")
        bench.demo.host.destroy(bench.guest.domid)
        bench.service.relocation.look_again()
        entry = await bench.until_there_is_no_job()
        assert entry.phase is Phase.OFFLINED


async def test_an_uncorrected_error_keeps_the_guest_that_owns_the_page_for_as_long_as_it_does(
    tmp_path: Path,
) -> None:
    async with bench_at(tmp_path, attempts=1) as bench:
        host = bench.demo.host
        poison = host.frame_of(bench.guest.domid, 7)
        bench.service.retirer.take_poisoned(poison, "an error")
        bench.retire()
        await bench.until_the_job_is("deferred")
        [job] = bench.service.relocation.snapshot()
        assert f"mfn {poison:#x}" in job.detail
        assert f"d{bench.guest.domid}" in job.detail
        host.destroy(bench.guest.domid)
        await bench.until_there_is_no_job()
        assert bench.toolstack.calls == []


async def test_an_uncorrected_error_of_a_pvh_guest_keeps_no_other(tmp_path: Path) -> None:
    # Xen has named its owner when the page was marked.
    async with bench_at(tmp_path, attempts=1) as bench:
        host = bench.demo.host
        poison = host.frame_of(host.add_hvm(name="other", pages=256), 5)
        bench.service.retirer.take_poisoned(poison, "an error")
        await bench.until(lambda: bench.entry(poison).reason == "uncorrected")
        bench.retire()
        await bench.until(lambda: bench.toolstack.calls == ["localhost"])


async def test_an_uncorrected_error_of_a_pv_guest_keeps_no_other(tmp_path: Path) -> None:
    async with bench_at(tmp_path, attempts=1) as bench:
        host = bench.demo.host
        web = next(one for one in host.domains() if one.name == "web")
        poison = host.frame_of(web.domid, host.pv(web.domid).layout.plain[0])
        bench.service.retirer.take_poisoned(poison, "an error")
        bench.retire()
        await bench.until(lambda: bench.toolstack.calls == ["localhost"])


async def test_a_guest_is_not_migrated_on_when_one_of_its_pages_has_an_uncorrected_error(
    tmp_path: Path,
) -> None:
    async with bench_at(tmp_path, retry_first=0.2, retry_last=0.2, attempts=3) as bench:
        bench.toolstack.at_once = False
        bench.retire()
        await bench.until(lambda: len(bench.toolstack.calls) == 1)
        bad = bench.demo.host.frame_of(bench.demo.pvh, 6)
        bench.demo.host.poison(bad)
        bench.service.retirer.take_poisoned(bad, "as a test wishes")
        await bench.until(lambda: len(bench.toolstack.broken_off) == 1)
        [why] = bench.toolstack.broken_off
        assert why is not None
        assert f"{bad:#x}" in why
        await bench.until_the_job_is("deferred")
        assert len(bench.toolstack.calls) == 1
