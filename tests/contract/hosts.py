"""The hosts that the contract is tried on, and the little that tests need besides the ports."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from pgofflined.core.frames import Domid, Gfn
from pgofflined.ports import Hypervisor
from pgofflined.sim.guests import Answer, SuspendBehaviour
from pgofflined.sim.layout import PvSpec
from pgofflined.sim.machine import SimulatedHost
from pgofflined.sim.scenarios import small_host


class ContractHost(Protocol):
    """A host with three guests."""

    @property
    def hypervisor(self) -> Hypervisor:
        """What is being tried."""
        ...

    @property
    def pv(self) -> Domid:
        """A Linux PV guest with two vCPUs that suspends when asked."""
        ...

    @property
    def pvh(self) -> Domid:
        """A Linux PVH guest."""
        ...

    @property
    def deaf(self) -> Domid:
        """A PV guest that ignores requests to suspend."""
        ...

    def console_ring(self, domid: Domid) -> Gfn:
        """The frame of a guest's console ring as its grant table names it."""
        ...


@dataclass(frozen=True, kw_only=True)
class SimContractHost:
    """The simulated host."""

    hypervisor: SimulatedHost
    pv: Domid
    pvh: Domid
    deaf: Domid

    def console_ring(self, domid: Domid) -> Gfn:
        grants = self.hypervisor.simulated(domid).grants
        if domid == self.pvh:
            return Gfn(grants[0].pfn)
        return Gfn(self.hypervisor.frame_of(domid, grants[0].pfn))


@dataclass(frozen=True, kw_only=True)
class XenContractHost:
    """The Xen host in whose dom0 the tests run."""

    hypervisor: Hypervisor

    @property
    def pv(self) -> Domid:
        return Domid(int(os.environ["PGOFFLINED_PV_DOMID"]))

    @property
    def pvh(self) -> Domid:
        return Domid(int(os.environ["PGOFFLINED_PVH_DOMID"]))

    @property
    def deaf(self) -> Domid:
        return Domid(int(os.environ["PGOFFLINED_DEAF_DOMID"]))

    def console_ring(self, domid: Domid) -> Gfn:
        path = f"/local/domain/{domid}/console/ring-ref"
        answer = subprocess.run(["xenstore-read", path], check=True, capture_output=True, text=True)
        return Gfn(int(answer.stdout))


@contextmanager
def simulated_host() -> Iterator[ContractHost]:
    """A fresh simulated host; its books have to balance when the test is over."""
    small = small_host()
    deaf = small.host.add_pv(PvSpec(name="deaf", pages=256))
    small.host.simulated(deaf).behaviour = SuspendBehaviour(answer=Answer.IGNORES)
    yield SimContractHost(hypervisor=small.host, pv=small.pv, pvh=small.pvh, deaf=deaf)
    small.host.check_invariants()
    assert small.host.crashes == {}
    assert small.host.corrupted is None


@contextmanager
def xen_host() -> Iterator[ContractHost]:
    """The running Xen host."""
    from pgofflined.xen.hypervisor import XenHypervisor

    hypervisor = XenHypervisor()
    try:
        yield XenContractHost(hypervisor=hypervisor)
    finally:
        hypervisor.close()


BACKENDS = {"sim": simulated_host, "xen": xen_host}


def chosen_backend() -> str:
    """``PGOFFLINED_BACKEND``, or the simulator."""
    return os.environ.get("PGOFFLINED_BACKEND", "sim")
