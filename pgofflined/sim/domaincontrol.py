"""Suspending, pausing and listing a simulated host's domains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from errno import EBUSY, EINVAL, EOPNOTSUPP

from pgofflined.core.domains import DomainInfo, GuestKind, ShutdownReason
from pgofflined.core.errors import DomainGone, GuestDidNotSuspend, GuestEnded, SuspendNotAsked
from pgofflined.core.frames import DOM0, Domid
from pgofflined.core.suspending import SuspendSupport
from pgofflined.ports import SuspendLimits, VcpuFrames, nothing
from pgofflined.sim.errors import Refused
from pgofflined.sim.frames import FrameType
from pgofflined.sim.guests import Answer, SimulatedDomain
from pgofflined.sim.host import HostState
from pgofflined.sim.pagetables import PageFault

# What a domain that is let run has run for at once, in ns.
_RUN = 1000


class SimulatedDomainControl(HostState):
    """``ports.DomainControl``."""

    def domains(self) -> Sequence[DomainInfo]:
        """All domains in the order of their domids."""
        with self.call("getdomaininfolist"):
            return [self.by_domid[domid].info() for domid in sorted(self.by_domid)]

    def domain(self, domid: Domid) -> DomainInfo:
        """One domain."""
        with self.call("getdomaininfo", domid):
            return self.simulated(domid).info()

    def conditions(self) -> Sequence[DomainInfo]:
        """All domains, without their names."""
        return [replace(info, name="") for info in self.domains()]

    def condition(self, domid: Domid) -> DomainInfo:
        """One domain, without its name."""
        with self.call("getdomaininfo", domid):
            return replace(self.simulated(domid).info(), name="")

    def suspend_support(self, domid: Domid) -> SuspendSupport:
        """control/feature-suspend, as the test says."""
        with self.call("xs_read", domid):
            domain = self.simulated(domid)
            return (
                SuspendSupport.NOT_ASKED if domain.kind is GuestKind.HVM else domain.suspend_support
            )

    def suspend(self, domid: Domid, limits: SuspendLimits) -> None:
        """control/shutdown = suspend, and what the guest makes of it."""
        with self.call("suspend", domid):
            domain = self.simulated(domid)
            behaviour = domain.behaviour
            deaf = self._refuse_or_ignore(domain)
        if behaviour.answer is Answer.AT_WITHDRAWAL and not deaf:
            self.clock.wait(limits.acknowledge)
            self._finish_suspend(domain)
            return
        if deaf or behaviour.acknowledge_after > limits.acknowledge:
            self.clock.wait(limits.acknowledge)
            self._same(domain)
            raise GuestDidNotSuspend(domid, stage="acknowledge", seconds=limits.acknowledge)
        self.clock.wait(behaviour.acknowledge_after)
        self._same(domain)
        self._perhaps_end(domain)
        late = behaviour.suspend_after - limits.suspend
        if behaviour.answer is Answer.STALLS or late > 0:
            self.clock.wait(limits.suspend)
            self._same(domain)
            if behaviour.answer is not Answer.STALLS:
                domain.suspends_at = self.clock.monotonic() + late
            raise GuestDidNotSuspend(domid, stage="suspend", seconds=limits.suspend)
        self.clock.wait(behaviour.suspend_after)
        self._finish_suspend(domain)

    def resume(self, domid: Domid, before: Callable[[], None] = nothing) -> None:
        """Cooperative resume; the guest's own work follows as soon as nothing pauses it."""
        with self.call("resumedomain", domid):
            domain = self.simulated(domid)
            if domain.suspended:
                before()
                domain.shutdown = None
                domain.resume_pending = True
                self._let_run(domain)

    def tell_resumed(self, domid: Domid) -> None:
        """XS_RESUME, for a domain that is not suspended."""
        with self.call("xs_resume_domain", domid):
            domain = self.simulated(domid)
            if not domain.suspended:
                domain.thought_shut_down = False

    def pause(self, domid: Domid) -> None:
        """XEN_DOMCTL_pausedomain."""
        with self.call("pausedomain", domid):
            if domid == DOM0:
                raise Refused(EINVAL)
            self.simulated(domid).pauses += 1

    def unpause(self, domid: Domid) -> None:
        """XEN_DOMCTL_unpausedomain; without a pause to take back it fails with EINVAL."""
        with self.call("unpausedomain", domid):
            domain = self.simulated(domid)
            if domain.pauses == 0:
                raise Refused(EINVAL)
            domain.pauses -= 1
            self._let_run(domain)

    def withdraw_suspend(self, domid: Domid) -> bool:
        """control/shutdown emptied; a guest here has read the request or never will."""
        with self.call("withdraw_suspend", domid):
            domain = self.simulated(domid)
            unread, domain.unread_request = domain.unread_request, False
            return unread

    def somebody_at(self, domid: Domid) -> str | None:
        """Who saves or migrates the domain, as the test says."""
        with self.call("processes", domid):
            return self.simulated(domid).somebody

    def serves(self, domid: Domid) -> str | None:
        """No guest here serves another."""
        with self.call("xs_read", domid):
            self.simulated(domid)
            return None

    def vcpu_frames(self, domid: Domid) -> VcpuFrames:
        """XEN_DOMCTL_getvcpucontext of every vCPU."""
        with self.call("getvcpucontext", domid):
            holds = self.simulated(domid).holds
            return VcpuFrames(
                roots=frozenset(hold.mfn for hold in holds if hold.kind is FrameType.L4),
                tables=frozenset(hold.mfn for hold in holds if hold.kind is FrameType.SEG_DESC),
            )

    def has_devices(self, domid: Domid) -> bool:
        """Whether the simulated toolstack has assigned devices to the domain."""
        with self.call("backend/pci", domid):
            return self.simulated(domid).has_devices

    def _perhaps_end(self, domain: SimulatedDomain) -> None:
        """Let the guest end between its acknowledgement and the suspend, where it is to."""
        match domain.behaviour.answer:
            case Answer.DIES:
                self.destroy(domain.domid)
            case Answer.REBOOTS:
                self.reboot(domain.domid)
            case Answer.CRASHES:
                self.crash(domain.domid, "the guest crashed on its way to suspend")
            case Answer.CRASHES_READING:
                domain.unread_request = True
                self.crash(domain.domid, "the guest crashed as it read the request")
            case Answer.POWERS_OFF:
                domain.shutdown = ShutdownReason.POWEROFF
            case _:
                return
        self._same(domain)

    def _same(self, domain: SimulatedDomain) -> None:
        """A domain that was asked must still be there after a wait in which others may act."""
        with self.lock:
            if self.by_domid.get(domain.domid) is not domain:
                raise GuestEnded(domain.domid, None)
            if domain.shutdown not in (None, ShutdownReason.SUSPEND):
                raise GuestEnded(domain.domid, domain.shutdown)

    def _refuse_or_ignore(self, domain: SimulatedDomain) -> bool:
        """Whether the guest will not read the request.  Refuses what can never work."""
        if domain.kind is GuestKind.HVM:
            raise SuspendNotAsked(EOPNOTSUPP, op="suspend", domid=domain.domid)
        if domain.suspended:
            raise SuspendNotAsked(EBUSY, op="suspend", domid=domain.domid)
        if domain.shutdown is not None:
            raise DomainGone(domain.domid)
        return (
            not domain.runs
            or domain.domid == DOM0
            or domain.suspends_at is not None
            or domain.behaviour.answer is Answer.IGNORES
        )

    def _finish_suspend(self, domain: SimulatedDomain) -> None:
        with self.lock:
            self._same(domain)
            self.become_suspended(domain)
            if not domain.suspended:
                # Paused by somebody between its acknowledgement and its suspend call.
                raise GuestDidNotSuspend(domain.domid, stage="suspend", seconds=0.0)

    def _let_run(self, domain: SimulatedDomain) -> None:
        if not domain.runs:
            return
        domain.cpu_time += _RUN
        if not domain.resume_pending:
            return
        domain.resume_pending = False
        if domain.pv is not None:
            try:
                domain.pv.after_resume()
            except PageFault as fault:
                self.crash(domain.domid, str(fault))
