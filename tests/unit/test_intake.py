"""What follows from a report, on the assembled service: what is told, counted and taken in hand."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from pgofflined.core.book import Cause, Phase
from pgofflined.core.domains import ShutdownReason
from pgofflined.core.events import Event
from pgofflined.core.frames import DOM0, Domid, Mfn, maddr_of
from pgofflined.core.policy import DomainPolicy, Policy
from pgofflined.core.reports import (
    ErrorReport,
    HypervisorActed,
    HypervisorResult,
    OtherError,
    OtherKind,
    Sighting,
)
from pgofflined.core.telemetry import BankEntry
from pgofflined.core.units import AmountOfMemory

from .whole import POLICY, Whole, at_work, retiring
from .whole_pages import fields, poison, told

ONE = retiring(max_retired=AmountOfMemory(size=1 << 12))


async def take(whole: Whole, report: ErrorReport) -> None:
    await whole.service.intake.take(Sighting(when=1.0, source="simulated", report=report))


BANK = BankEntry(bank=7, status=1 << 63, addr=0x1000, misc=0, domid=Domid(3))


def nowhere(kind: OtherKind) -> OtherError:
    return OtherError(kind=kind, bank=BANK)


def acted(mfn: Mfn | None, domid: Domid | None) -> HypervisorActed:
    return HypervisorActed(
        mfn=mfn,
        domid=domid,
        broken=mfn is not None,
        result=HypervisorResult.OFFLINED,
        reason="it took the page out",
        bank=BANK,
    )


async def test_a_corrected_error_is_told_with_its_page_and_the_owner_that_xen_names(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with at_work(tmp_path) as whole:
        mfn = whole.plain()
        whole.telemetry.push_corrected(maddr_of(mfn), domid=whole.small.pv)
        await whole.until(lambda: whole.service.counters.reports.total() == 1)
        await whole.until(lambda: bool(told(caplog, Event.ERROR_SEEN)))
        [record] = told(caplog, Event.ERROR_SEEN)
        assert record.levelno == logging.WARNING
        assert fields(record)["MFN"] == f"{mfn:#x}"
        assert fields(record)["DOMID"] == str(whole.small.pv)
        assert fields(record)["BANK"] == "9"
        assert "a corrected memory error in" in record.getMessage()


async def test_a_page_below_the_threshold_is_kept_and_its_errors_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        async with at_work(tmp_path, retiring(corrected_errors=3)) as whole:
            mfn = whole.plain()
            await whole.corrected(mfn, times=2)
            assert whole.entry(mfn) is None
            assert (await whole.service.query(mfn)).hits_in_window == 2
            kept = [text for text in caplog.messages if text.startswith(f"mfn {mfn:#x} is kept")]
            assert [text.split(": ")[1][:8] for text in kept] == ["1 of the", "2 of the"]
            await whole.corrected(mfn, times=1)
            assert (await whole.page(mfn, Phase.OFFLINED)).cause is Cause.CORRECTED


async def test_errors_of_a_page_that_is_in_hand_are_counted_and_decide_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with at_work(tmp_path) as whole:
        mfn = whole.of_dom0()
        await whole.corrected(mfn)
        await whole.page(mfn, Phase.LEFT)
        await whole.corrected(mfn, times=3)
        assert (await whole.service.query(mfn)).hits_in_window == 2, "as many as are remembered"
        assert len(told(caplog, Event.PAGE_TO_RETIRE)) == 1


async def test_what_is_kept_of_errors_is_one_hit_for_each(tmp_path: Path) -> None:
    async with at_work(tmp_path, retiring(corrected_errors=10)) as whole:
        mfn = whole.plain()
        before = whole.clock.monotonic()
        await whole.corrected(mfn, times=3)
        [kept] = whole.store.load_hits(before)
        assert kept.mfn == mfn
        assert [weight for _, weight in kept.hits] == [1, 1, 1]
        assert all(time <= whole.clock.monotonic() for time, _ in kept.hits)


async def test_an_uncorrected_error_is_told_and_its_page_is_marked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with at_work(tmp_path) as whole:
        mfn = whole.plain()
        await poison(whole, mfn)
        [record] = told(caplog, Event.UNCORRECTED_ERROR)
        assert record.levelno == logging.ERROR
        assert fields(record)["MFN"] == f"{mfn:#x}"
        assert fields(record)["BANK"] == "7"
        entry = await whole.page(mfn, Phase.LEFT, reason="uncorrected")
        assert (entry.cause, entry.marked) == (Cause.UNCORRECTED, True)
        assert told(caplog, Event.PAGE_TO_RETIRE)[0].getMessage().endswith(record.getMessage())


@pytest.mark.parametrize(
    ("kind", "event", "level"),
    [
        (OtherKind.UNCORRECTED_SIGNALLED, Event.UNCORRECTED_ERROR, logging.ERROR),
        (OtherKind.NOT_MEMORY, Event.ERROR_SEEN, logging.WARNING),
    ],
)
async def test_an_error_that_names_no_page_is_told_and_nothing_is_done(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: OtherKind, event: Event, level: int
) -> None:
    async with at_work(tmp_path) as whole:
        await take(whole, nowhere(kind))
        [record] = told(caplog, event)
        assert record.levelno == level
        assert fields(record)["BANK"] == "7"
        assert "MFN" not in fields(record)
        # The owner that Xen has noted is told of what is worse than a corrected error.
        assert ("DOMID" in fields(record)) is (event is Event.UNCORRECTED_ERROR)
        assert whole.service.retirer.errors.poisoned == frozenset()
        assert len(whole.service.retirer.ledger.book) == 0


async def test_each_uncorrected_error_is_told_and_the_same_one_not_for_ever(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with at_work(tmp_path) as whole:
        for number in range(50):
            other = replace(BANK, addr=number << 12)
            await take(whole, OtherError(kind=OtherKind.UNCORRECTED_SIGNALLED, bank=other))
        assert len(told(caplog, Event.UNCORRECTED_ERROR)) == 50
        for _ in range(50):
            await take(whole, nowhere(OtherKind.UNCORRECTED_SIGNALLED))
        assert 50 < len(told(caplog, Event.UNCORRECTED_ERROR)) < 75


async def test_what_xen_did_itself_is_told_as_critical_and_spares_its_domain(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with at_work(tmp_path) as whole:
        pv = whole.small.pv
        await take(whole, acted(whole.plain(), pv))
        [record] = told(caplog, Event.HYPERVISOR_ACTED)
        assert record.levelno == logging.CRITICAL
        assert fields(record)["MFN"] == f"{whole.plain():#x}"
        assert fields(record)["DOMID"] == str(pv)
        assert fields(record)["BANK"] == "7"
        assert "it took the page out" in record.getMessage()
        errors = whole.service.retirer.errors
        assert errors.is_wedged(whole.small.host.domain(pv).identity)
        assert not errors.is_wedged(whole.small.host.domain(DOM0).identity)
        assert errors.poisoned == {whole.plain()}
        # No further page of it is marked.
        await whole.corrected(whole.plain(1))
        await whole.page(whole.plain(1), Phase.WAITING, reason="owner_ending")


async def test_all_that_xen_did_is_told_however_much_it_is_and_the_same_only_at_times(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with at_work(tmp_path) as whole:
        seen = acted(None, None)
        for number in range(30):
            await take(whole, replace(seen, bank=replace(BANK, addr=number << 12)))
            await take(whole, replace(seen, bank=None, domid=Domid(1000 + number)))
            await take(whole, replace(seen, domid=Domid(1000 + number)))
        assert len(told(caplog, Event.HYPERVISOR_ACTED)) == 90
        caplog.clear()
        for _ in range(30):
            await take(whole, replace(seen, bank=None, domid=Domid(1000)))
        assert 0 < len(told(caplog, Event.HYPERVISOR_ACTED)) < 30


async def test_what_xen_did_to_a_page_that_nobody_owned_spares_nobody(tmp_path: Path) -> None:
    async with at_work(tmp_path) as whole:
        await take(whole, acted(None, None))
        errors = whole.service.retirer.errors
        assert (errors.wedged, errors.poisoned) == (frozenset(), frozenset())


async def test_no_page_of_dom0_is_marked_whatever_error_it_has_had(tmp_path: Path) -> None:
    # Xen has broken another one, and the record of that was lost, or does not say whose it was.
    async with at_work(tmp_path) as whole:
        whole.small.host.poison(whole.of_dom0(0), known=True)
        whole.telemetry.push_ucna(maddr_of(whole.of_dom0(1)))
        entry = await whole.page(whole.of_dom0(1), Phase.LEFT, reason="dom0")
        assert not entry.marked
        await whole.corrected(whole.of_dom0(2))
        await whole.page(whole.of_dom0(2), Phase.LEFT, reason="dom0")
        assert whole.xen.trace.of("offline") == []


async def test_a_page_that_is_found_broken_spares_its_owner(tmp_path: Path) -> None:
    async with at_work(tmp_path) as whole:
        host = whole.small.host
        for broken, other, domid in (
            (whole.of_dom0(0), whole.of_dom0(1), DOM0),
            (whole.plain(0), whole.plain(1), whole.small.pv),
        ):
            host.poison(broken, known=True)
            # In one look, the broken one first.
            retirer = whole.service.retirer
            retirer.take_poisoned(broken, "by a test")
            retirer.take_poisoned(other, "by a test")
            entry = await whole.page(broken, Phase.LEFT, reason="broken")
            assert entry.domain == host.domain(domid).identity
            assert "reboot the host" in entry.detail
            await whole.page(other, Phase.LEFT, Phase.WAITING)
            assert whole.calls("offline", other) == 0
            assert retirer.errors.is_wedged(host.domain(domid).identity)


async def test_a_page_of_a_crashed_guest_is_marked_when_it_has_gone(tmp_path: Path) -> None:
    # Xen has broken another page of it, and no source has said so.
    async with at_work(tmp_path) as whole:
        host = whole.small.host
        host.break_frame(whole.plain(0))
        assert host.domain(whole.small.pv).shutdown is ShutdownReason.CRASH
        mfn = whole.plain(1)
        whole.telemetry.push_ucna(maddr_of(mfn))
        entry = await whole.page(mfn, Phase.WAITING, reason="owner_ending")
        assert "has crashed" in entry.detail
        assert whole.calls("offline", mfn) == 0
        assert entry.domain == host.domain(whole.small.pv).identity
        await asyncio.to_thread(host.destroy, whole.small.pv)
        await whole.page(mfn, Phase.OFFLINED)


# What an operator asks for.


async def test_an_operators_page_is_taken_in_hand_once(tmp_path: Path) -> None:
    async with at_work(tmp_path) as whole:
        mfn, request = whole.granted(), whole.service.intake.request
        assert request(mfn) == (True, "taken in hand")
        assert request(mfn) == (True, "it is under way already")
        entry = await whole.page(mfn, Phase.LEFT)
        assert entry.cause is Cause.OPERATOR
        # One that was left is tried anew.
        assert request(mfn) == (True, "taken in hand")


@pytest.mark.parametrize(
    ("policy", "key"),
    [(retiring(dry_run=True), "retire.dry_run"), (retiring(enabled=False), "retire.enabled")],
)
async def test_nothing_is_done_for_an_operator_while_nothing_is_done_at_all(
    tmp_path: Path, policy: Policy, key: str
) -> None:
    async with at_work(tmp_path, policy) as whole:
        is_taken, why = whole.service.intake.request(whole.plain())
        assert not is_taken
        assert key in why
        assert why.endswith("; nothing was done")
        assert whole.entry(whole.plain()) is None


async def test_an_operator_may_ask_again_for_a_page_that_uses_up_the_cap_already(
    tmp_path: Path,
) -> None:
    async with at_work(tmp_path, ONE) as whole:
        mfn, request = whole.granted(), whole.service.intake.request
        await whole.corrected(mfn)
        assert (await whole.page(mfn, Phase.LEFT)).marked
        assert request(whole.plain(1)) == (
            *(False, "1 pages are retired or on their way, and retire.max_retired allows 1"),
        )
        assert request(mfn) == (True, "taken in hand")


async def test_a_page_that_was_left_unmarked_is_no_exception_from_the_cap(tmp_path: Path) -> None:
    policy = replace(ONE, domains=DomainPolicy(deny=("pv",)))
    async with at_work(tmp_path, policy) as whole:
        mfn = whole.plain()
        await whole.corrected(mfn)
        assert not (await whole.page(mfn, Phase.LEFT, reason="denied")).marked
        pvh = whole.small.host.frame_of(whole.small.pvh, 5)
        await whole.corrected(pvh)
        await whole.page(pvh, Phase.LEFT, reason="no_relocation")
        is_taken, _ = whole.service.intake.request(mfn)
        assert not is_taken


async def test_an_operators_page_with_an_uncorrected_error_is_marked_and_not_moved(
    tmp_path: Path,
) -> None:
    async with at_work(tmp_path) as whole:
        mfn = whole.plain()
        await poison(whole, mfn)
        await whole.page(mfn, Phase.LEFT, reason="uncorrected")
        assert whole.service.intake.request(mfn) == (
            *(True, "it has had an uncorrected error, so it is marked and not moved"),
        )
        assert whole.suspended() == []


# What the policy keeps back.


async def test_what_a_dry_run_would_retire_is_told_as_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with at_work(tmp_path, retiring(dry_run=True)) as whole:
        mfn = whole.plain()
        await whole.corrected(mfn)
        [record] = told(caplog, Event.PAGE_WOULD_RETIRE)
        assert record.levelno == logging.WARNING
        assert fields(record)["MFN"] == f"{mfn:#x}"
        assert record.getMessage().startswith(f"mfn {mfn:#x} would be retired")
        # By another policy it is told anew.
        whole.service.apply(whole.service.policy)
        assert len(told(caplog, Event.PAGE_WOULD_RETIRE)) == 1
        changed = replace(whole.service.policy.retire, window=3600.0)
        whole.service.apply(replace(whole.service.policy, retire=changed))
        assert len(told(caplog, Event.PAGE_WOULD_RETIRE)) == 2


async def test_a_page_over_the_cap_is_told_as_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with at_work(tmp_path, ONE) as whole:
        first, second = whole.granted(0), whole.plain(1)
        await whole.corrected(first, second)
        [record] = told(caplog, Event.CAP_REACHED)
        assert record.levelno == logging.ERROR
        assert fields(record)["MFN"] == f"{second:#x}"
        assert record.getMessage().startswith(f"mfn {second:#x} is kept although it is failing: 1")


async def test_a_page_over_the_cap_is_told_of_anew_when_the_cap_is_another(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with at_work(tmp_path, ONE) as whole:
        await whole.corrected(whole.granted(0), whole.plain(1))
        nothing = replace(ONE.retire, max_retired=AmountOfMemory(size=0))
        whole.service.apply(replace(whole.service.policy, retire=nothing))
        assert len(told(caplog, Event.CAP_REACHED)) == 2


async def test_what_is_kept_is_told_also_when_it_is_decided_upon_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        async with at_work(tmp_path, retiring(dry_run=True)) as whole:
            mfn = whole.plain()
            await whole.corrected(mfn)
            off = retiring(enabled=False).retire
            caplog.clear()
            whole.service.apply(replace(whole.service.policy, retire=off))
            assert any(text.startswith(f"mfn {mfn:#x} is kept") for text in caplog.messages)


async def test_a_page_with_an_uncorrected_error_is_not_moved_also_where_the_book_has_forgotten_it(
    tmp_path: Path,
) -> None:
    async with at_work(tmp_path) as whole:
        mfn = whole.plain()
        whole.service.retirer.errors.add(mfn)
        await whole.corrected(mfn, times=3)
        assert whole.entry(mfn) is None
        assert whole.suspended() == []


async def test_pages_that_are_kept_back_are_remembered_in_bounds(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with at_work(tmp_path, retiring(dry_run=True, max_tracked_pages=2)) as whole:
        mfns = [whole.plain(which) for which in range(3)]
        await whole.corrected(*mfns[:2])
        await whole.corrected(*mfns[:2])
        assert len(told(caplog, Event.PAGE_WOULD_RETIRE)) == 2
        await whole.corrected(mfns[2])
        await whole.corrected(mfns[2])
        assert len(told(caplog, Event.PAGE_WOULD_RETIRE)) == 3


async def test_a_reload_follows_the_new_threshold_window_and_bound_of_errors(
    tmp_path: Path,
) -> None:
    async with at_work(tmp_path, retiring(corrected_errors=5)) as whole:
        first, second, other = whole.plain(0), whole.plain(1), whole.plain(2)
        await whole.corrected(first, second, times=3)
        fewer = replace(POLICY.retire, corrected_errors=3, max_tracked_pages=1)
        whole.service.apply(replace(whole.service.policy, retire=fewer))
        # The bound keeps the page that was hit last; that one has enough now.
        await whole.page(second, Phase.OFFLINED)
        assert whole.entry(first) is None
        assert len(whole.service.intake.history) == 1
        short = replace(POLICY.retire, window=0.001)
        whole.service.apply(replace(whole.service.policy, retire=short))
        await whole.corrected(other, times=1)
        await whole.until(
            lambda: whole.service.intake.history.hits(other, whole.clock.monotonic()) == 0
        )
        await whole.corrected(other, times=1)
        assert whole.entry(other) is None
