"""From error reports to pages that are to go: history, policy, and what Xen did itself."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import Protocol, assert_never

import msgspec

from pgofflined.core.book import Cause
from pgofflined.core.domains import DomainIdentity, DomainInfo
from pgofflined.core.errors import PortError
from pgofflined.core.events import Event
from pgofflined.core.frames import Domid, Mfn
from pgofflined.core.history import History
from pgofflined.core.policy import CapReached, DryRun, Ignore, Policy, Retire, Watch, decide
from pgofflined.core.reports import (
    CorrectedPageError,
    HypervisorActed,
    OtherError,
    Sighting,
    UncorrectedPageError,
)
from pgofflined.journal_log import Announced, Chatter, bank_fields, event
from pgofflined.ports import Clock, Hypervisor
from pgofflined.retiring import Retirer
from pgofflined.store import StoredHit

log = logging.getLogger(__name__)

_POISONED = "poisoned"
_WEDGED = "wedged"


class FactStore(Protocol):
    """What is kept over a restart besides the pages."""

    def add_hits(self, batch: Iterable[StoredHit]) -> None:
        """Keep hits."""
        ...

    def get_meta(self, key: str) -> str | None:
        """A value by its key."""
        ...

    def set_meta(self, key: str, value: str) -> None:
        """Keep a value."""
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
        store: FactStore,
        host_frames: int,
        chatter: Chatter | None = None,
    ) -> None:
        self._chatter = chatter or Chatter(clock.monotonic)
        self._announced = Announced()
        self.policy = policy
        self.history = history
        self.host_frames = host_frames
        self.cap_reached = False
        self._xen = xen
        self._clock = clock
        self._retirer = retirer
        self._store = store
        self._load_facts()

    def cap_frames(self) -> int:
        """Frames that may be retired in all."""
        return self.policy.retire.max_retired.frames(self.host_frames)

    async def take(self, sighting: Sighting) -> None:
        """Act on one report."""
        report = sighting.report
        match report:
            case CorrectedPageError():
                self._corrected(report, sighting.when)
            case HypervisorActed():
                await self._hypervisor_acted(report)
            case UncorrectedPageError():
                self._tell_uncorrected(report)
                self._note_poison(report.mfn)
            case OtherError():
                self._other(report)
            case _:
                assert_never(report)
        # A flood of reports must not keep the loop from everything else.
        await asyncio.sleep(0)

    def request(self, mfn: Mfn) -> tuple[bool, str]:
        """Take a page in hand because an operator says so; whether it was, and why (not)."""
        retired, limit = self._retirer.ledger.book.marked(), self.cap_frames()
        if not self.policy.retire.enabled:
            return False, "retiring is switched off (retire.enabled = false)"
        if self.policy.retire.dry_run:
            return False, "this is a dry run (retire.dry_run = true); nothing was done"
        if mfn in self._retirer.poisoned:
            return False, "the page has had an uncorrected error; Xen deals with it"
        if self._retirer.ledger.is_under_way(mfn):
            return True, "it is under way already"
        if retired >= limit:
            return False, f"{retired} pages are retired and retire.max_retired allows {limit}"
        self._retirer.take(mfn, Cause.OPERATOR, "an operator asked for it")
        return True, "taken in hand"

    def _corrected(self, report: CorrectedPageError, when: float) -> None:
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
        # One hit for each record: the count in it is the bank's, the address the last error's.
        hits = self.history.record(mfn, when, 1)
        self._store.add_hits([StoredHit(mfn, when, 1)])
        entry = self._retirer.ledger.book.get(mfn)
        if entry is not None and (not entry.phase.is_final or entry.marked):
            return
        verdict = decide(
            report,
            hits,
            self.policy.retire,
            retired_frames=self._retirer.ledger.book.marked(),
            host_frames=self.host_frames,
            poisoned=self._retirer.poisoned,
        )
        match verdict:
            case Ignore() | Watch():
                if told:
                    log.info("mfn %#x is kept: %s", mfn, verdict.reason)
            case DryRun(reason=reason):
                if self._announced.is_news(mfn, (Event.PAGE_WOULD_RETIRE, self.policy.retire)):
                    what = f"mfn {mfn:#x} would be retired, were this no dry run: {reason}"
                    event(log, logging.WARNING, Event.PAGE_WOULD_RETIRE, what, mfn=mfn)
            case CapReached(limit_frames=limit):
                self.cap_reached = True
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
        which = (bank.socket, bank.apicid, bank.bank, bank.status, bank.addr)
        is_news = self._announced.is_news(which, Event.UNCORRECTED_ERROR)
        if not is_news and not self._chatter.admits(Event.UNCORRECTED_ERROR):
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

    async def _hypervisor_acted(self, report: HypervisorActed) -> None:
        event(
            log,
            logging.CRITICAL,
            Event.HYPERVISOR_ACTED,
            report.describe(),
            mfn=report.mfn,
            domid=report.domid,
            fields=bank_fields(report.bank),
        )
        domain = None
        if report.domid is not None:
            domain = await asyncio.to_thread(self._find, report.domid)
        self._retirer.note_hypervisor_action(report.mfn, domain, report.describe())
        self._save_facts()

    def _find(self, domid: Domid) -> DomainInfo | None:
        try:
            return self._xen.domain(domid)
        except PortError:
            return None

    def _note_poison(self, mfn: Mfn) -> None:
        self._retirer.poisoned.add(mfn)
        self._save_facts()

    def _save_facts(self) -> None:
        poisoned = sorted(self._retirer.poisoned)
        wedged = sorted(self._retirer.wedged, key=lambda domain: domain.domid)
        self._store.set_meta(_POISONED, msgspec.json.encode(poisoned).decode())
        self._store.set_meta(_WEDGED, msgspec.json.encode(wedged).decode())

    def _load_facts(self) -> None:
        self._retirer.poisoned |= stored_poison(self._store)
        try:
            wedged = msgspec.json.decode(
                self._store.get_meta(_WEDGED) or "[]", type=list[DomainIdentity]
            )
        except msgspec.MsgspecError as error:
            log.error("what was stored of domains that Xen has hit cannot be read: %s", error)
            return
        self._retirer.wedged.update(wedged)


def stored_poison(store: FactStore) -> frozenset[Mfn]:
    """The frames that were known to have an uncorrected error."""
    try:
        found = msgspec.json.decode(store.get_meta(_POISONED) or "[]", type=list[int])
    except msgspec.MsgspecError as error:
        log.error("what was stored of uncorrected errors cannot be read: %s", error)
        return frozenset()
    return frozenset(Mfn(mfn) for mfn in found)
