"""What follows from a look at a page, on the assembled service."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from pgofflined.core.book import Cause, Phase
from pgofflined.core.domains import DomainIdentity
from pgofflined.core.errors import DomainGone
from pgofflined.core.events import Event
from pgofflined.core.frames import Domid, Mfn
from pgofflined.core.outcomes import (
    RefusalReason,
)
from pgofflined.core.policy import DomainPolicy, Marking, Policy, RelocationPolicy
from pgofflined.sim.faults import Fault
from pgofflined.sim.guests import SuspendBehaviour
from pgofflined.triage import Later, LaterReason

from .whole import POLICY, Whole, at_work, exchanging
from .whole_pages import LOCAL, SLOW, entry_of, finish, in_hand, poison, refusal, told

# What a look at a page has shown.


async def test_only_a_page_that_somebody_freed_while_it_was_marked_keeps_a_cpu_searching(
    tmp_path: Path,
) -> None:
    async with at_work(tmp_path, SLOW) as whole:
        host = whole.small.host
        free = host.frames.allocate()
        host.frames.release(free, dirty=False)
        whole.service.retirer.take(free, Cause.CORRECTED, "two errors")
        entry = await whole.page(free, Phase.OFFLINED)
        assert entry.detail == "it was free and is out of use now"
        assert whole.service.snapshot().idle_scrub == 0
        left = host.frame_of(whole.small.pvh, 5)
        await whole.corrected(left)
        await whole.page(left, Phase.LEFT, reason="no_relocation")
        await asyncio.to_thread(host.destroy, whole.small.pvh)
        assert (await whole.page(left, Phase.OFFLINED)).detail == "its owner has left it"
        assert whole.service.snapshot().idle_scrub == 1
        waiting = whole.plain()
        host.offline(waiting)
        in_hand(whole, waiting, Phase.TRIAGE)
        host.destroy(whole.small.pv)
        whole.service.retirer.domain_ended()
        await whole.page(waiting, Phase.OFFLINED)
        assert whole.service.snapshot().idle_scrub == 2


async def test_an_address_that_is_no_memory_keeps_nobody_from_anything(tmp_path: Path) -> None:
    async with at_work(tmp_path, SLOW) as whole:
        device = Mfn(whole.small.host.frames.count + 7)
        await poison(whole, device)
        await poison(whole, whole.plain())
        await whole.page(device, Phase.LEFT, reason="not_ram")
        await whole.page(whole.plain(), Phase.LEFT, reason="uncorrected")
        assert whole.service.retirer.errors.poisoned == {whole.plain()}


@pytest.mark.parametrize(
    ("reason", "longest"),
    [(LaterReason.OWNER_DYING, 10.0), (LaterReason.OWNER_ENDING, 300.0)],
)
async def test_a_page_whose_owner_is_being_taken_apart_is_looked_at_often(
    tmp_path: Path, reason: LaterReason, longest: float
) -> None:
    async with at_work(tmp_path, SLOW) as whole:
        mfn, retirer = whole.plain(), whole.service.retirer
        in_hand(whole, mfn)
        for _ in range(20):
            retirer.consequences.apply(mfn, Later(mfn=mfn, reason=reason, detail="so it is"))
        left = retirer.ledger.seconds_to_next()
        assert left is not None
        assert longest - 5 < left <= longest


async def test_a_page_that_xen_names_no_owner_of_is_tried_three_times_more(tmp_path: Path) -> None:
    async with at_work(tmp_path, SLOW) as whole:
        mfn, apply = whole.plain(), whole.service.retirer.consequences.apply
        in_hand(whole, mfn, marked=False)
        anonymous = Later(mfn=mfn, reason=LaterReason.ANONYMOUS, detail="nobody's", marked=True)
        for _ in range(3):
            apply(mfn, anonymous)
            entry = entry_of(whole, mfn)
            assert (entry.phase, entry.reason, entry.marked) == (
                *(Phase.WAITING, "anonymous", True),
            )
        apply(mfn, anonymous)
        entry = entry_of(whole, mfn)
        assert (entry.phase, entry.reason, entry.marked) == (Phase.LEFT, "xen", True)


async def test_a_xen_that_cannot_be_asked_is_asked_again_soon(tmp_path: Path) -> None:
    lost = Fault(method="query", error=DomainGone(Domid(3)))
    async with at_work(tmp_path, SLOW, faults=[lost]) as whole:
        mfn = whole.of_dom0()
        await whole.corrected(mfn)
        entry = await whole.page(mfn, Phase.WAITING, reason="cannot_ask_xen")
        assert entry.detail == "d3 is gone"
        seconds = whole.service.retirer.ledger.seconds_to_next()
        assert seconds is not None
        assert 0 < seconds <= 2


@pytest.mark.parametrize("kind", ["pv", "pvh"])
async def test_a_page_that_breaks_between_the_look_and_its_job_is_given_to_nobody(
    tmp_path: Path, kind: str
) -> None:
    running: list[Whole] = []
    loop = asyncio.get_running_loop()

    def strike() -> None:
        coroutine = poison(running[0], page(running[0]))
        asyncio.run_coroutine_threadsafe(coroutine, loop).result(30)

    page: Callable[[Whole], Mfn] = (
        Whole.plain if kind == "pv" else lambda whole: whole.small.host.frame_of(whole.small.pvh, 5)
    )
    async with at_work(tmp_path, LOCAL, faults=[Fault(method="offline", act=strike)]) as whole:
        running.append(whole)
        await whole.corrected(page(whole))
        await whole.page(page(whole), Phase.LEFT, reason="uncorrected")
        assert whole.suspended() == []
        assert whole.migration.asked == []


async def test_a_page_for_which_no_exchange_can_be_queued_waits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with at_work(
        tmp_path, exchanging(max_queued=1, workers=1, suspend_timeout=1000.0)
    ) as whole:
        guest = whole.small.host.simulated(whole.small.pv)
        guest.behaviour = SuspendBehaviour(suspend_after=200.0)
        mfns = [whole.plain(which) for which in range(3)]
        await whole.corrected(mfns[0])
        await whole.until(lambda: whole.suspended() == [whole.small.pv])
        await whole.corrected(mfns[1])
        await whole.page(mfns[1], Phase.EXCHANGE)
        await whole.corrected(mfns[2])
        entry = await whole.page(mfns[2], Phase.WAITING, reason="queue_full")
        assert (entry.detail, entry.marked) == ("the queue of exchanges is full", True)
        [record] = told(caplog, Event.QUEUE_FULL)
        assert record.levelno == logging.WARNING
        assert record.getMessage() == f"mfn {mfns[2]:#x} waits: the queue of exchanges is full"


async def test_where_no_guest_is_migrated_a_pvh_page_stays_pending_with_what_ends_that(
    tmp_path: Path,
) -> None:
    off = replace(LOCAL, relocation=replace(LOCAL.relocation, enabled=False))
    saving = replace(POLICY, relocation=RelocationPolicy(save_restore=True))
    for number, policy in enumerate((off, saving)):
        folder = tmp_path / str(number)
        folder.mkdir()
        async with at_work(folder, policy) as whole:
            mfn = whole.small.host.frame_of(whole.small.pvh, 5)
            await whole.corrected(mfn)
            entry = await whole.page(mfn, Phase.LEFT, reason="no_relocation")
            assert entry.marked
            assert f"until d{whole.small.pvh} ends or is migrated" in entry.detail
            assert entry.domain == whole.small.host.domain(whole.small.pvh).identity


@pytest.mark.parametrize(
    ("policy", "mark"),
    [
        (POLICY, "is marked offline-pending"),
        (
            exchanging(mark=Marking.AFTER_SCRUB, scrub_wait=0.05),
            "is to be marked later",
        ),
    ],
)
async def test_what_a_page_waits_for_is_told_with_whether_it_is_marked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, policy: Policy, mark: str
) -> None:
    with caplog.at_level(logging.INFO):
        async with at_work(tmp_path, policy) as whole:
            mfn = whole.plain()
            await whole.corrected(mfn)
            await whole.page(mfn, Phase.OFFLINED)
            record = told(caplog, Event.PAGE_MARKED)[0]
            domid = whole.small.pv
            assert record.getMessage() == f"mfn {mfn:#x} of d{domid} {mark} and waits for exchange"
            assert record.levelno == logging.INFO


# Whom pages of guests that are migrated or saved are given to.


class Moves:
    """Takes guests to be migrated or saved, or has no room for them."""

    def __init__(self, *, has_room: bool) -> None:
        self.taken: list[tuple[DomainIdentity, str, tuple[Mfn, ...], bool]] = []
        self._has_room = has_room

    def submit(
        self, domain: DomainIdentity, name: str, mfns: Iterable[Mfn], *, by_saving: bool = False
    ) -> bool:
        if self._has_room:
            self.taken.append((domain, name, tuple(mfns), by_saving))
        return self._has_room


def giving_to(whole: Whole, moves: Moves) -> None:
    whole.service.retirer.connect(whole.service.pool, moves)


SAVING = replace(SLOW, relocation=RelocationPolicy(save_restore=True))


async def test_a_page_of_a_pvh_guest_is_given_to_be_migrated_with_its_mark(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        async with at_work(tmp_path, LOCAL) as whole:
            moves = Moves(has_room=True)
            giving_to(whole, moves)
            mfn = whole.small.host.frame_of(whole.small.pvh, 5)
            await whole.corrected(mfn)
            entry = await whole.page(mfn, Phase.RELOCATION)
            domain = whole.small.host.domain(whole.small.pvh)
            assert moves.taken == [(domain.identity, domain.name, (mfn,), False)]
            assert (entry.marked, entry.domain) == (True, domain.identity)
            assert told(caplog, Event.PAGE_MARKED)[0].getMessage() == (
                f"mfn {mfn:#x} of d{domain.domid} is marked offline-pending and waits for "
                "relocation"
            )


async def test_a_page_waits_where_no_more_guests_can_be_queued_to_be_migrated(
    tmp_path: Path,
) -> None:
    async with at_work(tmp_path, LOCAL) as whole:
        giving_to(whole, Moves(has_room=False))
        mfn = whole.small.host.frame_of(whole.small.pvh, 5)
        await whole.corrected(mfn)
        entry = await whole.page(mfn, Phase.WAITING)
        assert (entry.reason, entry.detail, entry.marked) == (
            *("queue_full", "the queue of migrations is full", True),
        )


@pytest.mark.parametrize("has_room", [True, False])
async def test_a_guest_whose_page_cannot_be_exchanged_is_given_to_be_saved_if_there_is_room(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, *, has_room: bool
) -> None:
    async with at_work(tmp_path, SAVING) as whole:
        moves = Moves(has_room=has_room)
        giving_to(whole, moves)
        mfn = whole.plain()
        known = in_hand(whole, mfn)
        finish(whole, refusal(mfn, RefusalReason.SHARED_INFO))
        entry = entry_of(whole, mfn)
        assert entry.marked
        if not has_room:
            assert (entry.phase, entry.reason) == (Phase.WAITING, "queue_full")
            assert entry.detail == "the queue of migrations is full"
            return
        assert moves.taken == [(known.domain, "pv", (mfn,), True)]
        assert entry.phase is Phase.RELOCATION
        [record] = told(caplog, Event.PAGE_MARKED)
        domid = whole.small.pv
        assert record.levelno == logging.WARNING
        assert record.getMessage() == (
            f"mfn {mfn:#x} of d{domid} was not exchanged, and d{domid} is to be saved and "
            "restored: so it is"
        )


async def test_a_guest_that_may_not_be_touched_is_not_saved_for_its_page(tmp_path: Path) -> None:
    denying = replace(SAVING, domains=DomainPolicy(deny=("pv",)))
    async with at_work(tmp_path, denying) as whole:
        moves = Moves(has_room=True)
        giving_to(whole, moves)
        mfn = whole.plain()
        in_hand(whole, mfn)
        finish(whole, refusal(mfn, RefusalReason.SHARED_INFO))
        entry = entry_of(whole, mfn)
        assert (entry.phase, entry.reason, entry.marked) == (Phase.LEFT, "shared_info", True)
        assert entry.detail.startswith("so it is; domains.deny has 'pv'")
        assert moves.taken == []


async def test_nobody_is_saved_where_nobody_takes_guests(tmp_path: Path) -> None:
    async with at_work(tmp_path, SAVING) as whole:
        whole.service.retirer.connect(whole.service.pool, None)
        mfn = whole.plain()
        in_hand(whole, mfn)
        finish(whole, refusal(mfn, RefusalReason.SHARED_INFO))
        entry = entry_of(whole, mfn)
        assert (entry.phase, entry.reason) == (Phase.WAITING, "queue_full")
