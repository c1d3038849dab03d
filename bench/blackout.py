"""How long a guest stands still for an exchange, beside a save and restore of the same guest.

On real Xen in an emulated host (see tests/e2e/rig): the absolute times are the emulator's, the
ratios are what counts.  Every round does all jobs and one save and restore, one after the other.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from bench.figures import AtMost, Figure, ratio
from tests.e2e.rig.guest import Guest, GuestSpec
from tests.e2e.rig.host import Host, HostSpec
from tests.e2e.rig.pool import HostPool

JOBS: Final = (1, 8, 256)
# Of the whole blackout of one page beside a save and restore of the same guest.
TARGET: Final = AtMost(1 / 5)
# Our share, from the guest's suspend to our resume call, in ms under emulation.
SHARE_TARGET: Final = AtMost(25)
BATCH_TARGET: Final = AtMost(2)
_MEMORY_MIB: Final = 128
_ROUNDS: Final = 5
_LIMIT: Final = 300.0
_HOST: Final = HostSpec.parse("intel-native-noservice")
_LOGS: Final = Path(__file__).parents[1] / "build" / "bench"
_SPARE_PAGES: Final = 32
_LEAST_SHARE: Final = 0.9
_TESTS_IN_DOM0: Final = "/opt/pgofflined-tests"

# In memory, so that no disk counts against the save.
_SAVED: Final = "/dev/shm/bench.save"  # noqa: S108 - in dom0, where nobody else is
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


def measure() -> list[Figure]:
    """Boot a host, measure, and stop it."""
    pool = HostPool(_LOGS)
    try:
        host = pool.host(_HOST)
        return _measure(host)
    finally:
        pool.stop()


def _measure(host: Host) -> list[Figure]:
    guest = host.start_guest(GuestSpec(name="bench", memory_mib=_MEMORY_MIB))
    rounds: list[dict[int, Job]] = []
    shares: list[float] = []
    saved: list[float] = []
    for number in range(1, _ROUNDS + 1):
        print(f"bench: round {number} of {_ROUNDS} ...", file=sys.stderr, flush=True)
        jobs = _exchange(host, guest)
        shares.append(100 * sum(job.exchanged for job in jobs) / sum(job.pages for job in jobs))
        # Of jobs of one size, the last is the one that moved something.
        rounds.append({job.pages: job for job in jobs})
        saved.append(_save_and_restore(host, guest))
        guest.wait_passes(1)
    guest.assert_clean(migrated=True)
    whole = {count: [jobs[count].whole for jobs in rounds] for count in JOBS}
    ours = {count: [jobs[count].ours for jobs in rounds] for count in JOBS}
    figures = []
    for count in JOBS:
        what = f"exchange of {count} page{'s' if count > 1 else ''}"
        figures += [
            Figure(name=f"{what}, whole", unit="ms", samples=_milliseconds(whole[count])),
            Figure(
                name=f"{what}, our share",
                unit="ms",
                samples=_milliseconds(ours[count]),
                target=SHARE_TARGET if count == 1 else None,
            ),
        ]
    figures.append(Figure(name="xl save + xl restore", unit="ms", samples=_milliseconds(saved)))
    figures.append(ratio("exchange of 1 page / save + restore", whole[1], saved, target=TARGET))
    figures += [
        ratio(
            f"exchange of {count} pages / of 1 page, our share",
            ours[count],
            ours[1],
            target=BATCH_TARGET,
        )
        for count in JOBS[1:]
    ]
    figures.append(Figure(name="random data pages exchanged", unit="%", samples=tuple(shares)))
    return figures


def _exchange(host: Host, guest: Guest) -> list[Job]:
    """The jobs of one round, in order."""
    wanted = sum(JOBS) + _SPARE_PAGES
    done = host.run(
        f"cd {_TESTS_IN_DOM0} && python3 -m tests.e2e.dom0.pages {guest.domid} data {wanted} |"
        f" python3 -m tests.e2e.dom0.exchange_pages {guest.domid} {' '.join(map(str, JOBS))}",
        timeout=_LIMIT,
    )
    jobs = [msgspec.json.decode(line, type=Job) for line in done.stdout.splitlines()]
    for refusal in (refusal for job in jobs for refusal in job.refused):
        print(f"bench: refused: {refusal}", file=sys.stderr, flush=True)
    for count in JOBS:
        share = [job.exchanged / job.pages for job in jobs if job.pages == count]
        if not share or share[-1] < _LEAST_SHARE:
            raise NotExchanged(done.out)
    return jobs


def _save_and_restore(host: Host, guest: Guest) -> float:
    """Seconds from the request to save the guest until its restored twin runs."""
    try:
        done = host.python(_SAVE_AND_RESTORE, guest.spec.name, _SAVED, timeout=_LIMIT)
    finally:
        host.run(["rm", "-f", _SAVED])
    return float(done.out)


def _milliseconds(seconds: list[float]) -> tuple[float, ...]:
    return tuple(value * 1000 for value in seconds)
