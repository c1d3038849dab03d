"""A process that exchanges pages of a simulated guest, and is killed in the middle of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

import pytest

from pgofflined.core.domains import DomainIdentity
from pgofflined.core.frames import Mfn
from pgofflined.core.moves import Group
from pgofflined.core.offline import WhenMarked
from pgofflined.core.recovery import Recovered, RecoveryReport
from pgofflined.core.xenversion import XenVersion
from pgofflined.exchanger import exchange
from pgofflined.ports import JobRecord, Journal, OpenJob, SuspendLimits, UnfinishedJob
from pgofflined.sim.faults import Fault, FaultyHypervisor, Killed
from pgofflined.sim.journal import MemoryJournal
from pgofflined.sim.layout import PvLayout
from tests.unit.exchanger.conftest import FIXED, UNFIXED, Bench

if TYPE_CHECKING:
    pass

T = TypeVar("T")
Pick = Callable[[PvLayout], Sequence[int]]

PAGES: dict[str, Pick] = {
    "data": lambda of: of.plain[:1],
    "shared": lambda of: of.user_pages[:1],
    "batch": lambda of: [*of.plain[:4], *of.user_pages[:2], of.text[0], of.p2m_list[0]],
    "l1": lambda of: [of.text_upper[2]],
    "l1-of-itself": lambda of: [of.direct_l1[0]],
    "l1-pinned": lambda of: [of.processes[0].upper[2]],
    "l2": lambda of: [of.direct_l2[0]],
    "l3": lambda of: [of.direct_l3],
    "l4": lambda of: [of.root],
    "mixed": lambda of: [of.plain[0], of.direct_l2[0], of.root],
}


VERSIONS = {"fixed": FIXED, "unfixed": UNFIXED}

# A process that is killed tidies nothing up, as Python does here with what nobody has any more.
LEFT_BY_THE_DEAD: deque[OpenJob] = deque(maxlen=8)


@dataclass
class MortalJournal:
    """The journal of a process that is killed at its n-th record, or at a call of ``xen``.

    ``groups`` are those that it was told to keep.
    """

    inner: Journal
    xen: FaultyHypervisor
    at: int = 0
    after: bool = False
    count: int = 0
    groups: list[Group] = field(default_factory=list)

    def open(self, record: JobRecord) -> OpenJob:
        job = _MortalJob(self, self.strike(lambda: self.inner.open(record)))
        LEFT_BY_THE_DEAD.append(job)
        return job

    def unfinished(self) -> Sequence[UnfinishedJob]:
        return self.inner.unfinished()

    def done_with(self, domain: DomainIdentity) -> None:
        self.inner.done_with(domain)

    def strike(self, act: Callable[[], T]) -> T:
        if self.xen.killed:
            raise Killed
        self.count += 1
        if self.count == self.at and not self.after:
            self._die()
        result = act()
        if self.count == self.at:
            self._die()
        return result

    def _die(self) -> None:
        self.xen.killed = True
        raise Killed


@dataclass
class _MortalJob:
    journal: MortalJournal
    inner: OpenJob

    def keep(self, group: Group) -> None:
        self.journal.groups.append(group)
        self.journal.strike(lambda: self.inner.keep(group))

    def hold(self, cpu_time: int | None) -> None:
        self.journal.strike(lambda: self.inner.hold(cpu_time))

    def begin(self) -> None:
        self.journal.strike(self.inner.begin)

    def settled(self) -> None:
        self.journal.strike(self.inner.settled)

    def leave(self, *, damaged: bool = False) -> None:
        self.journal.strike(lambda: self.inner.leave(damaged=damaged))

    def close(self) -> None:
        self.journal.strike(self.inner.close)

    def set_aside(self) -> None:
        self.journal.strike(self.inner.set_aside)


def run(
    bench: Bench,
    mfns: Sequence[Mfn],
    xen: FaultyHypervisor,
    journal: MortalJournal | None = None,
    *,
    when: WhenMarked | None = None,
) -> None:
    """The job, in a process that may be killed."""
    exchange(
        bench.identity,
        mfns,
        xen=xen,
        journal=journal or MortalJournal(bench.journal, xen),
        clock=bench.host.clock,
        limits=SuspendLimits(),
        when=when or bench.when,
    )


def killed(dying: Fault) -> Bench:
    """A job for one page, whose process was killed at a call."""
    bench = Bench.build()
    mfns = bench.mark(*PAGES["data"](bench.layout))
    with pytest.raises(Killed):
        run(bench, mfns, FaultyHypervisor(bench.host, dying))
    return bench


def mortal(unfinished: UnfinishedJob, xen: FaultyHypervisor) -> UnfinishedJob:
    """A record in the hands of a process that may be killed at a call of ``xen``."""
    job = _MortalJob(MortalJournal(MemoryJournal(), xen), unfinished.job)
    return replace(unfinished, job=job)


@contextmanager
def hosts_of(version: XenVersion) -> Iterator[None]:
    """Let hosts be of a version, for finding out what the cases of a test are."""
    before, Bench.version = Bench.version, version
    try:
        yield
    finally:
        Bench.version = before


def calls_of_a_good_run(pick: Pick) -> list[str]:
    bench = Bench.build()
    _, xen = bench.exchange_traced(bench.mark(*pick(bench.layout)))
    return xen.trace.methods


def records_of_a_good_run(pick: Pick) -> int:
    bench = Bench.build()
    xen = FaultyHypervisor(bench.host)
    journal = MortalJournal(bench.journal, xen)
    run(bench, bench.mark(*pick(bench.layout)), xen, journal)
    return journal.count


def assert_ended_well(bench: Bench, pfns: Sequence[int], reports: list[RecoveryReport]) -> None:
    after = bench.assert_guest_runs_unharmed()
    assert set(bench.before.moved(after)) <= set(pfns)
    guest = bench.host.simulated(bench.domid)
    assert not guest.thought_shut_down, "nobody would notice its next end"
    assert [r for r in reports if r.outcome is Recovered.LEFT_ALONE or r.stuck] == []
    assert bench.journal.kept == {}
