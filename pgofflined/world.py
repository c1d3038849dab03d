"""Everything outside that the service works with, whatever host it runs on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import tzinfo

from pgofflined.aftercare import CareTimes
from pgofflined.core.machine import Machine
from pgofflined.mce_listener import SourceFactory
from pgofflined.notify import Notifier
from pgofflined.ports import Clock, DomainEnds, Hypervisor, Journal, TelemetrySource
from pgofflined.relocation import Links, Relocator
from pgofflined.saving import Saves
from pgofflined.store import Store


@dataclass(frozen=True, kw_only=True)
class World:
    """The host, and what the daemon has of its own on it.

    ``ends`` opens word of domains that end; without it pages are asked about slowly only.
    ``source_opened`` and ``source_broken`` are told of every source, so that its descriptor can
    be kept over a restart.  ``exchanges_off`` says why no exchange can be begun now; None where
    one can.
    """

    xen: Hypervisor
    clock: Clock
    machine: Machine
    sources: Sequence[SourceFactory]
    relocator: Relocator
    links: Links
    zone: tzinfo
    store: Store
    journal: Journal
    notifier: Notifier
    saves: Saves = field(default_factory=Saves)
    ends: Callable[[], DomainEnds] | None = None
    times: CareTimes = field(default_factory=CareTimes)
    source_opened: Callable[[TelemetrySource], None] = lambda _source: None
    source_broken: Callable[[TelemetrySource], None] = lambda _source: None
    exchanges_off: Callable[[], str | None] = lambda: None
