"""What the running service makes of machine checks: its journal, its counts and what it knows."""

from __future__ import annotations

import asyncio
import logging
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC
from pathlib import Path

import pytest

from pgofflined.core.events import Event
from pgofflined.core.frames import Domid, Maddr, Mfn, Pfn, maddr_of
from pgofflined.core.machine import CpuVendor, Machine
from pgofflined.core.policy import ControlPolicy, MetricsPolicy, Policy, RetirePolicy
from pgofflined.core.reports import CorrectedPageError
from pgofflined.core.units import AmountOfMemory
from pgofflined.demo import SimulatedRelocator
from pgofflined.journal_log import FieldHandler
from pgofflined.notify import NullNotifier
from pgofflined.relocation import KernelLinks
from pgofflined.saving import Saves
from pgofflined.service import Service
from pgofflined.sim.activity import MemoryChecker
from pgofflined.sim.clock import ManualClock
from pgofflined.sim.dimm import FailingDimm
from pgofflined.sim.journal import MemoryJournal
from pgofflined.sim.scenarios import DemoHost, SmallHost, small_host
from pgofflined.sim.telemetry import SimulatedTelemetry
from pgofflined.store import Store
from pgofflined.world import World

EVERY_FIELD = {"BANK", "STATUS", "ADDR", "MISC", "SOCKET", "APICID", "MCG_STATUS", "MCG_CAP"}
WITH_SER_P, WITHOUT_SER_P = 0x0F00_0C14, 0x1C09
# As published of Westmere: the low bits of MISC are no address mode.
WESTMERE, WESTMERE_MISC = 0xCC00_0480_0001_009F, 0x8F44_9608_0009_5840
# As published: of a northbridge of AMD's, and of Goldmont at every boot.
FATAL, GOLDMONT = 0xF60C_2001_0000_0813, 0xA600_0000_0002_0408
NO_ACTION = RetirePolicy(dry_run=True)

Entry = tuple[str, dict[str, str]]


@dataclass
class Scene:
    """A service that reads the machine checks of a small simulated host."""

    service: Service
    telemetry: SimulatedTelemetry
    small: SmallHost
    entries: list[Entry] = field(default_factory=list)

    def frames(self, count: int) -> list[Mfn]:
        """Frames of the PV guest."""
        return [self.small.host.frame_of(self.small.pv, Pfn(100 + pfn)) for pfn in range(count)]

    def of(self, kind: Event) -> list[Entry]:
        """The journal's entries of a kind."""
        return [entry for entry in self.entries if entry[1].get("MESSAGE_ID") == kind.message_id]

    async def until(self, condition: Callable[[], bool]) -> None:
        """Let the service run until something is so."""
        async with asyncio.timeout(20):
            while not condition():  # noqa: ASYNC110 - of a service that runs beside the test
                await asyncio.sleep(0.001)

    async def settled(self) -> None:
        """Let it take all that was pushed, and a record that makes no sense, behind the rest."""
        undecodable = self.service.counters.undecodable
        before = undecodable.total()
        self.telemetry.push_garbage(b"")
        await self.until(lambda: undecodable.total() > before)


@contextmanager
def journal_of(scene: Scene) -> Iterator[None]:
    logger = logging.getLogger("pgofflined")
    level = logger.level

    def send(message: str, **fields: str) -> None:
        scene.entries.append((message, fields))

    handler = FieldHandler(send)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@asynccontextmanager
async def running(
    folder: Path,
    *,
    retire: RetirePolicy = NO_ACTION,
    mcg_cap: int = WITH_SER_P,
    vendor: CpuVendor = CpuVendor.INTEL,
    family: int = 6,
) -> AsyncIterator[Scene]:
    small = small_host(clock=ManualClock())
    host = small.host
    telemetry = SimulatedTelemetry(pool=100_000, mcg_cap=mcg_cap)
    demo = DemoHost(
        host=host,
        telemetry=telemetry,
        dimm=FailingDimm([Mfn(1)], rows=1, seed=1),
        checkers=dict[Domid, MemoryChecker](),
        pvh=small.pvh,
    )
    with closing(Store.open(folder / "state.db", "this")) as store:
        world = World(
            xen=host,
            clock=host.clock,
            machine=Machine(vendor=vendor, family=family, physical_bits=46, max_mfn=host.max_mfn()),
            sources=[lambda: telemetry],
            relocator=SimulatedRelocator(demo),
            links=KernelLinks(),
            zone=UTC,
            store=store,
            journal=MemoryJournal(),
            notifier=NullNotifier(),
            saves=Saves("this", notes=folder),
        )
        policy = replace(
            Policy(),
            retire=retire,
            metrics=MetricsPolicy(listen=None),
            control=ControlPolicy(socket=str(folder / "control.sock")),
        )
        scene = Scene(Service(world, policy), telemetry, small)
        stop = asyncio.Event()
        with journal_of(scene):
            task = asyncio.create_task(scene.service.run(stop))
            try:
                yield scene
            finally:
                stop.set()
                await task


async def test_every_kind_of_machine_check_is_in_the_journal_with_all_its_fields(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as scene:
        corrected, ucna, leftover, taken = scene.frames(4)
        source = scene.telemetry
        source.push_corrected(Maddr(maddr_of(corrected) + 0x40), cpu=3, domid=scene.small.pv)
        source.push_ucna(Maddr(maddr_of(ucna) + 0x80), domid=scene.small.pv)
        source.push_leftover(maddr_of(leftover) + 0xC0)
        source.push_leftover(0xFEF1_FF80, status=GOLDMONT, bank=4)
        source.push_interrupt(FATAL, 0x1_FEF5_1800, bank=4)
        source.push_polled(0x8C00_0000_0000_0151, 0x1000)
        source.push_srao(taken, scene.small.pv)
        await scene.settled()
    found = [entry for entry in scene.entries if "STATUS" in entry[1]]
    assert len(found) == 7
    for message, fields in found:
        assert fields.keys() >= EVERY_FIELD, message
        assert f"status {fields['STATUS']}" in message
        assert f"address {fields['ADDR']}" in message
        assert fields["MCG_CAP"] == "0xf000c14"
    [(message, fields)] = scene.of(Event.UNCORRECTED_ERROR)[:1]
    assert f"an uncorrected error in mfn {ucna:#x} of d{scene.small.pv}" in message
    assert (fields["MFN"], fields["DOMID"]) == (f"{ucna:#x}", f"{scene.small.pv}")
    assert fields["ADDR"] == f"{maddr_of(ucna) + 0x80:#x}"
    [fatal] = [fields for _, fields in found if fields["STATUS"] == f"{FATAL:#018x}"]
    assert (fatal["ADDR"], fatal["BANK"], fatal["SOCKET"]) == ("0x1fef51800", "4", "0")
    assert [fields["APICID"] for _, fields in scene.of(Event.ERROR_SEEN)] == ["3", "0"]


async def test_a_page_has_one_hit_for_each_record_whatever_its_bank_has_counted(
    tmp_path: Path,
) -> None:
    async with running(tmp_path, retire=RetirePolicy()) as scene:
        [mfn] = scene.frames(1)
        scene.telemetry.push_corrected(maddr_of(mfn), count=78, overwritten=True)
        await scene.settled()
        assert (await scene.service.query(mfn)).hits_in_window == 1
        assert scene.of(Event.PAGE_TO_RETIRE) == []
        scene.telemetry.push_corrected(maddr_of(mfn))
        await scene.until(lambda: bool(scene.of(Event.PAGE_TO_RETIRE)))


async def test_errors_that_hardware_overwrote_are_counted_as_lost(tmp_path: Path) -> None:
    async with running(tmp_path) as scene:
        [mfn] = scene.frames(1)
        source = scene.telemetry
        source.push_corrected(maddr_of(mfn), count=5)
        source.push_corrected(maddr_of(mfn), count=78, overwritten=True)
        source.push_corrected(maddr_of(mfn), count=0, overwritten=True)
        source.push_interrupt(FATAL, 0x1_FEF5_1800, bank=4)
        await scene.settled()
        assert scene.service.snapshot().lost["hardware"] == 77 + 1 + 1
        lost = scene.service.metrics.registry.get_sample_value(
            "pgofflined_records_lost_total", {"where": "hardware"}
        )
        assert lost == 79


async def test_processors_without_error_recovery_name_their_pages_by_addrv_alone(
    tmp_path: Path,
) -> None:
    for mcg_cap, retired in ((WITHOUT_SER_P, 1), (WITH_SER_P, 0)):
        folder = tmp_path / str(retired)
        folder.mkdir()
        async with running(folder, mcg_cap=mcg_cap) as scene:
            [mfn] = scene.frames(1)
            for _ in range(2):
                scene.telemetry.push_polled(WESTMERE, maddr_of(mfn), WESTMERE_MISC, bank=8)
            await scene.settled()
            assert len(scene.of(Event.PAGE_WOULD_RETIRE)) == retired


async def test_what_was_in_the_banks_at_boot_is_told_apart_and_its_page_is_known(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as scene:
        mfn, handled = scene.frames(2)
        scene.telemetry.push_leftover(maddr_of(mfn))
        scene.telemetry.push_leftover(0xFEF1_FF80, status=GOLDMONT, bank=4)
        scene.telemetry.push_srao(handled, scene.small.pv)
        await scene.settled()
        assert mfn in scene.service.retirer.errors.poisoned
        assert Mfn(0xFEF1F) not in scene.service.retirer.errors.poisoned
    usable, fatal = scene.of(Event.UNCORRECTED_ERROR)
    for message, _ in (usable, fatal):
        assert "before this boot" in message
        assert "went down" not in message
    [(acted, _)] = scene.of(Event.HYPERVISOR_ACTED)
    assert "before this boot" not in acted


async def test_uncorrectable_memory_of_an_old_amd_host_is_known_not_to_be_read(
    tmp_path: Path,
) -> None:
    async with running(tmp_path, vendor=CpuVendor.AMD, family=0x15) as scene:
        deferred, uncorrected = scene.frames(2)
        scene.telemetry.push_amd_deferred(maddr_of(deferred))
        scene.telemetry.push_amd_uncorrected(maddr_of(uncorrected))
        await scene.settled()
        assert scene.service.retirer.errors.poisoned >= {deferred, uncorrected}


async def test_uncorrected_error_beyond_the_hosts_memory_is_no_pages(tmp_path: Path) -> None:
    async with running(tmp_path) as scene:
        scene.telemetry.push_ucna(Maddr(0x38_0000_0000))
        await scene.settled()
        assert scene.service.retirer.errors.poisoned == frozenset()
    [(message, _)] = scene.of(Event.UNCORRECTED_ERROR)
    assert "beyond the host's last frame" in message


async def test_a_storm_of_corrected_errors_leaves_a_few_lines_and_their_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []
    describe = CorrectedPageError.describe

    def noted(report: CorrectedPageError) -> str:
        built.append(report.mfn)
        return describe(report)

    monkeypatch.setattr(CorrectedPageError, "describe", noted)
    async with running(tmp_path) as scene:
        for mfn in scene.frames(50):
            scene.telemetry.push_corrected(maddr_of(mfn))
        await scene.settled()
        assert len(built) == 20, "sentences were built to be thrown away"
        assert len(scene.of(Event.ERROR_SEEN)) == 20
        assert len([message for message, _ in scene.entries if "is kept" in message]) == 20
        assert scene.service.counters.reports["corrected", "simulated"] == 50
    assert scene.of(Event.ERROR_SEEN)[-1][0] == "30 such entries were left out"


async def test_a_storm_of_garbage_and_losses_leaves_a_few_lines_and_their_number(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as scene:
        for _ in range(50):
            scene.telemetry.push_garbage(b"")
            # Entries that Xen had no room for: MCINFO_FLAGS_UNCOMPLETE.
            scene.telemetry.push_garbage(struct.pack("<II", 0, 1).ljust(768, b"\0"))
        await scene.until(lambda: scene.service.counters.undecodable.total() == 50)
        await scene.settled()
        for kind in (Event.RECORD_UNDECODABLE, Event.RECORDS_LOST):
            assert len(scene.of(kind)) == 20
        assert scene.service.snapshot().lost["incomplete"] == 50
    assert scene.of(Event.RECORD_UNDECODABLE)[-1][0] == "31 such entries were left out"
    assert scene.of(Event.RECORDS_LOST)[-1][0] == "30 such entries were left out"


async def test_no_verdict_is_left_out_for_a_storm_and_none_is_said_twice(tmp_path: Path) -> None:
    nothing_more = RetirePolicy(max_retired=AmountOfMemory(size=0))
    for retire, kind in (
        (nothing_more, Event.CAP_REACHED),
        (NO_ACTION, Event.PAGE_WOULD_RETIRE),
    ):
        folder = tmp_path / kind.name
        folder.mkdir()
        async with running(folder, retire=retire) as scene:
            pages = scene.frames(50)
            for mfn in pages * 4:
                scene.telemetry.push_corrected(maddr_of(mfn))
            await scene.settled()
        assert [fields["MFN"] for _, fields in scene.of(kind)] == [f"{mfn:#x}" for mfn in pages]


async def test_a_verdict_is_said_again_when_the_policy_has_changed(tmp_path: Path) -> None:
    async with running(tmp_path) as scene:
        [mfn] = scene.frames(1)
        for _ in range(3):
            scene.telemetry.push_corrected(maddr_of(mfn))
        await scene.settled()
        scene.service.apply(
            replace(scene.service.policy, retire=replace(NO_ACTION, corrected_errors=3))
        )
        for _ in range(2):
            scene.telemetry.push_corrected(maddr_of(mfn))
        await scene.settled()
        assert len(scene.of(Event.PAGE_WOULD_RETIRE)) == 2


async def test_no_uncorrected_error_is_left_out_for_a_storm(tmp_path: Path) -> None:
    async with running(tmp_path) as scene:
        pages = scene.frames(60)
        for mfn in pages * 3:
            scene.telemetry.push_ucna(maddr_of(mfn))
        for mfn in pages:
            scene.telemetry.push_corrected(maddr_of(mfn))
        await scene.settled()
        told = [fields["MFN"] for _, fields in scene.of(Event.UNCORRECTED_ERROR)]
        assert set(told) == {f"{mfn:#x}" for mfn in pages}
        # Of one that is reported again and again only some are repeated.
        assert len(told) == 60 + 20
    assert scene.of(Event.UNCORRECTED_ERROR)[-1][0] == "100 such entries were left out"
