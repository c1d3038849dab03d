"""Drives every page that is to go, from the first report to its end.

One object on the event loop decides who does what next; hypercalls happen in threads.  Nothing
here polls: it sleeps until a report, an answer or the next due retry.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from pgofflined.aftercare import Aftercare, CareTimes
from pgofflined.consequences import SOON, Consequences
from pgofflined.core.book import Cause, Phase
from pgofflined.core.domains import DomainIdentity, DomainInfo, GuestKind
from pgofflined.core.errors import PortError
from pgofflined.core.events import Event
from pgofflined.core.frames import Mfn
from pgofflined.core.outcomes import (
    ExchangeReport,
)
from pgofflined.core.policy import Backoff, Denied, Marking, Policy, domain_allowed
from pgofflined.core.relocation_outcomes import (
    NotRelocated,
    Relocated,
    RelocationOutcome,
)
from pgofflined.exchanging import Exchanging
from pgofflined.guestcare import GuestCare
from pgofflined.journal_log import Chatter, event
from pgofflined.ledger import Ledger
from pgofflined.ports import Clock, Hypervisor, Journal, nothing
from pgofflined.takers import Exchanges, Relocations
from pgofflined.triage import (
    Disposition,
    Rules,
    triage,
)
from pgofflined.uncorrected import UncorrectedErrors, known_owners, poison_of
from pgofflined.unresolved import Occasion, look_once_more

T = TypeVar("T")

log = logging.getLogger(__name__)

# An owner that is ending, or a page that is being handed out, settles within moments; a host
# that cannot be asked may take longer.
_SOON = Backoff(first=2.0, last=300.0)
_ROUND = 256
# A page that is being handed to its owner has one a moment later.  One that Xen cannot name an
# owner of after these tries (2 + 4 + 8 s) is Xen's own, allocated without an owner.
_ANONYMOUS_TRIES = 3
# Seconds between two looks at pages that stay in use, should nothing else tell of a change.
_SLOWLY = 3600.0


class Retirer:
    """Everything that happens to pages that are to go.

    All methods but ``recover`` and ``poison_of`` belong to the loop's thread; ``exchanging`` is for
    the workers.  ``restored`` holds what came on this host of guests that we have moved: they have
    followed a request to suspend, and announce nothing in their new domain.  ``ended`` says of
    guests how they ended after our request.
    """

    def __init__(
        self,
        *,
        xen: Hypervisor,
        journal: Journal,
        clock: Clock,
        policy: Policy,
        ledger: Ledger,
        errors: UncorrectedErrors,
        times: CareTimes = CareTimes(),  # noqa: B008 - it does not change
        slowly: float = _SLOWLY,
        soon: Backoff = SOON,
        chatter: Chatter | None = None,
    ) -> None:
        self.ledger = ledger
        self.policy = policy
        self.errors = errors
        self.restored: frozenset[DomainIdentity] = frozenset()
        self.ended: dict[DomainIdentity, str] = {}
        self.host_frames = xen.total_frames()
        self.exchanging = Exchanging(
            xen=xen,
            journal=journal,
            clock=clock,
            policy=lambda: self.policy.exchange,
            poisoned=lambda: self.errors.poisoned,
            denial=self._exchange_denial,
            wedged=lambda domain: domain in self.errors.wedged,
            was_restored=lambda domain: domain in self.restored,
        )
        self.aftercare = Aftercare(
            xen,
            clock,
            times=times,
            ended=self.exchanging.done_with,
            keep=self.exchanging.keep_asked,
            under_way=self.exchanging.is_under_way,
        )
        self.care = GuestCare(self.exchanging, self.aftercare)
        self.consequences = Consequences(
            ledger, errors, lambda: self.policy, chatter or Chatter(clock.monotonic), soon
        )
        self._xen = xen
        self._clock = clock
        self._wake = asyncio.Event()
        self._stopping = False
        self._triage_began: float | None = None
        # Of its own: whoever else waits for Xen must not keep pages waiting, and no two looks at
        # pages overlap.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="triage")
        self._occasion: Occasion | None = None
        self._slowly = slowly
        self._next_slow_look = clock.monotonic() + slowly
        self._was_full = False
        # Told when there is room for further pages again.
        self.room_again: Callable[[], None] = nothing
        # Told of each page with an uncorrected error.
        self.poison_reported: Callable[[], None] = nothing

    def connect(self, exchanges: Exchanges, relocations: Relocations | None) -> None:
        """Say who takes pages; ``relocations`` is None where the policy wants none."""
        self.consequences.connect(exchanges, relocations)

    def cap_frames(self) -> int:
        """Frames that may be retired in all."""
        return self.policy.retire.max_retired.frames(self.host_frames)

    def has_room(self) -> bool:
        """Whether one more page may be taken in hand."""
        return self.ledger.book.counted() < self.cap_frames()

    def take(self, mfn: Mfn, cause: Cause, reason: str) -> None:
        """Take a page in hand; one that is already under way goes on as it was."""
        if not self.ledger.is_under_way(mfn):
            self.ledger.begin(mfn, cause, reason)
            self._wake.set()

    def take_poisoned(self, mfn: Mfn, reason: str) -> None:
        """Keep a page with an uncorrected error from being read, and mark it."""
        self.errors.add(mfn)
        self.poison_reported()
        entry = self.ledger.book.get(mfn)
        if entry is None or entry.phase in (Phase.TRIAGE, Phase.WAITING, Phase.LEFT):
            if entry is None or entry.cause is not Cause.UNCORRECTED or not entry.marked:
                self.ledger.begin(mfn, Cause.UNCORRECTED, reason)
            self._wake.set()
        elif not entry.phase.is_final:
            # Its job sees that it must not be read, and gives it back.
            self.ledger.is_poisoned(mfn)

    def note_hypervisor_action(
        self, mfn: Mfn | None, domain: DomainInfo | None, detail: str
    ) -> None:
        """Note that Xen broke a page by itself: it is never read, its owner never marked again."""
        if domain is not None:
            self.errors.add_wedged(domain.identity)
        if mfn is not None:
            self.take_poisoned(mfn, detail)

    def policy_changed(self, policy: Policy) -> None:
        """Follow another policy, also with what waits and with what was left under the old one."""
        self.policy = policy
        if self.on_hold() is None:
            self.ledger.release()
        self._look_once_more(Occasion.POLICY_CHANGED)

    def domain_ended(self) -> None:
        """Some domain has ended, perhaps the owner of a page that was left to it."""
        self._look_once_more(Occasion.DOMAIN_ENDED)

    def _look_once_more(self, occasion: Occasion) -> None:
        self._occasion = max(occasion, self._occasion or occasion)
        self._wake.set()

    def on_hold(self) -> str | None:
        """Why nothing is done about any page; None where it is."""
        if not self.policy.retire.enabled:
            return "retiring is switched off (retire.enabled = false)"
        if self.policy.retire.dry_run:
            return "this is a dry run (retire.dry_run = true)"
        return None

    async def run(self) -> None:
        """Look after the pages until stopped; begins with what an earlier run left."""
        self.ledger.begin_again()
        self._look_once_more(Occasion.STARTED)
        try:
            while not self._stopping:
                self._wake.clear()
                self._tell_room()
                if self.care:
                    await self._in_thread(self.care.look)
                if not await self._look_at_pages():
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(self._seconds_to_sleep()):
                            await self._wake.wait()
        finally:
            self._thread.shutdown(wait=False)

    def _tell_room(self) -> None:
        was_full, self._was_full = self._was_full, not self.has_room()
        if was_full and not self._was_full:
            self.room_again()

    async def _look_at_pages(self) -> bool:
        """Look at those that are due; whether there were any."""
        due = self.ledger.due(_ROUND)
        hold = self.on_hold()
        if due and hold is not None:
            for mfn in due:
                self.ledger.hold(mfn, f"nothing is done about it: {hold}")
        elif due:
            self._triage_began = self._clock.monotonic()
            settled = await self._in_thread(lambda: self._triage_all(due))
            self._triage_began = None
            for mfn, disposition in settled:
                self.consequences.apply(mfn, disposition)
        elif self._clock.monotonic() >= self._next_slow_look or self._occasion is not None:
            await self._look_at_unresolved()
        return bool(due)

    async def _look_at_unresolved(self) -> None:
        occasion = self._occasion or Occasion.SLOWLY
        self._occasion = None
        self._next_slow_look = self._clock.monotonic() + self._slowly
        left = tuple(self.ledger.book.in_phase(Phase.LEFT))
        if not left:
            return
        found = await self._in_thread(lambda: look_once_more(left, self._xen, occasion))
        # What has changed meanwhile is known better already.
        current = [mfn for mfn in found.offlined if self._is_left(mfn)]
        for mfn in current:
            self.consequences.has_left(mfn)
        if self.on_hold() is None:
            self.ledger.look_again(mfn for mfn in found.to_triage if self._may_be_taken_up(mfn))
        self._wake.set()

    def _is_left(self, mfn: Mfn) -> bool:
        entry = self.ledger.book.get(mfn)
        return entry is not None and entry.phase is Phase.LEFT

    def _may_be_taken_up(self, mfn: Mfn) -> bool:
        entry = self.ledger.book.get(mfn)
        if entry is None or entry.phase is not Phase.LEFT:
            return False
        return entry.is_counted or entry.cause is Cause.UNCORRECTED or self.has_room()

    async def _in_thread(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    def _seconds_to_sleep(self) -> float | None:
        waits = [self.ledger.seconds_to_next()]
        if self.care:
            waits.append(self.care.times.interval)
        if next(self.ledger.book.in_phase(Phase.LEFT), None) is not None:
            waits.append(max(0.0, self._next_slow_look - self._clock.monotonic()))
        return min((seconds for seconds in waits if seconds is not None), default=None)

    def seconds_in_triage(self) -> float:
        """For how long the triage under way has waited for Xen; 0 without one."""
        began = self._triage_began
        return 0.0 if began is None else self._clock.monotonic() - began

    def stop(self) -> None:
        """Begin nothing new; ``run`` returns.  What guests are owed then is ``care``'s."""
        self._stopping = True
        self._wake.set()

    def recover(self) -> None:
        """End what an earlier process left of exchanges; makes hypercalls, for a thread."""
        self.care.recover()

    def exchange_finished(self, job: str, report: ExchangeReport) -> None:
        """Enter what became of the pages of one exchange job."""
        self.aftercare.note(
            job,
            report.domain,
            stuck=report.stuck,
            may_suspend_late=report.may_suspend_late,
            standing=report.standing,
        )
        if report.ended is not None:
            self.ended[report.domain] = report.ended
            domid = report.domain.domid
            event(log, logging.CRITICAL, Event.GUEST_ENDED, report.ended, domid=domid, job=job)
        self.consequences.exchange_finished(job, report)
        self._wake.set()

    def relocation_finished(self, domain: DomainIdentity, outcome: RelocationOutcome) -> None:
        """Enter what became of the pages of one migration job."""
        if isinstance(outcome, NotRelocated) and outcome.stuck is not None:
            self.aftercare.leave_to_operator(domain, outcome.stuck)
        if isinstance(outcome, Relocated) and outcome.new_domid is not None:
            self.restored |= {DomainIdentity(outcome.new_domid, domain.uuid)}
        self.consequences.relocation_finished(domain, outcome)
        self._wake.set()

    def save_failed(self, domain: DomainIdentity) -> None:
        """Look after a guest that was asked to suspend itself for a save, which has failed."""
        self.exchanging.hold_off(domain)
        self.aftercare.note("save", domain, stuck=None, may_suspend_late=True, is_kept=False)
        self._wake.set()

    def _triage_all(self, mfns: Sequence[Mfn]) -> list[tuple[Mfn, Disposition | PortError]]:
        """Triage pages in one thread, so that the pages of one domain can go in one suspend."""
        rules = Rules(
            denial=self._exchange_denial,
            wedged=lambda domain: domain.identity in self.errors.wedged,
            mark_pv_later=self.policy.exchange.mark is Marking.AFTER_SCRUB,
        )
        settled: list[tuple[Mfn, Disposition | PortError]] = []
        for mfn in mfns:
            poisoned = mfn in self.errors.poisoned
            try:
                settled.append((mfn, triage(mfn, self._xen, rules, poisoned=poisoned)))
            except PortError as error:
                settled.append((mfn, error))
        return settled

    def poison_of(self, domain: DomainInfo) -> str | None:
        """The page of a domain that must not be read, in a sentence.  Asks Xen, for a thread."""
        poisoned = self.errors.poisoned
        return poison_of(domain, poisoned, self._xen, known_owners(self.ledger.book, poisoned))

    def denial(self, domain: DomainInfo) -> str | None:
        """Why a domain may not be suspended, saved or migrated now; None where it may."""
        hold = self.on_hold()
        if hold is not None:
            return hold
        answer = domain_allowed(self.policy.domains, domain.name, domain.uuid)
        return answer.reason if isinstance(answer, Denied) else None

    def _exchange_denial(self, domain: DomainInfo) -> str | None:
        denial = self.denial(domain)
        if denial is None and domain.kind is GuestKind.PV and not self.policy.exchange.enabled:
            return "exchanging pages of PV guests is switched off (exchange.enabled = false)"
        return denial
