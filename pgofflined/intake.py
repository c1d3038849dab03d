"""From error reports to pages that are to go: history, policy, and what Xen did itself."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import Protocol, assert_never

import msgspec

from pgofflined.core.book import Cause, Phase
from pgofflined.core.conditions import uncorrected_error
from pgofflined.core.domains import DomainIdentity, DomainInfo
from pgofflined.core.errors import PortError
from pgofflined.core.events import Event
from pgofflined.core.frames import Domid, Mfn
from pgofflined.core.history import History
from pgofflined.core.incidents import Incidents
from pgofflined.core.policy import CapReached, DryRun, Ignore, Policy, Retire, Watch, decide
from pgofflined.core.reports import CorrectedPageError, HypervisorActed, OtherError, Sighting
from pgofflined.journal_log import event
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
        incidents: Incidents,
    ) -> None:
        self.policy = policy
        self.history = history
        self.host_frames = host_frames
        self.cap_reached = False
        self._xen = xen
        self._clock = clock
        self._retirer = retirer
        self._store = store
        self._incidents = incidents
        self._load_facts()

    def cap_frames(self) -> int:
        """Frames that may be retired in all."""
        return self.policy.retire.max_retired.frames(self.host_frames)

    async def take(self, sighting: Sighting) -> None:
        """Act on one report."""
        report = sighting.report
        self._note_incident(sighting)
        match report:
            case CorrectedPageError():
                self._corrected(report, sighting.when)
            case HypervisorActed():
                await self._hypervisor_acted(report)
            case OtherError(mfn=mfn):
                event(log, logging.WARNING, Event.ERROR_SEEN, report.describe(), mfn=mfn)
                if mfn is not None:
                    self._note_poison(mfn)
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
        event(
            log, logging.WARNING, Event.ERROR_SEEN, report.describe(), mfn=mfn, domid=report.domid
        )
        hits = self.history.record(mfn, when, report.weight)
        self._store.add_hits([StoredHit(mfn, when, report.weight)])
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
            case Ignore(reason=reason) | Watch(reason=reason):
                log.info("mfn %#x is kept: %s", mfn, reason)
            case DryRun(reason=reason):
                what = f"mfn {mfn:#x} would be retired, were this no dry run: {reason}"
                event(log, logging.WARNING, Event.PAGE_WOULD_RETIRE, what, mfn=mfn)
            case CapReached(reason=reason):
                self.cap_reached = True
                what = f"mfn {mfn:#x} is kept although it is failing: {reason}"
                event(log, logging.ERROR, Event.CAP_REACHED, what, mfn=mfn)
            case Retire(reason=reason):
                self._retirer.take(mfn, Cause.CORRECTED, reason)
            case _:
                assert_never(verdict)

    async def _hypervisor_acted(self, report: HypervisorActed) -> None:
        event(
            log,
            logging.CRITICAL,
            Event.HYPERVISOR_ACTED,
            report.describe(),
            mfn=report.mfn,
            domid=report.domid,
        )
        domain = None
        if report.domid is not None:
            domain = await asyncio.to_thread(self._find, report.domid)
        self._retirer.note_hypervisor_action(report.mfn, domain, report.describe())
        self._save_facts()

    def _note_incident(self, sighting: Sighting) -> None:
        incident = uncorrected_error(sighting.report, sighting.when)
        if incident is None:
            return
        entry = None if incident.mfn is None else self._retirer.ledger.book.get(incident.mfn)
        # A scrubber goes on reporting a page that is out of use, which does no harm any more.
        if entry is None or entry.phase is not Phase.OFFLINED:
            self._incidents.note(incident)

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
