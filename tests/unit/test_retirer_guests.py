"""Guests that must not be read, are looked after, or were moved: on the assembled service."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from pgofflined.core.book import Cause, PageEntry, Phase
from pgofflined.core.domains import DomainIdentity
from pgofflined.core.events import Event
from pgofflined.core.frames import Domid
from pgofflined.core.offline import OfflineState
from pgofflined.core.outcomes import ExchangeReport, Standing
from pgofflined.core.relocation_outcomes import Relocated
from pgofflined.core.suspending import SuspendSupport

from .whole import at_work, retiring
from .whole_pages import fields, told


async def test_only_the_owner_of_a_page_that_must_not_be_read_is_kept_from_being_read(
    tmp_path: Path,
) -> None:
    async with at_work(tmp_path) as whole:
        host, retirer = whole.small.host, whole.service.retirer
        other = host.add_hvm(name="other")
        domains = [host.domain(whole.small.pvh), host.domain(other)]
        assert [retirer.poison_of(domain) for domain in domains] == [None, None]
        mfn = host.frame_of(whole.small.pvh, 5)
        retirer.take_poisoned(mfn, "an uncorrected error")
        await whole.page(mfn, Phase.LEFT, reason="uncorrected")
        # Xen has named its owner when it was marked.
        owner, stranger = [retirer.poison_of(domain) for domain in domains]
        assert owner is not None
        assert f"{mfn:#x}" in owner
        assert stranger is None


async def test_of_a_page_that_is_not_marked_the_book_does_not_know_the_owner_for_sure(
    tmp_path: Path,
) -> None:
    async with at_work(tmp_path, retiring(dry_run=True)) as whole:
        host, retirer = whole.small.host, whole.service.retirer
        mfn = host.frame_of(whole.small.pvh, 5)
        stale = host.domain(whole.small.pv).identity
        entry = PageEntry(mfn=mfn, cause=Cause.CORRECTED, phase=Phase.LEFT, since=1.0, domain=stale)
        retirer.ledger.put(entry)
        retirer.errors.add(mfn)
        assert retirer.poison_of(host.domain(whole.small.pvh)) is not None
        retirer.ledger.put(replace(entry, marked=True, domain=None))
        assert retirer.poison_of(host.domain(whole.small.pvh)) is not None
        retirer.ledger.put(replace(entry, marked=True))
        # Somebody has taken the mark back, and the page may be another's since.
        assert retirer.poison_of(host.domain(whole.small.pvh)) is not None
        host.offline(mfn)
        assert retirer.poison_of(host.domain(whole.small.pvh)) is None


@pytest.mark.parametrize("stuck", [None, "it stays paused"])
async def test_a_guest_that_a_job_left_standing_is_looked_after(
    tmp_path: Path, stuck: str | None
) -> None:
    async with at_work(tmp_path) as whole:
        host, pv = whole.small.host, whole.small.pv
        domain: DomainIdentity = host.domain(pv).identity
        standing = Standing(paused=stuck is not None)
        host.pause(pv)
        report = ExchangeReport(
            domain=domain, results=(), blackout=None, stuck=stuck, standing=standing
        )
        whole.service.retirer.exchange_finished("x1", report)
        assert (domain in whole.service.retirer.aftercare.stuck) is (stuck is not None)
        if stuck is None:
            return
        await whole.until(lambda: not host.domain(pv).paused)
        await whole.until(lambda: domain not in whole.service.retirer.aftercare.stuck)


async def test_what_xen_broke_is_never_read(tmp_path: Path) -> None:
    async with at_work(tmp_path) as whole:
        host, retirer = whole.small.host, whole.service.retirer
        mfn = host.frame_of(whole.small.pvh, 5)
        host.break_frame(mfn)
        retirer.take_poisoned(mfn, "by a test")
        assert retirer.errors.poisoned == {mfn}
        entry = await whole.page(mfn, Phase.LEFT, reason="broken")
        assert entry.marked
        assert host.query(mfn) & OfflineState.BROKEN


async def test_a_guest_of_a_failed_save_is_kept_for_whatever_runs_next(tmp_path: Path) -> None:
    async with at_work(tmp_path) as whole:
        retirer, host = whole.service.retirer, whole.small.host
        domain = host.domain(whole.small.pv).identity
        retirer.asked_in_vain(domain)
        # No exchange has kept a record of it.
        assert [left.is_kept for left in retirer.aftercare.left()] == [False]
        await whole.until(lambda: [left.is_kept for left in retirer.aftercare.left()] == [True])
        # Else a stop would wait for what it may still do.
        host.destroy(whole.small.pv)
        await whole.until(lambda: not retirer.aftercare)


async def test_what_came_of_each_guest_that_was_moved_here_is_remembered(tmp_path: Path) -> None:
    async with at_work(tmp_path) as whole:
        retirer = whole.service.retirer
        domain = whole.small.host.domain(whole.small.pvh).identity
        for new in (None, Domid(8), Domid(9)):
            outcome = Relocated(
                domain=domain, mfns=frozenset(), new_domid=new, attempts=1, seconds=1.0
            )
            retirer.relocation_finished(domain, outcome)
        assert retirer.restored == {
            DomainIdentity(Domid(8), domain.uuid),
            DomainIdentity(Domid(9), domain.uuid),
        }


async def test_a_guest_that_xl_has_asked_for_us_and_that_ended_is_told_and_not_asked_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with at_work(tmp_path) as whole:
        retirer = whole.service.retirer
        info = whole.small.host.domain(whole.small.pvh)
        retirer.guest_ended(info.identity, "d2 crashed")
        [record] = told(caplog, Event.GUEST_ENDED)
        assert (record.levelno, record.getMessage()) == (logging.CRITICAL, "d2 crashed")
        assert fields(record)["DOMID"] == str(info.domid)
        assert retirer.exchanging.objection(info, SuspendSupport.ANNOUNCED) is not None


async def test_how_a_guest_ended_after_our_request_is_told_as_critical(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with at_work(tmp_path) as whole:
        domain = whole.small.host.domain(whole.small.pv).identity
        for ended in (None, "d1 crashed"):
            report = ExchangeReport(domain=domain, results=(), blackout=None, ended=ended)
            whole.service.retirer.exchange_finished("x1", report)
        [record] = told(caplog, Event.GUEST_ENDED)
        assert (record.levelno, record.getMessage()) == (logging.CRITICAL, "d1 crashed")
        assert (fields(record)["DOMID"], fields(record)["JOB"]) == (str(domain.domid), "x1")
