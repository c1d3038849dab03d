"""The queue of migrations at work: one asyncio task per migration, hypercalls in threads.

The service sleeps until the next job is due, and is woken by new pages, the end of a migration,
another policy, or word from the kernel that a link or a route has changed.  Nothing tells that the
host's clock was set, or that somebody else has taken a guest off its pages: while jobs wait, both
are looked at every few minutes.

When the daemon stops, no new migration is started and one that runs gets ``stop_grace`` seconds
to end.  After that it goes on without us, never half-way: what it frees goes offline by itself,
and the next start finds the pages' state by asking Xen.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import tzinfo
from functools import partial
from pathlib import Path
from typing import assert_never

from pgofflined.core.domains import DomainIdentity, DomainInfo
from pgofflined.core.errors import PortError
from pgofflined.core.frames import Mfn
from pgofflined.core.policy import RelocationPolicy
from pgofflined.core.premigration import (
    Go,
    Hindrance,
    Never,
    NothingLeft,
    NotNow,
    PreMigration,
    Way,
    judge,
)
from pgofflined.core.relocating import Instant, RelocationQueue
from pgofflined.core.relocation_outcomes import (
    InDoubt,
    Migrated,
    MigrationOutcome,
    NotMigrated,
    NotRelocated,
    Relocated,
    RelocationOutcome,
    RelocationReason,
)
from pgofflined.core.status import JobStatus
from pgofflined.core.suspending import MayNotBeAsked
from pgofflined.ports import Clock
from pgofflined.relocation import telling
from pgofflined.relocation.breaking import Breaking
from pgofflined.relocation.ending import Ending
from pgofflined.relocation.following import Following, Sleep
from pgofflined.relocation.host import Host, InThread, MigrationHost
from pgofflined.relocation.links import Links
from pgofflined.relocation.relocator import Relocator
from pgofflined.relocation.settling import Settling
from pgofflined.relocation.waiting import Waiting
from pgofflined.saving import Saves

Finished = Callable[[DomainIdentity, RelocationOutcome], None]


class RelocationService:
    """Takes guests off bad pages that are not moved in place, as the policy allows.

    All methods belong to the event loop's thread.  ``finished`` is called once per job.
    Just before anything is begun, ``poison`` is asked in a thread for a page that the domain owns
    or may own and that must not be read, ``is_poisoned`` there of each page of the job, then
    ``denial`` for why the domain is to be left alone, if it is, and ``objection`` for why it must
    not be asked to suspend itself.
    ``asked_in_vain`` is told of a guest that a save or a migration has asked to suspend itself, and
    that runs, and ``ended`` of one that has ended when a save or a migration had asked it, and how.
    """

    def __init__(
        self,
        *,
        policy: RelocationPolicy,
        xen: Host,
        relocator: Relocator,
        links: Links,
        clock: Clock,
        zone: tzinfo,
        finished: Finished,
        poison: Callable[[DomainInfo], str | None],
        is_poisoned: Callable[[Mfn], bool],
        denial: Callable[[DomainInfo], str | None],
        objection: MayNotBeAsked,
        asked_in_vain: Callable[[DomainIdentity], None],
        ended: Callable[[DomainIdentity, str], None],
        sleep: Sleep = asyncio.sleep,
        in_thread: InThread = asyncio.to_thread,
        saves: Saves | None = None,
        stop_grace: float = 20.0,
    ) -> None:
        self._queue = RelocationQueue(policy, zone)
        self._host = MigrationHost(xen, poison, is_poisoned, objection, saves)
        self._relocator = relocator
        self._links = links
        self._breaking = Breaking(self._host, in_thread)
        self._clock = clock
        self._finished = finished
        self._denial = denial
        self._asked_in_vain = asked_in_vain
        self._ending = Ending(self._host, in_thread, ended)
        self._sleep = sleep
        self._in_thread = in_thread
        self._following = Following(clock, sleep, stop_grace)
        self._settling = Settling(self._queue, self._host, sleep, in_thread)
        self._wake = asyncio.Event()
        self._waiting = Waiting(self._queue, self._host, denial, in_thread, self._hurry)
        self._link_changes = 0
        self._examining = 0

    def submit(
        self, domain: DomainIdentity, name: str, mfns: Iterable[Mfn], *, by_saving: bool = False
    ) -> bool:
        """Queue a domain to be taken off pages; False when there is no room."""
        job = self._queue.submit(domain, name, mfns, self._now(), by_saving=by_saving)
        self._wake.set()
        return job is not None

    def set_policy(self, policy: RelocationPolicy) -> None:
        """Put another policy in force; a migration that runs goes on under the old one."""
        self._queue.set_policy(policy, self._now())
        self._wake.set()

    def look_again(self) -> None:
        """See at once which jobs have nothing to wait for any more: some domain has ended."""
        self._queue.look_again(self._now())
        self._wake.set()

    def poison_reported(self) -> None:
        """See at once which migration has to be broken off: an uncorrected error was reported."""
        self._breaking.look()

    def snapshot(self) -> tuple[JobStatus, ...]:
        """Every job that waits or runs."""
        return self._queue.statuses(self._now())

    def overdue(self) -> dict[DomainIdentity, str]:
        """What a person has to know of saves that take too long, by guest."""
        return dict(self._following.overdue)

    async def run(self) -> None:
        """Work until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._waiting.run(), name="relocations-waiting")
                tasks.create_task(self._breaking.run(), name="relocations-breaking")
                while True:
                    self._wake.clear()
                    while (job := self._queue.take(self._now())) is not None:
                        tasks.create_task(self._work(job.domain), name=job.label)
                    self._waiting.look_at(self._queue.to_look_at(self._now()))
                    if not self._queue.waits_for_link() and not self._examining:
                        self._links.unwatch()
                    await self._until_next_event()
        finally:
            self._links.unwatch()

    async def _until_next_event(self) -> None:
        now = self._now()
        due = self._queue.next_event(now)
        waits: list[asyncio.Future[object]] = [asyncio.ensure_future(self._wake.wait())]
        if due is not None:
            waits.append(asyncio.ensure_future(self._sleep(due - now.steady)))
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def _work(self, domain: DomainIdentity) -> None:
        """Do what can be done for a job now; it has a slot until then."""
        changes = self._link_changes
        try:
            verdict, policy = await self._examine(domain)
        except OSError as error:
            self._queue.started(domain)
            self._retry(domain, f"d{domain.domid} could not be looked at: {error}")
            self._wake.set()
            return
        match verdict:
            case Go():
                if self._queue.job(domain).by_saving:
                    await self._save_and_restore(domain, policy)
                else:
                    await self._migrate(domain, policy)
            case NothingLeft():
                await self._settle(domain, Migrated(), 0.0)
            case NotNow(hindrance=hindrance, detail=detail):
                self._defer(domain, hindrance, detail)
                if changes != self._link_changes:
                    self._queue.link_changed(self._now())
            case Never(reason=RelocationReason.DOMAIN_GONE as reason, detail=detail):
                await self._settle(domain, NotMigrated(detail=detail), 0.0, otherwise=reason)
            case Never(reason=reason, detail=detail):
                self._give_up(domain, reason, detail)
            case _:
                assert_never(verdict)
        self._wake.set()

    async def _examine(self, domain: DomainIdentity) -> tuple[PreMigration, RelocationPolicy]:
        """What may be done now, and under which policy: no other came into force meanwhile."""
        while True:
            policy = self._queue.policy
            verdict = await self._judge(domain, policy)
            if policy is not self._queue.policy:
                continue
            # It may have taken its time, and the clock may have been set.
            if isinstance(verdict, Go) and self._queue.closed_for(self._now()):
                what = "outside the maintenance windows"
                return NotNow(hindrance=Hindrance.OUTSIDE_WINDOW, detail=what), policy
            return verdict, policy

    async def _judge(self, domain: DomainIdentity, policy: RelocationPolicy) -> PreMigration:
        job = self._queue.job(domain)
        if job.by_saving and self._queue.may_not_be_saved(domain):
            return Never(reason=RelocationReason.GAVE_UP, detail=telling.NO_MORE_SAVES)
        way: Way | None = None
        self._examining += 1
        try:
            if policy.target and not policy.is_local and not job.by_saving:
                # Watched first, so that nothing that changes from here on is missed.
                self._links.watch(self._link_changed)
                way = await self._links.way(policy.target)
            mfns = self._queue.job(domain).mfns
            directory = Path(policy.save_directory) if job.by_saving else None
            facts = await self._in_thread(partial(self._host.facts, domain, mfns, way, directory))
        except PortError as error:
            return NotNow(hindrance=Hindrance.CANNOT_ASK_XEN, detail=str(error))
        finally:
            self._examining -= 1
            self._wake.set()
        if facts.domain is not None:
            # Asked when everything else is known, for the lists may have changed meanwhile.
            facts = replace(facts, denial=self._denial(facts.domain))
        return judge(domain, facts, policy)

    async def _migrate(self, domain: DomainIdentity, policy: RelocationPolicy) -> None:
        job = self._queue.started(domain)
        self._queue.note(domain, f"is being migrated to {policy.target}")
        telling.begun(job, policy)
        start = self._clock.monotonic()
        with self._breaking.following(domain) as off:
            outcome = await self._following.migration(
                self._relocator.migrate(domain, job.name, policy.target, policy.time_limit, off)
            )
        seconds = self._clock.monotonic() - start
        match outcome:
            case Migrated():
                await self._settle(domain, outcome, seconds)
            case NotMigrated() | InDoubt():
                await self._after_failure(domain, policy.target, outcome, seconds)
            case _:
                assert_never(outcome)

    async def _save_and_restore(self, domain: DomainIdentity, policy: RelocationPolicy) -> None:
        job = self._queue.started(domain)
        self._queue.note(domain, f"is being saved into {policy.save_directory} and restored")
        telling.begun(job, policy)
        start = self._clock.monotonic()
        outcome = await self._following.save(
            job, policy, self._relocator.save_and_restore(domain, policy.save_directory)
        )
        match outcome:
            case Migrated():
                await self._settle(domain, outcome, self._clock.monotonic() - start)
            case NotMigrated(detail=detail, was_asked=was_asked):
                if was_asked and not await self._ending.has_ended(domain):
                    self._asked_in_vain(domain)
                self._retry(domain, detail, stood_still=was_asked)
            case InDoubt(detail=detail):
                # Not ``stuck``: what is left is told for as long as its note is there.
                telling.save_unfinished(job, detail)
                await self._ending.has_ended(domain, may_be_away=True)
                self._give_up(domain, RelocationReason.GUEST_STUCK, detail)
            case _:
                assert_never(outcome)

    async def _after_failure(
        self,
        domain: DomainIdentity,
        target: str,
        outcome: NotMigrated | InDoubt,
        seconds: float,
    ) -> None:
        self._queue.note(domain, "its migration has failed; looking at where it is")
        detail = outcome.detail
        in_doubt = isinstance(outcome, InDoubt) or outcome.may_run_there
        try:
            care = await self._in_thread(
                partial(self._host.aftercare, domain, target=target, in_doubt=in_doubt)
            )
        except (PortError, OSError) as error:
            detail = f"{detail}; what became of d{domain.domid} cannot be seen: {error}"
            self._give_up(domain, RelocationReason.GUEST_STUCK, detail, stuck=detail)
            return
        if care.note:
            detail = f"{detail}; {care.note}"
        if care.moved:
            await self._settle(domain, Migrated(), seconds)
        elif care.ended:
            if isinstance(outcome, InDoubt) or outcome.was_asked:
                # xl asks at the end of what it calls saving; until then users end their guests.
                await self._ending.has_ended(domain, crash_only=True)
            await self._settle(domain, outcome, 0.0, otherwise=RelocationReason.DOMAIN_GONE)
        elif care.stuck is not None:
            self._give_up(domain, RelocationReason.GUEST_STUCK, detail, stuck=care.stuck)
        else:
            # One that may run there has followed the request, and is not to be let go for us again.
            if isinstance(outcome, NotMigrated) and outcome.was_asked and not in_doubt:
                self._asked_in_vain(domain)
            self._retry(domain, f"{detail}; d{domain.domid} runs on")

    def _retry(self, domain: DomainIdentity, detail: str, *, stood_still: bool = False) -> None:
        now = self._now()
        job = self._queue.failed(domain, detail, now, stood_still=stood_still)
        if job is None:
            tries = self._queue.job(domain).attempts
            detail = f"{tries} tries failed: {detail}"
            if self._queue.may_not_be_saved(domain):
                detail = f"{detail}; {telling.NO_MORE_SAVES}"
            self._give_up(domain, RelocationReason.GAVE_UP, detail)
            return
        telling.failed(job, detail, job.due - now.steady)

    async def _settle(
        self,
        domain: DomainIdentity,
        outcome: MigrationOutcome,
        seconds: float,
        *,
        otherwise: RelocationReason = RelocationReason.PAGES_REMAIN,
    ) -> None:
        """The old domain is gone: wait, not for ever, until Xen says that the pages are, too."""
        settled = await self._settling.settled(domain)
        if settled.remaining:
            detail = f"{len(settled.remaining)} pages are not offline: {settled.detail}"
            if not isinstance(outcome, Migrated):
                detail = f"{outcome.detail}; {detail}"
            self._give_up(domain, otherwise, detail, stuck=settled.stuck, offlined=settled.offlined)
            return
        job = self._queue.finish(domain)
        telling.done(job, settled.new_domid)
        telling.stuck(job, settled.stuck)
        self._finished(
            domain,
            Relocated(
                domain=domain,
                mfns=job.mfns,
                new_domid=settled.new_domid,
                attempts=job.attempts,
                seconds=seconds,
                stuck=settled.stuck,
            ),
        )

    def _defer(self, domain: DomainIdentity, hindrance: Hindrance, detail: str) -> None:
        job = self._queue.defer(domain, hindrance, detail, self._now())
        telling.put_off(job, detail)

    def _give_up(
        self,
        domain: DomainIdentity,
        reason: RelocationReason,
        detail: str,
        *,
        stuck: str | None = None,
        offlined: frozenset[Mfn] = frozenset(),
    ) -> None:
        job = self._queue.finish(domain)
        telling.given_up(job, detail)
        telling.stuck(job, stuck)
        self._finished(
            domain,
            NotRelocated(
                domain=domain,
                mfns=job.mfns - offlined,
                offlined=offlined,
                reason=reason,
                detail=detail,
                attempts=job.attempts,
                stuck=stuck,
            ),
        )

    def _link_changed(self) -> None:
        self._link_changes += 1
        self._queue.link_changed(self._now())
        self._wake.set()

    def _hurry(self, domain: DomainIdentity) -> None:
        self._queue.hurry(domain, self._now())
        self._wake.set()

    def _now(self) -> Instant:
        return Instant(wall=self._clock.now(), steady=self._clock.monotonic())
