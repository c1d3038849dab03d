"""What the survey of a guest costs as guests grow: time for each page table, and memory.

The guests are simulated and their frames made up as they are read, so that one of 1 TiB, which has
2 GiB of page tables, can be surveyed anywhere.  The time for making them up is taken out; all times
are the processor's.  Each survey runs in a process of its own, whose peak of resident memory is the
survey's.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from time import process_time
from typing import TYPE_CHECKING, Final, cast

from bench.figures import AtMost, Figure, ratio
from bench.sparse import DOMID, SparseGuest
from pgofflined.core.frames import Pfn
from pgofflined.exchanger.survey import survey

if TYPE_CHECKING:
    from pgofflined.ports import Hypervisor

ROUNDS: Final = 5
SIZES: Final = (64, 256, 1024)
# Nothing may grow faster than the guest does; what is more than 1 is caches and chance.
TARGET: Final = AtMost(1.3)
_TOP: Final = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of one survey: its seconds without and with those of making frames up, and memory in MiB."""

    tables: int
    own: float
    whole: float
    peak: float


def measure(rounds: int = ROUNDS, sizes: tuple[int, ...] = SIZES) -> list[Figure]:
    """Times and memory of all sizes, which take turns."""
    costs: dict[int, list[Cost]] = {gib: [] for gib in sizes}
    for number in range(1, rounds + 1):
        print(f"bench: round {number} of {rounds} ...", file=sys.stderr, flush=True)
        for gib in sizes:
            costs[gib].append(in_another_process(gib))
    figures = []
    for gib in sizes:
        what = f"survey of {_size(gib)}"
        seconds = [cost.own for cost in costs[gib]]
        peaks = [cost.peak for cost in costs[gib]]
        figures += [
            Figure(name=what, unit="s", samples=tuple(seconds)),
            Figure(
                name=f"{what}, for each page table", unit="us", samples=_per_table(costs[gib], 1e6)
            ),
            Figure(name=f"{what}, peak memory", unit="MiB", samples=tuple(peaks)),
        ]
    smallest, largest = sizes[0], sizes[-1]
    figures.append(
        Figure(
            name=f"survey of {_size(largest)}, with making its frames up",
            unit="s",
            samples=tuple(cost.whole for cost in costs[largest]),
        )
    )
    figures += [
        ratio(
            f"for each page table, {_size(gib)} / {_size(smallest)}",
            _per_table(costs[gib]),
            _per_table(costs[smallest]),
            target=TARGET,
        )
        for gib in sizes[1:]
    ]
    figures.append(
        ratio(
            f"memory for each page table, {_size(largest)} / {_size(smallest)}",
            [cost.peak / cost.tables for cost in costs[largest]],
            [cost.peak / cost.tables for cost in costs[smallest]],
            target=TARGET,
        )
    )
    return figures


def _per_table(costs: list[Cost], scale: float = 1.0) -> tuple[float, ...]:
    return tuple(scale * cost.own / cost.tables for cost in costs)


def _size(gib: int) -> str:
    return f"{gib >> 10} TiB" if gib >= 1 << 10 else f"{gib} GiB"


def in_another_process(gib: int, mappings: int = 0) -> Cost:
    """``survey_once``, whose peak of memory is that of a process that does nothing else."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.survey", str(gib), str(mappings)],
        cwd=_TOP,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return Cost(**json.loads(done.stdout))


def survey_once(gib: int, mappings: int = 0) -> Cost:
    """Survey a guest in this process for a page of its data, and see that it is found.

    And, if there are ``mappings``, for the page that they are of as well.
    """
    guest = SparseGuest(gib, mappings)
    often = guest.data_page()
    pfns = [Pfn(often - 1), often] if mappings else [often]
    mfns = [guest.mfn(pfn) for pfn in pfns]
    began = process_time()
    facts, *others = survey(cast("Hypervisor", guest), guest.domain(DOMID), mfns)
    whole = process_time() - began
    # The direct map has one entry for each page; without it the search has not done its work.
    assert facts.p2m_mfn == mfns[0]
    assert facts.references.levels.tolist() == [1]
    assert all(other.too_many or len(other.references) > mappings for other in others)
    return Cost(tables=guest.tables, own=whole - guest.seconds, whole=whole, peak=_peak_mib())


def _peak_mib() -> float:
    # getrusage would count what the process was before it became this program.
    (line,) = (
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM:")
    )
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    cost = survey_once(*map(int, sys.argv[1:]))
    print(json.dumps({name: getattr(cost, name) for name in Cost.__slots__}))
