"""How long guests stand still for an exchange, beside a save and restore of the larger one.

Every round has one process do all jobs on the small guest, another on the large one, and the large
one saved and restored, one after the other; the other guest is paused meanwhile.  The daemon is a
process that lives long, so a process's first exchange, which pays for code and memory that are
touched for the first time, is a figure of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import msgspec

from bench.figures import AtLeast, AtMost, Figure, ratio
from bench.rig import LARGE_MIB, LIMIT, SMALL_MIB

if TYPE_CHECKING:
    from bench.rig import Rig
    from tests.e2e.rig.guest import Guest

ROUNDS: Final = 10
BATCH: Final = 256
# Pages of the jobs of one process: the first one's own figure, then those with a target.
JOBS: Final = (1, 1, BATCH)
# Our share, from the guest's suspend to our resume call, in ms under emulation.
SHARE_TARGET: Final = AtMost(25)
BATCH_TARGET: Final = AtMost(2)
SIZE_TARGET: Final = AtMost(1.2)
SAVE_TARGET: Final = AtLeast(50)
_SPARE_PAGES: Final = 32
_LEAST_SHARE: Final = 0.9
_SIZES: Final = {SMALL_MIB: f"{SMALL_MIB} MiB", LARGE_MIB: f"{LARGE_MIB >> 10} GiB"}

# A file system of its own, in memory: /dev/shm may be half as large as memory only.
_SAVED: Final = "/run/bench"
_SAVE_AND_RESTORE: Final = """
import subprocess, sys, time
name, path = sys.argv[1:]
began = time.monotonic()
subprocess.run(["xl", "save", name, path], check=True, stdout=sys.stderr)
subprocess.run(["xl", "restore", path], check=True, stdout=sys.stderr)
print(time.monotonic() - began)
"""


class NotExchanged(Exception):
    """Of the pages that should have moved too few did; the time that it took means nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Pages exchanged in one suspend, as the program in dom0 tells it."""

    pages: int
    exchanged: int
    refused: tuple[str, ...]
    whole: float
    ours: float


@dataclass(slots=True, kw_only=True)
class Samples:
    """Of one guest, in ms: whole blackouts and our shares of each of ``JOBS``."""

    whole: tuple[list[float], ...] = field(default_factory=lambda: tuple([] for _ in JOBS))
    ours: tuple[list[float], ...] = field(default_factory=lambda: tuple([] for _ in JOBS))

    def add(self, jobs: Iterable[Job]) -> None:
        """Take one round's."""
        for number, job in enumerate(jobs):
            self.whole[number].append(1000 * job.whole)
            self.ours[number].append(1000 * job.ours)


def measure(rounds: int, rig: Rig) -> list[Figure]:
    """All figures of blackouts."""
    samples = {mib: Samples() for mib in _SIZES}
    saved: list[float] = []
    guests = {mib: rig.guest(mib) for mib in _SIZES}
    rig.host.run(f"mkdir -p {_SAVED} && mount -t tmpfs -o size=90% bench {_SAVED}")
    for number in range(1, rounds + 1):
        print(f"bench: round {number} of {rounds} ...", file=sys.stderr, flush=True)
        for mib, guest in guests.items():
            with rig.alone(guest):
                samples[mib].add(_exchange(rig, guest))
                if mib == LARGE_MIB:
                    saved.append(1000 * _save_and_restore(rig, guest))
    rig.assert_clean()
    return [*_of_guests(samples), *_of_saving(samples[LARGE_MIB], saved)]


def _of_guests(samples: dict[int, Samples]) -> list[Figure]:
    figures: list[Figure] = []
    for mib, size in _SIZES.items():
        whole, ours = samples[mib].whole, samples[mib].ours
        names = [f"a process's first page, {size}", f"1 page, {size}", f"{BATCH} pages, {size}"]
        for job, name in enumerate(names):
            target = SHARE_TARGET if job == 1 else None
            figures += [
                Figure(name=f"{name}, whole", unit="ms", samples=tuple(whole[job])),
                Figure(
                    name=f"{name}, our share", unit="ms", samples=tuple(ours[job]), target=target
                ),
            ]
        figures.append(
            ratio(
                f"{BATCH} pages / 1 page, {size}, our share", ours[2], ours[1], target=BATCH_TARGET
            )
        )
    large, small = samples[LARGE_MIB].ours, samples[SMALL_MIB].ours
    sizes = f"{_SIZES[LARGE_MIB]} / {_SIZES[SMALL_MIB]}"
    figures += [
        ratio(f"1 page, {sizes}, our share", large[1], small[1], target=SIZE_TARGET),
        ratio(f"{BATCH} pages, {sizes}, our share", large[2], small[2]),
    ]
    return figures


def _of_saving(large: Samples, saved: Sequence[float]) -> list[Figure]:
    size = _SIZES[LARGE_MIB]
    return [
        Figure(name=f"xl save + xl restore, {size}", unit="ms", samples=tuple(saved)),
        ratio(f"save + restore / 1 page, {size}, whole", saved, large.whole[1], target=SAVE_TARGET),
    ]


def _exchange(rig: Rig, guest: Guest) -> list[Job]:
    """One job for each of ``JOBS``."""
    wanted = sum(JOBS) + _SPARE_PAGES
    lines = rig.in_dom0(
        f"tests.e2e.dom0.pages {guest.domid} data {wanted}",
        f"tests.e2e.dom0.exchange_pages {guest.domid} {' '.join(map(str, JOBS))}",
    )
    jobs = [msgspec.json.decode(line, type=Job) for line in lines]
    for refusal in (refusal for job in jobs for refusal in job.refused):
        print(f"bench: refused: {refusal}", file=sys.stderr, flush=True)
    return jobs_that_count(jobs, JOBS)


def jobs_that_count(jobs: Iterable[Job], counts: Sequence[int]) -> list[Job]:
    """The first job of each of the ``counts``, without those that make up for refused pages.

    Raises NotExchanged where one of them has moved too few pages.
    """
    left = iter(jobs)
    chosen: list[Job] = []
    for count in counts:
        first = next(left, None)
        if first is None or first.pages != count or first.exchanged < _LEAST_SHARE * count:
            raise NotExchanged(f"of {count} pages too few were exchanged: {first}")
        chosen.append(first)
        missing = count - first.exchanged
        while missing and (more := next(left, None)) is not None:
            missing -= more.exchanged
    return chosen


def _save_and_restore(rig: Rig, guest: Guest) -> float:
    """Seconds from the request to save the guest until its restored twin runs."""
    path = f"{_SAVED}/state"
    try:
        done = rig.host.python(_SAVE_AND_RESTORE, guest.spec.name, path, timeout=LIMIT)
    finally:
        rig.host.run(["rm", "-f", path])
    return float(done.out)
