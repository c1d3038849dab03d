"""A simulated host with one PV guest, and pages of it that are marked for offlining."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import pytest

from pgofflined.aftercare import Aftercare, CareTimes
from pgofflined.core.domains import DomainIdentity
from pgofflined.core.frames import Domid, Mfn
from pgofflined.core.offline import WhenMarked
from pgofflined.core.outcomes import ExchangeReport
from pgofflined.core.policy import ExchangePolicy
from pgofflined.core.recovery import RecoveryReport
from pgofflined.core.xenversion import XenVersion
from pgofflined.exchanger import exchange
from pgofflined.exchanging import RECOVERY_SECONDS, Exchanging
from pgofflined.ports import Hypervisor, Journal, SuspendLimits
from pgofflined.sim.faults import FaultyHypervisor
from pgofflined.sim.frames import FrameState
from pgofflined.sim.host import HostSpec
from pgofflined.sim.invariants import check_invariants
from pgofflined.sim.journal import MemoryJournal
from pgofflined.sim.layout import PvLayout
from pgofflined.sim.machine import SimulatedHost
from pgofflined.sim.views import GuestView, guest_view

FIXED, UNFIXED = XenVersion(4, 20, 4), XenVersion(4, 17, 7)


@dataclass
class Bench:
    """The host, its guest, and what the guest saw before.

    ``version`` is that of every host that is built.
    """

    version: ClassVar[XenVersion] = FIXED
    host: SimulatedHost
    domid: Domid
    before: GuestView
    journal: MemoryJournal = field(default_factory=MemoryJournal)

    @classmethod
    def build(cls, *, l1tf: bool = True, reuses_first: bool = False) -> Bench:
        host = SimulatedHost(HostSpec(version=cls.version, l1tf=l1tf, reuses_first=reuses_first))
        domid = host.add_pv()
        return cls(host=host, domid=domid, before=guest_view(host, domid))

    @property
    def layout(self) -> PvLayout:
        return self.host.pv(self.domid).layout

    @property
    def identity(self) -> DomainIdentity:
        return self.host.domain(self.domid).identity

    @property
    def when(self) -> WhenMarked:
        """When the daemon marks pages on this host."""
        fixed = self.host.version().offlines_free_frames_safely
        return WhenMarked.BEFORE if fixed else WhenMarked.WHEN_HELD

    def mark(self, *pfns: int) -> list[Mfn]:
        """Pages that are to be exchanged, with a mark where they may have one."""
        mfns = [self.host.frame_of(self.domid, pfn) for pfn in pfns]
        if self.when is WhenMarked.BEFORE:
            for mfn in mfns:
                self.host.offline(mfn)
        return mfns

    def work(self, xen: Hypervisor | None = None, *, journal: Journal | None = None) -> Exchanging:
        """The part of a daemon that has begun no job of its own."""
        return Exchanging(
            xen=xen or self.host,
            journal=journal or self.journal,
            clock=self.host.clock,
            policy=ExchangePolicy,
            poisoned=frozenset,
        )

    def end_jobs(
        self, xen: Hypervisor | None = None, *, journal: Journal | None = None
    ) -> list[RecoveryReport]:
        """What a daemon does that starts: end what was left, again and again if need be.

        Then look after the guests that may follow a request late.
        """
        work = self.work(xen, journal=journal)
        reports = [*work.recover()]
        while work.has_rest:
            # Asked again at once it does nothing: what fails is given time to pass.
            assert work.recover_rest() == ()
            self.host.clock.wait(RECOVERY_SECONDS)
            reports += work.recover_rest()
        self.look_after(reports, ended=(journal or self.journal).done_with)
        return reports

    def look_after(
        self,
        reports: Sequence[RecoveryReport | ExchangeReport],
        *,
        ended: Callable[[DomainIdentity], None] | None = None,
    ) -> None:
        """Until no guest needs it; one that somebody has paused may need it for ever."""
        care = Aftercare(
            self.host,
            self.host.clock,
            times=CareTimes(),
            ended=ended or self.journal.done_with,
        )
        for report in reports:
            care.note(
                "test",
                report.domain,
                stuck=report.stuck,
                may_suspend_late=report.may_suspend_late,
                standing=report.standing,
            )
        until = self.host.clock.monotonic() + 4 * care.times.late
        while care and self.host.clock.monotonic() < until:
            care.look()
            self.host.clock.wait(care.times.interval)

    def exchange(self, mfns: Sequence[Mfn], xen: Hypervisor | None = None) -> ExchangeReport:
        return exchange(
            self.identity,
            mfns,
            xen=xen or self.host,
            journal=self.journal,
            clock=self.host.clock,
            limits=SuspendLimits(),
            when=self.when,
        )

    def exchange_traced(self, mfns: Sequence[Mfn]) -> tuple[ExchangeReport, FaultyHypervisor]:
        traced = FaultyHypervisor(self.host)
        return self.exchange(mfns, traced), traced

    def assert_heap_stays_sound(self) -> None:
        """No page has a mark that it must not have, and the guest can be destroyed."""
        if self.when is WhenMarked.WHEN_HELD:
            assert not (self.host.frames.state == FrameState.OFFLINING).any()
        if self.domid in self.host.by_domid:
            self.host.destroy(self.domid)
        assert self.host.corrupted is None

    def assert_guest_runs_unharmed(self) -> GuestView:
        """The guest runs, sees the same memory as before, and Xen's books agree."""
        assert [kept.group for kept in self.journal.kept.values() if kept.group is not None] == []
        info = self.host.domain(self.domid)
        assert info.shutdown is None
        assert not info.paused
        assert self.host.crashes == {}
        after = guest_view(self.host, self.domid)
        assert self.before.differences(after) == []
        check_invariants(self.host)
        return after


@pytest.fixture
def bench() -> Bench:
    return Bench.build()
