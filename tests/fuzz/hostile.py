"""A guest full of lies: python -m tests.fuzz.hostile CASES [SEED].

Each case is a host with two guests, of which one is hostile: before and during an exchange of some
of its pages it writes what it likes into everything of its own that we read (shared_info, p2m list,
frame lists, start_info, page tables through Xen, the M2P of its frames, grants), or ends.  Whatever
comes of it, no exception comes out, nobody else's memory changes, and the guest does not stand
still because of us.  Every other host has the old allocator: there no mark is left, and the heap
stays sound when the guests end.
"""

from __future__ import annotations

import contextlib
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from pgofflined.core.domains import ShutdownReason
from pgofflined.core.errors import DomainGone, PortError
from pgofflined.core.frames import DOM0
from pgofflined.core.offline import WhenMarked
from pgofflined.core.outcomes import ExchangeReport, Refusal
from pgofflined.core.xenversion import XenVersion
from pgofflined.exchanger import exchange
from pgofflined.ports import SuspendLimits
from pgofflined.sim import linux
from pgofflined.sim.errors import Refused
from pgofflined.sim.faults import Fault, FaultyHypervisor, Moment
from pgofflined.sim.frames import FrameState
from pgofflined.sim.guests import Answer, SuspendBehaviour
from pgofflined.sim.host import HostSpec
from pgofflined.sim.journal import MemoryJournal
from pgofflined.sim.layout import P2M_FOREIGN, P2M_IDENTITY, P2M_MISSING, PvSpec
from pgofflined.sim.pagetables import PageFault
from pgofflined.sim.scenarios import small_host

_GUEST = PvSpec(name="hostile", pages=192, vcpus=2, processes=2, process_pages=8, text_pages=4)
_CALLS = 45
_ANSWERS = [*[Answer.SUSPENDS] * 9, *Answer]


@dataclass
class Case:
    """One host, drawn from a seed."""

    seed: int
    random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)  # noqa: S311 - cases are to be repeatable
        self.when = WhenMarked.WHEN_HELD if self.seed % 2 else WhenMarked.BEFORE
        version = XenVersion(4, 17, 7) if self.seed % 2 else XenVersion(4, 20, 4)
        small = small_host(HostSpec(version=version), guest=_GUEST)
        self.host, self.domid = small.host, small.pv
        self.victim = self.host.add_pv(PvSpec(name="victim", pages=128, processes=1))
        self.guest = self.host.pv(self.domid)
        self._start = self.guest.mfns().tolist()
        # Its kernel does nothing but lie: what an honest one does around a suspend it would do by
        # its own p2m, and to whomever that names by then.
        vars(self.guest).update(before_suspend=lambda: None, after_resume=lambda: None)

    def run(self) -> ExchangeReport:
        """The exchange; raises what is wrong with how it ended."""
        pick = self.random
        pages = pick.sample(self.guest.layout.populated, pick.randint(1, 4))
        mfns = [self.host.frame_of(self.domid, pfn) for pfn in pages]
        if self.when is WhenMarked.BEFORE:
            for mfn in mfns:
                self.host.offline(mfn)
        identity = self.host.domain(self.domid).identity
        self.host.simulated(self.domid).behaviour = SuspendBehaviour(answer=pick.choice(_ANSWERS))
        before = self._others()
        for _ in range(pick.randint(0, 3)):
            self._lie()
        journal = MemoryJournal()
        report = exchange(
            identity,
            mfns,
            xen=FaultyHypervisor(self.host, *self._lies_on_the_way()),
            journal=journal,
            clock=self.host.clock,
            limits=SuspendLimits(),
            when=self.when,
        )
        self._check(report, journal, before)
        if self.when is WhenMarked.WHEN_HELD:
            self._check_heap()
        return report

    def _lies_on_the_way(self) -> list[Fault]:
        return [
            Fault(
                nth=self.random.randint(1, _CALLS),
                moment=self.random.choice((Moment.BEFORE, Moment.AFTER)),
                act=self._lie,
            )
            for _ in range(self.random.randint(1, 5))
        ]

    def _check(self, report: ExchangeReport, journal: MemoryJournal, before: list[object]) -> None:
        if report.stuck is not None:
            raise AssertionError(f"the guest is stuck: {report.stuck}")
        if self._others() != before:
            raise AssertionError("somebody else's memory has changed")
        if any(kept.group is not None for kept in journal.kept.values()):
            raise AssertionError("a group was left in the journal")
        with contextlib.suppress(DomainGone):
            info = self.host.domain(self.domid)
            if info.paused or info.shutdown is ShutdownReason.SUSPEND:
                raise AssertionError("the guest stands still because of us")

    def _check_heap(self) -> None:
        if (self.host.frames.state == FrameState.OFFLINING).any():
            raise AssertionError("a page has kept its mark")
        # One that ends in the milliseconds for which it is held frees pages that are marked.
        was_there = self.domid in self.host.by_domid
        for domid in (self.domid, self.victim):
            if domid in self.host.by_domid:
                self.host.destroy(domid)
        if was_there and self.host.corrupted is not None:
            raise AssertionError(self.host.corrupted)

    def _others(self) -> list[object]:
        """Contents of everything that is not the hostile guest's, and who owns it."""
        frames = self.host.frames
        others = np.flatnonzero(np.isin(frames.owner, (int(DOM0), int(self.victim))))
        return [others.tolist(), frames.contents.digests(others.astype(np.uint64)).tolist()]

    # What the guest does.

    def _lie(self) -> None:
        domain = self.host.by_domid.get(self.domid)
        # One that is held can do nothing, save for what others do to it.
        if domain is None or domain.dying:
            return
        runs: list[Callable[[], object]] = [
            *[self._shared_info, self._p2m_entry, self._frame, self._m2p, self._entry] * 3,
            self._pin,
            self._grant,
        ]
        always: list[Callable[[], object]] = [self._hold, self._destroy, self._crash, self._pause]
        act = self.random.choice(runs if domain.runs and self.random.random() < 0.97 else always)
        # What Xen or the guest's own processor would not do for it does not happen.
        with contextlib.suppress(PortError, Refused, IndexError, PageFault):
            act()

    def _number(self) -> int:
        frames = self.host.frames.count
        own = self.random.choice(self.guest.layout.populated)
        return self.random.choice(
            [
                0,
                1,
                self.random.randrange(frames),
                self.random.randrange(frames) << 12,
                own,
                (1 << 40) - 1,
                1 << 40,
                (1 << 52) - 1,
                P2M_MISSING,
                own | P2M_IDENTITY,
                own | P2M_FOREIGN,
                self.random.getrandbits(64),
                self.random.randrange(1, 1 << 14),
            ]
        )

    def _own_mfn(self) -> int:
        own = np.flatnonzero(self.host.frames.owner == self.domid)
        return int(self.random.choice(own.tolist()))

    def _shared_info(self) -> None:
        word = linux.ARCH_MAX_PFN + self.random.randrange(6)
        self.guest.set_shared_info(word, self._number())

    def _p2m_entry(self) -> None:
        page = self.random.choice(self.guest.layout.p2m_list)
        self._write(page, self.random.randrange(512), self._number())

    def _frame(self) -> None:
        layout = self.guest.layout
        pfn = self.random.choice(
            [*layout.p2m_list, *layout.p2m_mid, layout.p2m_top, layout.start_info, *layout.plain]
        )
        for _ in range(4):
            self._write(pfn, self.random.randrange(512), self._number())

    def _write(self, pfn: int, index: int, word: int) -> None:
        """Write to a page as long as it is where it was at the start."""
        mfn = self._start[pfn]
        if self.host.frames.owner[mfn] == self.domid:
            self.host.frames.contents.write(mfn, index, np.array([word], dtype=np.uint64))

    def _m2p(self) -> None:
        self.host.set_m2p(self._own_mfn(), self._number())

    def _entry(self) -> None:
        """An entry set through Xen, as the guest's own mmu_update would."""
        table, target = self._own_mfn(), self._own_mfn()
        flags = self.random.choice([0, 0x25, 0x63, 0x67, 0x8000_0000_0000_0063])
        value = target << 12 | flags if flags else 0
        with self.host.lock:
            self.host.guest_update(self.domid, table, self.random.randrange(512), value)

    def _pin(self) -> None:
        table = self._own_mfn()
        with self.host.lock:
            if self.host.frames.pinned[table]:
                self.host.references.unpin(table)
            else:
                level = self.random.randint(1, 4)
                self.host.references.pin(table, int(self.domid), level)

    def _grant(self) -> None:
        pfn = self.random.choice(self.guest.layout.populated)
        self.host.grant(self.domid, pfn, mapped=self.random.random() < 0.5)

    def _hold(self) -> None:
        self.host.hold(self.domid, self.random.choice(self.guest.layout.populated), why="dom0")

    def _destroy(self) -> None:
        self.host.destroy(self.domid)

    def _crash(self) -> None:
        self.host.crash(self.domid, "by itself")

    def _pause(self) -> None:
        """An administrator pauses it and lets it go."""
        self.host.pause(self.domid)
        self.host.unpause(self.domid)


def main(cases: int, first: int) -> int:
    """Run cases; 1 and the seed at the first that ends badly."""
    began, told = time.monotonic(), Counter[str]()
    for seed in range(first, first + cases):
        try:
            report = Case(seed).run()
        except Exception:
            print(f"seed {seed} ends badly", file=sys.stderr)
            raise
        told.update(
            result.reason.value if isinstance(result, Refusal) else type(result).__name__.lower()
            for result in report.results
        )
    for outcome, count in told.most_common():
        print(f"{count:8}  {outcome}")
    print(f"{cases} cases from seed {first} in {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0))
