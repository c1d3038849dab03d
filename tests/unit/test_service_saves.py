"""What the service looks at before it has a guest saved, and what it does after that.

Everything is the service's own: only the mover is another, and the host a simulated one.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from pgofflined.aftercare import CareTimes
from pgofflined.core.book import Cause, PageEntry, Phase
from pgofflined.core.domains import DomainIdentity
from pgofflined.core.events import Event
from pgofflined.core.frames import Mfn
from pgofflined.core.policy import Policy, RelocationPolicy
from pgofflined.core.relocation_outcomes import InDoubt, MigrationOutcome, NotMigrated
from pgofflined.journal_log import FieldHandler
from pgofflined.relocation import telling
from pgofflined.relocation.relocator import BreakOff
from pgofflined.savewatch import SaveWatch
from pgofflined.saving import Saves, write_note
from pgofflined.service import Service
from pgofflined.sim.clock import WallClock
from pgofflined.sim.scenarios import DemoHost, demo_host
from pgofflined.store import Store

from .test_savewatch import NOTE, service_of


@dataclass
class Mover:
    """In place of the mover; leaves its note, where it is to be in doubt."""

    notes: Path
    outcome: MigrationOutcome
    called: list[DomainIdentity] = field(default_factory=list)

    async def save_and_restore(self, domain: DomainIdentity, directory: str) -> MigrationOutcome:
        del directory
        self.called.append(domain)
        if isinstance(self.outcome, InDoubt):
            write_note(replace(NOTE, domain=domain), self.notes, new=True)
        return self.outcome

    async def migrate(
        self, domain: DomainIdentity, name: str, target: str, time_limit: float, off: BreakOff
    ) -> MigrationOutcome:
        raise AssertionError((domain, name, target, time_limit, off))


@dataclass
class Bench:
    """A service that may save the guest, one of whose pages is to go."""

    service: Service
    demo: DemoHost
    mover: Mover
    guest: DomainIdentity
    policy: Policy
    mfns: list[Mfn]

    def submit(self) -> None:
        [mfn, *_] = self.mfns
        self.demo.host.offline(mfn)
        entry = PageEntry(
            mfn=mfn,
            cause=Cause.CORRECTED,
            phase=Phase.RELOCATION,
            since=0.0,
            marked=True,
            domain=self.guest,
            domain_name="web",
            reason="granted",
            detail="",
        )
        self.service.retirer.ledger.put(entry)
        assert self.service.relocation.submit(self.guest, "web", [mfn], by_saving=True)

    def hinder(self, how: str) -> None:
        match how:
            case "poison":
                self.service.retirer.take_poisoned(self.mfns[1], "an error")
            case "deny":
                domains = replace(self.policy.domains, deny=("web",))
                self.service.apply(replace(self.policy, domains=domains))
            case "dry run":
                retire = replace(self.policy.retire, dry_run=True)
                self.service.apply(replace(self.policy, retire=retire))
            case "no exchange":
                exchange = replace(self.policy.exchange, enabled=False)
                self.service.apply(replace(self.policy, exchange=exchange))
            case "note":
                write_note(replace(NOTE, domain=self.guest), self.mover.notes, new=True)
            case _:
                raise AssertionError(how)


def heard_of(
    module: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> asyncio.Event:
    """Set with the next entry of a module in the journal."""
    heard = asyncio.Event()
    logger = logging.getLogger(module)
    monkeypatch.setattr(logger, "handlers", [FieldHandler(lambda *_, **__: heard.set())])
    # Not by the attribute alone: a logger remembers which levels it has found switched off.
    caplog.set_level(logging.INFO, logger=module)
    return heard


def saves_in(folder: Path, guest: DomainIdentity) -> Saves:
    """To which it is known that xl has created the guest."""
    folder.chmod(0o700)
    (folder / f"userdata-d.{guest.domid}.{guest.uuid}.libxl-json").touch()
    return Saves(
        "this",
        notes=folder,
        configs=folder,
        libvirt=folder / "libvirt",
        mounts=Path(os.devnull),
    )


@asynccontextmanager
async def bench_at(folder: Path, outcome: MigrationOutcome) -> AsyncIterator[Bench]:
    demo = demo_host(clock=WallClock(), seed=1)
    guest = next(one for one in demo.host.domains() if one.name == "web").identity
    saves = saves_in(folder, guest)
    relocation = RelocationPolicy(
        save_restore=True, save_directory=str(folder), free_memory_reserve=0
    )
    policy = replace(Policy(), relocation=relocation)
    mover = Mover(folder, outcome)
    layout = demo.host.pv(guest.domid).layout
    mfns = [demo.host.frame_of(guest.domid, layout.plain[at]) for at in range(2)]
    with closing(Store.open(folder / "state.db", "this")) as store:
        service = service_of(
            demo,
            folder,
            store,
            policy=policy,
            relocator=mover,
            saves=saves,
            times=CareTimes(interval=0.02, late_at_stop=0.1),
        )
        stop = asyncio.Event()
        async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
            tasks.create_task(service.run(stop))
            await service.ready.wait()
            yield Bench(service, demo, mover, guest, policy, mfns)
            stop.set()


@pytest.mark.parametrize("how", ["poison", "deny", "dry run", "no exchange", "note"])
async def test_no_save_is_begun_where_the_service_knows_better(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    async with bench_at(tmp_path, NotMigrated(detail="it was begun")) as bench:
        bench.hinder(how)
        heard = heard_of(telling.__name__, monkeypatch, caplog)
        bench.submit()
        await heard.wait()
        assert bench.mover.called == []
    # What is begun is told of before.
    kinds = [getattr(one, "pgofflined_fields", {}).get("MESSAGE_ID") for one in caplog.records]
    assert Event.SAVE_BEGUN.message_id not in kinds


async def test_a_save_that_is_left_to_a_person_is_shown_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with bench_at(tmp_path, InDoubt(detail="look")) as bench:
        heard = heard_of(SaveWatch.__module__, monkeypatch, caplog)
        bench.submit()
        await heard.wait()
        assert bench.mover.called == [bench.guest]
        attention = bench.service.snapshot().attention
    assert any("was cut off" in condition.text for condition in attention)


async def test_a_guest_is_looked_after_when_its_save_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench_at(tmp_path, NotMigrated(detail="no", was_asked=True)) as bench:
        noted = asyncio.Event()
        monkeypatch.setattr(telling, "failed", lambda *_: noted.set())
        bench.submit()
        await noted.wait()
        assert bench.service.retirer.aftercare


async def test_an_uncorrected_error_of_another_guest_keeps_no_guest_from_being_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench_at(tmp_path, NotMigrated(detail="no")) as bench:
        host = bench.demo.host
        other = next(one for one in host.domains() if one.name == "database")
        page = host.frame_of(other.domid, host.pv(other.domid).layout.plain[0])
        bench.service.retirer.take_poisoned(page, "an error")
        begun = asyncio.Event()
        monkeypatch.setattr(telling, "begun", lambda *_: begun.set())
        bench.submit()
        await begun.wait()
