"""The simulated host: everything that ``ports.Hypervisor`` asks for, in memory."""

from __future__ import annotations

from pgofflined.core.frames import Domid
from pgofflined.sim.domaincontrol import SimulatedDomainControl
from pgofflined.sim.framecontrol import SimulatedFrameControl
from pgofflined.sim.invariants import check_invariants
from pgofflined.sim.memory import SimulatedMemory
from pgofflined.sim.views import GuestView, guest_view


class SimulatedHost(SimulatedFrameControl, SimulatedDomainControl, SimulatedMemory):
    """A host with a hypervisor that refuses as Xen does.

    Made from a ``HostSpec`` and a clock; guests come by ``add_pv`` and ``add_hvm``.  Faults of
    the caller that would endanger a real host raise ``sim.errors.SimulationError``.
    """

    def snapshot(self, domid: Domid) -> GuestView:
        """What a guest sees of its memory now; see ``GuestView.differences`` and ``moved``."""
        return guest_view(self, domid)

    def check_invariants(self) -> None:
        """Raise InvariantViolation unless counts, types, M2P and p2m all agree.

        Not in the middle of an exchange: until the guest's p2m is written they do not.
        """
        check_invariants(self)
