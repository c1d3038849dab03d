"""When pages are looked at, and which: on the assembled service, and on a retirer alone where the
service has no key for what is tested."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from pgofflined.core.book import Cause, PageEntry, Phase
from pgofflined.core.frames import Mfn
from pgofflined.core.policy import DomainPolicy, Policy
from pgofflined.core.units import AmountOfMemory
from pgofflined.ledger import Ledger
from pgofflined.retiring import Retirer
from pgofflined.sim.clock import WallClock
from pgofflined.sim.faults import Fault, FaultyHypervisor
from pgofflined.sim.journal import MemoryJournal
from pgofflined.sim.layout import PvSpec
from pgofflined.sim.scenarios import SmallHost, small_host
from pgofflined.uncorrected import UncorrectedErrors

from .test_retiring import Pages
from .whole import POLICY, Whole, at_work, exchanging, retiring

ONE = retiring(max_retired=AmountOfMemory(size=1 << 12))


def left_page(small: SmallHost, *, reason: str = "granted", marked: bool = True) -> PageEntry:
    """A page of the PVH guest that an earlier daemon left; asked about, but left, at the start."""
    mfn = small.host.frame_of(small.pvh, 5)
    if marked:
        small.host.offline(mfn)
    domain = small.host.domain(small.pvh)
    return PageEntry(
        mfn=mfn,
        cause=Cause.CORRECTED,
        phase=Phase.LEFT,
        since=1.0,
        marked=marked,
        domain=domain.identity,
        domain_name=domain.name,
        reason=reason,
    )


class Alone:
    """A retirer without anybody who reports to it, or moves guests."""

    def __init__(
        self, small: SmallHost, *entries: PageEntry, policy: Policy = POLICY, slowly: float = 0.1
    ) -> None:
        self.small = small
        self.pages = Pages()
        clock = WallClock()
        self.xen = FaultyHypervisor(small.host)
        self.retirer = Retirer(
            xen=self.xen,
            journal=MemoryJournal(),
            clock=clock,
            policy=policy,
            ledger=Ledger(self.pages, clock, entries),
            errors=UncorrectedErrors(self.pages),
            slowly=slowly,
        )

    def looks(self, mfn: Mfn) -> int:
        return sum(mfn in call.args for call in self.xen.trace.of("query"))

    async def until_looked(self, mfn: Mfn, times: int) -> None:
        async with asyncio.timeout(30):
            while self.looks(mfn) < times:  # noqa: ASYNC110 - the thread that looks tells nobody
                await asyncio.sleep(0.001)


@asynccontextmanager
async def running(alone: Alone) -> AsyncIterator[Alone]:
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(alone.retirer.run())
        yield alone
        alone.retirer.stop()


# When.


async def test_pages_that_stay_in_use_are_asked_about_slowly_although_nothing_is_told() -> None:
    small = small_host()
    page = left_page(small)
    async with running(Alone(small, page)) as alone:
        await alone.until_looked(page.mfn, 3)
        small.host.destroy(small.pvh)  # nobody tells
        await alone.pages.until(page.mfn, Phase.OFFLINED)


async def test_pages_that_stay_in_use_are_not_asked_about_for_nothing() -> None:
    small = small_host()
    page = left_page(small)
    async with running(Alone(small, page, slowly=3600.0)) as alone:
        await alone.until_looked(page.mfn, 1)
        # A look at another page is none at these.
        other = small.host.frame_of(small.pvh, 6)
        alone.retirer.take(other, Cause.OPERATOR, "asked for")
        await alone.pages.until(other, Phase.LEFT)
        assert alone.looks(page.mfn) == 1


async def test_nothing_is_asked_while_no_page_is_in_use() -> None:
    small = small_host()
    async with running(Alone(small, slowly=0.0)) as alone:
        mfn = small.host.frame_of(small.pvh, 5)
        alone.retirer.take(mfn, Cause.OPERATOR, "asked for")
        await alone.pages.until(mfn, Phase.LEFT)
    assert len(alone.xen.trace.of("conditions")) <= 3, "no list of domains without a page"


@pytest.mark.parametrize("told", ["ended", "reload"])
async def test_what_is_told_while_a_page_is_looked_at_is_not_lost(told: str) -> None:
    small = small_host()
    page = left_page(small)
    alone = Alone(small, page, slowly=3600.0)
    loop = asyncio.get_running_loop()

    def tell() -> None:
        if told == "ended":
            loop.call_soon_threadsafe(alone.retirer.domain_ended)
        else:
            loop.call_soon_threadsafe(alone.retirer.policy_changed, POLICY)

    alone.xen.plan.append(Fault(method="query", act=tell))
    async with running(alone):
        await alone.until_looked(page.mfn, 2)


async def test_a_reload_is_looked_into_although_a_domain_ends_right_after_it() -> None:
    small = small_host()
    page = left_page(small)
    async with running(Alone(small, page, slowly=3600.0)) as alone:
        await alone.until_looked(page.mfn, 1)
        offlines = len(alone.xen.trace.of("offline"))
        # In one turn of the loop: of the two, the reload has more looked at.
        alone.retirer.policy_changed(POLICY)
        alone.retirer.domain_ended()
        await alone.until_looked(page.mfn, 3)
        await alone.pages.until(page.mfn, Phase.LEFT)
        assert alone.pages.entries[page.mfn].reason == "no_relocation"
        assert len(alone.xen.trace.of("offline")) > offlines


async def test_how_long_xen_keeps_a_look_waiting_can_be_told(tmp_path: Path) -> None:
    running: list[Whole] = []
    seen: list[float] = []

    def look() -> None:
        retirer = running[0].service.retirer
        first = retirer.seconds_in_a_call()
        while (later := retirer.seconds_in_a_call()) <= first:
            pass
        seen.extend((first, later))

    async with at_work(tmp_path, faults=[Fault(method="query", act=look)]) as whole:
        running.append(whole)
        assert whole.service.retirer.seconds_in_a_call() == 0.0
        began = whole.clock.monotonic()
        mfn = whole.of_dom0()
        await whole.corrected(mfn)
        await whole.page(mfn, Phase.LEFT)
        first, later = seen
        assert 0.0 <= first < later <= whole.clock.monotonic() - began
        assert whole.service.retirer.seconds_in_a_call() == 0.0


# Which.


async def test_a_page_that_is_under_way_goes_on_as_it_was(tmp_path: Path) -> None:
    slow = exchanging(retry_first=3600.0, retry_last=3600.0, attempts=100)
    async with at_work(tmp_path, slow) as whole:
        mfn = whole.granted()
        await whole.corrected(mfn)
        before = await whole.page(mfn, Phase.WAITING)
        whole.service.retirer.take(mfn, Cause.OPERATOR, "asked for")
        assert whole.entry(mfn) == before


async def test_a_page_with_an_uncorrected_error_is_marked_once_whatever_was_known_of_it(
    tmp_path: Path,
) -> None:
    slow = exchanging(retry_first=3600.0, retry_last=3600.0, attempts=100)
    async with at_work(tmp_path, slow) as whole:
        waiting, left = whole.granted(), whole.small.host.frame_of(whole.small.pvh, 5)
        await whole.corrected(waiting, left)
        await whole.page(waiting, Phase.WAITING)
        await whole.page(left, Phase.LEFT, reason="no_relocation")
        for mfn in (waiting, left):
            whole.service.retirer.take_poisoned(mfn, "an uncorrected error")
            entry = await whole.page(mfn, Phase.LEFT, reason="uncorrected")
            assert (entry.cause, entry.marked) == (Cause.UNCORRECTED, True)
            # The same error once more is nothing new.
            whole.service.retirer.take_poisoned(mfn, "the same once more")
            assert whole.entry(mfn) == entry
        whole.small.host.destroy(whole.small.pvh)
        whole.service.retirer.domain_ended()
        gone = await whole.page(left, Phase.OFFLINED)
        whole.service.retirer.take_poisoned(left, "after its end")
        assert whole.entry(left) == gone


async def test_a_page_that_an_uncorrected_error_could_not_mark_is_tried_again(
    tmp_path: Path,
) -> None:
    async with at_work(tmp_path) as whole:
        mfn = whole.plain()
        domain = whole.small.host.domain(whole.small.pv)
        entry = PageEntry(
            mfn=mfn,
            cause=Cause.UNCORRECTED,
            phase=Phase.LEFT,
            since=1.0,
            domain=domain.identity,
            reason="unsafe_call",
        )
        whole.service.retirer.ledger.put(entry)
        whole.service.retirer.take_poisoned(mfn, "an uncorrected error")
        assert (await whole.page(mfn, Phase.LEFT, reason="uncorrected")).marked


async def test_a_page_whose_mark_was_taken_back_is_not_marked_again_over_the_cap(
    tmp_path: Path,
) -> None:
    async with at_work(tmp_path, ONE) as whole:
        used, other = whole.granted(0), whole.small.host.frame_of(whole.small.pvh, 5)
        denied = replace(ONE, domains=DomainPolicy(deny=("pvh*", "hvm*")))
        whole.service.apply(replace(whole.service.policy, domains=denied.domains))
        await whole.corrected(other)
        await whole.page(other, Phase.LEFT, reason="denied")
        await whole.corrected(used)
        assert (await whole.page(used, Phase.LEFT)).marked
        # Allowed now, but there is no room.
        whole.service.apply(replace(whole.service.policy, domains=DomainPolicy()))
        looks = whole.calls("query", other)
        await whole.until(lambda: whole.calls("query", other) > looks)
        whole.service.retirer.domain_ended()
        looks = whole.calls("query", other)
        await whole.until(lambda: whole.calls("query", other) > looks)
        entry = whole.entry(other)
        assert entry is not None
        assert (entry.phase, entry.reason) == (Phase.LEFT, "denied")
        assert whole.calls("offline", other) == 1, "before it was known whose it is"


async def test_each_owner_of_a_page_that_xen_broke_is_spared_in_the_same_round() -> None:
    small = small_host()
    second = small.host.add_pv(PvSpec(name="second"))
    alone = Alone(small)
    pages: dict[Mfn, str] = {}
    for domid in (small.pv, second):
        broken = small.host.frame_of(domid, small.host.pv(domid).layout.plain[0])
        small.host.break_frame(broken)
        # As in the moment before it has crashed.
        small.host.simulated(domid).shutdown = None
        pages[broken] = "broken"
    for domid in (small.pv, second):
        pages[small.host.frame_of(domid, small.host.pv(domid).layout.plain[1])] = "owner_ending"
    for mfn in pages:
        alone.retirer.take(mfn, Cause.CORRECTED, "two errors")
    async with running(alone):
        for mfn, reason in pages.items():
            entry = await alone.pages.until(mfn, Phase.LEFT, Phase.WAITING)
            assert entry.reason == reason
    # The next call for a page of one of them would hang the host.
    assert alone.xen.trace.of("offline") == []


async def test_that_there_is_room_again_is_told_once_and_only_then() -> None:
    small = small_host()
    alone = Alone(small, policy=ONE, slowly=3600.0)
    told: list[bool] = []
    alone.retirer.room_again = lambda: told.append(alone.retirer.has_room())
    used, other = (small.host.frame_of(small.pvh, which) for which in (5, 6))
    async with running(alone):
        alone.retirer.take_poisoned(other, "an uncorrected error")  # it takes no room
        await alone.pages.until(other, Phase.LEFT)
        alone.retirer.take(used, Cause.CORRECTED, "two errors")
        entry = await alone.pages.until(used, Phase.LEFT)
        assert entry.marked
        alone.retirer.domain_ended()
        await alone.until_looked(used, alone.looks(used) + 1)
        assert told == []
        alone.retirer.take_poisoned(used, "an uncorrected error")
        async with asyncio.timeout(30):
            while not told:  # noqa: ASYNC110 - the retirer tells nobody else
                await asyncio.sleep(0.001)
        alone.retirer.domain_ended()
        await alone.until_looked(used, alone.looks(used) + 1)
    assert told == [True]


async def test_no_page_is_taken_up_again_while_nothing_is_done_at_all() -> None:
    small = small_host()
    page = left_page(small)
    gone = left_page(small, marked=False)
    gone = replace(gone, mfn=small.host.frame_of(small.pvh, 6))
    alone = Alone(small, page, gone, policy=retiring(dry_run=True), slowly=0.05)
    async with running(alone):
        await alone.until_looked(page.mfn, 3)
        small.host.destroy(small.pvh)
        # That a page has gone is noted all the same.
        await alone.pages.until(page.mfn, Phase.OFFLINED)
        await alone.until_looked(gone.mfn, alone.looks(gone.mfn) + 2)
        assert gone.mfn not in alone.pages.entries, "nothing was entered of it"


async def test_held_pages_are_let_go_only_by_a_policy_that_does_something(tmp_path: Path) -> None:
    async with at_work(tmp_path) as whole:
        mfn = whole.plain()
        whole.service.apply(replace(whole.service.policy, retire=retiring(dry_run=True).retire))
        whole.service.retirer.take(mfn, Cause.OPERATOR, "asked for")
        entry = await whole.page(mfn, Phase.WAITING, reason="on_hold")
        assert entry.detail == "nothing is done about it: this is a dry run (retire.dry_run = true)"
        whole.service.apply(replace(whole.service.policy, retire=retiring(enabled=False).retire))
        assert whole.entry(mfn) == entry
        whole.service.apply(replace(whole.service.policy, retire=POLICY.retire))
        await whole.page(mfn, Phase.OFFLINED)


async def test_an_exchange_is_switched_off_for_pv_guests_alone() -> None:
    small = small_host()
    alone = Alone(small, policy=exchanging(enabled=False))
    pv, pvh = small.host.frame_of(small.pv, 5), small.host.frame_of(small.pvh, 5)
    async with running(alone):
        for mfn in (pv, pvh):
            alone.retirer.take(mfn, Cause.CORRECTED, "two errors")
        entry = await alone.pages.until(pv, Phase.LEFT)
        assert "exchange.enabled" in entry.detail
        assert (await alone.pages.until(pvh, Phase.LEFT)).reason == "no_relocation"
        # A guest is saved only for pages that it could not be moved off by an exchange.
        denial = alone.retirer.denial(small.host.domain(small.pv))
        assert denial is not None
        assert "exchange.enabled" in denial
        assert alone.retirer.denial(small.host.domain(small.pvh)) is None


# What changes while it is looked at.


@pytest.mark.parametrize("is_gone", [True, False])
async def test_what_happened_to_a_page_while_it_was_asked_about_is_known_better(
    *, is_gone: bool
) -> None:
    small = small_host()
    page = left_page(small)
    alone = Alone(small, page, slowly=3600.0)
    loop = asyncio.get_running_loop()
    moved = replace(page, phase=Phase.EXCHANGE)
    done = asyncio.Event()

    def move() -> None:
        alone.retirer.ledger.put(moved)
        done.set()

    def meanwhile() -> None:
        if is_gone:
            small.host.destroy(small.pvh)
        else:
            small.host.online(page.mfn)  # which is to be looked into
        loop.call_soon_threadsafe(move)

    alone.xen.plan.append(Fault(method="query", act=meanwhile))
    async with running(alone):
        await done.wait()
        other = small.host.frame_of(small.pv, 5)
        alone.retirer.take(other, Cause.OPERATOR, "asked for")
        await alone.pages.until(other, Phase.WAITING, Phase.LEFT)
        assert alone.retirer.ledger.book.get(page.mfn) == moved


@pytest.mark.parametrize("cause", [Cause.CORRECTED, Cause.UNCORRECTED])
async def test_a_page_that_needs_no_room_is_taken_up_although_there_is_none(cause: Cause) -> None:
    small = small_host()
    # It uses up all there is itself, or none of it.
    page = replace(left_page(small, marked=cause is Cause.CORRECTED), cause=cause)
    full = replace(page, mfn=small.host.frame_of(small.pvh, 6), cause=Cause.CORRECTED, marked=True)
    alone = Alone(small, page, full, policy=ONE, slowly=3600.0)
    if cause is Cause.UNCORRECTED:
        alone.retirer.errors.add(page.mfn)
    async with running(alone):
        alone.retirer.policy_changed(ONE)
        await alone.pages.until(page.mfn, Phase.LEFT)
        entry = alone.pages.entries[page.mfn]
        assert entry.reason == ("no_relocation" if cause is Cause.CORRECTED else "uncorrected")
