"""Ready-made hosts: a small one for tests, a bigger one with a failing DIMM for the demo."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pgofflined.core.domains import GuestKind
from pgofflined.core.frames import Domid, Mfn
from pgofflined.ports import Clock
from pgofflined.sim.activity import MemoryChecker
from pgofflined.sim.dimm import FailingDimm
from pgofflined.sim.guests import SuspendBehaviour
from pgofflined.sim.host import HostSpec
from pgofflined.sim.layout import PvSpec
from pgofflined.sim.machine import SimulatedHost
from pgofflined.sim.telemetry import SimulatedTelemetry

_PAGES_PER_MIB = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class SmallHost:
    """A host with one PV and one PVH guest of a MiB or two."""

    host: SimulatedHost
    pv: Domid
    pvh: Domid


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoHost:
    """A host at work: guests that check their memory, and a module under them that goes bad."""

    host: SimulatedHost
    telemetry: SimulatedTelemetry
    dimm: FailingDimm
    checkers: dict[Domid, MemoryChecker]
    pvh: Domid


def small_host(
    spec: HostSpec | None = None, *, guest: PvSpec | None = None, clock: Clock | None = None
) -> SmallHost:
    """Build a host in milliseconds, for a test to do with as it likes."""
    host = SimulatedHost(spec, clock=clock)
    pv = host.add_pv(guest)
    pvh = host.add_hvm(kind=GuestKind.PVH)
    return SmallHost(host=host, pv=pv, pvh=pvh)


def demo_host(*, clock: Clock | None = None, seed: int = 1) -> DemoHost:
    """Build a host with three PV guests and a PVH guest, which share the failing module."""
    host = SimulatedHost(
        HostSpec(frames=512 * _PAGES_PER_MIB, dom0=64 * _PAGES_PER_MIB, seed=seed), clock=clock
    )
    checkers = {}
    for name, mib, vcpus, seconds in (
        ("web", 64, 2, 0.15),
        ("database", 128, 4, 0.4),
        ("build", 64, 2, 0.25),
    ):
        spec = PvSpec(
            name=name, pages=mib * _PAGES_PER_MIB, vcpus=vcpus, processes=8, process_pages=256
        )
        domid = host.add_pv(spec)
        host.simulated(domid).behaviour = SuspendBehaviour(suspend_after=seconds)
        checkers[domid] = MemoryChecker.start(host, domid)
    pvh = host.add_hvm(kind=GuestKind.PVH, name="mail", pages=64 * _PAGES_PER_MIB)
    owned = np.isin(host.frames.owner, [*checkers, pvh]) & ~host.frames.special
    guests = [Mfn(mfn) for mfn in np.flatnonzero(owned).tolist()]
    return DemoHost(
        host=host,
        telemetry=SimulatedTelemetry(),
        dimm=FailingDimm(guests, rows=6, seed=seed),
        checkers=checkers,
        pvh=pvh,
    )
