"""Ends jobs that an earlier process left, by its record and by what Xen says is true.

A guest that still stands still is as the process left it: its entries are cleared or set, its pages
exchanged or not, and Xen knows which.  What was exchanged is settled, what was not is undone, and
the guest is let go.  Doing this a second time, or for a group that was settled already, changes
nothing; so what fails is done again as a whole.

A guest that runs is not touched: nobody may change page tables under it.
"""

from __future__ import annotations

from pgofflined.core.domains import DomainInfo, ShutdownReason
from pgofflined.core.errors import DomainGone, PortError
from pgofflined.core.frames import Mfn
from pgofflined.core.moves import Group
from pgofflined.core.outcomes import Damaged, PageResult
from pgofflined.core.recovery import Recovered, RecoveryReport
from pgofflined.exchanger.transfer import Transfer
from pgofflined.letgo import let_go, told
from pgofflined.ports import Hypervisor, JobRecord, UnfinishedJob

# A request to suspend that was followed is followed within so many seconds; a guest that stands
# still later does so for somebody else.
_OURS_SECONDS = 900.0


def recover(
    unfinished: UnfinishedJob,
    xen: Hypervisor,
    *,
    now: float,
    never_read: frozenset[Mfn] = frozenset(),
    last_try: bool = False,
) -> RecoveryReport:
    """End one job, and close its record when nothing is left to do.

    ``Recovered.NOT_YET`` asks to be called again: the guest is held until then.  With ``last_try``
    it is let go in any case, and the record put aside for a person.  ``Recovered.BUSY`` asks for it
    however often that has been.  ``now`` is in seconds since the epoch.
    """
    recovery = _Recovery(unfinished, xen, now, never_read)
    try:
        report = recovery.end()
    except DomainGone as error:
        report = recovery.report(Recovered.GONE, str(error))
    except PortError as error:
        detail = f"d{unfinished.record.domain.domid} may stand still because of us: {error}"
        report = recovery.report(Recovered.NOT_YET, detail)
    if report.outcome is Recovered.NOT_YET and last_try:
        report = recovery.give_up(report)
    elif report.outcome is Recovered.LEFT_ALONE:
        unfinished.job.set_aside()
    elif report.outcome not in (Recovered.NOT_YET, Recovered.BUSY) and report.stuck is None:
        unfinished.job.close()
    return report


class _ChangedByOthers(Exception):
    """The guest's page tables are neither as we found them nor as we left them."""


class _Recovery:
    """One try for one job."""

    def __init__(
        self, unfinished: UnfinishedJob, xen: Hypervisor, now: float, never_read: frozenset[Mfn]
    ) -> None:
        self._record = unfinished.record
        self._group = unfinished.group
        self._job = unfinished.job
        self._domid = unfinished.record.domain.domid
        self._xen = xen
        self._now = now
        self._never_read = never_read

    def end(self) -> RecoveryReport:
        """Raises DomainGone, PortError."""
        domid = self._domid
        info = self._xen.condition(domid)
        if not _is_same(info, self._record):
            raise DomainGone(domid)
        if self._group is None and self._now - self._record.began > _OURS_SECONDS:
            detail = f"the request to d{domid} is too old to have been followed"
            return self.report(Recovered.NOTHING_TO_DO, detail)
        if info.shutdown not in (None, ShutdownReason.SUSPEND):
            detail = f"d{domid} is shut down ({info.shutdown.name.lower()})"
            return self.report(Recovered.GONE, detail)
        somebody = self._xen.somebody_at(domid)
        if somebody is not None:
            # What stands in control/shutdown may be his, and so may be the guest's standing still.
            return self.report(Recovered.BUSY, f"d{domid} is left alone until {somebody} has ended")
        if self._group is None:
            return self._end_request(info)
        if info.shutdown is ShutdownReason.SUSPEND:
            return self._finish(info)
        pages = ", ".join(f"{mfn:#x}" for mfn in self._group.frames())
        detail = (
            f"d{domid} was let go by somebody else in the middle of the exchange of mfn {pages}: "
            "what it maps there may be missing; restart it when convenient"
        )
        return self.report(Recovered.LEFT_ALONE, detail)

    def _end_request(self, info: DomainInfo) -> RecoveryReport:
        """The guest was asked, and no more: take that back, or let it go if it has followed.

        A guest takes a request before it follows it.  One that stands still with ours unread does
        so for somebody else, whose it is to resume.
        """
        domid = self._domid
        unread = self._xen.withdraw_suspend(domid)
        if info.shutdown is not ShutdownReason.SUSPEND:
            detail = f"d{domid} runs"
            # Read, it may still be followed.
            late = not unread
            return self.report(Recovered.NOTHING_TO_DO, detail, may_suspend_late=late)
        if unread:
            detail = f"d{domid} is suspended for somebody else: our request was still unread"
            return self.report(Recovered.NOTHING_TO_DO, detail)
        return self._finish(info)

    def _finish(self, info: DomainInfo) -> RecoveryReport:
        """Make the memory of a guest that stands still whole, and let it go."""
        domid = self._domid
        results: tuple[PageResult, ...] = ()
        try:
            if self._group is not None:
                results = self._make_whole(info, self._group)
        except _ChangedByOthers as error:
            # Whoever let it go and stopped it again has plans of his own with it.
            detail = f"d{domid} is not as it was left: {error}"
            return self.report(Recovered.LEFT_ALONE, detail)
        damage = "; ".join(result.detail for result in results if isinstance(result, Damaged))
        if damage:
            detail = f"d{domid} cannot be put right: {damage}"
            return self.report(Recovered.NOT_YET, detail, results=results)
        self._job.settled()
        stuck = let_go(self._xen, domid)
        told(self._xen, domid)
        detail = f"d{domid} still stood still; its memory is whole, and it was let go"
        return self.report(Recovered.FINISHED, detail, results=results, stuck=stuck)

    def _make_whole(self, info: DomainInfo, group: Group) -> tuple[PageResult, ...]:
        """Settle what was exchanged and undo what was not.  Raises _ChangedByOthers, PortError."""
        transfer = Transfer(self._xen, self._domid, group)
        transfer.take_over()
        changed = transfer.changed_by_others(self._never_read)
        if changed is not None:
            raise _ChangedByOthers(changed)
        if not info.paused:
            self._xen.pause(self._domid)
        transfer.settle()
        return tuple(transfer.progress.results())

    def give_up(self, report: RecoveryReport) -> RecoveryReport:
        """Let the guest go as it is.

        What is not mapped it will fault at, which harms it less than to stand still for ever.
        """
        self._job.set_aside()
        stuck = let_go(self._xen, self._domid)
        told(self._xen, self._domid)
        return self.report(Recovered.LEFT_ALONE, report.detail, results=report.results, stuck=stuck)

    def report(
        self,
        outcome: Recovered,
        detail: str,
        *,
        results: tuple[PageResult, ...] = (),
        stuck: str | None = None,
        may_suspend_late: bool = False,
    ) -> RecoveryReport:
        """What became of this try."""
        return RecoveryReport(
            domain=self._record.domain,
            outcome=outcome,
            detail=detail,
            results=results,
            stuck=stuck,
            may_suspend_late=may_suspend_late,
        )


def _is_same(info: DomainInfo, record: JobRecord) -> bool:
    return (
        info.identity == record.domain
        and not info.dying
        and info.shared_info == record.shared_info
        and info.cpu_time >= record.cpu_time
    )
