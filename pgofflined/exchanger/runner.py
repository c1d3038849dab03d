"""One exchange job: look, survey, suspend, check, transfer, resume.

The guest is kept for as short as can be.  What takes time that grows with its size, the search
through its page tables, is done while it runs; what was found is looked at again when it stands
still.  Whatever happens between suspend and resume, the guest is let go on every way out.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from errno import EBUSY

from pgofflined.core.domains import DomainIdentity, DomainInfo, GuestKind, ShutdownReason
from pgofflined.core.errors import (
    DomainGone,
    GuestDidNotSuspend,
    OfflineCallUnsafe,
    PortError,
    SuspendNotAsked,
)
from pgofflined.core.frames import Mfn
from pgofflined.core.offline import OfflineState, WhenMarked
from pgofflined.core.outcomes import (
    Blackout,
    Exchanged,
    ExchangeReport,
    PageResult,
    Refusal,
    RefusalReason,
    Standing,
    page_of,
)
from pgofflined.core.suspending import MayNotBeAsked, how_it_ended, unless_announced
from pgofflined.exchanger.holding import UNCOLLECTED, Holding, kept
from pgofflined.exchanger.marking import NEIGHBOUR, wedged_detail
from pgofflined.exchanger.moving import AllPoisoned, Mover, NotKept
from pgofflined.exchanger.plan import Plan, make_plan, refuse_by_state
from pgofflined.exchanger.poison import Poison
from pgofflined.exchanger.survey import GuestLayoutError, survey
from pgofflined.marks import may_join
from pgofflined.ports import (
    Clock,
    Hold,
    Hypervisor,
    JobRecord,
    Journal,
    OpenJob,
    SuspendLimits,
    UnfinishedJob,
)

log = logging.getLogger(__name__)

# Frames that have to stay free in the host besides the ones we take: an exchange that runs out
# of memory half-way may silently lose the page's mark (assign_pages, xen/common/page_alloc.c).
FREE_RESERVE = 64
# What calls for a domain that has ended look like.
_MAY_BE_THE_END = frozenset(
    {RefusalReason.XEN_REFUSED, RefusalReason.GUEST_LAYOUT, RefusalReason.NOT_THE_DOMAINS}
)
# A guest that runs may change what is being read; so often is it begun anew.
_SURVEY_TRIES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Surveyed:
    """A plan made of what was found while the guest ran, and the seconds that finding it took."""

    plan: Plan
    seconds: float


class ExchangeJob:
    """Pages of one PV domain, exchanged in one suspend.

    ``when`` says whether the pages are marked offline-pending already, are to be marked while their
    guest is held, or become free without a mark.  ``never_read`` gives those that are known to hold
    an uncorrected error and are refused, whatever Xen knows of them; it is asked again and again,
    for such an error may be reported while the job is under way.  ``denial`` says why the policy
    does not let a domain be suspended; it is asked first, and once more right before the request.
    ``objection`` says why it must not be asked to suspend itself, ``wedged`` whether Xen has broken
    a page of it by itself, so that none may be marked.  ``unended`` is told of a job whose guest
    could be neither put right nor let go: ``recover`` is to go on with it.  Synchronous on purpose:
    doing and undoing happen in one thread, so no cancellation can make them overlap.
    """

    def __init__(
        self,
        domain: DomainIdentity,
        *,
        xen: Hypervisor,
        journal: Journal,
        clock: Clock,
        limits: SuspendLimits,
        never_read: Callable[[], frozenset[Mfn]],
        denial: Callable[[DomainInfo], str | None],
        objection: MayNotBeAsked,
        when: WhenMarked,
        unended: Callable[[UnfinishedJob], None],
        wedged: Callable[[], bool],
    ) -> None:
        self._domain = domain
        self._xen = xen
        self._journal = journal
        self._clock = clock
        self._limits = limits
        self._poison = Poison(never_read)
        self._denial = denial
        self._objection = objection
        self._ended: str | None = None
        self._when = when
        self._wedged = wedged
        self._unended = unended
        self._held = Holding(xen, domain.domid, clock=clock, limits=limits)

    def run(self, mfns: Sequence[Mfn]) -> ExchangeReport:
        """A result for every page; raises only for faults of our own."""
        pages = tuple(dict.fromkeys(mfns))
        results: dict[Mfn, PageResult] = {}
        try:
            info = self._xen.domain(self._domain.domid)
            results |= self._look(info, pages)
            left = [mfn for mfn in pages if mfn not in results]
            if left:
                surveyed = self._survey(info, left)
                results |= {refusal.mfn: refusal for refusal in surveyed.plan.refusals}
                if surveyed.plan.groups:
                    results |= self._hold_and_move(info, surveyed)
        except PortError as error:
            results = self._refuse_rest(pages, results, *_reason_of(error))
        except GuestLayoutError as error:
            detail = f"the guest cannot be believed: {error}"
            results = self._refuse_rest(pages, results, RefusalReason.GUEST_LAYOUT, detail)
        return self._report(self._with_the_end([results[mfn] for mfn in pages]))

    def _with_the_end(self, results: Sequence[PageResult]) -> list[PageResult]:
        """The results, with the domain's end as the reason of refusals that it may have caused.

        Most calls fail with ESRCH then, and what they were for is not to be looked for again.
        """
        ends = {
            result.mfn: replace(result, reason=RefusalReason.DOMAIN_GONE)
            for result in results
            if isinstance(result, Refusal) and result.reason in _MAY_BE_THE_END
        }
        if not ends or not self._is_gone():
            return list(results)
        return [ends.get(page_of(result), result) for result in results]

    def _is_gone(self) -> bool:
        try:
            info = self._xen.condition(self._domain.domid)
        except DomainGone:
            return True
        except PortError:
            return False
        return info.identity != self._domain or info.dying

    # While the guest runs.

    def _look(self, info: DomainInfo, mfns: Sequence[Mfn]) -> dict[Mfn, PageResult]:
        """Refusals that need no look into the guest's memory."""
        busy = self._refuse_domain(info)
        if busy is not None:
            return self._refuse_rest(mfns, {}, *busy)
        needed = len(mfns) + FREE_RESERVE
        if self._xen.free_frames() < needed:
            detail = f"the host has fewer than {needed} free frames; free some memory"
            return self._refuse_rest(mfns, {}, RefusalReason.NO_FREE_MEMORY, detail)
        if self._when is WhenMarked.WHEN_HELD:
            if self._wedged():
                detail = wedged_detail(self._domain.domid)
                return self._refuse_rest(mfns, {}, RefusalReason.CANNOT_MARK, detail)
            # Or the guest would be suspended for nothing.
            with self._xen.placed():
                pass
        refusals: dict[Mfn, PageResult] = {}
        for mfn in mfns:
            poisoned = mfn in self._poison
            state = OfflineState.BROKEN if poisoned else self._xen.query(mfn)
            refusal = refuse_by_state(mfn, state, when=self._when)
            if refusal is None and self._when is WhenMarked.WHEN_HELD and may_join(self._xen, mfn):
                refusal = Refusal(mfn=mfn, reason=RefusalReason.NEIGHBOUR_FREE, detail=NEIGHBOUR)
            if refusal is not None:
                refusals[mfn] = refusal
        return refusals

    def _refuse_domain(self, info: DomainInfo) -> tuple[RefusalReason, str] | None:
        domid = self._domain.domid
        if info.identity != self._domain or info.dying:
            return RefusalReason.DOMAIN_GONE, f"d{domid} is gone or dying"
        if info.kind is not GuestKind.PV or info.is_dom0:
            return RefusalReason.NOT_PV, f"d{domid} is no PV guest"
        denial = self._denial(info)
        if denial is not None:
            return RefusalReason.DENIED, f"d{domid} is not to be suspended: {denial}"
        if info.shutdown is not None or info.paused:
            state = (
                "paused" if info.shutdown is None else f"shut down ({info.shutdown.name.lower()})"
            )
            detail = f"d{domid} is {state} by someone else; it is left alone until it runs"
            return RefusalReason.DOMAIN_BUSY, detail
        if self._xen.has_devices(domid):
            detail = f"d{domid} has devices of the host, which write to frames by their number"
            return RefusalReason.HAS_DEVICES, detail
        unfit = self._objection(info, self._xen.suspend_support(domid))
        if unfit is None:
            return None
        if unfit.may_pass:
            return RefusalReason.SUSPEND_UNANNOUNCED, unfit.detail
        return RefusalReason.NO_SUSPEND_SUPPORT, unfit.detail

    def _survey(self, info: DomainInfo, mfns: Sequence[Mfn]) -> Surveyed:
        for _ in range(_SURVEY_TRIES - 1):
            with contextlib.suppress(GuestLayoutError, PortError):
                return self._survey_once(info, mfns)
        return self._survey_once(info, mfns)

    def _survey_once(self, info: DomainInfo, mfns: Sequence[Mfn]) -> Surveyed:
        began = self._clock.monotonic()
        facts = survey(self._xen, info, mfns, self._poison)
        return Surveyed(
            plan=make_plan(facts, when=self._when, blackout=self._limits.blackout),
            seconds=self._clock.monotonic() - began,
        )

    # While it stands still.

    def _hold_and_move(self, info: DomainInfo, surveyed: Surveyed) -> dict[Mfn, PageResult]:
        planned = [mfn for group in surveyed.plan.groups for mfn in group.frames()]
        record = JobRecord(
            domain=self._domain,
            shared_info=info.shared_info,
            cpu_time=info.cpu_time,
            began=self._clock.monotonic(),
        )
        try:
            job = self._journal.open(record)
        except PortError as error:
            return self._refuse_rest(planned, {}, RefusalReason.NOT_KEPT, str(error))
        mover = Mover(
            xen=self._xen,
            clock=self._clock,
            job=job,
            poison=self._poison,
            when=self._when,
            limits=self._limits,
            wedged=self._wedged,
        )
        why = RefusalReason.XEN_REFUSED, "the exchange was not reached; nothing was changed"
        try:
            mover.prepare(self._domain.domid, surveyed.plan)
            self._leave_to_others()
            self._obey(info)
            mover.refuse_poisoned(surveyed.plan)
            with UNCOLLECTED, self._held.suspended(job, lambda: mover.is_whole):
                self._move(mover, info, surveyed, job)
        except _InUseByOthers as error:
            why = RefusalReason.DOMAIN_BUSY, str(error)
        except AllPoisoned as error:
            why = RefusalReason.BROKEN, str(error)
        except _Denied as error:
            why = RefusalReason.DENIED, str(error)
        except PortError as error:
            why = _reason_of(error)
        except Exception:  # a fault in one job must cost neither the guest nor its other pages
            log.exception("the exchange for d%d met a fault of our own", self._domain.domid)
            why = RefusalReason.INTERNAL, "a fault of our own, which the journal tells"
        finally:
            mover.close()
            self._end(record, job, mover)
            self._look_for_an_end()
        return self._verified(self._refuse_rest(planned, mover.results(), *why))

    def _end(self, record: JobRecord, job: OpenJob, mover: Mover) -> None:
        """The record of a guest that may stand still because of us is needed on."""
        held = self._held
        if held.owes_nothing and mover.is_whole:
            job.close()
        elif held.owes_nothing:
            job.set_aside()
        elif mover.is_whole:
            job.leave()
        else:
            # Neither whole nor let go: it must not be taken up by those who only resume.
            held.stuck, held.may_suspend_late = None, False
            hold = Hold(cpu_time=held.cpu_time)
            self._unended(UnfinishedJob(record=record, hold=hold, group=mover.unsettled, job=job))

    def _look_for_an_end(self) -> None:
        """Whether the guest ended after our request, at the latest as it began to run again."""
        if not self._held.was_asked:
            return
        domid = self._domain.domid
        try:
            info = self._xen.condition(domid)
        except DomainGone:
            self._ended = how_it_ended(domid, None)
        except PortError as error:
            log.warning("whether d%d still runs cannot be seen: %s", domid, error)
        else:
            if info.identity != self._domain:
                self._ended = how_it_ended(domid, None)
            elif info.shutdown not in (None, ShutdownReason.SUSPEND):
                self._ended = how_it_ended(domid, info.shutdown)
            elif info.dying:
                self._ended = how_it_ended(domid, None)

    def _leave_to_others(self) -> None:
        """Asked last, for all before takes long, but not when the guest stands still."""
        somebody = self._xen.somebody_at(self._domain.domid)
        if somebody is not None:
            raise _InUseByOthers(f"d{self._domain.domid} is left alone until {somebody} has ended")

    def _obey(self, info: DomainInfo) -> None:
        """The policy may have changed since the job was queued, and while all that was done."""
        denial = self._denial(info)
        if denial is not None:
            raise _Denied(f"d{self._domain.domid} is not to be suspended: {denial}")

    def _move(self, mover: Mover, before: DomainInfo, surveyed: Surveyed, job: OpenJob) -> None:
        info = self._xen.condition(self._domain.domid)
        if info.identity != self._domain or info.dying:
            raise DomainGone(self._domain.domid)
        if info.shutdown is not ShutdownReason.SUSPEND:
            raise _InUseByOthers(f"d{self._domain.domid} was resumed by someone else")
        if self._held.cpu_time != info.cpu_time:
            self._held.cpu_time = info.cpu_time
            with kept():
                job.hold(info.cpu_time)
        mover.move(before, surveyed.plan, held=self._held.held, survey_seconds=surveyed.seconds)

    # When it runs again.

    def _verified(self, results: dict[Mfn, PageResult]) -> dict[Mfn, PageResult]:
        """The results with Xen's word on whether the exchanged frames are out of use."""
        return {
            mfn: replace(result, offlined=self._is_offlined(mfn))
            if isinstance(result, Exchanged)
            else result
            for mfn, result in results.items()
        }

    def _is_offlined(self, mfn: Mfn) -> bool:
        try:
            return bool(self._xen.query(mfn) & OfflineState.OFFLINED)
        except PortError:
            # The page is moved all the same; whoever reads "not confirmed" asks again.
            return False

    def _refuse_rest(
        self,
        mfns: Sequence[Mfn],
        results: dict[Mfn, PageResult],
        reason: RefusalReason,
        detail: str,
    ) -> dict[Mfn, PageResult]:
        refusals: dict[Mfn, PageResult] = {
            mfn: Refusal(mfn=mfn, reason=reason, detail=detail) for mfn in mfns
        }
        return refusals | results

    def _report(self, results: Sequence[PageResult]) -> ExchangeReport:
        held = self._held
        blackout = None
        if held.released:
            blackout = Blackout(whole=held.released - held.asked, ours=held.released - held.held)
        return ExchangeReport(
            domain=self._domain,
            results=tuple(results),
            blackout=blackout,
            stuck=None if held.stuck is None else held.stuck.text,
            may_suspend_late=held.may_suspend_late,
            ended=self._ended,
            standing=Standing(
                paused=held.stuck is not None and held.stuck.paused, cpu_time=held.cpu_time
            ),
        )


class _InUseByOthers(Exception):
    """Somebody saves or migrates the guest, or has let it go that suspended itself for us."""


class _Denied(Exception):
    """The policy does not let the guest be suspended."""


def _reason_of(error: PortError) -> tuple[RefusalReason, str]:
    match error:
        case GuestDidNotSuspend():
            return RefusalReason.NO_SUSPEND, str(error)
        case OfflineCallUnsafe():
            return RefusalReason.CANNOT_MARK, str(error)
        case NotKept():
            return RefusalReason.NOT_KEPT, str(error)
        case DomainGone():
            return RefusalReason.DOMAIN_GONE, str(error)
        case SuspendNotAsked(errno=code) if code == EBUSY:
            return RefusalReason.DOMAIN_BUSY, f"somebody else has it suspended: {error}"
        case _:
            return RefusalReason.XEN_REFUSED, str(error)


def _for_the_next_process(unfinished: UnfinishedJob) -> None:
    """Its record is there."""


def exchange(
    domain: DomainIdentity,
    mfns: Sequence[Mfn],
    *,
    xen: Hypervisor,
    journal: Journal,
    clock: Clock,
    limits: SuspendLimits,
    never_read: Callable[[], frozenset[Mfn]] = frozenset,
    denial: Callable[[DomainInfo], str | None] = lambda _: None,
    objection: MayNotBeAsked = unless_announced,
    when: WhenMarked = WhenMarked.BEFORE,
    unended: Callable[[UnfinishedJob], None] = _for_the_next_process,
    wedged: Callable[[], bool] = lambda: False,
) -> ExchangeReport:
    """Exchange pages of one PV domain, all in one suspend; see ``ExchangeJob``."""
    job = ExchangeJob(
        domain,
        xen=xen,
        journal=journal,
        clock=clock,
        limits=limits,
        never_read=never_read,
        denial=denial,
        objection=objection,
        when=when,
        unended=unended,
        wedged=wedged,
    )
    return job.run(mfns)
