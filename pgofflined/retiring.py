"""Drives every page that is to go, from the first report to its end.

One object on the event loop decides who does what next; hypercalls happen in threads.  Nothing
here polls: it sleeps until a report, an answer or the next due retry.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from typing import assert_never

from pgofflined.aftercare import Aftercare
from pgofflined.core.book import Cause, PageEntry, Phase
from pgofflined.core.domains import DomainIdentity, DomainInfo, GuestKind
from pgofflined.core.errors import PortError
from pgofflined.core.events import Event
from pgofflined.core.frames import Mfn
from pgofflined.core.ladder import HandOver, LookAgain, SaveRestore, TryAgain, next_rung
from pgofflined.core.offline import OfflineState
from pgofflined.core.outcomes import (
    Damaged,
    Exchanged,
    ExchangeReport,
    PageResult,
    Refusal,
)
from pgofflined.core.policy import Backoff, Denied, Marking, Policy, domain_allowed
from pgofflined.core.relocation_outcomes import NotRelocated, Relocated, RelocationOutcome
from pgofflined.exchanging import Exchanging
from pgofflined.journal_log import event
from pgofflined.ledger import Ledger, tell
from pgofflined.ports import Clock, Hypervisor, Journal
from pgofflined.takers import Exchanges, Nobody, Relocations
from pgofflined.triage import (
    Disposition,
    Later,
    Left,
    Offlined,
    Rules,
    ToExchange,
    ToRelocate,
    triage,
)

log = logging.getLogger(__name__)

# An owner that is ending, or a page that is being handed out, settles within moments; a host
# that cannot be asked may take longer.
_SOON = Backoff(first=2.0, last=300.0)
_ROUND = 256


class Retirer:
    """Everything that happens to pages that are to go.

    All methods but ``recover`` and ``poison_in_use`` belong to the loop's thread; ``exchanging`` is
    for the workers.
    ``wedged`` holds the domains of which Xen itself has broken a page, ``poisoned`` the frames
    whose contents must never be read.
    """

    def __init__(
        self,
        *,
        xen: Hypervisor,
        journal: Journal,
        clock: Clock,
        policy: Policy,
        ledger: Ledger,
        late_look: float = 5.0,
    ) -> None:
        self.ledger = ledger
        self.policy = policy
        self.wedged: set[DomainIdentity] = set()
        self.poisoned: set[Mfn] = set()
        self.exchanging = Exchanging(
            xen=xen,
            journal=journal,
            clock=clock,
            policy=lambda: self.policy.exchange,
            poisoned=lambda: frozenset(self.poisoned),
            wedged=lambda domain: domain in self.wedged,
        )
        self.aftercare = Aftercare(xen, clock, interval=late_look, ended=self.exchanging.done_with)
        self.idle_scrub = 0
        self._xen = xen
        self._clock = clock
        self._exchanges: Exchanges = Nobody()
        self._relocations: Relocations | None = None
        self._wake = asyncio.Event()
        self._stopping = False
        self._triage_began: float | None = None
        # Whether a page may stay marked while somebody owns it; see XenVersion.
        self._marks_are_safe = False

    def connect(self, exchanges: Exchanges, relocations: Relocations | None) -> None:
        """Say who takes pages; ``relocations`` is None where the policy wants none."""
        self._exchanges = exchanges
        self._relocations = relocations

    def take(self, mfn: Mfn, cause: Cause, reason: str) -> None:
        """Take a page in hand; one that is already under way goes on as it was."""
        if not self.ledger.is_under_way(mfn):
            self.ledger.begin(mfn, cause, reason)
            self._wake.set()

    def note_hypervisor_action(
        self, mfn: Mfn | None, domain: DomainInfo | None, detail: str
    ) -> None:
        """Note that Xen broke a page by itself: it is never read, its owner never marked again."""
        if domain is not None:
            self.wedged.add(domain.identity)
        if mfn is None:
            return
        self.poisoned.add(mfn)
        self.ledger.put(
            PageEntry(
                mfn=mfn,
                cause=Cause.UNCORRECTED,
                phase=Phase.LEFT,
                since=self._clock.now(),
                marked=True,
                domain=domain.identity if domain is not None else None,
                domain_name=domain.name if domain is not None else "",
                reason="hypervisor_acted",
                detail=detail,
            )
        )

    async def run(self) -> None:
        """Look after the pages until stopped; begins with what an earlier run left."""
        version = await asyncio.to_thread(self._xen.version)
        self._marks_are_safe = version.offlines_free_frames_safely
        self.ledger.begin_again()
        while not self._stopping:
            self._wake.clear()
            if self._has_guests_to_look_after():
                await asyncio.to_thread(self._look_after)
            due = self.ledger.due(_ROUND)
            if due:
                self._triage_began = self._clock.monotonic()
                settled = await asyncio.to_thread(self._triage_all, due)
                self._triage_began = None
                for mfn, disposition in settled:
                    self._apply(mfn, disposition)
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._seconds_to_sleep()):
                    await self._wake.wait()

    def _has_guests_to_look_after(self) -> bool:
        return bool(self.aftercare) or self.exchanging.has_rest

    def _seconds_to_sleep(self) -> float | None:
        due = self.ledger.seconds_to_next()
        if not self._has_guests_to_look_after():
            return due
        return self.aftercare.interval if due is None else min(due, self.aftercare.interval)

    def seconds_in_triage(self) -> float:
        """For how long the triage under way has waited for Xen; 0 without one."""
        began = self._triage_began
        return 0.0 if began is None else self._clock.monotonic() - began

    def stop(self) -> None:
        """Begin nothing new; ``run`` returns."""
        self._stopping = True
        self._wake.set()

    def recover(self) -> None:
        """End what an earlier process left of exchanges; makes hypercalls, for a thread."""
        self.aftercare.note_recovered(self.exchanging.recover())

    def _look_after(self) -> None:
        if self.exchanging.has_rest:
            self.aftercare.note_recovered(self.exchanging.recover_rest())
        self.aftercare.look()

    def exchange_finished(self, job: str, report: ExchangeReport) -> None:
        """Enter what became of the pages of one exchange job."""
        self.aftercare.note(
            job, report.domain, stuck=report.stuck, may_suspend_late=report.may_suspend_late
        )
        for result in report.results:
            self._exchange_result(job, report.domain, result)
        self._tell_exchange(job, report)
        self._wake.set()

    def _tell_exchange(self, job: str, report: ExchangeReport) -> None:
        domid = report.domain.domid
        moved = sum(isinstance(result, Exchanged) for result in report.results)
        pause = "was not suspended"
        if report.blackout is not None:
            pause = (
                f"stood still for {report.blackout.whole:.3f} s, "
                f"{report.blackout.ours:.3f} s of them for our work"
            )
        what = f"d{domid} was moved off {moved} of {len(report.results)} pages and {pause}"
        event(log, logging.INFO, Event.EXCHANGE_DONE, what, domid=domid, job=job)

    def relocation_finished(self, domain: DomainIdentity, outcome: RelocationOutcome) -> None:
        """Enter what became of the pages of one migration job."""
        match outcome:
            case Relocated(mfns=mfns):
                gone = mfns
            case NotRelocated(mfns=kept, offlined=gone):
                if outcome.stuck is not None:
                    self.aftercare.stuck[domain] = outcome.stuck
                for mfn in kept:
                    self.ledger.leave(mfn, outcome.reason.value, outcome.detail, marked=True)
            case _:
                assert_never(outcome)
        for mfn in gone:
            self._note_freed_dirty()
            self.ledger.offlined(mfn, f"its owner d{domain.domid} has left it")
        self._wake.set()

    def save_failed(self, domain: DomainIdentity) -> None:
        """Look after a guest that was asked to suspend itself for a save, which has failed."""
        self.exchanging.hold_off(domain)
        self.aftercare.note("save", domain, stuck=None, may_suspend_late=True)
        self._wake.set()

    def _triage_all(self, mfns: Sequence[Mfn]) -> list[tuple[Mfn, Disposition | PortError]]:
        """Triage pages in one thread, so that the pages of one domain can go in one suspend."""
        rules = Rules(
            denial=self._denial,
            wedged=lambda domain: domain.identity in self.wedged,
            mark_pv_later=self.policy.exchange.mark is Marking.AFTER_SCRUB,
        )
        settled: list[tuple[Mfn, Disposition | PortError]] = []
        for mfn in mfns:
            try:
                settled.append((mfn, triage(mfn, self._xen, rules)))
            except PortError as error:
                settled.append((mfn, error))
        return settled

    def poison_in_use(self) -> Mfn | None:
        """A page with an uncorrected error that somebody may own.  Asks Xen, for a thread."""
        return next(filter(self._may_be_read, tuple(self.poisoned)), None)

    def _may_be_read(self, mfn: Mfn) -> bool:
        """Whether somebody may still own a page with an uncorrected error."""
        try:
            return not self._xen.query(mfn) & OfflineState.OFFLINED
        except PortError:
            return True

    def denial(self, domain: DomainInfo) -> str | None:
        """Why a domain may not be saved or migrated now; None where it may."""
        if not self.policy.retire.enabled:
            return "retiring is switched off (retire.enabled = false)"
        if self.policy.retire.dry_run:
            return "this is a dry run (retire.dry_run = true)"
        answer = domain_allowed(self.policy.domains, domain.name, domain.uuid)
        return answer.reason if isinstance(answer, Denied) else None

    def _denial(self, domain: DomainInfo) -> str | None:
        answer = domain_allowed(self.policy.domains, domain.name, domain.uuid)
        if isinstance(answer, Denied):
            return answer.reason
        if domain.kind is GuestKind.PV and not self.policy.exchange.enabled:
            return "exchanging pages of PV guests is switched off (exchange.enabled = false)"
        return None

    def _apply(self, mfn: Mfn, disposition: Disposition | PortError) -> None:
        match disposition:
            case Offlined(detail=detail):
                entry = self.ledger.book.get(mfn)
                if entry is not None and entry.marked:
                    # Somebody owned it while it was marked, and freed it since.
                    self._note_freed_dirty()
                self.ledger.offlined(mfn, detail)
            case ToExchange(domain=domain, marked=marked):
                self._to_exchange(mfn, domain, marked=marked)
            case ToRelocate(domain=domain):
                self._to_relocate(mfn, domain)
            case Left(reason=why, detail=detail, marked=marked):
                self.ledger.leave(mfn, why.value, detail, marked=marked)
            case Later(reason=until, detail=detail, marked=marked):
                self.ledger.wait(mfn, _SOON, until.value, detail, marked=marked)
            case PortError():
                self.ledger.wait(mfn, _SOON, "cannot_ask_xen", str(disposition))
            case _:
                assert_never(disposition)

    def _to_exchange(self, mfn: Mfn, domain: DomainInfo, *, marked: bool) -> None:
        if mfn in self.poisoned:
            detail = (
                "it has had an uncorrected error and must not be copied; "
                f"it goes when d{domain.domid} ends, restart that guest"
            )
            self.ledger.leave(mfn, "uncorrected", detail, marked=marked)
            return
        if self._exchanges.submit(domain.identity, domain.name, mfn):
            self._handed_over(mfn, domain, Phase.EXCHANGE, marked=marked)
        else:
            self._queue_full(mfn, "exchanges", marked=marked)

    def _to_relocate(self, mfn: Mfn, domain: DomainInfo) -> None:
        if self._relocations is None or not self.policy.relocation.target:
            detail = (
                "no migration is configured (relocation.target); it stays pending until "
                f"d{domain.domid} ends or is migrated by hand"
            )
            self.ledger.leave(mfn, "no_relocation", detail, marked=True)
        elif self._relocations.submit(domain.identity, domain.name, (mfn,)):
            self._handed_over(mfn, domain, Phase.RELOCATION, marked=True)
        else:
            self._queue_full(mfn, "migrations", marked=True)

    def _handed_over(self, mfn: Mfn, domain: DomainInfo, phase: Phase, *, marked: bool) -> None:
        mark = "marked offline-pending" if marked else "to be marked later"
        what = f"is {mark} and waits for {phase.value}"
        tell(logging.INFO, Event.PAGE_MARKED, what, mfn, domid=domain.domid)
        self.ledger.hand_over(mfn, domain, phase, marked=marked)

    def _queue_full(self, mfn: Mfn, which: str, *, marked: bool) -> None:
        tell(logging.WARNING, Event.QUEUE_FULL, f"waits: the queue of {which} is full", mfn)
        self.ledger.wait(mfn, _SOON, "queue_full", f"the queue of {which} is full", marked=marked)

    def _exchange_result(self, job: str, domain: DomainIdentity, result: PageResult) -> None:
        domid = domain.domid
        match result:
            case Exchanged(old=old, new=new, offlined=offlined):
                if offlined:
                    self._note_freed_dirty()
                    self.ledger.offlined(old, f"d{domid} was moved from it to mfn {new:#x}")
                else:
                    self._wait_for_xen(old)
            case Refusal():
                self._refused(job, domain, result)
            case Damaged(old=old, detail=detail):
                what = (
                    f"was exchanged, but d{domid} could not be put right: {detail}; restart it at "
                    "once, for its programs may read zeros there"
                )
                tell(logging.CRITICAL, Event.PAGE_DAMAGED, what, old, domid=domid, job=job)
                self.ledger.leave(old, "damaged", detail, marked=True)
            case _:
                assert_never(result)

    def _wait_for_xen(self, mfn: Mfn) -> None:
        """A page has left its guest, and is not out of use yet."""
        entry = self.ledger.book.get(mfn)
        if entry is None or entry.marked:
            self.ledger.wait(mfn, _SOON, "not_confirmed", "Xen has yet to take it out")
            return
        seconds = self.policy.exchange.scrub_wait
        detail = f"it is free, and is marked when there were {seconds:g} s to scrub it"
        self.ledger.wait(mfn, Backoff(first=seconds, last=_SOON.last), "scrubbing", detail)

    def _refused(self, job: str, domain: DomainIdentity, refusal: Refusal) -> None:
        mfn, reason, detail = refusal.mfn, refusal.reason, refusal.detail
        what = f"was not exchanged: {detail}"
        tell(logging.WARNING, Event.PAGE_REFUSED, what, mfn, domid=domain.domid, job=job)
        entry = self.ledger.book.get(mfn)
        marked = self._marks_are_safe and (entry is None or entry.marked)
        tries = 1 if entry is None else entry.attempts + 1
        rung = next_rung(reason, tries, self.policy, marked=marked)
        match rung:
            case LookAgain():
                self.ledger.wait(mfn, _SOON, reason.value, detail, marked=marked)
            case TryAgain():
                retry = self.policy.exchange.retry
                self.ledger.refused(mfn, retry, reason.value, detail, marked=marked)
            case SaveRestore():
                self._to_save(mfn, domain, refusal)
            case HandOver():
                self.ledger.leave(mfn, reason.value, detail, marked=marked)
            case _:
                assert_never(rung)

    def _to_save(self, mfn: Mfn, domain: DomainIdentity, refusal: Refusal) -> None:
        """Have a PV guest saved and restored, for its page cannot be exchanged."""
        entry = self.ledger.book.get(mfn)
        name = "" if entry is None else entry.domain_name
        reason, detail = refusal.reason.value, refusal.detail
        answer = domain_allowed(self.policy.domains, name, domain.uuid)
        if isinstance(answer, Denied):
            self.ledger.leave(mfn, reason, f"{detail}; {answer.reason}", marked=True)
        elif self._relocations is not None and self._relocations.submit(
            domain, name, (mfn,), by_saving=True
        ):
            what = f"was not exchanged, and d{domain.domid} is to be saved and restored: {detail}"
            tell(logging.WARNING, Event.PAGE_MARKED, what, mfn, domid=domain.domid)
            self.ledger.to_relocation(mfn)
        else:
            self._queue_full(mfn, "migrations", marked=True)

    def _note_freed_dirty(self) -> None:
        """Count what leaves an idle CPU searching (xen/common/page_alloc.c, scrub_free_pages)."""
        if not self.idle_scrub:
            event(
                log,
                logging.WARNING,
                Event.IDLE_SCRUB_HAZARD,
                "a page was retired right after it was freed: until the host reboots, one idle "
                "CPU of each such page's NUMA node keeps looking for it, which costs power but "
                "no guest's time",
            )
        self.idle_scrub += 1
