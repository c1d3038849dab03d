"""From error reports to pages that are to go: history, policy, and what Xen did itself."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import Protocol, assert_never

from pgofflined.core.book import Cause, Phase
from pgofflined.core.conditions import Condition, uncorrected_error
from pgofflined.core.events import Event
from pgofflined.core.frames import Mfn
from pgofflined.core.history import History
from pgofflined.core.incidents import Incidents
from pgofflined.core.policy import CapReached, DryRun, Ignore, Policy, Retire, Watch, decide
from pgofflined.core.reports import (
    CorrectedPageError,
    HypervisorActed,
    OtherError,
    Sighting,
    UncorrectedPageError,
)
from pgofflined.core.telemetry import BankEntry
from pgofflined.journal_log import Announced, Chatter, bank_fields, event
from pgofflined.ports import Clock, Hypervisor
from pgofflined.retiring import Retirer
from pgofflined.store import StoredHit

log = logging.getLogger(__name__)


class HitStore(Protocol):
    """Where hits are kept over a restart."""

    def add_hits(self, batch: Iterable[StoredHit]) -> None:
        """Keep hits."""
        ...


class Intake:
    """Decides about reports as they come; belongs to the loop's thread."""

    def __init__(
        self,
        *,
        xen: Hypervisor,
        clock: Clock,
        policy: Policy,
        history: History,
        retirer: Retirer,
        store: HitStore,
        incidents: Incidents,
        chatter: Chatter | None = None,
    ) -> None:
        self._chatter = chatter or Chatter(clock.monotonic)
        self._announced = Announced()
        self.policy = policy
        self.history = history
        self._xen = xen
        self._clock = clock
        self._retirer = retirer
        self._store = store
        self._incidents = incidents
        # What was reported of pages that are out of use, until it is known that they still are.
        self._doubted: dict[Mfn, Condition] = {}
        retirer.room_again = self.decide_again
        retirer.doubt_settled = self._doubt_settled

    async def take(self, sighting: Sighting) -> None:
        """Act on one report."""
        report = sighting.report
        self._note_incident(sighting)
        match report:
            case CorrectedPageError():
                self._corrected(report)
            case HypervisorActed():
                await self._hypervisor_acted(report)
            case UncorrectedPageError(mfn=mfn):
                self._tell_uncorrected(report)
                self._retirer.take_poisoned(mfn, report.describe())
            case OtherError():
                self._other(report)
            case _:
                assert_never(report)
        # A flood of reports must not keep the loop from everything else.
        await asyncio.sleep(0)

    def request(self, mfn: Mfn) -> tuple[bool, str]:
        """Take a page in hand because an operator says so; whether it was, and why (not)."""
        hold = self._retirer.on_hold()
        if hold is not None:
            return False, f"{hold}; nothing was done"
        ledger = self._retirer.ledger
        if ledger.is_under_way(mfn):
            return True, "it is under way already"
        if mfn in self._retirer.errors.poisoned:
            self._retirer.take_poisoned(mfn, "an operator asked for it")
            return True, "it has had an uncorrected error, so it is marked and not moved"
        entry = ledger.book.get(mfn)
        if not self._retirer.has_room() and not (entry is not None and entry.is_counted):
            return False, (
                f"{ledger.book.counted()} pages are retired or on their way, and "
                f"retire.max_retired allows {self._retirer.cap_frames()}"
            )
        self._retirer.take(mfn, Cause.OPERATOR, "an operator asked for it")
        return True, "taken in hand"

    def policy_changed(self, policy: Policy) -> None:
        """Follow another policy: also what was counted under the old one is decided upon anew."""
        self.policy = policy
        self.history.adapt(
            window=policy.retire.window,
            threshold=policy.retire.corrected_errors,
            max_pages=policy.retire.max_tracked_pages,
        )
        self.decide_again()

    def decide_again(self) -> None:
        """Decide about all pages that have had errors enough and are not in hand."""
        now = self._clock.monotonic()
        book = self._retirer.ledger.book
        for mfn, hits in self.history.reached(now):
            if mfn not in book:
                self._decide(mfn, hits)

    def _corrected(self, report: CorrectedPageError) -> None:
        mfn = report.mfn
        told = self._chatter.admits(Event.ERROR_SEEN)
        if told:
            event(
                log,
                logging.WARNING,
                Event.ERROR_SEEN,
                report.describe(),
                mfn=mfn,
                domid=report.domid,
                fields=bank_fields(report.bank),
            )
        # By a clock that nobody sets: what is counted lives no longer than this boot of the host.
        when = self._clock.monotonic()
        # One hit for each record: the count in it is the bank's, the address the last error's.
        hits = self.history.record(mfn, when, 1)
        self._store.add_hits([StoredHit(mfn, when, 1)])
        entry = self._retirer.ledger.book.get(mfn)
        if entry is None:
            self._decide(mfn, hits, tell_kept=told)
        elif entry.phase is Phase.OFFLINED:
            self._retirer.doubt(mfn)

    def _decide(self, mfn: Mfn, hits: int, *, tell_kept: bool = True) -> None:
        verdict = decide(
            mfn,
            hits,
            self.policy.retire,
            retired_frames=self._retirer.ledger.book.counted(),
            limit_frames=self._retirer.cap_frames(),
            poisoned=self._retirer.errors.poisoned,
        )
        match verdict:
            case Ignore() | Watch():
                if tell_kept:
                    log.info("mfn %#x is kept: %s", mfn, verdict.reason)
            case DryRun(reason=reason):
                # A verdict is told whatever else is said, and once: a page may fail often.
                if self._announced.is_news(mfn, (Event.PAGE_WOULD_RETIRE, self.policy.retire)):
                    what = f"mfn {mfn:#x} would be retired, were this no dry run: {reason}"
                    event(log, logging.WARNING, Event.PAGE_WOULD_RETIRE, what, mfn=mfn)
            case CapReached(limit_frames=limit):
                if self._announced.is_news(mfn, (Event.CAP_REACHED, limit)):
                    what = f"mfn {mfn:#x} is kept although it is failing: {verdict.reason}"
                    event(log, logging.ERROR, Event.CAP_REACHED, what, mfn=mfn)
            case Retire(reason=reason):
                self._retirer.take(mfn, Cause.CORRECTED, reason)
            case _:
                assert_never(verdict)

    def _other(self, report: OtherError) -> None:
        if report.is_uncorrected:
            self._tell_uncorrected(report)
        elif self._chatter.admits(Event.ERROR_SEEN):
            fields = bank_fields(report.bank)
            event(log, logging.WARNING, Event.ERROR_SEEN, report.describe(), fields=fields)

    def _tell_uncorrected(self, report: UncorrectedPageError | OtherError) -> None:
        """Log an uncorrected error, each one; of the same one again only so many."""
        bank = report.bank
        if not self._is_to_be_told(Event.UNCORRECTED_ERROR, bank):
            return
        event(
            log,
            logging.ERROR,
            Event.UNCORRECTED_ERROR,
            report.describe(),
            mfn=report.mfn,
            domid=bank.domid,
            fields=bank_fields(bank),
        )

    def _is_to_be_told(self, kind: Event, bank: BankEntry | None, *what: object) -> bool:
        """Whether an error is not the very same again, or not too many of those were told."""
        which: tuple[object, ...] = (kind, *what)
        if bank is not None:
            which += (bank.socket, bank.apicid, bank.bank, bank.status, bank.addr)
        return self._announced.is_news(which, kind) or self._chatter.admits(kind)

    async def _hypervisor_acted(self, report: HypervisorActed) -> None:
        what = (report.mfn, report.domid, report.result, report.broken)
        if self._is_to_be_told(Event.HYPERVISOR_ACTED, report.bank, *what):
            event(
                log,
                logging.CRITICAL,
                Event.HYPERVISOR_ACTED,
                report.describe(),
                mfn=report.mfn,
                domid=report.domid,
                fields=bank_fields(report.bank),
            )
        if report.mfn is not None:
            # At once, for nothing must read it.  Not marked before it is known whose it is: one
            # more offline call for a page of a domain that Xen has hit could hang the host.
            self._retirer.errors.add(report.mfn)
        if report.domid is not None:
            self._retirer.errors.add_wedged_domid(report.domid)
        if report.mfn is not None:
            self._retirer.take_poisoned(report.mfn, report.describe())

    def _note_incident(self, sighting: Sighting) -> None:
        incident = uncorrected_error(sighting.report, sighting.when)
        if incident is None:
            return
        entry = None if incident.mfn is None else self._retirer.ledger.book.get(incident.mfn)
        if entry is None or entry.phase is not Phase.OFFLINED:
            self._incidents.note(incident)
        else:
            # A scrubber goes on reporting a page that is out of use, which does no harm any more.
            self._doubted[entry.mfn] = incident

    def _doubt_settled(self, mfn: Mfn, is_offlined: bool) -> None:  # noqa: FBT001 - told, not asked
        incident = self._doubted.pop(mfn, None)
        if is_offlined:
            return
        if incident is not None:
            self._incidents.note(incident)
        if mfn in self._retirer.errors.poisoned:
            self._retirer.take_poisoned(mfn, "it has had an uncorrected error, and is used again")
        else:
            self._decide(mfn, self.history.hits(mfn, self._clock.monotonic()))
