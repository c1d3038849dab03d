"""How fast page tables are searched, beside a plain copy of the same bytes.

The tables are larger than any cache and searched in batches as a survey reads them.  Frames are
drawn from all of a 64 GiB host: nothing can be ruled out by where an entry points.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import TYPE_CHECKING, Final

import numpy as np

from bench.figures import Figure, ratio
from pgofflined.core.pagetable import find_references

if TYPE_CHECKING:
    from pgofflined.core.pagetable import Frames, Words

WANTED: Final = (1, 8, 64)
_TABLES: Final = 16 << 10  # 64 MiB; they map 32 GiB
_BATCH: Final = 1024
_ROUNDS: Final = 9
_HOST_FRAMES: Final = 16 << 20
_SHARE_PRESENT: Final = 0.9
_FLAGS: Final = 1 << 63 | 0x67


def measure() -> list[Figure]:
    """GB/s of the copy and of the searches, all in each round, and their ratios."""
    chance = np.random.default_rng(1)
    tables = _random_tables(chance)
    copy = np.empty_like(tables)
    searched = [
        (count, chance.choice(_HOST_FRAMES, count, replace=False).astype(np.uint64))
        for count in WANTED
    ]
    copied: list[float] = []
    rates: dict[int, list[float]] = {count: [] for count in WANTED}
    # The first round is not counted: it touches memory for the first time.
    for number in range(_ROUNDS + 1):
        rate = _rate(lambda: np.copyto(copy, tables), tables)
        if number:
            copied.append(rate)
        for count, wanted in searched:
            rate = _rate(lambda wanted=wanted: _search(tables, wanted), tables)  # type: ignore[misc]
            if number:
                rates[count].append(rate)
    figures = [Figure(name="memcpy", unit="GB/s", samples=tuple(copied))]
    for count in WANTED:
        what = f"search for {count} frame{'s' if count > 1 else ''}"
        figures += [
            Figure(name=what, unit="GB/s", samples=tuple(rates[count])),
            ratio(f"{what} / memcpy", rates[count], copied),
        ]
    return figures


def _random_tables(chance: np.random.Generator) -> Words:
    shape = (_TABLES, 512)
    tables = chance.integers(0, _HOST_FRAMES, shape, dtype=np.uint64)
    tables <<= np.uint64(12)
    tables |= np.uint64(_FLAGS)
    tables[chance.random(shape, dtype=np.float32) >= _SHARE_PRESENT] = 0
    return tables


def _search(tables: Words, wanted: Frames) -> None:
    levels = np.ones(_BATCH, dtype=np.uint8)
    for start in range(0, len(tables), _BATCH):
        find_references(tables[start : start + _BATCH], levels, wanted)


def _rate(act: Callable[[], None], tables: Words) -> float:
    began = perf_counter()
    act()
    return tables.nbytes / (perf_counter() - began) / 1e9
