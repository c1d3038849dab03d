"""What Xen, or somebody at its tools, does by itself, and how the service follows."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from errno import EIO
from pathlib import Path

import pytest

from pgofflined.core.book import Cause, PageEntry, Phase
from pgofflined.core.conditions import ConditionCode
from pgofflined.core.errors import PortError, XenError
from pgofflined.core.frames import DOM0, Mfn, maddr_of
from pgofflined.core.offline import OfflineState
from pgofflined.core.policy import Marking, Policy, RelocationPolicy
from pgofflined.core.reports import HypervisorActed, HypervisorResult, Sighting
from pgofflined.core.xenversion import XenVersion
from pgofflined.sim.faults import Fault
from pgofflined.sim.frames import FrameState
from pgofflined.sim.host import HostSpec
from pgofflined.sim.scenarios import SmallHost, small_host
from pgofflined.store import Store

from .whole import POLICY, SettableClock, Whole, at_work, exchanging, retiring

LATER = exchanging(mark=Marking.AFTER_SCRUB, attempts=1)


def old_xen() -> SmallHost:
    return small_host(HostSpec(version=XenVersion(4, 17, 7)), clock=SettableClock())


def codes(whole: Whole) -> list[str]:
    return [condition.code.value for condition in whole.service.snapshot().attention]


def free_frame(whole: Whole, which: int = 0) -> Mfn:
    frames = whole.small.host.frames
    free = (Mfn(mfn) for mfn in range(frames.count) if frames.state[mfn] == FrameState.FREE)
    return [mfn for mfn, _ in zip(free, range(which + 1), strict=False)][which]


# Marks on a Xen that they damage.


@pytest.mark.parametrize("phase", [Phase.LEFT, Phase.WAITING, Phase.EXCHANGE, Phase.TRIAGE])
@pytest.mark.parametrize(
    "policy", [POLICY, retiring(dry_run=True), retiring(enabled=False)], ids=["on", "dry", "off"]
)
async def test_marks_that_another_release_has_left_are_taken_back_at_the_start(
    tmp_path: Path, phase: Phase, policy: Policy
) -> None:
    small = old_xen()
    mfn = small.host.frame_of(small.pv, small.host.pv(small.pv).layout.plain[0])
    small.host.grant(small.pv, small.host.pv(small.pv).layout.plain[0])
    small.host.offline(mfn)
    entry = PageEntry(mfn=mfn, cause=Cause.CORRECTED, phase=phase, since=1.0, marked=True)
    async with at_work(tmp_path, policy, small=small, earlier=[entry]) as whole:
        await whole.until(lambda: not whole.small.host.query(mfn))
        await whole.until(lambda: not whole.service.retirer.ledger.book[mfn].marked)
        await asyncio.to_thread(small.host.destroy, small.pv)
        assert small.host.corrupted is None


async def test_a_mark_that_cannot_be_taken_back_is_told_and_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small = old_xen()
    mfn = small.host.frame_of(small.pv, small.host.pv(small.pv).layout.plain[0])
    small.host.offline(mfn)
    left = PageEntry(mfn=mfn, cause=Cause.CORRECTED, phase=Phase.LEFT, since=1.0, marked=True)
    refused = Fault(method="online", times=10**6, error=XenError(EIO, op="page_online"))
    # Else the page itself might be taken up before its mark is.
    policy = retiring(dry_run=True)
    async with at_work(tmp_path, policy, small=small, earlier=[left], faults=[refused]) as whole:
        await whole.until(lambda: f"xen-hptool mem-online {mfn:x}" in caplog.text)
        assert whole.service.retirer.ledger.book[mfn].marked
        whole.xen.plan.clear()
        whole.service.retirer.domain_ended()
        await whole.until(lambda: not whole.service.retirer.ledger.book[mfn].marked)
        assert not small.host.query(mfn)


async def test_a_page_that_is_freed_with_its_mark_there_puts_the_heap_in_doubt(
    tmp_path: Path,
) -> None:
    async with at_work(tmp_path, small=old_xen()) as whole:
        host = whole.small.host
        mfn = host.frame_of(whole.small.pvh, 5)
        host.break_frame(mfn)
        whole.telemetry.push_srao(mfn, whole.small.pvh)
        entry = await whole.page(mfn, Phase.LEFT, reason="broken")
        assert "allocator may be damaged" in entry.detail
        assert "heap_in_doubt" not in codes(whole)
        await asyncio.to_thread(host.destroy, whole.small.pvh)
        await whole.page(mfn, Phase.OFFLINED)
        assert "heap_in_doubt" in codes(whole)
        # One that the daemon has moved its guest off is as it should be.
    async with at_work(tmp_path / "other", small=old_xen()) as whole:
        mfn = whole.plain()
        whole.small.host.set_m2p(Mfn(mfn ^ 1), 1)
        await whole.corrected(mfn)
        await whole.page(mfn, Phase.OFFLINED)
        assert "heap_in_doubt" not in codes(whole)


async def test_where_xen_frees_safely_a_page_that_goes_with_its_mark_leaves_the_heap_sound(
    tmp_path: Path,
) -> None:
    async with at_work(tmp_path) as whole:
        mfn = whole.small.host.frame_of(whole.small.pvh, 5)
        await whole.corrected(mfn)
        assert (await whole.page(mfn, Phase.LEFT, reason="no_relocation")).marked
        await asyncio.to_thread(whole.small.host.destroy, whole.small.pvh)
        whole.service.retirer.domain_ended()
        await whole.page(mfn, Phase.OFFLINED)
        assert "heap_in_doubt" not in codes(whole)


async def test_a_mark_of_another_release_whose_guest_has_ended_puts_the_heap_in_doubt(
    tmp_path: Path,
) -> None:
    small = old_xen()
    mfn = small.host.frame_of(small.pv, small.host.pv(small.pv).layout.plain[0])
    small.host.offline(mfn)
    left = PageEntry(mfn=mfn, cause=Cause.CORRECTED, phase=Phase.LEFT, since=1.0, marked=True)
    small.host.destroy(small.pv)
    async with at_work(tmp_path, small=small, earlier=[left]) as whole:
        await whole.page(mfn, Phase.OFFLINED)
        assert "heap_in_doubt" in codes(whole)


# Pages that Xen has broken, and the lock that it may have left behind.


async def test_what_is_said_of_a_broken_page_does_not_hang_the_host(tmp_path: Path) -> None:
    async with at_work(tmp_path) as whole:
        host = whole.small.host
        told = {}
        for name, mfn in (
            ("pv", whole.plain()),
            ("dom0", whole.of_dom0()),
            ("pvh", host.frame_of(whole.small.pvh, 5)),
        ):
            host.poison(mfn, known=True)
            whole.service.retirer.take_poisoned(mfn, "by a test")
            left = (await whole.page(mfn, Phase.LEFT, reason="broken")).detail
            told[name] = left, (await whole.service.query(mfn)).note
        for text in told["pv"]:
            assert "may hang the host: leave it as it is" in text
        for text in told["dom0"]:
            assert "it is dom0's: move the other guests away and reboot" in text
        for text in told["pvh"]:
            assert "restart that guest" in text


async def test_pages_that_xen_has_lent_a_guest_it_has_hit_are_not_marked(tmp_path: Path) -> None:
    async with at_work(tmp_path) as whole:
        host, retirer = whole.small.host, whole.service.retirer
        lent = host.simulated(whole.small.pv).shared_info
        of_dom0 = host.domain(DOM0).shared_info
        host.poison(whole.plain(), known=True)
        retirer.take_poisoned(whole.plain(), "by a test")
        await whole.page(whole.plain(), Phase.LEFT, reason="broken")
        whole.telemetry.push_ucna(maddr_of(lent))
        assert (await whole.page(lent, Phase.WAITING)).reason == "owner_ending"
        await whole.corrected(of_dom0)
        assert (await whole.page(of_dom0, Phase.LEFT)).reason == "dom0"
        assert whole.calls("offline", lent) == whole.calls("offline", of_dom0) == 0


async def test_a_guest_whose_lent_pages_cannot_be_told_counts_as_their_owner(
    tmp_path: Path,
) -> None:
    fault = Fault(method="shared_frames", times=10**6, error=PortError("not now"))
    async with at_work(tmp_path, faults=[fault]) as whole:
        host = whole.small.host
        host.break_frame(whole.plain())
        mfn = free_frame(whole)
        whole.telemetry.push_ucna(maddr_of(mfn))
        await whole.page(mfn, Phase.WAITING, reason="owner_ending")
        assert whole.calls("offline", mfn) == 0
        whole.xen.plan.clear()
        await whole.page(mfn, Phase.OFFLINED)


# What was out of use, and is not any more.


async def test_a_page_that_somebody_gave_back_is_retired_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with at_work(tmp_path) as whole:
        host = whole.small.host
        mfn = free_frame(whole)
        await whole.corrected(mfn)
        await whole.page(mfn, Phase.OFFLINED)
        asked = whole.calls("query", mfn)
        await whole.corrected(mfn, times=1)
        await whole.until(lambda: whole.calls("query", mfn) > asked)
        assert "somebody has given it back" not in caplog.text
        assert host.query(mfn) is OfflineState.OFFLINED
        host.online(mfn)
        await whole.corrected(mfn, times=1)
        await whole.until(lambda: host.query(mfn) is OfflineState.OFFLINED)
        assert f"mfn {mfn:#x} was out of use, and somebody has given it back" in caplog.text


async def test_an_uncorrected_error_of_a_page_that_was_out_of_use_is_not_lost(
    tmp_path: Path,
) -> None:
    async with at_work(tmp_path) as whole:
        host = whole.small.host
        mfn = free_frame(whole)
        await whole.corrected(mfn)
        await whole.page(mfn, Phase.OFFLINED)
        whole.telemetry.push_ucna(maddr_of(mfn))
        await whole.until(lambda: mfn in whole.service.retirer.errors.poisoned)
        assert "uncorrected_error" not in codes(whole)
        host.online(mfn)
        host.frames.state[mfn] = FrameState.INUSE
        whole.telemetry.push_ucna(maddr_of(mfn))
        await whole.page(mfn, Phase.WAITING, Phase.LEFT)
        assert "uncorrected_error" in codes(whole)


async def test_a_page_that_is_freed_some_time_after_the_end_of_a_domain_is_seen_to_go(
    tmp_path: Path,
) -> None:
    # What Xen has allocated for a domain is freed last, when its end has long been told.
    async with at_work(tmp_path) as whole:
        host = whole.small.host
        mfn = host.frames.allocate()
        await whole.corrected(mfn)
        await whole.page(mfn, Phase.LEFT, reason="xen")
        before = whole.calls("query", mfn)
        host.destroy(whole.small.pvh)
        await whole.until(lambda: whole.calls("query", mfn) > before)
        assert whole.service.retirer.ledger.book[mfn].phase is Phase.LEFT
        host.frames.state[mfn] = FrameState.OFFLINED
        await whole.page(mfn, Phase.OFFLINED)


# What is lost.


async def test_what_xen_holds_back_is_found_again_when_the_state_is_lost(tmp_path: Path) -> None:
    small = small_host(clock=SettableClock())
    async with at_work(tmp_path, small=small) as whole:
        gone, left = free_frame(whole), small.host.frame_of(small.pvh, 5)
        await whole.corrected(gone)
        await whole.page(gone, Phase.OFFLINED)
        whole.telemetry.push_ucna(maddr_of(left))
        await whole.page(left, Phase.LEFT, reason="uncorrected")
    (tmp_path / "state.db").write_bytes(b"rubbish")
    relocating = replace(POLICY, relocation=RelocationPolicy(target="localhost"))
    async with at_work(tmp_path, relocating, small=small) as whole:
        entry = await whole.page(left, Phase.LEFT, reason="uncorrected")
        assert entry.marked
        book = whole.service.retirer.ledger.book
        assert book[gone].phase is Phase.OFFLINED
        assert book[gone].detail == "it was out of use when the stored state was lost"
        assert book.counted() == 1
        assert "state_lost" in codes(whole)
        # Its guest is not migrated for another page: that would read it.
        other = small.host.frame_of(small.pvh, 6)
        await whole.corrected(other)
        await whole.page(other, Phase.RELOCATION)
        await whole.until(lambda: bool(whole.calls("query", left)))
        assert whole.migration.asked == []
    async with at_work(tmp_path, small=small) as whole:
        assert "state_lost" in codes(whole)
        assert len(whole.xen.trace.of("held_back")) == 0


async def test_where_nothing_is_held_back_nothing_was_lost(tmp_path: Path) -> None:
    (tmp_path / "state.db").write_bytes(b"rubbish")
    async with at_work(tmp_path) as whole:
        await whole.until(lambda: whole.service.retirer.on_hold() is None)
        assert len(whole.xen.trace.of("held_back")) == 1
        assert "state_lost" not in codes(whole)


async def test_nothing_is_done_about_pages_before_it_is_known_which_must_not_be_read(
    tmp_path: Path,
) -> None:
    small = small_host(clock=SettableClock())
    mfn = small.host.frame_of(small.pv, small.host.pv(small.pv).layout.plain[0])
    async with at_work(tmp_path, small=small) as whole:
        whole.telemetry.push_ucna(maddr_of(mfn))
        await whole.page(mfn, Phase.LEFT, reason="uncorrected")
    small.host.poison(mfn)
    (tmp_path / "state.db").write_bytes(b"rubbish")
    # Whoever opens it first puts it aside; the next has to know all the same.
    Store.open(tmp_path / "state.db", "this").close()
    fault = Fault(method="held_back", times=10**6, error=XenError(EIO, op="query_page_offline"))
    async with at_work(tmp_path, small=small, faults=[fault]) as whole:
        await whole.until(lambda: "state_lost" in codes(whole))
        await whole.corrected(mfn)
        entry = await whole.page(mfn, Phase.WAITING, reason="on_hold")
        assert "has to be found out first" in entry.detail
        assert whole.suspended() == []
    async with at_work(tmp_path, small=small) as whole:
        await whole.page(mfn, Phase.LEFT, reason="uncorrected")
        await whole.corrected(whole.plain(1))
        await whole.page(whole.plain(1), Phase.OFFLINED)
        assert "state_lost" in codes(whole)


def test_the_store_says_what_it_could_not_use(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    first = Store.open(path, "this")
    assert first.lost is None
    first.close()
    again = Store.open(path, "this")
    assert again.lost is None
    again.close()
    path.write_bytes(b"rubbish")
    for _ in range(2):
        anew = Store.open(path, "this")
        assert anew.lost is not None
        assert str(path) in anew.lost
        anew.close()
    found = Store.open(path, "this")
    found.found_again()
    assert found.lost is None
    found.close()
    last = Store.open(path, "this")
    assert last.lost is None
    last.close()


async def test_a_second_act_of_xen_on_a_page_is_shown_anew(tmp_path: Path) -> None:
    async with at_work(tmp_path) as whole:
        mfn = whole.small.host.frame_of(whole.small.pvh, 5)
        whole.small.host.break_frame(mfn)
        whole.telemetry.push_srao(mfn, whole.small.pvh)
        await whole.page(mfn, Phase.LEFT, reason="broken")
        whole.service.incidents.acknowledge(ConditionCode.UNCORRECTED_ERROR)
        again = HypervisorActed(
            mfn=mfn,
            domid=whole.small.pvh,
            broken=True,
            result=HypervisorResult.REPEATED,
            reason="Xen crashed its owner",
            bank=None,
        )
        await whole.service.intake.take(Sighting(when=2.0, source="simulated", report=again))
        [condition] = [
            one for one in whole.service.snapshot().attention if one.code == "uncorrected_error"
        ]
        assert not condition.acknowledged
        assert "crashed its owner" in condition.text


# Marks that are set last.


async def test_a_page_that_is_left_goes_with_its_guest_although_it_was_to_be_marked_later(
    tmp_path: Path,
) -> None:
    async with at_work(tmp_path, LATER) as whole:
        mfn = whole.granted()
        await whole.corrected(mfn)
        entry = await whole.page(mfn, Phase.LEFT, reason="granted")
        assert entry.marked
        assert whole.small.host.query(mfn) is OfflineState.OFFLINE_PENDING
        await asyncio.to_thread(whole.small.host.destroy, whole.small.pv)
        await whole.page(mfn, Phase.OFFLINED)


async def test_as_long_as_there_are_tries_left_a_page_is_marked_after_it_is_scrubbed(
    tmp_path: Path,
) -> None:
    policy = exchanging(LATER, attempts=3, retry_first=0.05, retry_last=0.05, scrub_wait=0.05)
    async with at_work(tmp_path, policy) as whole:
        mfn = whole.granted()
        await whole.corrected(mfn)
        entry = await whole.page(mfn, Phase.WAITING, reason="granted")
        assert not entry.marked
        whole.small.host.simulated(whole.small.pv).grants.clear()
        await whole.page(mfn, Phase.OFFLINED)
        assert whole.service.snapshot().idle_scrub == 0


async def test_a_page_that_stays_is_marked_at_the_last_try_and_not_before(tmp_path: Path) -> None:
    policy = exchanging(LATER, attempts=3, retry_first=0.05, retry_last=0.05, scrub_wait=0.05)
    async with at_work(tmp_path, policy) as whole:
        ledger, seen = whole.service.retirer.ledger, []
        heard = ledger.changed

        def look(entry: PageEntry) -> None:
            heard(entry)
            seen.append(entry)

        ledger.changed = look
        mfn = whole.granted()
        await whole.corrected(mfn)
        assert (await whole.page(mfn, Phase.LEFT, reason="granted")).marked
    waits = {(one.attempts, one.marked) for one in seen if one.phase is Phase.WAITING}
    assert waits == {(1, False), (2, False)}


# A Xen, or a xenstored, that does not answer.


@pytest.mark.parametrize("method", ["conditions", "query"])
async def test_a_look_that_xen_keeps_waiting_stops_the_watchdog(
    tmp_path: Path, method: str
) -> None:
    running: list[Whole] = []
    seen: list[float] = []

    def look() -> None:
        retirer = running[0].service.retirer
        while (waited := retirer.seconds_in_a_call()) == 0.0:
            pass
        seen.append(waited)

    async with at_work(tmp_path) as whole:
        running.append(whole)
        mfn = whole.small.host.frame_of(whole.small.pvh, 5)
        await whole.corrected(mfn)
        await whole.page(mfn, Phase.LEFT)
        made = len(whole.xen.trace.of(method))
        whole.xen.plan.append(Fault(method=method, nth=made + 1, act=look))
        whole.service.retirer.domain_ended()
        await whole.until(lambda: bool(seen))
