"""The daemon is killed at any call or record of an exchange, and another one ends the job.

Afterwards every page is where it was or exchanged, the guest runs with its memory, and nothing is
left of the job.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pgofflined.core.errors import PortError
from pgofflined.core.frames import Domid
from pgofflined.core.moves import PteWrites
from pgofflined.core.offline import WhenMarked
from pgofflined.core.xenversion import XenVersion
from pgofflined.exchanger import recover
from pgofflined.jobstore import JobStore
from pgofflined.sim.faults import Fault, FaultyHypervisor, Killed, Moment
from tests.unit.exchanger.conftest import Bench

if TYPE_CHECKING:
    from _pytest.mark.structures import ParameterSet

    from pgofflined.ports import FrameArray, Words

from tests.crash.killing import (
    PAGES,
    VERSIONS,
    MortalJournal,
    assert_ended_well,
    calls_of_a_good_run,
    hosts_of,
    mortal,
    records_of_a_good_run,
    run,
)


def _kills() -> Iterator[ParameterSet]:
    for xen, version in VERSIONS.items():
        for name, pick in PAGES.items():
            with hosts_of(version):
                methods = calls_of_a_good_run(pick)
            for nth, method in enumerate(methods, start=1):
                for moment in Moment:
                    told = f"{xen}-{name}-{nth}-{method}-{moment.name.lower()}"
                    yield pytest.param(version, name, nth, moment, id=told)


@pytest.mark.parametrize(("version", "name", "nth", "moment"), [*_kills()])
def test_a_job_that_is_killed_at_a_call_is_ended_by_another_process(
    version: XenVersion, name: str, nth: int, moment: Moment
) -> None:
    assert Bench.version == version
    bench = Bench.build()
    pfns = PAGES[name](bench.layout)
    xen = FaultyHypervisor(bench.host, Fault(nth=nth, moment=moment, kills=True))
    with pytest.raises(Killed):
        run(bench, bench.mark(*pfns), xen)
    reports = bench.end_jobs()
    assert_ended_well(bench, pfns, reports)


RECORDS = [
    pytest.param(name, at, after, id=f"{name}-{at}-{'after' if after else 'before'}")
    for name, pick in PAGES.items()
    for at in range(1, records_of_a_good_run(pick) + 1)
    for after in (False, True)
]


@pytest.mark.parametrize(("name", "at", "after"), RECORDS)
def test_a_job_that_is_killed_at_a_record_is_ended_by_another_process(
    name: str,
    at: int,
    after: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    bench = Bench.build()
    pfns = PAGES[name](bench.layout)
    xen = FaultyHypervisor(bench.host)
    with pytest.raises(Killed):
        run(bench, bench.mark(*pfns), xen, MortalJournal(bench.journal, xen, at, after=after))
    reports = bench.end_jobs()
    assert_ended_well(bench, pfns, reports)


@given(
    name=st.sampled_from(sorted(PAGES)),
    first=st.integers(1, 40),
    further=st.lists(st.integers(1, 25), max_size=3),
    moments=st.lists(st.sampled_from(Moment), min_size=4, max_size=4),
)
@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    derandomize=True,
)
def test_processes_that_are_killed_one_after_the_other_are_followed_by_one_that_ends_the_job(
    name: str, first: int, further: list[int], moments: list[Moment]
) -> None:
    bench = Bench.build()
    pfns = PAGES[name](bench.layout)
    mfns = bench.mark(*pfns)
    xen = FaultyHypervisor(bench.host, Fault(nth=first, moment=moments[0], kills=True))
    with contextlib.suppress(Killed):
        run(bench, mfns, xen)
    for nth, moment in zip(further, moments[1:], strict=False):
        dying = FaultyHypervisor(bench.host, Fault(nth=nth, moment=moment, kills=True))
        try:
            for unfinished in bench.journal.unfinished():
                recover(mortal(unfinished, dying), dying, now=bench.host.clock.monotonic())
        except Killed:
            continue
    reports = bench.end_jobs()
    assert_ended_well(bench, pfns, reports)


@pytest.mark.parametrize("name", sorted(PAGES))
@pytest.mark.parametrize("method", ["exchange", "update_ptes", "write_frames", "unpause"])
def test_a_record_in_a_file_is_as_good_as_one_in_memory(
    name: str, method: str, tmp_path: Path
) -> None:
    bench = Bench.build()
    pfns = PAGES[name](bench.layout)
    xen = FaultyHypervisor(bench.host, Fault(method=method, moment=Moment.AFTER, kills=True))
    with pytest.raises(Killed):
        run(bench, bench.mark(*pfns), xen, MortalJournal(JobStore(tmp_path / "left"), xen))
    # What another process finds: this one, which is not really dead, still holds its locks.
    found = tmp_path / "found"
    shutil.copytree(tmp_path / "left", found)
    reports = bench.end_jobs(journal=JobStore(found))
    assert len(reports) == 1
    assert_ended_well(bench, pfns, reports)
    assert list(found.iterdir()) == []


@pytest.mark.parametrize(("name", "at", "after"), RECORDS)
def test_what_a_job_that_is_killed_at_a_record_leaves_in_its_files_is_enough(
    name: str,
    at: int,
    after: bool,  # noqa: FBT001 - a parameter of the test
    tmp_path: Path,
) -> None:
    bench = Bench.build()
    pfns = PAGES[name](bench.layout)
    xen = FaultyHypervisor(bench.host)
    left, found = tmp_path / "left", tmp_path / "found"
    left.mkdir()
    with pytest.raises(Killed):
        run(bench, bench.mark(*pfns), xen, MortalJournal(JobStore(left), xen, at, after=after))
    shutil.copytree(left, found)
    reports = bench.end_jobs(journal=JobStore(found))
    assert_ended_well(bench, pfns, reports)
    assert list(found.iterdir()) == []


class DiesAmongTheSlots(FaultyHypervisor):
    """Is killed when it has written all contents, and some of the p2m slots."""

    def write_frames(
        self, domid: Domid, mfns: FrameArray, contents: Words, slots: PteWrites
    ) -> None:
        super().write_frames(domid, mfns, contents, slots[: len(slots) // 2])
        self.killed = True
        raise Killed


@pytest.mark.parametrize("name", sorted(PAGES))
def test_a_job_that_is_killed_between_contents_and_slots_is_ended_by_another_process(
    name: str,
) -> None:
    bench = Bench.build()
    pfns = PAGES[name](bench.layout)
    with pytest.raises(Killed):
        run(bench, bench.mark(*pfns), DiesAmongTheSlots(bench.host))
    reports = bench.end_jobs()
    assert_ended_well(bench, pfns, reports)


@pytest.mark.parametrize("name", sorted(PAGES))
def test_recovery_that_fails_at_any_call_leaves_a_guest_that_a_second_one_puts_right(
    name: str,
) -> None:
    def killed() -> tuple[Bench, Sequence[int]]:
        bench = Bench.build()
        pfns = PAGES[name](bench.layout)
        dying = Fault(method="exchange", moment=Moment.AFTER, kills=True)
        with pytest.raises(Killed):
            run(bench, bench.mark(*pfns), FaultyHypervisor(bench.host, dying))
        return bench, pfns

    bench, _ = killed()
    dry = FaultyHypervisor(bench.host)
    bench.end_jobs(dry)
    for nth in range(1, len(dry.trace.calls) + 1):
        for times in (1, 6):
            bench, pfns = killed()
            xen = FaultyHypervisor(bench.host, Fault(nth=nth, times=times))
            reports = bench.end_jobs(xen)
            if any(isinstance(one.outcome, PortError) for one in xen.trace.of("tell_resumed")):
                # The guest runs, and that its next end may go unnoticed is in the journal.
                bench.host.tell_resumed(bench.domid)
            assert_ended_well(bench, pfns, reports)


@pytest.mark.parametrize("name", sorted(PAGES))
@pytest.mark.parametrize("moment", [Moment.HALFWAY, Moment.AFTER])
def test_a_frame_that_comes_back_at_once_is_not_taken_for_one_that_never_left(
    name: str, moment: Moment
) -> None:
    # Unmarked, the frame that a page has just left is free, and may be given for the next page.
    bench = Bench.build(reuses_first=True)
    pfns = PAGES[name](bench.layout)
    mfns = [bench.host.frame_of(bench.domid, pfn) for pfn in pfns]
    for dies in (False, True):
        xen = FaultyHypervisor(
            bench.host, Fault(method="exchange", moment=moment, kills=dies, error=LOST)
        )
        with contextlib.suppress(Killed):
            run(bench, mfns, xen, when=WhenMarked.AFTER_SCRUB)
        reports = bench.end_jobs()
        assert_ended_well(bench, pfns, reports)


LOST = PortError("the reply was lost")
