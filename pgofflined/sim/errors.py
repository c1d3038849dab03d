"""What goes wrong in a simulated host: Xen's refusals, and misuse that would hurt a real one."""

from __future__ import annotations


class Refused(Exception):
    """The simulated hypervisor's internal refusal; ``errno`` is positive."""

    def __init__(self, errno: int) -> None:
        self.errno = errno
        super().__init__(errno)


class SimulationError(Exception):
    """The caller did what would endanger a real host: a fault of the program under test.

    Deliberately no PortError, so that no handler of ordinary failures swallows it.
    """


class PoisonRead(SimulationError):
    """A broken or poisoned frame was mapped or touched; a real host would take a machine check."""

    def __init__(self, mfn: int) -> None:
        self.mfn = mfn
        super().__init__(f"poisoned mfn {mfn:#x} was touched: a real host would take an #MC")


class HostHangs(SimulationError):
    """A lock was waited for that Xen itself has left broken: a real host stands still for good."""

    def __init__(self, domid: int) -> None:
        super().__init__(f"an offline call for a page of d{domid}, of which Xen has broken one")


class UnsafeUpdate(SimulationError):
    """Page tables of a running domain were changed from outside.

    Xen does not flush the domain's TLBs for that (the comment before the TLB maintenance in
    do_mmu_update, xen/arch/x86/mm.c), so its vCPUs may go on with what they had cached.
    """


class InvariantViolation(SimulationError):
    """The books of the simulated host do not agree with each other."""
