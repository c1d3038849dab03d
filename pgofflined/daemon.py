"""The daemon on a real host: opens what it needs of Xen, the kernel and systemd, and runs."""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from pgofflined import __version__
from pgofflined.config import EX_CONFIG, ConfigError, load
from pgofflined.core.domains import DomainIdentity
from pgofflined.core.errors import PortError, SourceUnavailable
from pgofflined.core.events import Event
from pgofflined.core.machine import read_cpuinfo
from pgofflined.core.policy import Policy, SourceName, effective
from pgofflined.core.relocation_outcomes import MigrationOutcome, NotMigrated
from pgofflined.diskless import may_reach_a_disk
from pgofflined.jobstore import JobStore
from pgofflined.journal_log import event, setup_logging
from pgofflined.mce_listener import SourceFactory
from pgofflined.notify import ChannelName, Notifier, kept_descriptors, make_notifier
from pgofflined.ports import TelemetrySource
from pgofflined.relocation import (
    KernelLinks,
    NoLauncher,
    Relocator,
    XlRelocator,
    choose_launcher,
    local_zone,
)
from pgofflined.saving import Saves
from pgofflined.service import Service, World
from pgofflined.serving import CannotListen
from pgofflined.store import Store, StoreInUse, read_boot_id
from pgofflined.xen.abi.mca import VIRQ_MCA
from pgofflined.xen.hypervisor import XenHypervisor
from pgofflined.xen.telemetry import McelogSource, NativeSource

log = logging.getLogger(__name__)

EX_UNAVAILABLE: Final = os.EX_UNAVAILABLE
_RUN: Final = Path("/run/pgofflined")
JOBS: Final = _RUN / "jobs"
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


class _NoRelocator:
    """Stands in where no migration could be started safely, and says why."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    async def migrate(
        self, domain: DomainIdentity, name: str, target: str, time_limit: float
    ) -> MigrationOutcome:
        """Migrate nothing."""
        del domain, name, target, time_limit
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
    try:
        policy = load(config_path)
    except ConfigError as error:
        _tell_rejected(error)
        return EX_CONFIG
    clock = HostClock()
    notifier = make_notifier(clock.monotonic)
    try:
        return asyncio.run(_serve(config_path, policy, notifier, clock))
    except (PortError, StoreInUse, CannotListen, ValueError) as error:
        log.critical("pgofflined cannot start: %s", error)
        return EX_UNAVAILABLE


async def _serve(config_path: Path, policy: Policy, notifier: Notifier, clock: HostClock) -> int:
    xen = XenHypervisor()
    machine = read_cpuinfo(_CPUINFO.read_text(encoding="ascii"), max_mfn=xen.max_mfn())
    store = Store.open(_RUN / "state.db", read_boot_id())
    native = NativeFactory(kept_descriptors(), notifier)
    factories: dict[SourceName, SourceFactory] = {
        SourceName.NATIVE: native,
        SourceName.MCELOG: McelogSource,
    }
    current: list[Service] = []
    world = World(
        xen=xen,
        clock=clock,
        machine=machine,
        sources=[factories[name] for name in policy.sources.order],
        relocator=_relocator(lambda: current[0].policy.relocation.ssh_command),
        links=KernelLinks(),
        zone=local_zone(),
        store=store,
        journal=_journal(),
        notifier=notifier,
        saves=Saves(read_boot_id()),
        source_opened=native.keep,
        source_broken=native.let_go,
    )
    service = Service(world, policy)
    current.append(service)
    _tell_started(policy, xen, service)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, _reload, config_path, service, notifier)
    try:
        await service.run(stop)
    finally:
        store.close()
    return 0


def _journal() -> JobStore:
    refusal = _leak()
    if refusal is not None:
        log.error("%s", refusal)
    return JobStore(JOBS, refusal=_leak)


def _leak() -> str | None:
    """Why no exchange can be begun now; looked at again before each, for mounts come and go."""
    try:
        leak = may_reach_a_disk(JOBS)
    except OSError as error:
        leak = f"where {JOBS} lies cannot be told ({error})"
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
    try:
        policy = load(config_path)
    except ConfigError as error:
        _tell_rejected(error)
    else:
        service.apply(policy)
        event(log, logging.INFO, Event.CONFIG_RELOADED, f"{config_path} was read again")
        _tell_policy(policy, service)
    notifier.ready(service.status_line())


def _tell_rejected(error: ConfigError) -> None:
    for problem in error.problems:
        event(log, logging.ERROR, Event.CONFIG_REJECTED, f"{error.name}: {problem}")


def _tell_started(policy: Policy, xen: XenHypervisor, service: Service) -> None:
    message = f"pgofflined {__version__} on Xen {xen.version()}"
    event(log, logging.INFO, Event.STARTED, message)
    _tell_policy(policy, service)
    snapshot = service.snapshot()
    for line in snapshot.attention:
        if line != snapshot.source.note:  # no source has been tried at this point
            log.warning("%s", line)


def _tell_policy(policy: Policy, service: Service) -> None:
    for line in effective(policy, host_frames=service.intake.host_frames):
        log.info("policy: %s", line)
