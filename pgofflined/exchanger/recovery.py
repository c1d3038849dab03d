"""Ends jobs that an earlier process left, by its record and by what Xen says is true.

A guest that still stands still is as the process left it: its entries are cleared or set, its pages
exchanged or not, and Xen knows which.  What was exchanged is settled, what was not is undone, and
the guest is let go.  Doing this a second time, or for a group that was settled already, changes
nothing; so what fails is done again as a whole.

A guest that has run since is not touched: nobody may change page tables under it.

Only what is ours is undone.  Our pause is the one on a guest that has not run since we held it; any
other is somebody else's.  Our suspend is one that our request, read, may have led to, and that
nobody saves or migrates the guest by.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from pgofflined.core.domains import DomainInfo, ShutdownReason
from pgofflined.core.errors import DomainGone, PortError
from pgofflined.core.moves import Group
from pgofflined.core.outcomes import Damaged, PageResult, Standing
from pgofflined.core.recovery import Recovered, RecoveryReport, crashed_when_asked
from pgofflined.exchanger.poison import NO_POISON, Poison
from pgofflined.exchanger.transfer import Transfer
from pgofflined.letgo import Kept, by_hand, let_go, resume_only, told
from pgofflined.marks import take_marks_back
from pgofflined.ports import Hypervisor, JobRecord, UnfinishedJob

# A guest that follows a request does so within the two time limits of the policy, 120 s each at
# most (``core.schema``).  One that stands still later may do so for somebody else.
_OURS_SECONDS = 600.0


def recover(
    unfinished: UnfinishedJob,
    xen: Hypervisor,
    *,
    now: float,
    poison: Poison = NO_POISON,
    last_try: bool = False,
    noted: Callable[[RecoveryReport], None] = lambda _: None,
) -> RecoveryReport:
    """End one job, and close its record when nothing is left to do.

    ``Recovered.NOT_YET`` asks to be called again: the guest is held until then.  With ``last_try``
    it is let go in any case, and the record put aside for a person.  ``Recovered.BUSY`` and
    ``Recovered.HELD`` ask for it however often that has been.  ``now`` is in seconds of
    ``Clock.monotonic``.  ``noted`` is told of what a person has to see to, before its record is put
    away: who is killed in between tells it twice.
    """
    recovery = _Recovery(unfinished, xen, now, poison)
    try:
        report = recovery.end()
    except DomainGone as error:
        report = recovery.report(Recovered.GONE, str(error))
    except PortError as error:
        detail = f"d{unfinished.record.domain.domid} may stand still because of us: {error}"
        report = recovery.report(Recovered.NOT_YET, detail)
    if report.needs_a_person:
        noted(report)
    if report.outcome is Recovered.NOT_YET and last_try:
        report = recovery.give_up(report, noted)
    elif report.outcome is Recovered.LEFT_ALONE:
        unfinished.job.set_aside()
    elif report.stuck is not None or report.may_suspend_late:
        unfinished.job.leave()
    elif report.outcome not in (Recovered.NOT_YET, Recovered.BUSY, Recovered.HELD):
        unfinished.job.close()
    return report


class _LeftAlone(Exception):
    """The guest has run since."""


class _Recovery:
    """One try for one job."""

    def __init__(
        self, unfinished: UnfinishedJob, xen: Hypervisor, now: float, poison: Poison
    ) -> None:
        self._record = unfinished.record
        self._hold = unfinished.hold
        self._group = unfinished.group
        self._job = unfinished.job
        self._domid = unfinished.record.domain.domid
        self._xen = xen
        self._now = now
        # What is no time of this boot so far is none: of a damaged record, or one without it.
        began = self._record.began
        self._asked = began if math.isfinite(began) and began <= now else None
        self._poison = poison
        self._results: tuple[PageResult, ...] = ()
        self._unreadable = unfinished.unreadable
        self._is_whole = self._group is None and self._unreadable is None

    def end(self) -> RecoveryReport:
        """Raises DomainGone, PortError."""
        try:
            return self._end()
        finally:
            # Whatever becomes of the guest: it may have run since, or be about to end.
            self._take_marks_back()

    def _end(self) -> RecoveryReport:
        domid = self._domid
        info = self._xen.condition(domid)
        if not _is_same(info, self._record):
            raise DomainGone(domid)
        # Who resumed it may have died before xenstored was told.
        told(self._xen, domid)
        if info.shutdown is ShutdownReason.CRASH:
            return self.report(Recovered.CRASHED, crashed_when_asked(domid))
        if info.shutdown not in (None, ShutdownReason.SUSPEND):
            detail = f"d{domid} is shut down ({info.shutdown.name.lower()})"
            return self.report(Recovered.GONE, detail)
        if self._unreadable is not None:
            return self._end_unreadable(info, self._unreadable)
        if self._group is not None:
            # First of all, whoever is at it: nobody can use the guest as it is.
            try:
                damage = self._make_whole(info, self._group)
            except _LeftAlone as error:
                return self.report(Recovered.LEFT_ALONE, str(error))
            if damage:
                return self.report(Recovered.NOT_YET, f"d{domid} cannot be put right: {damage}")
            info = self._xen.condition(domid)
        somebody = self._xen.somebody_at(domid)
        if somebody is not None:
            # What stands in control/shutdown may be his, and so may be the guest's standing still.
            detail = f"d{domid} is left alone until {somebody} has ended"
            if self._results:
                detail += (
                    "; its memory was just put right, perhaps while that was reading it: do not "
                    "trust what it has saved or sent"
                )
            return self.report(Recovered.BUSY, detail)
        return self._end_request(info) if self._hold is None else self._end_hold(info)

    def _end_unreadable(self, info: DomainInfo, why: str) -> RecoveryReport:
        """It may be in the middle of a change that nobody here can undo or finish."""
        domid = self._domid
        if self._is_as_left(info):
            detail = (
                f"d{domid} stands still, perhaps in the middle of a change: {why}. It is held: "
                f"parts of its memory may be missing, so run no `xl unpause` or `xl resume`. Have "
                f"that record read, or `xl destroy {domid}` and start the guest anew"
            )
            return self.report(Recovered.HELD, detail)
        detail = f"d{domid} has run since, perhaps with a page missing: {why}; restart it"
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
            # Read, it may still be followed; of how long ago it was, too, where that is unknown.
            late = (self._asked is None or self._is_recent) and not unread
            return self.report(Recovered.NOTHING_TO_DO, detail, may_suspend_late=late)
        if unread:
            detail = f"d{domid} is suspended for somebody else: our request was still unread"
            return self.report(Recovered.NOTHING_TO_DO, detail)
        if self._is_recent:
            # A pause, if there is one, is not ours: that is noted before it is made.
            return self._told_of(resume_only(self._xen, domid))
        detail = (
            f"d{domid} is suspended, and we had asked it to, but {self._how_long_ago()}, and it "
            "may be so for somebody else: if nobody saves or migrates it, "
            f"{by_hand(domid, paused=False)}"
        )
        return self.report(Recovered.STANDS_STILL, detail)

    @property
    def _is_recent(self) -> bool:
        """Whether a guest that stands still may do so for us alone."""
        return self._asked is not None and self._now - self._asked <= _OURS_SECONDS

    def _how_long_ago(self) -> str:
        return "when is not known" if self._asked is None else "long ago"

    def _end_hold(self, info: DomainInfo) -> RecoveryReport:
        """It had suspended itself for us, and its memory is whole."""
        if self._is_as_left(info):
            if self._is_perhaps_paused_by_another(info):
                detail = (
                    f"d{self._domid} is paused, and whether by us cannot be told: if nobody else "
                    f"has paused it, {by_hand(self._domid)}"
                )
                return self.report(Recovered.STANDS_STILL, detail)
            return self._told_of(let_go(self._xen, self._domid))
        state = "runs" if info.shutdown is None else "is suspended again, for somebody else"
        return self.report(
            Recovered.NOTHING_TO_DO,
            f"d{self._domid} has run since it stood still for us, and {state}",
        )

    def _is_perhaps_paused_by_another(self, info: DomainInfo) -> bool:
        """Whether it may have run since, and been paused: it is suspended for us no more."""
        is_known = self._hold is not None and self._hold.cpu_time is not None
        return not is_known and info.shutdown is not ShutdownReason.SUSPEND

    def _told_of(self, stuck: Kept | None) -> RecoveryReport:
        """The end of a guest that was let go, unless something keeps it."""
        told(self._xen, self._domid)
        detail = f"d{self._domid} still stood still; its memory is whole, and it was let go"
        return self.report(Recovered.FINISHED, detail, stuck=stuck)

    def _is_as_left(self, info: DomainInfo) -> bool:
        """Whether the guest stands still, and has since we held it.

        By its processor time, for somebody may have resumed it although our pause keeps it from
        running, or may have let it run and suspended it again.
        """
        stands_still = info.shutdown is ShutdownReason.SUSPEND or info.paused
        used = self._hold.cpu_time if self._hold is not None else None
        return stands_still and used in (None, info.cpu_time)

    def _make_whole(self, info: DomainInfo, group: Group) -> str:
        """Settle what was exchanged and undo what was not; what is damaged, if anything.

        Raises _LeftAlone where it has run since, PortError.
        """
        paused = self._is_as_left(info) and not info.paused
        if paused:
            self._xen.pause(self._domid)
            # Nobody can let it run from here on.
            info = self._xen.condition(self._domid)
        if not self._is_as_left(info):
            if paused:
                self._xen.unpause(self._domid)
            pages = ", ".join(f"{mfn:#x}" for mfn in group.frames())
            raise _LeftAlone(
                f"d{self._domid} was let go by somebody else in the middle of the exchange of mfn "
                f"{pages}: what it maps there may be missing, or read as zeros; restart it"
            )
        transfer = Transfer(self._xen, self._domid, group, poison=self._poison)
        transfer.take_over()
        changed = transfer.changed_by_others()
        if changed is not None:
            return f"it is not as it was left: {changed}"
        transfer.settle()
        self._results = tuple(transfer.progress.results())
        damages = [each.detail for each in self._results if isinstance(each, Damaged)]
        damage = "; ".join([*damages, *self._take_marks_back()])
        if not damage:
            self._job.settled()
            self._is_whole = True
        return damage

    def _take_marks_back(self) -> list[str]:
        """Marks that were set for the exchange, where none may stay; what stays, in words."""
        if self._group is None or self._xen.version().offlines_free_frames_safely:
            return []
        return take_marks_back(self._xen, self._group.frames())

    def give_up(
        self, report: RecoveryReport, noted: Callable[[RecoveryReport], None]
    ) -> RecoveryReport:
        """Let the guest go as it is, if it stands still for us.

        What is not mapped it faults at, as a rule (see decision 5), which harms it less than to
        stand still for ever.
        """
        domid = self._domid
        if self._unreadable is not None:
            # Xen could not be asked for it until now.  It is held as soon as it can be.
            return report
        try:
            info = self._xen.condition(domid)
            if not _is_same(info, self._record):
                raise DomainGone(domid)
        except DomainGone as error:
            self._job.close()
            return self.report(Recovered.GONE, str(error))
        except PortError:
            return report
        somebody = self._somebody()
        if somebody is not None:
            # By now he takes the suspend for his.
            detail = f"{report.detail}; it is held until {somebody} has ended"
            busy = self.report(Recovered.BUSY, detail)
            if busy.needs_a_person:
                noted(busy)
            return busy
        stuck: Kept | None = None
        if self._hold is None:
            # It was not paused by us.
            if self._is_recent:
                stuck = resume_only(self._xen, domid)
        elif self._is_as_left(info) and not self._is_perhaps_paused_by_another(info):
            stuck = let_go(self._xen, domid)
        told(self._xen, domid)
        # Asked and no more, it may follow that yet.
        late = self._hold is None
        report = self.report(
            Recovered.LEFT_ALONE, report.detail, stuck=stuck, may_suspend_late=late
        )
        noted(report)
        # Not before: if we are killed in between, another process tries once more.
        if stuck is None and not late:
            self._job.set_aside()
        else:
            self._job.leave(damaged=not self._is_whole)
        return report

    def _somebody(self) -> str | None:
        try:
            return self._xen.somebody_at(self._domid)
        except PortError:
            return None  # so often has it been asked for in vain

    def report(
        self,
        outcome: Recovered,
        detail: str,
        *,
        stuck: Kept | None = None,
        may_suspend_late: bool = False,
    ) -> RecoveryReport:
        """What became of this try."""
        return RecoveryReport(
            domain=self._record.domain,
            outcome=outcome,
            detail=detail,
            results=self._results,
            is_whole=self._is_whole,
            stuck=None if stuck is None else stuck.text,
            may_suspend_late=may_suspend_late,
            standing=Standing(
                paused=stuck is not None and stuck.paused,
                cpu_time=None if self._hold is None else self._hold.cpu_time,
            ),
            asked=self._asked,
        )


def _is_same(info: DomainInfo, record: JobRecord) -> bool:
    return (
        info.identity == record.domain
        and not info.dying
        and record.shared_info in (None, info.shared_info)
        and info.cpu_time >= record.cpu_time
    )
