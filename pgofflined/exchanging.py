"""Exchange jobs as the worker threads run them, and the end of those that were cut off."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from queue import SimpleQueue
from typing import assert_never

from pgofflined.core.domains import DomainIdentity
from pgofflined.core.events import Event
from pgofflined.core.frames import Mfn
from pgofflined.core.offline import WhenMarked
from pgofflined.core.outcomes import Damaged, ExchangeReport, Refusal, RefusalReason
from pgofflined.core.policy import ExchangePolicy, Marking
from pgofflined.core.recovery import Recovered, RecoveryReport
from pgofflined.journal_log import event
from pgofflined.marks import take_marks_back
from pgofflined.ports import Clock, Hypervisor, Journal, SuspendLimits, UnfinishedJob

log = logging.getLogger(__name__)

# What keeps a guest from being put right (dom0 short of memory, xenstored not up yet) passes within
# so many tries, so many seconds apart at least, or not at all.
RECOVERY_TRIES = 12
RECOVERY_SECONDS = 5.0


class Exchanging:
    """Runs jobs, by the policy that is in force when each begins.

    ``poisoned`` gives the frames whose contents must never be read, ``wedged`` whether Xen has
    broken a page of a domain by itself.  No method but ``run`` may be
    called from several threads.  A job of this process whose guest it can neither put right nor let
    go is tried again as if an earlier process had left it.
    """

    def __init__(
        self,
        *,
        xen: Hypervisor,
        journal: Journal,
        clock: Clock,
        policy: Callable[[], ExchangePolicy],
        poisoned: Callable[[], frozenset[Mfn]],
        wedged: Callable[[DomainIdentity], bool] = lambda _domain: False,
    ) -> None:
        self._xen = xen
        self._journal = journal
        self._clock = clock
        self._policy = policy
        self._poisoned = poisoned
        self._wedged = wedged
        self._rest: list[UnfinishedJob] = []
        self._tries: Counter[DomainIdentity] = Counter()
        self._busy: dict[DomainIdentity, str] = {}
        # Jobs not ended yet, and guests that are looked after since: a new job would suspend the
        # guest for us, and who is to let it go would do so in the middle of that.
        self._unended: set[DomainIdentity] = set()
        self._looked_after: set[DomainIdentity] = set()
        self._next_try = 0.0
        # From the threads in which jobs run.
        self._given_up: SimpleQueue[UnfinishedJob] = SimpleQueue()
        self._took_over = False

    def take_over(self, earlier: Exchanging) -> None:
        """Go on with what another of this process has begun to recover, in place of ``recover``.

        It must not be used any more.
        """
        names = ("_rest", "_tries", "_busy", "_unended", "_looked_after", "_next_try")
        vars(self).update({name: vars(earlier).pop(name) for name in names})
        self._took_over = True

    def run(self, domain: DomainIdentity, mfns: tuple[Mfn, ...]) -> ExchangeReport:
        """Exchange pages; never raises for a single job's sake."""
        # numpy comes with it, which a daemon that has nothing to do need not hold.
        from pgofflined.exchanger import exchange

        if domain in self._unended or domain in self._looked_after:
            detail = f"what was left of an earlier exchange in d{domain.domid} comes first"
            return _refused(domain, mfns, RefusalReason.DOMAIN_BUSY, detail)
        policy = self._policy()
        try:
            report = exchange(
                domain,
                mfns,
                never_read=self._poisoned(),
                xen=self._xen,
                journal=self._journal,
                clock=self._clock,
                limits=SuspendLimits(
                    acknowledge=policy.acknowledge_timeout,
                    suspend=policy.suspend_timeout,
                    blackout=policy.max_blackout,
                ),
                when=self._when_marked(policy),
                unended=self._give_up,
                wedged=lambda: self._wedged(domain),
            )
            if report.stuck is not None or report.may_suspend_late:
                self.hold_off(domain)
            if not self._xen.version().offlines_free_frames_safely:
                self._withdraw(report)
        except Exception:  # a fault in one job must not end the daemon of all other guests
            log.exception("the exchange for d%d failed by a fault of our own", domain.domid)
            detail = "a fault of our own, which the journal tells; please report it"
            report = _refused(domain, mfns, RefusalReason.INTERNAL, detail)
        return report

    def hold_off(self, domain: DomainIdentity) -> None:
        """Begin no job in a guest that is looked after, before ``done_with``."""
        self._looked_after.add(domain)

    def done_with(self, domain: DomainIdentity) -> None:
        """Nobody has to look after the guest of an ended job any more."""
        self._journal.done_with(domain)
        self._looked_after.discard(domain)

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
        rest, self._rest = self._rest, []
        while not self._given_up.empty():
            rest.append(self._given_up.get())
        return self._recover(rest)

    @property
    def has_rest(self) -> bool:
        """Whether there are jobs to try again."""
        return bool(self._rest) or not self._given_up.empty()

    def _recover(self, jobs: Sequence[UnfinishedJob]) -> tuple[RecoveryReport, ...]:
        self._next_try = self._clock.monotonic() + RECOVERY_SECONDS
        reports = []
        self._unended.update(unfinished.record.domain for unfinished in jobs)
        for unfinished in jobs:
            report = self._recover_one(unfinished)
            domain = report.domain
            rest = replace(unfinished, group=None) if report.is_whole else unfinished
            if report.outcome is Recovered.BUSY:
                # That may last for hours, and is told once.
                if self._busy.get(domain) != report.detail:
                    _tell(report)
                self._busy[domain] = report.detail
                self._rest.append(rest)
                continue
            _tell(report)
            if report.outcome is Recovered.NOT_YET:
                self._tries[domain] += 1
                self._rest.append(rest)
            else:
                del self._tries[domain]
                if report.stuck is not None or report.may_suspend_late:
                    self.hold_off(domain)
                self._unended.discard(domain)
                reports.append(report)
        return tuple(reports)

    def _recover_one(self, unfinished: UnfinishedJob) -> RecoveryReport:
        from pgofflined.exchanger import recover

        domain = unfinished.record.domain
        last = self._tries[domain] >= RECOVERY_TRIES
        try:
            return recover(
                unfinished,
                self._xen,
                now=self._clock.monotonic(),
                never_read=self._poisoned(),
                last_try=last,
            )
        except Exception:  # one guest's record must not keep the daemon from all others
            log.exception("the job of d%d could not be ended", domain.domid)
            detail = f"a fault of our own in ending the job of d{domain.domid}; please report it"
            outcome = Recovered.LEFT_ALONE if last else Recovered.NOT_YET
            if last:
                unfinished.job.leave(damaged=unfinished.group is not None)
            return RecoveryReport(
                domain=domain, outcome=outcome, detail=detail, stuck=detail if last else None
            )


def _refused(
    domain: DomainIdentity, mfns: tuple[Mfn, ...], reason: RefusalReason, detail: str
) -> ExchangeReport:
    results = tuple(Refusal(mfn=mfn, reason=reason, detail=detail) for mfn in mfns)
    return ExchangeReport(domain=domain, results=results, blackout=None)


def _tell(report: RecoveryReport) -> None:
    domid, job = report.domain.domid, "recovery"
    message = f"an exchange was cut off: {report.detail}"
    match report.outcome:
        case Recovered.NOTHING_TO_DO | Recovered.GONE:
            event(log, logging.INFO, Event.JOB_RECOVERED, message, domid=domid, job=job)
        case Recovered.FINISHED:
            event(log, logging.WARNING, Event.JOB_RECOVERED, message, domid=domid, job=job)
        case Recovered.NOT_YET:
            log.error("%s; the guest is held, and it is tried again", message)
        case Recovered.BUSY:
            if report.results:
                event(log, logging.CRITICAL, Event.JOB_NOT_RECOVERED, message, domid=domid, job=job)
            else:
                log.warning("%s; then it is tried again", message)
        case Recovered.LEFT_ALONE | Recovered.STANDS_STILL:
            event(log, logging.CRITICAL, Event.JOB_NOT_RECOVERED, message, domid=domid, job=job)
        case _:
            assert_never(report.outcome)
    for result in report.results:
        if isinstance(result, Damaged):
            what = (
                f"mfn {result.old:#x} of d{domid} could not be put right: {result.detail}; "
                "restart it at once"
            )
            event(log, logging.CRITICAL, Event.PAGE_DAMAGED, what, domid=domid, job=job)
