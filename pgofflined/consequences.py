"""What follows for a page from what was found out about it, and from how its job has ended."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import assert_never

from pgofflined.core.book import Phase
from pgofflined.core.domains import DomainIdentity, DomainInfo
from pgofflined.core.errors import PortError
from pgofflined.core.events import Event
from pgofflined.core.frames import Mfn
from pgofflined.core.ladder import HandOver, LookAgain, SaveRestore, TryAgain, next_rung
from pgofflined.core.outcomes import (
    Damaged,
    Exchanged,
    ExchangeReport,
    PageResult,
    Refusal,
    RefusalReason,
)
from pgofflined.core.policy import Backoff, Denied, Marking, Policy, domain_allowed
from pgofflined.core.relocation_outcomes import (
    NotRelocated,
    Relocated,
    RelocationOutcome,
    RelocationReason,
)
from pgofflined.journal_log import Chatter, event
from pgofflined.ledger import Ledger, tell
from pgofflined.takers import Exchanges, Nobody, Relocations
from pgofflined.triage import (
    Disposition,
    Later,
    LaterReason,
    Left,
    LeftReason,
    Offlined,
    ToExchange,
    ToRelocate,
)
from pgofflined.uncorrected import UncorrectedErrors

log = logging.getLogger(__name__)

# An owner that is ending, or a page that is being handed out, settles within moments; a host
# that cannot be asked may take longer.
SOON = Backoff(first=2.0, last=300.0)
_DYING_SECONDS = 10.0
# A page that is being handed to its owner has one a moment later.  One that Xen cannot name an
# owner of after these tries (2 + 4 + 8 s) is Xen's own, allocated without an owner.
_ANONYMOUS_TRIES = 3


# Whose the page is now, whether it keeps its mark, and what Xen did to it, is for triage to say.
_TRIAGE_TELLS = frozenset(
    {RelocationReason.DOMAIN_GONE, RelocationReason.DENIED, RelocationReason.BROKEN}
)
_TRIAGE_TELLS_OF_REFUSALS = frozenset({RefusalReason.DENIED, RefusalReason.BROKEN})


class Consequences:
    """Enters what became of pages into the book, and gives those that are to be moved to whom can.

    ``idle_scrub`` counts the pages that were retired in the way that leaves an idle CPU searching;
    ``idle_scrub_changed`` is told of it.  ``found_broken`` is told, with a sentence, of pages that
    Xen has broken and of whose error no source has told.  ``freed_marked`` is told of pages that
    their owner has freed with their mark on a Xen of which not ``frees_safely``.
    """

    def __init__(
        self,
        ledger: Ledger,
        errors: UncorrectedErrors,
        policy: Callable[[], Policy],
        chatter: Chatter,
        soon: Backoff = SOON,
        *,
        frees_safely: bool = True,
    ) -> None:
        self.idle_scrub = 0
        self.freed_marked: Callable[[Mfn], None] = lambda _mfn: None
        self._frees_safely = frees_safely
        # Whose guest will not be moved off them by an exchange, so that they are marked now.
        self.to_mark: frozenset[Mfn] = frozenset()
        self.idle_scrub_changed: Callable[[int], None] = lambda _count: None
        self.found_broken: Callable[[Mfn, str], None] = lambda _mfn, _detail: None
        self._ledger = ledger
        self._errors = errors
        self._policy = policy
        self._chatter = chatter
        self._soon = soon
        self._exchanges: Exchanges = Nobody()
        self._relocations: Relocations | None = None

    def connect(self, exchanges: Exchanges, relocations: Relocations | None) -> None:
        """Say who takes pages; ``relocations`` is None where the policy wants none."""
        self._exchanges = exchanges
        self._relocations = relocations

    def has_left(self, mfn: Mfn) -> None:
        """A page that was left in use, or waited, is out of use now."""
        self._is_offlined(mfn, "its owner has left it")

    def apply(self, mfn: Mfn, disposition: Disposition | PortError) -> None:
        """Enter what was found out about a page."""
        match disposition:
            case Offlined(detail=detail):
                self._is_offlined(mfn, detail)
            case ToExchange(domain=domain, marked=marked):
                self._to_exchange(mfn, domain, marked=marked)
            case ToRelocate(domain=domain):
                self._to_relocate(mfn, domain)
            case Left():
                self._leave(mfn, disposition)
            case Later(reason=LaterReason.ANONYMOUS as reason) if (
                self._ledger.waits(mfn, reason.value) >= _ANONYMOUS_TRIES
            ):
                detail = (
                    "Xen has it in use and names no owner of it, so it is Xen's own; it goes out "
                    "of use if Xen frees it; plan a reboot with badpage="
                )
                self._ledger.leave(mfn, LeftReason.XEN.value, detail, marked=True)
            case Later(reason=until, detail=detail, marked=marked, domain=owner):
                # The page of a domain that is being taken apart is free any moment.
                pause = self._soon
                if until is LaterReason.OWNER_DYING:
                    pause = Backoff(first=pause.first, last=min(pause.last, _DYING_SECONDS))
                self._ledger.wait(mfn, pause, until.value, detail, marked=marked, domain=owner)
            case PortError():
                self._ledger.wait(mfn, self._soon, "cannot_ask_xen", str(disposition))
            case _:
                assert_never(disposition)

    def _is_offlined(self, mfn: Mfn, detail: str) -> None:
        entry = self._ledger.book.get(mfn)
        if entry is not None and entry.marked:
            # Somebody owned it while it was marked, and freed it since.
            self.note_freed_dirty()
        is_poisoned = mfn in self._errors.poisoned
        if not self._frees_safely and entry is not None and (entry.marked or is_poisoned):
            self.freed_marked(mfn)
        self._ledger.offlined(mfn, detail)

    def _leave(self, mfn: Mfn, left: Left) -> None:
        if left.reason is LeftReason.NOT_RAM and mfn in self._errors.poisoned:
            # An address of a device: nobody is kept from anything for it.
            self._errors.remove(mfn)
        elif left.reason is LeftReason.BROKEN:
            # Not every source tells what Xen does by itself.
            if left.domain is not None:
                self._errors.add_wedged(left.domain.identity)
            else:
                self._ledger.disown(mfn)
            if mfn not in self._errors.poisoned:
                self._errors.add(mfn)
                self._ledger.is_poisoned(mfn)
                self.found_broken(mfn, left.detail)
        self._ledger.leave(
            mfn, left.reason.value, left.detail, marked=left.marked, domain=left.domain
        )

    def _to_exchange(self, mfn: Mfn, domain: DomainInfo, *, marked: bool) -> None:
        if self._exchanges.submit(domain.identity, domain.name, mfn):
            self._handed_over(mfn, domain, Phase.EXCHANGE, marked=marked)
        else:
            self._queue_full(mfn, "exchanges", marked=marked)

    def _to_relocate(self, mfn: Mfn, domain: DomainInfo) -> None:
        if self._relocations is None or not self._policy().relocation.target:
            detail = (
                "no migration is configured (relocation.target); it stays pending until "
                f"d{domain.domid} ends or is migrated by hand"
            )
            self._ledger.leave(mfn, "no_relocation", detail, marked=True, domain=domain)
        elif self._relocations.submit(domain.identity, domain.name, (mfn,)):
            self._handed_over(mfn, domain, Phase.RELOCATION, marked=True)
        else:
            self._queue_full(mfn, "migrations", marked=True)

    def _handed_over(self, mfn: Mfn, domain: DomainInfo, phase: Phase, *, marked: bool) -> None:
        mark = "marked offline-pending" if marked else "to be marked later"
        what = f"is {mark} and waits for {phase.value}"
        tell(logging.INFO, Event.PAGE_MARKED, what, mfn, domid=domain.domid)
        self._ledger.hand_over(mfn, domain, phase, marked=marked)

    def _queue_full(self, mfn: Mfn, which: str, *, marked: bool) -> None:
        detail = f"the queue of {which} is full"
        if self._chatter.admits(Event.QUEUE_FULL):
            tell(logging.WARNING, Event.QUEUE_FULL, f"waits: {detail}", mfn)
        self._ledger.wait(mfn, self._soon, "queue_full", detail, marked=marked)

    def exchange_finished(self, job: str, report: ExchangeReport) -> None:
        """Enter what became of the pages of one exchange job."""
        for result in report.results:
            self._exchange_result(job, report.domain, result)
        self._tell_exchange(job, report)

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
                self._not_relocated(kept, outcome)
            case _:
                assert_never(outcome)
        for mfn in gone:
            self.note_freed_dirty()
            self._ledger.offlined(mfn, f"its owner d{domain.domid} has left it")

    def _not_relocated(self, mfns: Iterable[Mfn], outcome: NotRelocated) -> None:
        """A page of a guest that ended has another owner, or none; a denied one loses its mark;
        one with an uncorrected error goes when its guest ends."""
        for mfn in mfns:
            if mfn in self._errors.poisoned or outcome.reason in _TRIAGE_TELLS:
                self._ledger.look_again([mfn])
            else:
                self._ledger.leave(mfn, outcome.reason.value, outcome.detail, marked=True)

    def _exchange_result(self, job: str, domain: DomainIdentity, result: PageResult) -> None:
        domid = domain.domid
        match result:
            case Exchanged(old=old, new=new, offlined=offlined):
                if offlined:
                    self.note_freed_dirty()
                    self._ledger.offlined(old, f"d{domid} was moved from it to mfn {new:#x}")
                else:
                    self._wait_for_xen(old)
            case Refusal():
                self._refused(job, domain, result)
            case Damaged(old=old, new=new, detail=detail):
                what = (
                    f"was exchanged, but d{domid} could not be put right: {detail}; restart it at "
                    "once, for its programs may read zeros there"
                )
                tell(logging.CRITICAL, Event.PAGE_DAMAGED, what, old, domid=domid, job=job)
                if new != old and not self._ledger.book[old].marked:
                    # It is free, and nothing keeps it from the next who needs a page.
                    self._wait_for_xen(old)
                else:
                    self._ledger.leave(old, "damaged", detail, marked=True)
            case _:
                assert_never(result)

    def _wait_for_xen(self, mfn: Mfn) -> None:
        """A page has left its guest, and is not out of use yet."""
        # What was marked while its guest was held is not booked as such.
        marked = self._ledger.book[mfn].marked
        if marked or self._policy().exchange.mark is not Marking.AFTER_SCRUB:
            self._ledger.wait(mfn, self._soon, "not_confirmed", "Xen has yet to take it out")
            return
        seconds = self._policy().exchange.scrub_wait
        detail = f"it is free, and is marked when there were {seconds:g} s to scrub it"
        self._ledger.wait(mfn, Backoff(first=seconds, last=self._soon.last), "scrubbing", detail)

    def _refused(self, job: str, domain: DomainIdentity, refusal: Refusal) -> None:
        mfn, reason, detail = refusal.mfn, refusal.reason, refusal.detail
        what = f"was not exchanged: {detail}"
        tell(logging.WARNING, Event.PAGE_REFUSED, what, mfn, domid=domain.domid, job=job)
        entry = self._ledger.book[mfn]
        marked = entry.marked
        if mfn in self._errors.poisoned or reason in _TRIAGE_TELLS_OF_REFUSALS:
            self._ledger.look_again([mfn])
            return
        # Where it is not marked, it is once it is known what follows, so as to go with its guest.
        policy = self._policy()
        rung = next_rung(reason, entry.attempts + 1, policy, marked=marked or self._frees_safely)
        is_last = isinstance(rung, SaveRestore | HandOver) or (
            isinstance(rung, TryAgain) and policy.exchange.retry.delay(entry.attempts + 1) is None
        )
        if is_last and not marked and self._frees_safely and mfn not in self.to_mark:
            self.to_mark |= {mfn}
            self._ledger.look_again([mfn])
            return
        self.to_mark -= {mfn}
        match rung:
            case LookAgain():
                self._ledger.wait(mfn, self._soon, reason.value, detail, marked=marked)
            case TryAgain():
                retry = self._policy().exchange.retry
                self._ledger.refused(mfn, retry, reason.value, detail, marked=marked)
            case SaveRestore():
                self._to_save(mfn, domain, refusal)
            case HandOver():
                self._ledger.leave(mfn, reason.value, detail, marked=marked)
            case _:
                assert_never(rung)

    def _to_save(self, mfn: Mfn, domain: DomainIdentity, refusal: Refusal) -> None:
        """Have a PV guest saved and restored, for its page cannot be exchanged."""
        name = self._ledger.book[mfn].domain_name
        reason, detail = refusal.reason.value, refusal.detail
        answer = domain_allowed(self._policy().domains, name, domain.uuid)
        if isinstance(answer, Denied):
            self._ledger.leave(mfn, reason, f"{detail}; {answer.reason}", marked=True)
        elif self._relocations is not None and self._relocations.submit(
            domain, name, (mfn,), by_saving=True
        ):
            what = f"was not exchanged, and d{domain.domid} is to be saved and restored: {detail}"
            tell(logging.WARNING, Event.PAGE_MARKED, what, mfn, domid=domain.domid)
            self._ledger.to_relocation(mfn)
        else:
            self._queue_full(mfn, "migrations", marked=True)

    def note_freed_dirty(self) -> None:
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
        self.idle_scrub_changed(self.idle_scrub)
