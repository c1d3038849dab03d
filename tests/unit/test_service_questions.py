"""What the running service answers about single pages, and what it notes of who knows of them."""

from __future__ import annotations

import logging
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from errno import EPERM
from pathlib import Path

import pytest

from pgofflined.control import client
from pgofflined.core.book import NOT_RAM, PageEntry, Phase
from pgofflined.core.conditions import Condition, ConditionCode
from pgofflined.core.domains import GuestKind
from pgofflined.core.errors import XenError
from pgofflined.core.events import Event
from pgofflined.core.frames import DOM0, Mfn, maddr_of
from pgofflined.core.offline import OfflineState
from pgofflined.core.status import Fate
from pgofflined.sim.frames import FrameState
from tests.unit.rim_samples import LEFT_PAGE, OFFLINED_PAGE, WAITING_PAGE, WEB
from tests.unit.test_service_people import LIMIT, Bench, bench_at


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with bench_at(tmp_path) as bench:
        yield bench


async def test_the_owner_of_a_page_is_told_as_far_as_it_can_be(bench: Bench) -> None:
    host = bench.demo.host
    domid, mfn = bench.page()
    answer = await bench.service.query(mfn)
    assert (answer.mfn, answer.state, answer.owner, answer.note) == (
        *(mfn, "ONLINE", f"d{domid} (pv) web", ""),
    )
    free = await bench.service.query(bench.first(host.frames.state == FrameState.FREE))
    assert (free.owner, free.note) == ("free, or Xen's own", "")
    [mail] = [one.domid for one in host.domains() if one.kind is GuestKind.PVH]
    owned = (host.frames.owner == mail) & ~host.frames.special
    hers = await bench.service.query(bench.first(owned))
    assert (hers.owner, hers.note) == (
        "an HVM or PVH guest",
        "Xen names it only when the page is marked",
    )
    nothing = await bench.service.query(bench.first(~host.frames.ram))
    assert (nothing.state, nothing.owner, nothing.uncorrected) == ("NOT_RAM", "nobody", False)
    assert nothing.note == "no memory of this host: there is nothing to retire"


async def test_a_page_that_is_out_of_use_is_nobodys(bench: Bench) -> None:
    mfn = bench.first(bench.demo.host.frames.state == FrameState.FREE)
    assert (await bench.service.offline(mfn)).fate is Fate.OUT_OF_USE
    answer = await bench.service.query(mfn)
    assert (answer.state, answer.owner, answer.note) == (
        *("OFFLINED", "nobody: it is out of use", ""),
    )
    assert answer.entry == bench.service.retirer.ledger.book.get(mfn)
    assert answer.entry is not None
    assert answer.entry.phase is Phase.OFFLINED


async def test_errors_that_count_against_a_page_are_told(bench: Bench) -> None:
    domid, mfn = bench.page()
    assert (await bench.service.query(mfn)).hits_in_window == 0
    bench.demo.telemetry.push_corrected(maddr_of(mfn), domid=domid)
    seen = bench.service.counters.reports
    await bench.until(lambda: seen["corrected", "simulated"] == 1)
    answer = await bench.service.query(mfn)
    assert (answer.hits_in_window, answer.uncorrected, answer.entry) == (1, False, None)


async def test_what_is_true_of_a_poisoned_page_is_told_with_what_ends_it(bench: Bench) -> None:
    _, mfn = bench.page()
    bench.service.retirer.errors.add(mfn)
    assert (await bench.service.query(mfn)).note == (
        "the page has had an uncorrected error; it is not marked, so that who gets it after its "
        f"owner would get the error too; put badpage={mfn:#x} on Xen's command line for the next "
        "boot; until then its owner is neither saved nor migrated"
    )
    bench.demo.host.offline(mfn)
    assert (await bench.service.query(mfn)).note == (
        "the page has had an uncorrected error; it is marked, and goes out of use when its owner "
        "ends: restart that guest; until then its owner is neither saved nor migrated"
    )
    free = bench.first(bench.demo.host.frames.state == FrameState.FREE)
    bench.demo.host.offline(free)
    bench.service.retirer.errors.add(free)
    out_of_use = await bench.service.query(free)
    assert out_of_use.uncorrected
    assert out_of_use.note == (
        "the page has had an uncorrected error; it is out of use and does no harm"
    )


async def test_why_xen_could_not_be_asked_is_told_to_whoever_asked(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(mfn: Mfn) -> OfflineState:
        raise XenError(EPERM, op="query_page_offline", mfn=mfn)

    _, mfn = bench.page()
    monkeypatch.setattr(bench.demo.host, "query", refuse)
    with pytest.raises(client.RequestFailed, match="query_page_offline failed with EPERM"):
        await bench.query(mfn)


async def test_a_question_that_is_not_answered_keeps_no_process_from_ending(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(threading.enumerate())
    asked, answer = threading.Event(), threading.Event()
    query = bench.demo.host.query
    asking: list[threading.Thread] = []

    def hang(mfn: Mfn) -> OfflineState:
        asking.append(threading.current_thread())
        asked.set()
        answer.wait(LIMIT)
        return query(mfn)

    _, mfn = bench.page()
    monkeypatch.setattr(bench.demo.host, "query", hang)
    monkeypatch.setattr("pgofflined.operations._QUERY_SECONDS", 0.05)
    with pytest.raises(client.RequestFailed, match="Xen has not answered within"):
        await bench.query(mfn)
    assert asked.is_set()
    [thread] = asking
    assert thread not in before
    assert thread.daemon
    answer.set()


FATES = [
    (OFFLINED_PAGE, Fate.OUT_OF_USE, "its owner was moved off it in place"),
    (LEFT_PAGE, Fate.UNRESOLVED, LEFT_PAGE.detail),
    ({"reason": NOT_RAM, "detail": ""}, Fate.REFUSED, NOT_RAM),
    (WAITING_PAGE, Fate.UNDER_WAY, "waiting: the page is granted to d0"),
    ({"phase": Phase.EXCHANGE, "domain": WEB}, Fate.UNDER_WAY, "exchange of d7"),
    ({"phase": Phase.EXCHANGE}, Fate.UNDER_WAY, "exchange of its owner"),
    ({"phase": Phase.RELOCATION, "domain": WEB}, Fate.UNDER_WAY, "relocation of d7"),
]


@pytest.mark.parametrize(("page", "fate", "detail"), FATES)
async def test_what_has_become_of_a_page_is_told_by_its_entry(
    bench: Bench, page: PageEntry | dict[str, object], fate: Fate, detail: str
) -> None:
    entry = page if isinstance(page, PageEntry) else replace(LEFT_PAGE, **page)  # type: ignore[arg-type]
    book = bench.service.retirer.ledger.book
    book.put(entry)
    answer = await bench.service.wait(entry.mfn, 0.0)
    assert (answer.mfn, answer.fate, answer.detail) == (entry.mfn, fate, detail)


async def test_a_page_that_nobody_has_named_is_not_known(bench: Bench) -> None:
    answer = await bench.service.wait(Mfn(0x77), 0.0)
    assert (answer.fate, answer.detail) == (Fate.UNKNOWN, "the daemon does not know this page")


async def test_only_what_is_of_a_guest_is_acknowledged_for_it(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="pgofflined")
    domid, mfn = bench.page()
    others = bench.dom0s()
    bench.demo.telemetry.push_srao(mfn, domid)
    bench.demo.telemetry.push_srao(others, DOM0)

    def errors() -> list[Condition]:
        conditions = bench.service.snapshot().attention
        return [one for one in conditions if one.code is ConditionCode.UNCORRECTED_ERROR]

    await bench.until(lambda: len(errors()) == 2)
    answer = bench.service.acknowledge(ConditionCode.UNCORRECTED_ERROR, None, domid, uid=1000)
    assert [(one.mfn, one.domid) for one in answer.done] == [(mfn, domid)]
    assert [one.mfn for one in errors() if not one.acknowledged] == [others]
    [fields] = [
        found
        for record in caplog.records
        if (found := getattr(record, "pgofflined_fields", {})).get("MESSAGE_ID")
        == Event.ACKNOWLEDGED.message_id
    ]
    assert (fields["MFN"], fields["DOMID"]) == (hex(mfn), str(domid))


async def test_a_page_that_goes_out_of_use_ends_its_own_error_and_nothing_else(
    bench: Bench,
) -> None:
    domid, mfn = bench.page()
    others = bench.dom0s()
    bench.demo.telemetry.push_srao(mfn, domid)
    bench.demo.telemetry.push_srao(others, DOM0)
    book = bench.service.retirer.ledger.book
    await bench.until(lambda: mfn in book and others in book)
    bench.service.incidents.note(
        Condition(code=ConditionCode.PAGE_DAMAGED, text="no frame", since=1.0, mfn=mfn)
    )

    def incidents() -> set[tuple[ConditionCode, Mfn | None]]:
        kept = (ConditionCode.UNCORRECTED_ERROR, ConditionCode.PAGE_DAMAGED)
        attention = bench.service.snapshot().attention
        return {(one.code, one.mfn) for one in attention if one.code in kept}

    damaged = (ConditionCode.PAGE_DAMAGED, mfn)
    error, other = ((ConditionCode.UNCORRECTED_ERROR, which) for which in (mfn, others))
    assert incidents() == {damaged, error, other}
    bench.service.retirer.ledger.offlined(mfn, "its owner has ended")
    # What the guest has lost stays to be seen to.
    assert incidents() == {damaged, other}
