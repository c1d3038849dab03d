"""Drives every page that is to go, from the first report to its end.

One object on the event loop decides who does what next; hypercalls happen in threads.  Nothing
here polls: it sleeps until a report, an answer or the next due retry.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from pgofflined.aftercare import Aftercare, CareTimes
from pgofflined.consequences import SOON, Consequences
from pgofflined.core.book import NOT_RAM, Cause, PageEntry, Phase
from pgofflined.core.domains import DomainIdentity, DomainInfo, GuestKind
from pgofflined.core.errors import PortError
from pgofflined.core.events import Event
from pgofflined.core.frames import Mfn
from pgofflined.core.offline import OfflineState
from pgofflined.core.outcomes import (
    ExchangeReport,
)
from pgofflined.core.policy import Backoff, Denied, Marking, Policy, domain_allowed
from pgofflined.core.relocation_outcomes import Relocated, RelocationOutcome
from pgofflined.exchanging import Exchanging
from pgofflined.guestcare import GuestCare
from pgofflined.indoubt import GuestsInDoubt
from pgofflined.journal_log import Chatter, event
from pgofflined.ledger import Ledger
from pgofflined.marks import take_marks_back
from pgofflined.ports import Clock, Hypervisor, Journal, nothing
from pgofflined.takers import Exchanges, Relocations
from pgofflined.triage import (
    Disposition,
    Left,
    LeftReason,
    Rules,
    triage,
)
from pgofflined.uncorrected import UncorrectedErrors, known_owners, poison_of
from pgofflined.unresolved import Found, Occasion, look_once_more

T = TypeVar("T")

log = logging.getLogger(__name__)

_ROUND = 256
# Seconds between two looks at pages that stay in use, should nothing else tell of a change.
_SLOWLY = 3600.0
# Where nothing is done about a page for the time being.
_RESTING = (Phase.LEFT, Phase.WAITING)


class Retirer:
    """Everything that happens to pages that are to go.

    All methods but ``recover`` and ``poison_of`` belong to the loop's thread; ``exchanging`` is for
    the workers.  ``restored`` holds what came on this host of guests that we have moved: they have
    followed a request to suspend, and announce nothing in their new domain.
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
        in_doubt: GuestsInDoubt | None = None,
    ) -> None:
        self.ledger = ledger
        self.policy = policy
        self.errors = errors
        self.restored: frozenset[DomainIdentity] = frozenset()
        self.host_frames = xen.total_frames()
        self.exchanging = Exchanging(
            xen=xen,
            journal=journal,
            clock=clock,
            policy=lambda: self.policy.exchange,
            poisoned=lambda: self.errors.poisoned,
            denial=self.denial,
            wedged=self.errors.is_wedged,
            was_restored=lambda domain: domain in self.restored,
        )
        self.aftercare = Aftercare(
            xen,
            clock,
            times=times,
            ended=self.exchanging.done_with,
            keep=self.exchanging.keep_asked,
            under_way=self.exchanging.is_under_way,
            crashed=self.exchanging.has_crashed,
        )
        self.in_doubt = GuestsInDoubt(xen, clock) if in_doubt is None else in_doubt
        self.care = GuestCare(self.exchanging, self.aftercare, self.in_doubt)
        self.consequences = Consequences(
            ledger,
            errors,
            lambda: self.policy,
            chatter or Chatter(clock.monotonic),
            soon,
            frees_safely=xen.version().offlines_free_frames_safely,
        )
        self._xen = xen
        self._clock = clock
        self._wake = asyncio.Event()
        self._stopping = False
        self._call_began: float | None = None
        # Of its own: whoever else waits for Xen must not keep pages waiting, and no two looks at
        # pages overlap.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="triage")
        self._occasion: Occasion | None = None
        self._soon = soon
        self._missed_looks = 0
        self._slowly = slowly
        # Seconds to the look after the next one.
        self._pause = slowly
        self._next_look = clock.monotonic() + slowly
        self._next_slow_look = clock.monotonic() + slowly
        self._was_full = False
        # Told when there is room for further pages again.
        self.room_again: Callable[[], None] = nothing
        # Told when all pages were looked at under the policy that is in force.
        self.policy_taken_up: Callable[[], None] = nothing
        # Why it is not known yet which pages have had uncorrected errors in this boot.
        self.forgotten: str | None = None
        # Told of pages that were out of use, and whether they are still.
        self.doubt_settled: Callable[[Mfn, bool], None] = lambda _mfn, _is_offlined: None
        self._doubted: set[Mfn] = set()
        # Told of each page with an uncorrected error.
        self.poison_reported: Callable[[], None] = nothing
        # Told when guests that need it were looked after.
        self.looked_after: Callable[[], None] = nothing

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
        """Keep a page with an uncorrected error from being read, and mark it.

        The same may be reported by the thousand: it is told once.
        """
        entry = self.ledger.book.get(mfn)
        if entry is not None and entry.reason == NOT_RAM:
            return
        self.errors.add(mfn)
        self.poison_reported()
        if entry is None:
            self.ledger.begin(mfn, Cause.UNCORRECTED, reason)
        elif entry.phase in (Phase.EXCHANGE, Phase.RELOCATION):
            # Its job sees that it must not be read, and gives it back.
            self.ledger.is_poisoned(mfn)
        elif entry.phase is Phase.OFFLINED:
            self.doubt(mfn)
        elif entry.cause is not Cause.UNCORRECTED:
            self.ledger.begin(mfn, Cause.UNCORRECTED, reason)
        elif not entry.marked:
            self.ledger.look_again([mfn])
        self._wake.set()

    def take_held_back(self, found: Mapping[Mfn, OfflineState]) -> None:
        """Book pages that Xen holds back and of which nothing is known any more.

        Those in use may have had an uncorrected error, and are never read.
        """
        for mfn, state in found.items():
            if not state & OfflineState.OFFLINED:
                reason = (
                    "Xen holds it back, and what was stored of it is lost, so it may have had one"
                )
                self.take_poisoned(mfn, reason)
            elif mfn not in self.ledger.book:
                entry = PageEntry(
                    mfn=mfn,
                    cause=Cause.CORRECTED,
                    phase=Phase.OFFLINED,
                    since=self._clock.now(),
                    marked=True,
                    detail="it was out of use when the stored state was lost",
                )
                self.ledger.put(entry)

    def doubt(self, mfn: Mfn) -> None:
        """Ask Xen whether a page is still out of use, of which an error was reported.

        Somebody may have given it back (`xen-hptool mem-online`).  ``doubt_settled`` is told.
        """
        self._doubted.add(mfn)
        self._wake.set()

    def policy_changed(self, policy: Policy) -> None:
        """Follow another policy, also with what waits and with what was left under the old one."""
        self.policy = policy
        if self.on_hold() is None:
            self.ledger.release()
        self._look_once_more(Occasion.POLICY_CHANGED)

    def domain_ended(self) -> None:
        """Some domain has ended, perhaps the owner of a page that was left to it.

        That is heard when it begins to be taken apart.  What Xen has allocated for it, or somebody
        else still maps, is freed later, and nobody tells: so there are looks after this one too,
        with growing pauses.
        """
        self._pause = min(self._soon.first, self._slowly)
        self._look_once_more(Occasion.DOMAIN_ENDED)

    def _look_once_more(self, occasion: Occasion) -> None:
        self._occasion = max(occasion, self._occasion or occasion)
        self._wake.set()

    def on_hold(self) -> str | None:
        """Why nothing is done about any page; None where it is."""
        if self.forgotten is not None:
            return self.forgotten
        if not self.policy.retire.enabled:
            return "retiring is switched off (retire.enabled = false)"
        if self.policy.retire.dry_run:
            return "this is a dry run (retire.dry_run = true)"
        return None

    async def run(self) -> None:
        """Look after the pages until stopped; begins with what an earlier run left."""
        self.ledger.begin_again()
        await self._take_dangerous_marks_back()
        self._look_once_more(Occasion.DOMAIN_ENDED)
        try:
            while not self._stopping:
                self._wake.clear()
                self._tell_room()
                if self.care:
                    await self._in_thread(self.care.look)
                    self.looked_after()
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
        await self._look_at_doubted()
        due = self.ledger.due(_ROUND)
        hold = self.on_hold()
        if due and hold is not None:
            for mfn in due:
                self.ledger.hold(mfn, f"nothing is done about it: {hold}")
        elif due:
            settled = await self._in_thread(lambda: self._triage_all(due))
            for mfn, poisoned, disposition in settled:
                if poisoned or mfn not in self.errors.poisoned:
                    self.consequences.apply(mfn, disposition)
                else:  # since it was looked at
                    self.ledger.look_again([mfn])
        elif self._is_time_to_look():
            await self._look_at_unresolved()
        return bool(due)

    async def _look_at_doubted(self) -> None:
        if not self._doubted:
            return
        doubted, self._doubted = self._doubted, set()
        answers = await self._in_thread(lambda: [(mfn, self._is_in_use(mfn)) for mfn in doubted])
        for mfn, is_in_use in answers:
            if is_in_use is None:
                self._doubted.add(mfn)  # it is asked again with whatever comes next
                continue
            entry = self.ledger.book.get(mfn)
            if is_in_use and entry is not None and entry.phase is Phase.OFFLINED:
                log.warning("mfn %#x was out of use, and somebody has given it back to Xen", mfn)
                self.ledger.forget(mfn)
            self.doubt_settled(mfn, not is_in_use)

    def _is_in_use(self, mfn: Mfn) -> bool | None:
        """Whether a frame is not out of use; None where Xen cannot be asked."""
        try:
            return not self._xen.query(mfn) & OfflineState.OFFLINED
        except PortError:
            return None

    def _is_time_to_look(self) -> bool:
        is_time = self._clock.monotonic() >= self._next_look
        return is_time or (self._occasion is not None and not self._missed_looks)

    async def _look_at_unresolved(self) -> None:
        await self._take_dangerous_marks_back()
        now = self._clock.monotonic()
        occasion = self._occasion
        if occasion is not Occasion.POLICY_CHANGED:
            # Not put off for ever where domains come and go.
            is_time = now >= self._next_slow_look
            occasion = Occasion.SLOWLY if is_time else Occasion.DOMAIN_ENDED
        self._occasion = None
        self._next_look = now + self._pause
        self._pause = min(2 * self._pause, self._slowly)
        resting = tuple(self.ledger.book.in_phase(*_RESTING))
        found: Found | None = Found(offlined=(), to_triage=())
        if resting:
            found = await self._in_thread(lambda: look_once_more(resting, self._xen, occasion))
        if found is None:
            self._look_is_missed(occasion)
            return
        self._missed_looks = 0
        if occasion is not Occasion.DOMAIN_ENDED:
            self._next_slow_look = now + self._slowly
        # What has changed meanwhile is known better already.
        current = [mfn for mfn in found.offlined if self._rests(mfn)]
        for mfn in current:
            self.consequences.has_left(mfn)
        if self.on_hold() is None:
            self.ledger.look_again(mfn for mfn in found.to_triage if self._may_be_taken_up(mfn))
        if occasion is Occasion.POLICY_CHANGED:
            self.policy_taken_up()
        self._wake.set()

    async def _take_dangerous_marks_back(self) -> None:
        """Of pages that no job has, whatever the policy says: see ``marks``.

        Another release has left them, or they could not be taken back when it was time.
        """
        if self._xen.version().offlines_free_frames_safely:
            return
        book = self.ledger.book
        resting = book.in_phase(Phase.TRIAGE, *_RESTING)
        marked = [entry.mfn for entry in resting if entry.marked]
        answers = await self._in_thread(
            lambda: [
                (mfn, take_marks_back(self._xen, [mfn]), self._is_in_use(mfn)) for mfn in marked
            ]
        )
        for mfn, problems, is_in_use in answers:
            for problem in problems:
                log.critical("%s", problem)
            # One that was freed with its mark is a matter of its own.
            if is_in_use and not problems:
                self.ledger.unmark(mfn)

    def _look_is_missed(self, occasion: Occasion) -> None:
        """Xen could not be asked (xenstored may restart): the occasion comes again."""
        self._occasion = max(occasion, self._occasion or occasion)
        self._missed_looks += 1
        wait = self._soon.delay(self._missed_looks) or self._soon.last
        self._next_look = self._clock.monotonic() + wait

    def _rests(self, mfn: Mfn) -> bool:
        entry = self.ledger.book.get(mfn)
        return entry is not None and entry.phase in _RESTING

    def _may_be_taken_up(self, mfn: Mfn) -> bool:
        entry = self.ledger.book.get(mfn)
        if entry is None or entry.phase not in _RESTING:
            return False
        return entry.is_counted or entry.cause is Cause.UNCORRECTED or self.has_room()

    async def _in_thread(self, call: Callable[[], T]) -> T:
        self._call_began = self._clock.monotonic()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, call)
        finally:
            self._call_began = None

    def _seconds_to_sleep(self) -> float | None:
        waits = [self.ledger.seconds_to_next()]
        if self.care:
            waits.append(self.care.times.interval)
        if next(self.ledger.book.in_phase(*_RESTING), None) is not None:
            waits.append(max(0.0, self._next_look - self._clock.monotonic()))
        return min((seconds for seconds in waits if seconds is not None), default=None)

    def seconds_in_a_call(self) -> float:
        """For how long what is asked of Xen just now has been waited for; 0 without anything."""
        began = self._call_began
        return 0.0 if began is None else self._clock.monotonic() - began

    def stop(self) -> None:
        """Begin nothing new; ``run`` returns.  What guests are owed then is ``care``'s."""
        self._stopping = True
        self._wake.set()

    def recover(self) -> None:
        """End what an earlier process left of exchanges; makes hypercalls, for a thread.

        What came of guests that we have moved is forgotten where it is gone since.
        """
        self.care.recover()
        with contextlib.suppress(PortError):
            self.restored &= {info.identity for info in self._xen.conditions()}

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
            domid = report.domain.domid
            event(log, logging.CRITICAL, Event.GUEST_ENDED, report.ended, domid=domid, job=job)
        self.consequences.exchange_finished(job, report)
        self._wake.set()

    def relocation_finished(self, domain: DomainIdentity, outcome: RelocationOutcome) -> None:
        """Enter what became of the pages of one migration job."""
        if outcome.stuck is not None:
            self.in_doubt.note(domain, outcome.stuck)
        if isinstance(outcome, Relocated) and outcome.new_domid is not None:
            # In place of what it was before, which is gone.
            new = DomainIdentity(outcome.new_domid, domain.uuid)
            self.restored = (self.restored - {domain}) | {new}
        self.consequences.relocation_finished(domain, outcome)
        self._wake.set()

    def guest_ended(self, domain: DomainIdentity, how: str) -> None:
        """A guest has ended when a save or a migration had asked it to suspend itself."""
        self.exchanging.has_ended(domain)
        event(log, logging.CRITICAL, Event.GUEST_ENDED, how, domid=domain.domid)

    def asked_in_vain(self, domain: DomainIdentity) -> None:
        """Look after a guest that a save or migration that failed had asked to suspend itself."""
        self.exchanging.hold_off(domain)
        self.aftercare.note("relocation", domain, stuck=None, may_suspend_late=True, is_kept=False)
        self._wake.set()

    def _triage_all(self, mfns: Sequence[Mfn]) -> list[tuple[Mfn, bool, Disposition | PortError]]:
        """Triage pages in one thread, so that the pages of one domain can go in one suspend.

        With each, whether an uncorrected error of it was known of.
        """
        broken: set[DomainIdentity] = set()
        rules = Rules(
            denial=self.denial,
            wedged=lambda domain: (
                domain.identity in broken or self.errors.is_wedged(domain.identity)
            ),
            mark_pv_later=lambda mfn: (
                self.policy.exchange.mark is Marking.AFTER_SCRUB
                and mfn not in self.consequences.to_mark
            ),
        )
        settled: list[tuple[Mfn, bool, Disposition | PortError]] = []
        for mfn in mfns:
            poisoned = mfn in self.errors.poisoned
            try:
                disposition = triage(mfn, self._xen, rules, poisoned=poisoned)
                if isinstance(disposition, Left) and disposition.reason is LeftReason.BROKEN:
                    broken |= set() if disposition.domain is None else {disposition.domain.identity}
                settled.append((mfn, poisoned, disposition))
            except PortError as error:
                settled.append((mfn, poisoned, error))
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
        if isinstance(answer, Denied):
            return answer.reason
        if domain.kind is GuestKind.PV and not self.policy.exchange.enabled:
            return "exchanging pages of PV guests is switched off (exchange.enabled = false)"
        return None
