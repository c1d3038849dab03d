"""How a retirer waits while Xen cannot be asked which domains there are."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from errno import EIO

from pgofflined.core.errors import XenError
from pgofflined.core.policy import Backoff
from pgofflined.ledger import Ledger
from pgofflined.retiring import Retirer
from pgofflined.sim.clock import WallClock
from pgofflined.sim.faults import Fault, FaultyHypervisor
from pgofflined.sim.journal import MemoryJournal
from pgofflined.sim.scenarios import small_host
from pgofflined.uncorrected import UncorrectedErrors

from .test_retirer import left_page
from .test_retiring import Pages
from .whole import POLICY

FIRST = 0.02
LIMIT = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Noted(Backoff):
    """Notes after how many failures it was asked for a wait."""

    asked: list[int] = field(default_factory=list)

    def delay(self, failures: int) -> float | None:
        self.asked.append(failures)
        return Backoff.delay(self, failures)


async def test_a_look_that_fails_comes_again_after_waits_that_grow_until_one_succeeds() -> None:
    small = small_host()
    page = left_page(small)
    xen = FaultyHypervisor(small.host)
    pages, clock, soon = Pages(), WallClock(), Noted(first=FIRST, last=1.0)
    looks: list[float] = []

    def fail(which: int) -> None:
        looks.append(time.monotonic())
        if which not in (3, 5):
            raise XenError(EIO, op="getdomaininfolist")

    xen.plan.extend(
        Fault(method="conditions", nth=nth, act=lambda nth=nth: fail(nth))  # type: ignore[misc]
        for nth in range(1, 6)
    )
    retirer = Retirer(
        xen=xen,
        journal=MemoryJournal(),
        clock=clock,
        policy=POLICY,
        ledger=Ledger(pages, clock, [page]),
        errors=UncorrectedErrors(pages),
        soon=soon,
        slowly=3600.0,
    )

    async def until(times: int) -> None:
        async with asyncio.timeout(LIMIT):
            while len(looks) < times:  # noqa: ASYNC110 - the thread that looks tells nobody
                await asyncio.sleep(0.001)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(retirer.run())
        await until(3)
        # The third has succeeded; the next occasion fails once.
        retirer.domain_ended()
        await until(5)
        retirer.stop()
    assert soon.asked == [1, 2, 1]
    assert looks[1] - looks[0] >= FIRST
    assert looks[2] - looks[1] >= 2 * FIRST
    assert looks[4] - looks[3] >= FIRST
