"""Moves planned groups of a guest that stands still, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress

import numpy as np

from pgofflined.core.domains import DomainInfo
from pgofflined.core.errors import DomainGone, PortError
from pgofflined.core.frames import Domid, Mfn
from pgofflined.core.moves import Group
from pgofflined.core.offline import WhenMarked
from pgofflined.core.outcomes import PageResult, Refusal, RefusalReason, page_of
from pgofflined.exchanger.check import Look, Seen, check, look_at
from pgofflined.exchanger.plan import Plan, make_plan, seconds_for
from pgofflined.exchanger.poison import REPORTED, Poison
from pgofflined.exchanger.survey import GuestLayoutError, survey
from pgofflined.exchanger.transfer import Transfer
from pgofflined.ports import Clock, Hypervisor, OpenJob, SuspendLimits

# What a step after the commit fails for (dom0 short of memory) mostly passes within so many
# seconds.  The guest is held meanwhile: with a page missing it is worse off.  Not for longer: after
# a minute libxl would take the suspend for its own.
_SETTLE_SECONDS = 40.0
_SECONDS_BETWEEN = 4.0
# A survey tells these from pages that cannot be moved.
_SURVEY_HELPS = frozenset({RefusalReason.OUT_OF_DATE, RefusalReason.OTHER_REFERENCES})


class NotKept(PortError):
    """What is going to be changed could not be recorded."""


class AllPoisoned(Exception):
    """Nothing can be moved: uncorrected errors were reported since the pages were looked at."""


class Mover:
    """``prepare`` while the guest runs, ``move`` when it stands still, and ``close`` in the end.

    ``results`` tells what became of the pages, also where ``move`` has raised something.
    ``is_whole`` is False while a group is neither undone nor settled: ``unsettled`` then.
    """

    def __init__(
        self,
        *,
        xen: Hypervisor,
        clock: Clock,
        job: OpenJob,
        poison: Poison,
        when: WhenMarked,
        limits: SuspendLimits,
        wedged: Callable[[], bool],
    ) -> None:
        # In their order; told in full only when nobody waits any more.
        self._outcomes: list[Transfer | Refusal] = []
        self.is_whole = True
        self._xen = xen
        self._clock = clock
        self._job = job
        self._poison = poison
        self._when = when
        self._wedged = wedged
        self._limits = limits
        self._olds = np.empty(0, dtype=np.uint64)
        self._news = np.empty(0, dtype=np.uint64)
        self._seen: Seen | None = None
        self._under_way: Group | None = None
        self._held = 0.0

    @property
    def unsettled(self) -> Group | None:
        """The group that is neither undone nor settled."""
        return None if self.is_whole else self._under_way

    def prepare(self, domid: Domid, plan: Plan) -> None:
        """Map and keep the first group, so that the guest need not wait for that.

        What cannot be read now is left to ``move``.  Raises DomainGone, NotKept.
        """
        group = plan.groups[0]
        if self._poison.touching(group).any():
            return
        try:
            self._seen = look_at(self._xen, domid, group, self._poison)
        except DomainGone:
            raise
        except PortError:
            # The guest runs, and has let go of a frame just now.
            return
        if self._seen is not None:
            try:
                self._job.keep(self._seen.group)
            except PortError as error:
                raise NotKept(str(error)) from error

    def refuse_poisoned(self, plan: Plan) -> None:
        """Raises AllPoisoned where that leaves nothing for which to suspend the guest."""
        if all(self._poison.touching(group).all() for group in plan.groups):
            raise AllPoisoned(REPORTED)

    def _without_poison(self, group: Group) -> Group:
        """The pages that may be read still; refuses the others."""
        touching = self._poison.touching(group)
        if not touching.any():
            return group
        mfns = [mfn for mfn, bad in zip(group.frames(), touching.tolist(), strict=True) if bad]
        self._refuse(mfns, RefusalReason.BROKEN, REPORTED)
        return group.only(~touching)

    def close(self) -> None:
        """Let go of what is mapped."""
        if self._seen is not None:
            with suppress(PortError):
                self._seen.look.close()

    def move(self, info: DomainInfo, plan: Plan, *, held: float, survey_seconds: float) -> None:
        """Move the groups of a plan; survey anew once, if there is time, for what is not found.

        ``held`` is when the guest began to stand still, ``survey_seconds`` what a survey takes.
        """
        self._held = held
        until = held + self._limits.blackout
        self._move_groups(info.domid, plan, until, first=True)
        unsure = [refusal.mfn for refusal in self._refusals() if refusal.reason in _SURVEY_HELPS]
        if not unsure or not self.is_whole:
            return
        if self._clock.monotonic() + survey_seconds > until:
            detail = (
                "what maps it was not all found while the guest ran, and to search again would "
                f"keep it for longer than {self._limits.blackout:g} s"
            )
            self._refuse(unsure, RefusalReason.BLACKOUT_LIMIT, detail)
            return
        try:
            moved = dict(zip(self._olds.tolist(), self._news.tolist(), strict=True))
            facts = survey(self._xen, info, unsure, self._poison, moved)
            again = make_plan(facts, when=self._when, blackout=self._limits.blackout)
        except (GuestLayoutError, PortError) as error:
            if isinstance(error, DomainGone):
                raise
            detail = f"it could not be searched for again: {error}"
            for mfn in unsure:
                self._outcomes.append(
                    Refusal(mfn=mfn, reason=RefusalReason.GUEST_LAYOUT, detail=detail)
                )
            return
        self._outcomes += again.refusals
        self._move_groups(info.domid, again, until)

    def _move_groups(self, domid: Domid, plan: Plan, until: float, *, first: bool = False) -> None:
        """``first``: the plan's first group is the job's, and was looked at beforehand."""
        for number, planned in enumerate(plan.groups):
            is_first = first and not number
            needed = seconds_for(len(planned), len(planned.references))
            # The plan has seen to it that the first one fits.
            if not is_first and self._clock.monotonic() + needed > until:
                detail = (
                    "the guest has been kept for others, and with it that would be longer than "
                    f"{self._limits.blackout:g} s (exchange.max_blackout)"
                )
                self._refuse(planned.frames(), RefusalReason.BLACKOUT_LIMIT, detail)
            elif not self.is_whole:
                # The record of the page that is damaged must not be replaced.
                what = "another page of the guest could not be put right just before"
                self._refuse(planned.frames(), RefusalReason.XEN_REFUSED, what)
            elif is_first and self._seen is not None:
                self._move_group(domid, self._seen.group, self._seen.look)
            else:
                # Tables and p2m pages may have moved with the groups before.
                self._move_group(domid, planned.renamed(self._olds, self._news), None)

    def _move_group(self, domid: Domid, group: Group, look: Look | None) -> None:
        group = self._without_poison(group)
        if not len(group):
            return
        with ExitStack() as looks:
            try:
                checked = check(self._xen, domid, group, looks, look, poison=self._poison)
            except DomainGone:
                raise
            except PortError as error:
                self._refuse(group.frames(), RefusalReason.OUT_OF_DATE, str(error))
                return
            self._outcomes += checked.refusals
            if checked.look is not None and len(checked.group):
                self._transfer(domid, checked.group, checked.look)

    def _transfer(self, domid: Domid, group: Group, look: Look) -> None:
        try:
            # What has not changed since it was kept costs nothing.
            self._job.keep(group)
            self._job.begin()
        except PortError as error:
            self._refuse(group.frames(), RefusalReason.NOT_KEPT, str(error))
            return
        transfer = self._new_transfer(domid, group)
        self._outcomes.append(transfer)
        self.is_whole, self._under_way = False, group
        try:
            transfer.run(look)
        except PortError:
            transfer = self._conclude(domid, group, transfer)
            raise
        except Exception:
            transfer = self._conclude(domid, group, self._once_more(domid, group))
            raise
        else:
            transfer = self._conclude(domid, group, transfer)
        finally:
            olds, news = transfer.progress.moved()
            self._olds = np.concatenate([self._olds, olds])
            self._news = np.concatenate([self._news, news])

    def _new_transfer(self, domid: Domid, group: Group) -> Transfer:
        return Transfer(
            self._xen, domid, group, when=self._when, wedged=self._wedged, poison=self._poison
        )

    def _once_more(self, domid: Domid, group: Group) -> Transfer:
        """Begin from what Xen says is true, as another process would."""
        rescue = self._new_transfer(domid, group)
        rescue.take_over()
        rescue.settle()
        self._outcomes.append(rescue)
        return rescue

    def _conclude(self, domid: Domid, group: Group, transfer: Transfer) -> Transfer:
        """Settle again and again, if need be; the record counts no more then.  Raises PortError."""
        until = self._held + _SETTLE_SECONDS
        while not transfer.is_whole and self._clock.monotonic() < until:
            self._clock.wait(_SECONDS_BETWEEN)
            transfer = self._once_more(domid, group)
        self.is_whole = transfer.is_whole
        if self.is_whole:
            self._job.settled()
        return transfer

    def _refuse(self, mfns: Iterable[Mfn], reason: RefusalReason, detail: str) -> None:
        self._outcomes += [Refusal(mfn=mfn, reason=reason, detail=detail) for mfn in mfns]

    def _refusals(self) -> Iterator[Refusal]:
        for outcome in self._outcomes:
            if isinstance(outcome, Refusal):
                yield outcome
            else:
                yield from outcome.progress.refusals

    def results(self) -> dict[Mfn, PageResult]:
        """By page; the last word on each."""
        results: dict[Mfn, PageResult] = {}
        for outcome in self._outcomes:
            told = [outcome] if isinstance(outcome, Refusal) else outcome.progress.results()
            results |= {page_of(result): result for result in told}
        return results
