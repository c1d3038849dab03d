"""What a guest that maps one page very often adds to the cost of its survey.

Linux has such a one, the page of zeroes, which it maps wherever memory was read and never written.
A hostile guest can make most of its memory page tables and fill all of them with one page.  Beside
it the same guest without that.
"""

from __future__ import annotations

import sys
from typing import Final

from bench.figures import AtMost, Figure, ratio
from bench.survey import Cost, in_another_process

ROUNDS: Final = 5
GIB: Final = 64
MAPPINGS: Final = (0, 1 << 20, 1 << 24)
# Whatever the guest does, what is found of a page is let go of when it is too much to be changed;
# what remains is one batch of tables in which each entry is a hit.
MEMORY: Final = AtMost(1.3)
# A batch of tables full of hits costs more than one with a few.
TIME: Final = AtMost(1.5)


def measure(
    rounds: int = ROUNDS, gib: int = GIB, mappings: tuple[int, ...] = MAPPINGS
) -> list[Figure]:
    """Times for each page table, and peaks of memory, beside those without many mappings."""
    costs: dict[int, list[Cost]] = {number: [] for number in mappings}
    for number in range(1, rounds + 1):
        print(f"bench: round {number} of {rounds} ...", file=sys.stderr, flush=True)
        for many in mappings:
            costs[many].append(in_another_process(gib, many))
    figures = []
    for many in mappings:
        what = f"survey, one page mapped {many + 1:,} times"
        figures += [
            Figure(name=what, unit="s", samples=tuple(cost.own for cost in costs[many])),
            Figure(
                name=f"{what}, peak memory",
                unit="MiB",
                samples=tuple(cost.peak for cost in costs[many]),
            ),
        ]
    plain = costs[mappings[0]]
    for many in mappings[1:]:
        figures += [
            ratio(
                f"for each page table, {many + 1:,} mappings / 1",
                [cost.own / cost.tables for cost in costs[many]],
                [cost.own / cost.tables for cost in plain],
                target=TIME,
            ),
            ratio(
                f"peak memory, {many + 1:,} mappings / 1",
                [cost.peak for cost in costs[many]],
                [cost.peak for cost in plain],
                target=MEMORY,
            ),
        ]
    return figures
