from __future__ import annotations

from collections import Counter
from itertools import islice

import numpy as np

from pgofflined.core.domains import GuestKind, ShutdownReason
from pgofflined.core.frames import PAGE_SHIFT, Mfn, mfn_of
from pgofflined.ports import Clock, Hypervisor, SuspendLimits
from pgofflined.sim.activity import MemoryChecker
from pgofflined.sim.clock import ManualClock, WallClock
from pgofflined.sim.dimm import FailingDimm
from pgofflined.sim.layout import DIRECT_MAP
from pgofflined.sim.pagetables import walk
from pgofflined.sim.scenarios import demo_host, small_host


def test_simulated_host_fulfils_the_ports() -> None:
    hypervisor: Hypervisor = small_host().host
    clocks: list[Clock] = [ManualClock(), WallClock()]

    assert hypervisor.version().offlines_free_frames_safely
    assert all(clock.now() > 1e9 for clock in clocks)


def test_manual_clock_moves_only_when_waited_on() -> None:
    clock = ManualClock()
    before = clock.now(), clock.monotonic()
    clock.wait(2.5)

    assert (clock.now() - before[0], clock.monotonic() - before[1]) == (2.5, 2.5)


def test_wall_clock_is_sped_up() -> None:
    clock = WallClock(speed=1e6)
    before = clock.monotonic()
    clock.wait(100.0)

    assert clock.monotonic() - before < 5.0


def test_demo_has_guests_of_both_kinds_at_work() -> None:
    demo = demo_host()
    kinds = [info.kind for info in demo.host.domains()]

    assert kinds == [GuestKind.PV] * 4 + [GuestKind.PVH]
    assert all(not checker.verify_all() for checker in demo.checkers.values())
    demo.host.check_invariants()
    demo.telemetry.close()


def test_errors_of_the_module_strike_guests_and_cluster() -> None:
    demo = demo_host()
    frames = [mfn_of(address) for address in islice(demo.dimm.addresses(), 200)]
    demo.telemetry.close()

    assert all(demo.host.frames.owner[mfn] > 0 for mfn in frames)
    assert Counter(frames).most_common(1)[0][1] > 10


def test_module_is_the_same_for_the_same_seed() -> None:
    first, second = (FailingDimm([Mfn(m) for m in range(100)], seed=3) for _ in range(2))

    assert list(islice(first.addresses(), 20)) == list(islice(second.addresses(), 20))


def test_checker_works_only_while_its_guest_runs() -> None:
    small = small_host()
    MemoryChecker.start(small.host, small.pv)
    small.host.suspend(small.pv, SuspendLimits())
    before = small.host.snapshot(small.pv)
    for _ in range(5):
        small.host.free_frames()
    assert before.differences(small.host.snapshot(small.pv)) == []
    small.host.resume(small.pv)
    small.host.free_frames()

    assert before.differences(small.host.snapshot(small.pv))


def test_checker_finds_a_page_with_other_contents() -> None:
    small = small_host()
    checker = MemoryChecker.start(small.host, small.pv)
    pfn = small.host.pv(small.pv).plain_pfns()[3]
    small.host.frames.contents.write(small.host.frame_of(small.pv, pfn), 77, np.ones(1, "u8"))

    assert pfn in checker.verify_all()


def test_checker_that_meets_a_cleared_entry_crashes_its_guest() -> None:
    small = small_host()
    guest = small.host.pv(small.pv)
    MemoryChecker.start(small.host, small.pv, pages_per_step=len(guest.plain_pfns()))
    address = DIRECT_MAP + (guest.plain_pfns()[3] << PAGE_SHIFT)
    slot = walk(small.host.frames.contents, guest.root, address)
    small.host.frames.contents.write(slot.table, slot.index, np.zeros(1, "u8"))

    assert small.host.domain(small.pv).shutdown is ShutdownReason.CRASH
