"""The daemon's parts put together, whatever host they run on: the real one or the simulated."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from pgofflined import __version__
from pgofflined.attention import Attention, Circumstances, policy_digest
from pgofflined.control import ControlServer
from pgofflined.core.conditions import Condition, ConditionCode
from pgofflined.core.domains import (
    DomainIdentity,
    identities_from_text,
    identities_to_text,
)
from pgofflined.core.errors import PortError
from pgofflined.core.events import Event
from pgofflined.core.frames import Domid, Mfn
from pgofflined.core.history import History
from pgofflined.core.incidents import Acknowledged
from pgofflined.core.outcomes import ExchangeReport
from pgofflined.core.policy import Policy, effective
from pgofflined.core.recovery import Recovered
from pgofflined.core.relocation_outcomes import RelocationOutcome
from pgofflined.core.status import FrameAnswer, OfflineAnswer, ReloadStatus, Snapshot, SourceStatus
from pgofflined.endwatch import watch_ends
from pgofflined.guestcare import see_out
from pgofflined.indoubt import GuestsInDoubt, migrated_before
from pgofflined.intake import Intake
from pgofflined.jobs import ExchangePool
from pgofflined.journal_log import Chatter, event
from pgofflined.ledger import Ledger
from pgofflined.mce_listener import (
    IntakeCounters,
    MceListener,
    SourceChoice,
    keep_source,
)
from pgofflined.metrics import Metrics, MetricsServer
from pgofflined.operations import Operations
from pgofflined.ports import TelemetrySource
from pgofflined.relocation import RelocationService
from pgofflined.relocation.counting import CountedRelocator
from pgofflined.retiring import Retirer
from pgofflined.savewatch import SaveWatch
from pgofflined.uncorrected import UncorrectedErrors
from pgofflined.world import World

log = logging.getLogger(__name__)

# How much longer than the guest's own limits an exchange may take before it counts as stuck.
_STUCK_MARGIN = 180.0


Serve = Callable[[], Coroutine[object, object, NoReturn]]


class Service:
    """The running daemon.  Made on the event loop that it runs on.

    ``warnings`` are of the configuration that ``policy`` is of.
    """

    def __init__(self, world: World, policy: Policy, warnings: tuple[str, ...] = ()) -> None:
        self._world = world
        self.policy = policy
        self._started = world.clock.monotonic()
        self.metrics_port = 0
        self.ready = asyncio.Event()
        now = world.clock.now()
        self._reload = ReloadStatus(successful=True, when=now, last_success=now, warnings=warnings)
        self._source = SourceStatus(name=None, note="no source has been tried yet")
        self._xen_version = world.xen.version()
        self.counters = IntakeCounters()
        self._chatter = Chatter(world.clock.monotonic)
        ledger = Ledger(world.store, world.clock, world.store.load_pages())
        in_doubt = GuestsInDoubt(
            world.xen,
            world.clock,
            world.store,
            before=migrated_before(ledger.book),
            target=lambda: self.policy.relocation.target,
        )
        self.retirer = Retirer(
            xen=world.xen,
            journal=world.journal,
            clock=world.clock,
            policy=policy,
            ledger=ledger,
            errors=UncorrectedErrors(world.store),
            chatter=self._chatter,
            times=world.times,
            in_doubt=in_doubt,
        )
        self.retirer.looked_after = self._looked_after
        consequences = self.retirer.consequences
        consequences.idle_scrub = int(world.store.get_meta(_IDLE_SCRUB) or 0)
        consequences.idle_scrub_changed = lambda count: world.store.set_meta(
            _IDLE_SCRUB, str(count)
        )
        restored = identities_from_text(world.store.get_meta(_RESTORED) or "")
        self.retirer.restored |= frozenset(restored)
        self._attention = Attention(world.store, world.clock)
        self.incidents = self._attention.incidents
        consequences.found_broken = self._attention.note_broken
        consequences.freed_marked = self._attention.note_freed_marked
        self.intake = Intake(
            xen=world.xen,
            clock=world.clock,
            policy=policy,
            history=self._load_history(),
            retirer=self.retirer,
            store=world.store,
            chatter=self._chatter,
            incidents=self.incidents,
        )
        self._operations = Operations(
            xen=world.xen,
            clock=world.clock,
            intake=self.intake,
            ledger=self.retirer.ledger,
            incidents=self.incidents,
            is_poisoned=lambda mfn: mfn in self.retirer.errors.poisoned,
        )
        self.retirer.ledger.changed = self._operations.page_changed
        self.pool = ExchangePool(
            self.retirer.exchanging.run,
            self._exchange_finished,
            clock=world.clock,
            workers=policy.exchange.workers,
            max_pages=policy.exchange.pages_in_one_suspend,
            queue_limit=policy.exchange.max_queued,
        )
        self.metrics = Metrics(self.snapshot, world.clock.now)
        self.relocation = RelocationService(
            policy=policy.relocation,
            xen=world.xen,
            relocator=CountedRelocator(
                world.relocator, self.metrics.observe_migration, in_doubt.is_migrated
            ),
            links=world.links,
            clock=world.clock,
            zone=world.zone,
            saves=world.saves,
            finished=self._relocation_finished,
            poison=self.retirer.poison_of,
            is_poisoned=lambda mfn: mfn in self.retirer.errors.poisoned,
            denial=self.retirer.denial,
            objection=self.retirer.exchanging.objection,
            asked_in_vain=self.retirer.asked_in_vain,
            ended=self._guest_ended,
        )
        self.retirer.poison_reported = self.relocation.poison_reported
        self.retirer.policy_taken_up = lambda: world.store.set_meta(
            _POLICY, policy_digest(self.policy)
        )
        if world.store.get_meta(_POLICY) != policy_digest(policy):
            self.retirer.policy_changed(policy)  # while no daemon ran
        self._saves = SaveWatch(world.clock, lambda: self.policy.relocation.time_limit)
        self._connect(policy)

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until ``stop`` is set, then end what is under way and come back.

        Not before every guest runs that may stand still because of us, as far as
        ``World.times.stop`` allows.
        """
        # Before anything else: guests may stand still because of a daemon that was killed.
        await asyncio.to_thread(self.retirer.recover)
        self._looked_after()
        lost = self._world.store.lost
        if lost is not None:
            self.retirer.forgotten = f"{lost}; what Xen holds back has to be found out first"
        # About what was counted by an earlier daemon too, perhaps in a dry run.
        self.intake.decide_again()
        async with self._sockets() as servers, asyncio.TaskGroup() as tasks:
            intake = tasks.create_task(self._listen(), name="intake")
            work = [
                tasks.create_task(self.retirer.run(), name="retirer"),
                tasks.create_task(self.pool.run(), name="exchanges"),
            ]
            relocations = tasks.create_task(self.relocation.run(), name="relocations")
            rest = [
                tasks.create_task(self._feed_watchdog(), name="watchdog"),
                tasks.create_task(self._find_again(lost), name="state"),
                tasks.create_task(
                    self._saves.run(
                        self._world.saves,
                        self._world.xen.domains,
                        Path(self.policy.relocation.save_directory),
                    ),
                    name="saves",
                ),
                tasks.create_task(
                    watch_ends(self._world.ends, self.policy.sources.retry, self._domain_ended),
                    name="ends",
                ),
                *(tasks.create_task(serve(), name="server") for serve in servers),
            ]
            self._world.notifier.ready(self.status_line())
            self.ready.set()
            await stop.wait()
            message = "pgofflined stops when the exchanges under way have ended"
            event(log, logging.INFO, Event.STOPPING, message)
            self._world.notifier.stopping("finishing the exchanges under way")
            intake.cancel()
            relocations.cancel()
            self.retirer.stop()
            self.pool.stop()
            await see_out(self.retirer.care, [*work, relocations])
            self._looked_after()
            for task in rest:
                task.cancel()
            self._chatter.close()

    def reject(self, problems: tuple[str, ...]) -> None:
        """Note that a configuration was rejected: the policy that was in force stays so."""
        now = self._world.clock.now()
        self._reload = replace(self._reload, successful=False, when=now, problems=problems)

    def apply(self, policy: Policy, warnings: tuple[str, ...] = ()) -> None:
        """Put a new policy in force; what needs a restart keeps its old value and is named."""
        now = self._world.clock.now()
        self._reload = ReloadStatus(successful=True, when=now, last_success=now, warnings=warnings)
        old = self.policy
        fixed = [
            name
            for name, was, now in (
                ("metrics", old.metrics, policy.metrics),
                ("control", old.control, policy.control),
                ("sources", old.sources, policy.sources),
                ("exchange.workers", old.exchange.workers, policy.exchange.workers),
            )
            if was != now
        ]
        if fixed:
            log.warning("%s take effect with the next start of the daemon", ", ".join(fixed))
        self.policy = replace(
            policy,
            metrics=old.metrics,
            control=old.control,
            sources=old.sources,
            exchange=replace(policy.exchange, workers=old.exchange.workers),
        )
        self.pool.set_limits(
            max_pages=policy.exchange.pages_in_one_suspend,
            queue_limit=policy.exchange.max_queued,
        )
        self._connect(policy)
        self.retirer.policy_changed(policy)
        self.intake.policy_changed(policy)
        self.relocation.set_policy(policy.relocation)

    # What the control socket asks.

    def snapshot(self) -> Snapshot:
        """The daemon at this moment."""
        book = self.retirer.ledger.book
        clock = self._world.clock
        snapshot = Snapshot(
            version=__version__,
            started=clock.now() - (clock.monotonic() - self._started),
            xen_version=str(self._xen_version),
            dry_run=self.policy.retire.dry_run,
            source=replace(self._source, last_record=self.counters.last_record),
            reports=dict(self.counters.reports),
            lost=self.counters.lost_by_place(),
            pages_by_phase={phase.value: count for phase, count in book.by_phase().items()},
            retired_frames=book.counted(),
            cap_frames=self.retirer.cap_frames(),
            tracked_pages=len(self.intake.history),
            evicted_pages=self.intake.history.evicted,
            idle_scrub=self.retirer.consequences.idle_scrub,
            oldest_unfinished=self.retirer.ledger.oldest_unfinished(),
            workers=self.pool.status(),
            jobs=(*self.pool.jobs(), *self.relocation.snapshot()),
            policy=tuple(effective(self.policy, host_frames=self.retirer.host_frames)),
            policy_digest=policy_digest(self.policy),
            pages=tuple(map(self.retirer.ledger.shown, book)),
            reload=self._reload,
        )
        return replace(snapshot, attention=self._conditions(snapshot))

    def max_mfn(self) -> Mfn:
        """Highest frame of the host."""
        return self._world.machine.max_mfn

    async def query(self, mfn: Mfn) -> FrameAnswer:
        """Xen's state of a frame, its owner as far as that can be told, and our entry."""
        return await self._operations.query(mfn)

    async def offline(self, mfn: Mfn, *, is_awaited: bool = True) -> OfflineAnswer:
        """Retire a frame by the policy's rules; ``is_awaited``: after a first look at it."""
        return await self._operations.offline(mfn, is_awaited=is_awaited)

    async def wait(self, mfn: Mfn, seconds: float) -> OfflineAnswer:
        """What has become of a frame in hand, at its end or after so many seconds."""
        return await self._operations.wait(mfn, seconds)

    def acknowledge(
        self, code: ConditionCode | None, mfn: Mfn | None, domid: Domid | None, *, uid: int
    ) -> Acknowledged:
        """A person knows of the conditions of this code, page and guest; None stands for any."""
        self.snapshot()  # what is true now can be acknowledged, and nothing else
        return self._operations.acknowledge(code, mfn, domid, uid=uid)

    # Inner workings.

    async def _find_again(self, lost: str | None) -> None:
        """Ask Xen what was forgotten, until it answers; nothing is done about pages before."""
        while lost is not None:
            try:
                found = await asyncio.to_thread(self._world.xen.held_back)
            except PortError as error:
                self._attention.note_state_lost(
                    f"{lost}, and Xen cannot be asked what it holds back ({error}): nothing is "
                    "done about any page until it can"
                )
                await asyncio.sleep(_ASK_AGAIN_SECONDS)
            else:
                self.retirer.take_held_back(found)
                self._world.store.found_again()
                self._attention.note_state_found(lost, len(found))
                self.retirer.forgotten = lost = None
                self.retirer.policy_changed(self.policy)

    def _connect(self, policy: Policy) -> None:
        wanted = policy.relocation.target or policy.relocation.save_restore
        relocates = policy.relocation.enabled and bool(wanted)
        self.retirer.connect(self.pool, self.relocation if relocates else None)

    def _domain_ended(self) -> None:
        self.retirer.domain_ended()
        self.relocation.look_again()

    def _conditions(self, snapshot: Snapshot) -> tuple[Condition, ...]:
        about = Circumstances(
            now=self._world.clock.now(),
            vendor=self._world.machine.vendor,
            policy=self.policy,
            version=self._xen_version,
            stuck=self.retirer.care.stuck,
            overdue=self.relocation.overdue(),
            saves=self._saves.conditions,
            trouble=self._world.store.trouble,
            worker=self._stuck_worker(),
            exchanges_off=self._world.exchanges_off(),
        )
        return self._attention.conditions(snapshot, about)

    def _looked_after(self) -> None:
        """Take note of what was seen of guests, so that the next daemon knows of it.

        At once: records are put away, and only what is stored outlives the daemon.
        """
        reports = self.retirer.exchanging.take_not_recovered()
        for report in reports:
            if report.outcome is Recovered.CRASHED:
                self.metrics.observe_end()
        self._attention.note_recovered(reports)
        self.retirer.in_doubt.keep()

    def _load_history(self) -> History:
        retire = self.policy.retire
        history = History(
            window=retire.window,
            threshold=retire.corrected_errors,
            max_pages=retire.max_tracked_pages,
        )
        since = self._world.clock.monotonic() - retire.window
        self._world.store.prune(before=since)
        history.load(self._world.store.load_hits(since))
        return history

    @contextlib.asynccontextmanager
    async def _sockets(self) -> AsyncIterator[list[Serve]]:
        """Open what others reach us by, before we say that we are ready."""
        with contextlib.ExitStack() as stack:
            servers: list[Serve] = []
            if self.policy.metrics.listen is not None:
                metrics = MetricsServer.open(self.policy.metrics.listen, self.metrics)
                stack.callback(metrics.close)
                self.metrics_port = metrics.port
                servers.append(metrics.serve)
            control = ControlServer.open(self.policy.control.socket, self)
            stack.callback(control.close)
            servers.append(control.serve)
            yield servers

    async def _listen(self) -> NoReturn:
        await keep_source(
            self._world.sources,
            listen=self._listen_to,
            chosen=self._source_chosen,
            retry=self.policy.sources.retry,
        )

    async def _listen_to(self, source: TelemetrySource) -> NoReturn:
        listener = MceListener(
            source,
            machine=self._world.machine,
            clock=self._world.clock,
            deliver=self.intake.take,
            counters=self.counters,
            chatter=self._chatter,
            drained=lambda: self._attention.note_lost(self.counters.lost_by_place()),
        )
        try:
            await listener.run()
        except PortError:
            self._world.source_broken(source)
            raise

    def _source_chosen(self, choice: SourceChoice) -> None:
        name = choice.source.name if choice.source is not None else None
        self._source = SourceStatus(name=name, note=choice.describe())
        if choice.source is not None:
            self._world.source_opened(choice.source)
        self._world.notifier.status(self.status_line())

    def _exchange_finished(self, job: str, report: ExchangeReport) -> None:
        self.metrics.observe_exchange(report)
        self._attention.note_exchange(report)
        self.retirer.exchange_finished(job, report)
        self._world.notifier.status(self.status_line())

    def _relocation_finished(self, domain: DomainIdentity, outcome: RelocationOutcome) -> None:
        self.metrics.observe_relocation(outcome)
        self.retirer.relocation_finished(domain, outcome)
        self._looked_after()
        self._world.store.set_meta(_RESTORED, identities_to_text(self.retirer.restored))
        self._saves.look_again()
        self._world.notifier.status(self.status_line())

    def _guest_ended(self, domain: DomainIdentity, how: str) -> None:
        self.metrics.observe_end()
        self._attention.note_ended(domain, how)
        self.retirer.guest_ended(domain, how)

    async def _feed_watchdog(self) -> None:
        interval = self._world.notifier.watchdog_interval
        if interval is None:
            return
        while True:
            problem = self._stuck_worker()
            if problem is None:
                self._world.notifier.watchdog()
            else:
                event(log, logging.CRITICAL, Event.WORKER_STUCK, problem)
            await asyncio.sleep(interval)

    def _stuck_worker(self) -> str | None:
        exchange = self.policy.exchange
        limit = exchange.acknowledge_timeout + exchange.suspend_timeout + _STUCK_MARGIN
        busy = max(self.pool.longest_busy(), self.retirer.seconds_in_a_call())
        if busy <= limit:
            return None
        return (
            f"a worker has waited for Xen for {busy:.0f} s, {limit:.0f} s are allowed; "
            "systemd will restart the daemon, look at `xl dmesg`"
        )

    def status_line(self) -> str:
        """The daemon in one line."""
        book = self.retirer.ledger.book
        unfinished = sum(1 for _ in book.unfinished())
        source = self._source.name or "NO SOURCE of machine checks"
        return f"{source}; {book.counted()} pages retired or pending, {unfinished} under way"


_IDLE_SCRUB = "idle_scrub"
_RESTORED = "restored"
_POLICY = "policy"
_ASK_AGAIN_SECONDS = 60.0
