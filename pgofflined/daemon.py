"""The daemon on a real host: opens what it needs of Xen, the kernel and systemd, and runs."""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import os
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from pgofflined import __version__
from pgofflined.affinitynote import AffinityFile
from pgofflined.aftercare import CareTimes
from pgofflined.attention import Attention
from pgofflined.config import EX_CONFIG, ConfigError, Configuration, load
from pgofflined.core.conditions import ConditionCode, Severity
from pgofflined.core.domains import DomainIdentity
from pgofflined.core.errors import PortError, SourceUnavailable
from pgofflined.core.events import Event
from pgofflined.core.frames import Mfn
from pgofflined.core.machine import read_cpuinfo
from pgofflined.core.policy import SourceName, effective
from pgofflined.core.recovery import RecoveryReport
from pgofflined.core.relocation_outcomes import MigrationOutcome, NotMigrated
from pgofflined.diskless import may_reach_a_disk
from pgofflined.jobstore import JobStore
from pgofflined.journal_log import event, setup_logging
from pgofflined.leftovers import Leftovers, only_daemon
from pgofflined.mce_listener import SourceFactory
from pgofflined.notify import ChannelName, Notifier, kept_descriptors, make_notifier
from pgofflined.ports import Clock, DomainEnds, Hypervisor, Journal, TelemetrySource
from pgofflined.relocation import (
    KernelLinks,
    NoLauncher,
    Relocator,
    XlRelocator,
    choose_launcher,
    local_zone,
)
from pgofflined.relocation.relocator import BreakOff
from pgofflined.saving import Saves
from pgofflined.service import Service
from pgofflined.serving import CannotListen
from pgofflined.store import Store, StoreInUse, read_boot_id
from pgofflined.uncorrected import stored_poison
from pgofflined.world import World
from pgofflined.xen.abi.mca import VIRQ_MCA
from pgofflined.xen.ends import XenstoreEnds
from pgofflined.xen.hypervisor import XenHypervisor, release_monitors, restore_affinity
from pgofflined.xen.process import leave_no_core
from pgofflined.xen.telemetry import McelogSource, NativeSource

log = logging.getLogger(__name__)

EX_UNAVAILABLE: Final = os.EX_UNAVAILABLE
_RUN: Final = Path("/run/pgofflined")
JOBS: Final = _RUN / "jobs"
STATE: Final = "state.db"
LOCK: Final = "lock"
AFFINITY: Final = "affinity"
_CPUINFO: Final = Path("/proc/cpuinfo")


class HostClock:
    """The host's own clocks."""

    def now(self) -> float:
        """Seconds since the epoch."""
        return time.time()

    def monotonic(self) -> float:
        """Seconds that never run backwards."""
        return time.monotonic()

    def wait(self, seconds: float) -> None:
        """Sleep."""
        time.sleep(seconds)


def _open_xen() -> Hypervisor:
    return XenHypervisor(AffinityFile(_RUN / AFFINITY))


def _restore_affinity() -> None:
    restore_affinity(AffinityFile(_RUN / AFFINITY))


@dataclass(frozen=True, kw_only=True)
class Host:
    """What the daemon needs of the host before it knows its configuration.

    ``lock_wait``: seconds for which another process that has the lock is waited for.
    """

    open_xen: Callable[[], Hypervisor] = _open_xen
    restore_affinity: Callable[[], object] = _restore_affinity
    release_monitors: Callable[[], object] = release_monitors
    open_ends: Callable[[], DomainEnds] = XenstoreEnds
    directory: Path = _RUN
    clock: Clock = field(default_factory=HostClock)
    times: CareTimes = field(default_factory=CareTimes)
    lock_wait: float = 20.0


class _NoRelocator:
    """Stands in where no migration could be started safely, and says why."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    async def migrate(
        self, domain: DomainIdentity, name: str, target: str, time_limit: float, off: BreakOff
    ) -> MigrationOutcome:
        """Migrate nothing."""
        del domain, name, target, time_limit, off
        return NotMigrated(detail=self._reason)

    async def save_and_restore(self, domain: DomainIdentity, directory: str) -> MigrationOutcome:
        """Save nothing."""
        del domain, directory
        return NotMigrated(detail=self._reason)


class NativeFactory:
    """Opens the native source; goes on with the event channel that systemd kept, if there is one.

    While systemd keeps a channel, VIRQ_MCA stays bound to it and cannot be bound again: before a
    new one is opened, the old one is dropped.
    """

    def __init__(self, kept: Mapping[ChannelName, int], notifier: Notifier) -> None:
        self._kept = {name: fd for name, fd in kept.items() if name.virq == VIRQ_MCA}
        self._notifier = notifier

    def __call__(self) -> TelemetrySource:
        """Open the source.  Raises SourceUnavailable."""
        while self._kept:
            name, fd = self._kept.popitem()
            try:
                return NativeSource.adopt(fd, name.port)
            except SourceUnavailable as error:
                log.warning("the event channel kept over the restart is of no use: %s", error)
                os.close(fd)
                self._notifier.drop_descriptor(name)
        return NativeSource.open()

    def keep(self, source: TelemetrySource) -> None:
        """Have the source's event channel kept over a restart."""
        if isinstance(source, NativeSource):
            name = ChannelName(virq=VIRQ_MCA, port=source.port)
            self._notifier.keep_descriptor(name, source.fileno())

    def let_go(self, source: TelemetrySource) -> None:
        """Have it kept no longer: it broke, and its copy would hold VIRQ_MCA."""
        if isinstance(source, NativeSource):
            self._notifier.drop_descriptor(ChannelName(virq=VIRQ_MCA, port=source.port))


def run(config_path: Path) -> int:
    """Run the daemon until it is told to stop; gives the exit status."""
    setup_logging(logging.INFO)
    # Where the watchdog ends us with SIGABRT, the journal is to tell what every thread waited for.
    faulthandler.enable()
    leave_no_core()
    return start(config_path, Host())


def start(config_path: Path, host: Host) -> int:
    """Be the only daemon, end what an earlier one left of exchanges, then serve."""
    with only_daemon(host.directory / LOCK, wait=host.lock_wait) as is_only:
        if not is_only:
            log.critical(
                "pgofflined cannot start: another one runs on this host (it has locked %s); stop "
                "it first (systemctl stop pgofflined)",
                host.directory / LOCK,
            )
            return EX_UNAVAILABLE
        return _start_alone(config_path, host)


def _start_alone(config_path: Path, host: Host) -> int:
    jobs = host.directory / JOBS.name
    journal = _journal(jobs)
    try:
        xen = host.open_xen()
    except PortError as error:
        log.critical("pgofflined cannot start: %s", error)
        is_bad = _load_or_tell(config_path) is None
        # A configuration with mistakes ends all tries, unless a guest may wait for us.
        return EX_CONFIG if is_bad and not any(jobs.glob("*")) else EX_UNAVAILABLE
    leftovers = recover_first(host, xen, journal)
    notifier = make_notifier(host.clock.monotonic)
    configuration = _load_or_tell(config_path)
    if configuration is None:
        # As above: with a guest that still waits for us, it is tried again.
        return EX_CONFIG if leftovers.see_out() else EX_UNAVAILABLE
    try:
        # Whatever ends the service, ``see_out`` finds the store free.
        with closing(Store.open(host.directory / STATE, read_boot_id())) as store:
            return asyncio.run(
                _serve(config_path, configuration, host, xen, journal, leftovers, store, notifier)
            )
    except (PortError, StoreInUse, CannotListen, ValueError) as error:
        log.critical("pgofflined cannot start: %s", error)
        leftovers.see_out(alive=notifier.watchdog)
        return EX_UNAVAILABLE
    except Exception:  # a fault of ours is told by who called, after the guests
        # A service that was ready is watched by systemd, which allows less time than they do.
        leftovers.see_out(alive=notifier.watchdog)
        raise


def recover_first(host: Host, xen: Hypervisor, journal: Journal) -> Leftovers:
    """Try once to end whatever an earlier process has left of guests, monitors and affinities."""
    leftovers = Leftovers(
        xen,
        journal,
        host.clock,
        lambda: _poison(host.directory),
        times=host.times,
        noted=lambda report: _note(host, report),
    )
    leftovers.recover()
    # Not before: a monitor that goes on while its guest stands still is lost.
    _release_monitors(host)
    try:
        host.restore_affinity()
    except PortError as error:
        log.error("whether a vCPU of dom0 is still kept off pCPU 0 cannot be seen: %s", error)
    return leftovers


async def _serve(
    config_path: Path,
    configuration: Configuration,
    host: Host,
    xen: Hypervisor,
    journal: Journal,
    leftovers: Leftovers,
    store: Store,
    notifier: Notifier,
) -> int:
    policy = configuration.policy
    machine = read_cpuinfo(_CPUINFO.read_text(encoding="ascii"), max_mfn=xen.max_mfn())
    native = NativeFactory(kept_descriptors(), notifier)
    factories: dict[SourceName, SourceFactory] = {
        SourceName.NATIVE: native,
        SourceName.MCELOG: McelogSource,
    }
    current: list[Service] = []
    world = World(
        xen=xen,
        clock=host.clock,
        machine=machine,
        sources=[factories[name] for name in policy.sources.order],
        relocator=_relocator(lambda: current[0].policy.relocation.ssh_command),
        links=KernelLinks(),
        zone=local_zone(),
        store=store,
        journal=journal,
        notifier=notifier,
        saves=Saves(read_boot_id()),
        ends=host.open_ends,
        times=host.times,
        source_opened=native.keep,
        source_broken=native.let_go,
        exchanges_off=lambda: _leak(host.directory / JOBS.name),
    )
    service = Service(world, policy, configuration.warnings)
    current.append(service)
    leftovers.hand_over(service.retirer.care)
    _tell_started(xen, service)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, _reload, config_path, service, notifier)
    await service.run(stop)
    return 0


def _release_monitors(host: Host) -> None:
    try:
        host.release_monitors()
    except PortError as error:
        log.warning("xl's monitors, should any be stopped, could not be let go on: %s", error)


def _poison(directory: Path) -> frozenset[Mfn]:
    """What is known of uncorrected errors without a service; nothing where the store is no help."""
    try:
        store = Store.open(directory / STATE, read_boot_id())
    except (StoreInUse, OSError) as error:
        log.error("what was stored of uncorrected errors cannot be read: %s", error)
        return frozenset()
    try:
        return stored_poison(store)
    finally:
        store.close()


def _note(host: Host, report: RecoveryReport) -> None:
    """Keep for the next daemon what a person has to see to, while none has the store."""
    domid = report.domain.domid
    try:
        with closing(Store.open(host.directory / STATE, read_boot_id())) as store:
            Attention(store, host.clock).note_recovered([report])
            trouble = store.trouble
    except (StoreInUse, OSError) as error:
        trouble = str(error)
    if trouble is not None:
        log.error("the next daemon will raise no alert for d%d: %s", domid, trouble)


def _load_or_tell(
    config_path: Path, rejected: Callable[[tuple[str, ...]], None] = lambda _: None
) -> Configuration | None:
    """The configuration; what speaks against it, or is doubtful in it, is told."""
    try:
        configuration = load(config_path)
    except ConfigError as error:
        for line in error.lines:
            event(log, logging.ERROR, Event.CONFIG_REJECTED, line)
        rejected(error.lines)
        return None
    for line in configuration.warnings:
        log.warning("%s", line)
    return configuration


def _journal(jobs: Path) -> JobStore:
    refusal = _leak(jobs)
    if refusal is not None:
        log.error("%s", refusal)
    return JobStore(jobs, refusal=lambda: _leak(jobs))


def _leak(jobs: Path) -> str | None:
    """Why no exchange can be begun now; looked at again before each, for mounts come and go."""
    try:
        leak = may_reach_a_disk(jobs)
    except OSError as error:
        leak = f"where {jobs} lies cannot be told ({error})"
    if leak is None:
        return None
    return (
        f"pages of PV guests are not exchanged: {leak}, and what an exchange keeps there must not "
        "reach a disk; mount a ramfs (systemctl start run-pgofflined-jobs.mount)"
    )


def _relocator(ssh_command: Callable[[], str]) -> Relocator:
    try:
        return XlRelocator(launcher=choose_launcher(), sleep=asyncio.sleep, ssh_command=ssh_command)
    except NoLauncher as error:
        log.error("%s", error)
        return _NoRelocator(str(error))


def _reload(config_path: Path, service: Service, notifier: Notifier) -> None:
    notifier.reloading()
    configuration = _load_or_tell(config_path, service.reject)
    if configuration is not None:
        service.apply(configuration.policy, configuration.warnings)
        event(log, logging.INFO, Event.CONFIG_RELOADED, f"{config_path} was read again")
        _tell_policy(service)
    notifier.ready(service.status_line())


def _tell_started(xen: Hypervisor, service: Service) -> None:
    message = f"pgofflined {__version__} on Xen {xen.version()}"
    event(log, logging.INFO, Event.STARTED, message)
    _tell_policy(service)
    snapshot = service.snapshot()
    for condition in snapshot.attention:
        if condition.code is not ConditionCode.NO_SOURCE:  # none has been tried at this point
            level = logging.INFO if condition.severity is Severity.INFO else logging.WARNING
            log.log(level, "%s", condition.text)


def _tell_policy(service: Service) -> None:
    """Tell what is in force: not all that the file says, where that needs a restart."""
    for line in effective(service.policy, host_frames=service.retirer.host_frames):
        log.info("policy: %s", line)
