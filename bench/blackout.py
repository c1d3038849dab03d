"""How long a guest stands still for an exchange, beside a save and restore of the same guest.

On real Xen in an emulated host (see tests/e2e/rig): the absolute times are the emulator's, the
ratios are what counts.  Every round does all jobs and one save and restore, one after the other.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Final

from bench.figures import AtMost, Figure, ratio
from tests.e2e.rig.guest import Guest, GuestSpec
from tests.e2e.rig.host import Host, HostSpec
from tests.e2e.rig.pool import HostPool

JOBS: Final = (1, 8, 55)
TARGET: Final = AtMost(1 / 5)
_MEMORY_MIB: Final = 128
_ROUNDS: Final = 5
_LIMIT: Final = 150.0
_HOST: Final = HostSpec.parse("intel-native-noservice")
_LOGS: Final = Path(__file__).parents[1] / "build" / "bench"
_PROGRAM: Final = Path(__file__).parent / "dom0" / "exchange.py"
_IN_DOM0: Final = "/opt/pgofflined-bench/exchange.py"
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
    """A page that should have moved did not; the time that it took means nothing."""


def measure() -> list[Figure]:
    """Boot a host, measure, and stop it."""
    pool = HostPool(_LOGS)
    try:
        host = pool.host(_HOST)
        host.put(_PROGRAM, _IN_DOM0)
        return _measure(host)
    finally:
        pool.stop()


def _measure(host: Host) -> list[Figure]:
    guest = host.start_guest(GuestSpec(name="bench", memory_mib=_MEMORY_MIB))
    whole: dict[int, list[float]] = {count: [] for count in JOBS}
    ours: dict[int, list[float]] = {count: [] for count in JOBS}
    saved: list[float] = []
    for number in range(1, _ROUNDS + 1):
        print(f"bench: round {number} of {_ROUNDS} ...", file=sys.stderr, flush=True)
        for count, (job_whole, job_ours) in zip(JOBS, _exchange(host, guest), strict=True):
            whole[count].append(job_whole)
            ours[count].append(job_ours)
        saved.append(_save_and_restore(host, guest))
        guest.wait_passes(1)
    guest.assert_clean(migrated=True)
    figures = []
    for count in JOBS:
        what = f"exchange of {count} page{'s' if count > 1 else ''}"
        figures += [
            Figure(name=f"{what}, whole", unit="ms", samples=_milliseconds(whole[count])),
            Figure(name=f"{what}, our share", unit="ms", samples=_milliseconds(ours[count])),
        ]
    figures.append(Figure(name="xl save + xl restore", unit="ms", samples=_milliseconds(saved)))
    figures.append(ratio("exchange of 1 page / save + restore", whole[1], saved, target=TARGET))
    figures += [
        ratio(f"exchange of {count} pages / of 1 page, our share", ours[count], ours[1])
        for count in JOBS[1:]
    ]
    return figures


def _exchange(host: Host, guest: Guest) -> list[tuple[float, float]]:
    """The blackout of each job of a round, whole and our share of it."""
    pages = host.run(
        f"cd {_TESTS_IN_DOM0} && python3 -m tests.e2e.dom0.pages {guest.domid} data {sum(JOBS)}",
        timeout=_LIMIT,
    )
    words = ["python3", _IN_DOM0, str(guest.domid), *map(str, JOBS)]
    lines = host.run(words, stdin=pages.stdout, timeout=_LIMIT).out.splitlines()
    blackouts = []
    for line in lines:
        job = json.loads(line)
        if job["results"] != {"exchanged": job["pages"]} or job["stuck"] is not None:
            raise NotExchanged(line)
        blackouts.append((float(job["whole"]), float(job["ours"])))
    return blackouts


def _save_and_restore(host: Host, guest: Guest) -> float:
    """Seconds from the request to save the guest until its restored twin runs."""
    try:
        done = host.python(_SAVE_AND_RESTORE, guest.spec.name, _SAVED, timeout=_LIMIT)
    finally:
        host.run(["rm", "-f", _SAVED])
    return float(done.out)


def _milliseconds(seconds: list[float]) -> tuple[float, ...]:
    return tuple(value * 1000 for value in seconds)
