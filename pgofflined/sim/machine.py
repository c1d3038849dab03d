"""The simulated host: everything that ``ports.Hypervisor`` asks for, in memory."""

from __future__ import annotations

from pgofflined.sim.domaincontrol import SimulatedDomainControl
from pgofflined.sim.framecontrol import SimulatedFrameControl
from pgofflined.sim.memory import SimulatedMemory


class SimulatedHost(SimulatedFrameControl, SimulatedDomainControl, SimulatedMemory):
    """A host with a hypervisor that refuses as Xen does.

    Made from a ``HostSpec`` and a clock; guests come by ``add_pv`` and ``add_hvm``.  Faults of
    the caller that would endanger a real host raise ``sim.errors.SimulationError``.
    """
