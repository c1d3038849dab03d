"""Exchange jobs as the worker threads run them, and the end of those that were cut off."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from queue import SimpleQueue
from typing import assert_never
from uuid import UUID

from pgofflined.core.domains import DomainIdentity, DomainInfo
from pgofflined.core.errors import PortError
from pgofflined.core.frames import Mfn
from pgofflined.core.offline import WhenMarked
from pgofflined.core.outcomes import ExchangeReport, Refusal, RefusalReason, Standing
from pgofflined.core.policy import ExchangePolicy, Marking
from pgofflined.core.recovery import Recovered, RecoveryReport, crashed_when_asked
from pgofflined.core.suspending import Objection, SuspendSupport, ended_before, objection
from pgofflined.marks import take_marks_back
from pgofflined.ports import (
    Clock,
    Hypervisor,
    JobRecord,
    Journal,
    SuspendLimits,
    UnfinishedJob,
)
from pgofflined.recoverylog import tell

log = logging.getLogger(__name__)

# What keeps a guest from being put right (dom0 short of memory, xenstored not up yet) passes within
# so many tries, so many seconds apart at least, or not at all.
RECOVERY_TRIES = 12
RECOVERY_SECONDS = 5.0


class Exchanging:
    """Runs jobs, by the policy that is in force when each begins.

    ``poisoned`` gives the frames whose contents must never be read, ``denial`` why a domain is not
    to be suspended now, if it is not; ``was_restored`` says whether a domain is what came of a
    guest that has suspended itself when asked, and ``wedged`` whether Xen has broken a page of a
    domain by itself.  ``noted`` keeps what a person has to see to, before the record of it is put
    away.  No method but ``run``, ``is_under_way``, ``hold_off``, ``done_with`` and ``objection``
    may be called from several threads.  A job of this process whose guest it can neither put right
    nor let go is tried again as if an earlier process had left it.
    """

    def __init__(
        self,
        *,
        xen: Hypervisor,
        journal: Journal,
        clock: Clock,
        policy: Callable[[], ExchangePolicy],
        poisoned: Callable[[], frozenset[Mfn]],
        denial: Callable[[DomainInfo], str | None] = lambda _: None,
        was_restored: Callable[[DomainIdentity], bool] = lambda _: False,
        wedged: Callable[[DomainIdentity], bool] = lambda _domain: False,
        noted: Callable[[RecoveryReport], None] = lambda _: None,
    ) -> None:
        self._xen = xen
        self._journal = journal
        self._clock = clock
        self._policy = policy
        self._poisoned = poisoned
        self._denial = denial
        self._was_restored = was_restored
        self._wedged = wedged
        self._noted = noted
        # Both are replaced as a whole: the loop reads them while a thread tries again.
        self._rest: tuple[UnfinishedJob, ...] = ()
        self._last: Mapping[DomainIdentity, RecoveryReport] = {}
        self._tries: Counter[DomainIdentity] = Counter()
        # Jobs not ended yet, and guests that are looked after since: a new job would suspend the
        # guest for us, and who is to let it go would do so in the middle of that.
        self._unended: set[DomainIdentity] = set()
        self._looked_after: set[DomainIdentity] = set()
        # And the other way round: nobody looks after a guest that a job of this process may hold.
        self._under_way: set[DomainIdentity] = set()
        # Guests of whom no record could be made; it is told once.
        self._unkept: set[DomainIdentity] = set()
        self._lock = threading.Lock()
        # Guests that ended after our request.  A toolstack that starts one again gives it the same
        # uuid, and nothing has changed that would let it survive the next request.
        self._ended: set[UUID] = set()
        self._next_try = 0.0
        # From the threads in which jobs run.
        self._given_up: SimpleQueue[UnfinishedJob] = SimpleQueue()
        self._not_recovered: SimpleQueue[RecoveryReport] = SimpleQueue()
        self._took_over = False

    def take_over(self, earlier: Exchanging) -> None:
        """Go on with what another of this process has begun to recover, in place of ``recover``.

        It must not be used any more.
        """
        names = (
            "_rest",
            "_last",
            "_tries",
            "_unended",
            "_looked_after",
            "_next_try",
            "_not_recovered",
            "_ended",
            "_unkept",
        )
        vars(self).update({name: vars(earlier).pop(name) for name in names})
        self._took_over = True

    def run(self, domain: DomainIdentity, mfns: tuple[Mfn, ...]) -> ExchangeReport:
        """Exchange pages; never raises for a single job's sake."""
        with self._lock:
            if domain in self._unended or domain in self._looked_after:
                detail = f"what was left of an earlier exchange in d{domain.domid} comes first"
                return _refused(domain, mfns, RefusalReason.DOMAIN_BUSY, detail)
            self._under_way.add(domain)
        try:
            return self._run(domain, mfns)
        finally:
            with self._lock:
                self._under_way.discard(domain)

    def is_under_way(self, domain: DomainIdentity) -> bool:
        """Whether a job is at work on the domain, or not ended yet, and may hold it.

        Its record must not be touched, and nobody else may let the guest run.  None begins after
        ``hold_off``, so that this stays False once it is.
        """
        with self._lock:
            return domain in self._under_way or domain in self._unended

    def _run(self, domain: DomainIdentity, mfns: tuple[Mfn, ...]) -> ExchangeReport:
        # numpy comes with it, which a daemon that has nothing to do need not hold.
        from pgofflined.exchanger import exchange

        policy = self._policy()
        try:
            report = exchange(
                domain,
                mfns,
                never_read=self._poisoned,
                denial=self._denial,
                xen=self._xen,
                journal=self._journal,
                clock=self._clock,
                limits=SuspendLimits(
                    acknowledge=policy.acknowledge_timeout,
                    suspend=policy.suspend_timeout,
                    blackout=policy.max_blackout,
                ),
                objection=self.objection,
                when=self._when_marked(policy),
                unended=self._give_up,
                wedged=lambda: self._wedged(domain),
            )
            if report.stuck is not None or report.may_suspend_late:
                self.hold_off(domain)
            if report.ended is not None:
                self._ended.add(domain.uuid)
            if not self._xen.version().offlines_free_frames_safely:
                self._withdraw(report)
        except Exception:  # a fault in one job must not end the daemon of all other guests
            log.exception("the exchange for d%d failed by a fault of our own", domain.domid)
            detail = "a fault of our own, which the journal tells; please report it"
            report = _refused(domain, mfns, RefusalReason.INTERNAL, detail)
        return report

    def has_crashed(self, domain: DomainIdentity) -> None:
        """A guest has crashed that was looked after because it might follow a request yet."""
        detail = crashed_when_asked(domain.domid)
        report = RecoveryReport(domain=domain, outcome=Recovered.CRASHED, detail=detail)
        tell(report)
        self.has_ended(domain)
        self._note(report)

    def has_ended(self, domain: DomainIdentity) -> None:
        """A guest has ended that somebody had asked for us: it is not asked again."""
        self._ended.add(domain.uuid)

    def objection(self, domain: DomainInfo, support: SuspendSupport) -> Objection | None:
        """Why a domain must not be asked to suspend itself now, by anybody for us."""
        if domain.uuid in self._ended:
            return ended_before(domain.domid)
        return objection(
            domain,
            support,
            self._policy().ask_unannounced,
            was_restored=self._was_restored(domain.identity),
        )

    def hold_off(self, domain: DomainIdentity) -> None:
        """Begin no job in a guest that is looked after, before ``done_with``."""
        with self._lock:
            self._looked_after.add(domain)

    def done_with(self, domain: DomainIdentity) -> None:
        """Nobody has to look after the guest of an ended job any more."""
        self._journal.done_with(domain)
        with self._lock:
            self._looked_after.discard(domain)

    def keep_asked(self, info: DomainInfo) -> bool:
        """Have a later process know of a guest that may follow a request that was no exchange's.

        Whether it does now.  Of a job that is not ended there is a record, which must stay.
        """
        with self._lock:
            if info.identity in self._unended:
                return True
        record = JobRecord(
            domain=info.identity,
            shared_info=info.shared_info,
            cpu_time=info.cpu_time,
            began=self._clock.monotonic(),
        )
        try:
            self._journal.open(record).leave()
        except PortError as error:
            if info.identity not in self._unkept:
                log.error("should this process end, nobody looks after d%d: %s", info.domid, error)
            self._unkept.add(info.identity)
            return False
        return True

    def _give_up(self, unfinished: UnfinishedJob) -> None:
        # Its record must not be replaced by that of another job.
        self._unended.add(unfinished.record.domain)
        self._given_up.put(unfinished)

    def _when_marked(self, policy: ExchangePolicy) -> WhenMarked:
        if not self._xen.version().offlines_free_frames_safely:
            return WhenMarked.WHEN_HELD
        match policy.mark:
            case Marking.BEFORE:
                return WhenMarked.BEFORE
            case Marking.AFTER_SCRUB:
                return WhenMarked.AFTER_SCRUB
            case _:
                assert_never(policy.mark)

    def _withdraw(self, report: ExchangeReport) -> None:
        """Take the marks of refused pages back where none may stay.

        The job has taken back what it has set; what is left is what it could not, and marks that
        the pages had before, from another program or a daemon that set them earlier.
        """
        refused = [result.mfn for result in report.results if isinstance(result, Refusal)]
        for problem in take_marks_back(self._xen, refused):
            log.critical("%s", problem)

    def recover(self) -> tuple[RecoveryReport, ...]:
        """End every job that an earlier process left, one after the other; tells each.

        Those that could not be ended are tried again by ``recover_rest``.
        """
        if self._took_over:
            return self.recover_rest()
        return self._recover(self._journal.unfinished())

    def recover_rest(self) -> tuple[RecoveryReport, ...]:
        """Try the jobs again that could not be ended, if it is time for that."""
        if self._clock.monotonic() < self._next_try:
            return ()
        jobs = [*self._rest]
        while not self._given_up.empty():
            jobs.append(self._given_up.get())
            # Not to be missing for a moment, for whoever asks whether there are any.
            self._rest = tuple(jobs)
        return self._recover(jobs)

    def take_not_recovered(self) -> Sequence[RecoveryReport]:
        """Jobs that a person has to see to, each given once; for the loop's thread."""
        reports = []
        while not self._not_recovered.empty():
            reports.append(self._not_recovered.get())
        return reports

    @property
    def has_rest(self) -> bool:
        """Whether there are jobs to try again."""
        return bool(self._rest) or not self._given_up.empty()

    @property
    def holds_up_a_stop(self) -> bool:
        """Whether trying again may help one of them: not where only a person can."""
        return not self._given_up.empty() or any(
            not self._is_held(unfinished.record.domain) for unfinished in self._rest
        )

    def left(self) -> Sequence[tuple[DomainIdentity, str]]:
        """The jobs that are not ended, and how far that is."""
        domains = [unfinished.record.domain for unfinished in self._rest]
        last = self._last
        return [(domain, last[domain].detail) for domain in domains if domain in last]

    def _is_held(self, domain: DomainIdentity) -> bool:
        last = self._last.get(domain)
        return last is not None and last.outcome is Recovered.HELD

    def _recover(self, jobs: Sequence[UnfinishedJob]) -> tuple[RecoveryReport, ...]:
        self._next_try = self._clock.monotonic() + RECOVERY_SECONDS
        self._unended.update(unfinished.record.domain for unfinished in jobs)
        self._rest = tuple(jobs)
        reports = [self._recover_next(unfinished) for unfinished in jobs]
        return tuple(report for report in reports if report is not None)

    def _recover_next(self, unfinished: UnfinishedJob) -> RecoveryReport | None:
        """Try to end a job; what became of it, if somebody has to know."""
        report = self._recover_one(unfinished)
        domain = report.domain
        before = self._last.get(domain)
        rest = replace(unfinished, group=None) if report.is_whole else unfinished
        match report.outcome:
            case Recovered.BUSY | Recovered.HELD:
                self._put(domain, unfinished, rest, report)
                # That may last for hours, and is told once.
                if before is not None and before.detail == report.detail:
                    return None
                tell(report)
                return report if report.outcome is Recovered.HELD else None
            case Recovered.NOT_YET:
                self._put(domain, unfinished, rest, report)
                tell(report)
                self._tries[domain] += 1
                return None
            case _:
                tell(report)
                if report.outcome is Recovered.CRASHED:
                    self.has_ended(domain)
                del self._tries[domain]
                if report.stuck is not None or report.may_suspend_late:
                    self.hold_off(domain)
                self._put(domain, unfinished, None, None)
                self._unended.discard(domain)
                return report

    def _put(
        self,
        domain: DomainIdentity,
        old: UnfinishedJob,
        new: UnfinishedJob | None,
        report: RecoveryReport | None,
    ) -> None:
        rest = [new if job is old else job for job in self._rest]
        self._rest = tuple(job for job in rest if job is not None)
        others = {other: last for other, last in self._last.items() if other != domain}
        self._last = others if report is None else {**others, domain: report}

    def _note(self, report: RecoveryReport) -> None:
        self._not_recovered.put(report)
        try:
            self._noted(report)
        except Exception:  # it must keep no guest from what is still to be done for it
            log.exception("what d%d needs could not be noted", report.domain.domid)

    def _recover_one(self, unfinished: UnfinishedJob) -> RecoveryReport:
        from pgofflined.exchanger import recover
        from pgofflined.exchanger.poison import Poison

        domain = unfinished.record.domain
        last = self._tries[domain] >= RECOVERY_TRIES
        try:
            return recover(
                unfinished,
                self._xen,
                now=self._clock.monotonic(),
                poison=Poison(self._poisoned),
                last_try=last,
                noted=self._note,
            )
        except Exception:  # one guest's record must not keep the daemon from all others
            if not self._is_held(domain):  # that lasts, and is told once
                log.exception("the job of d%d could not be ended", domain.domid)
            detail = f"a fault of our own in ending the job of d{domain.domid}; please report it"
            if not last:
                return RecoveryReport(domain=domain, outcome=Recovered.NOT_YET, detail=detail)
            return self._let_go_of(unfinished, detail)

    def _let_go_of(self, unfinished: UnfinishedJob, detail: str) -> RecoveryReport:
        """Leave a job of which all tries have met a fault of ours to those who only let go."""
        domain, hold = unfinished.record.domain, unfinished.hold
        if unfinished.unreadable is not None:
            # It may be in the middle of a change, and must not run.
            detail += f"; it is held, and {unfinished.unreadable}"
            return RecoveryReport(domain=domain, outcome=Recovered.HELD, detail=detail)
        report = RecoveryReport(
            domain=domain,
            outcome=Recovered.LEFT_ALONE,
            detail=detail,
            stuck=None if hold is None else detail,
            # Asked and no more, it may follow that yet.
            may_suspend_late=hold is None,
            # Without its processor time, a pause may be somebody else's.
            standing=Standing(
                paused=hold is not None and hold.cpu_time is not None,
                cpu_time=None if hold is None else hold.cpu_time,
            ),
        )
        self._note(report)
        unfinished.job.leave(damaged=unfinished.group is not None)
        return report


def _refused(
    domain: DomainIdentity, mfns: tuple[Mfn, ...], reason: RefusalReason, detail: str
) -> ExchangeReport:
    results = tuple(Refusal(mfn=mfn, reason=reason, detail=detail) for mfn in mfns)
    return ExchangeReport(domain=domain, results=results, blackout=None)
