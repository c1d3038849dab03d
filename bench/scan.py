"""How fast page tables are searched, beside merely reading the same bytes.

The tables are larger than any cache and searched in batches as a survey reads them.  Frames are
drawn from all of a 64 GiB host: nothing can be ruled out by where an entry points.

No program reads memory faster than a reduction that the library has vectorised.  Which is the
fastest depends on the processor and on numpy, so several are tried and the fastest counts.  A
memcpy is printed beside it, but is no measure of reading: it moves each byte twice.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from time import perf_counter
from typing import TYPE_CHECKING, Final

import numpy as np

from bench.figures import AtLeast, Figure, ratio
from pgofflined.core.pagetable import Search

if TYPE_CHECKING:
    from pgofflined.core.pagetable import Frames, Words

# Of the rate at which one core reads memory, for one frame: a search for many takes longer, but is
# still one for all of them.
TARGET: Final = AtLeast(0.5)
ROUNDS: Final = 10
WANTED: Final = (1, 8, 64)
_TABLES: Final = 64 << 10  # 256 MiB; they map 128 GiB
_BATCH: Final = 1024
_HOST_FRAMES: Final = 16 << 20
_SHARE_PRESENT: Final = 0.9
_FLAGS: Final = 1 << 63 | 0x67

_READS: Final[dict[str, Callable[[Words], object]]] = {
    "sum": np.add.reduce,
    "largest": np.maximum.reduce,
    "or of all": np.bitwise_or.reduce,
    "and of all": np.bitwise_and.reduce,
}


def measure(rounds: int = ROUNDS, *, tables: int = _TABLES) -> list[Figure]:
    """GB/s of the reads and of the searches, all in each round, and their ratios."""
    chance = np.random.default_rng(1)
    contents = _random_tables(chance, tables)
    searches = [
        (count, chance.choice(_HOST_FRAMES, count, replace=False).astype(np.uint64))
        for count in WANTED
    ]
    reads: dict[str, list[float]] = {way: [] for way in _READS}
    rates: dict[int, list[float]] = {count: [] for count in WANTED}
    copies: list[float] = []
    copy = np.empty_like(contents)
    # The first round is not counted: it touches memory for the first time.
    for number in range(rounds + 1):
        for way, read in _READS.items():
            rate = _rate(lambda read=read: read(contents.reshape(-1)), contents)  # type: ignore[misc]
            reads[way] += [rate] if number else []
        rate = _rate(lambda: np.copyto(copy, contents), contents)
        copies += [rate] if number else []
        for count, wanted in searches:
            rate = _rate(lambda wanted=wanted: _search(contents, wanted), contents)  # type: ignore[misc]
            rates[count] += [rate] if number else []
    fastest = max(reads, key=lambda way: statistics.median(reads[way]))
    figures = [
        Figure(name=f"reading, as {fastest}", unit="GB/s", samples=tuple(reads[fastest])),
        Figure(name="copying, as memcpy does", unit="GB/s", samples=tuple(copies)),
    ]
    for count in WANTED:
        what = f"search for {count} frame{'s' if count > 1 else ''}"
        figures += [
            Figure(name=what, unit="GB/s", samples=tuple(rates[count])),
            ratio(
                f"{what} / reading",
                rates[count],
                reads[fastest],
                target=TARGET if count == 1 else None,
            ),
        ]
    return figures


def _random_tables(chance: np.random.Generator, count: int) -> Words:
    shape = (count, 512)
    tables = chance.integers(0, _HOST_FRAMES, shape, dtype=np.uint64)
    tables <<= np.uint64(12)
    tables |= np.uint64(_FLAGS)
    tables[chance.random(shape, dtype=np.float32) >= _SHARE_PRESENT] = 0
    return tables


def _search(tables: Words, wanted: Frames) -> None:
    levels = np.ones(_BATCH, dtype=np.uint8)
    search = Search(wanted)
    for start in range(0, len(tables), _BATCH):
        search.find(tables[start : start + _BATCH], levels)


def _rate(act: Callable[[], object], tables: Words) -> float:
    began = perf_counter()
    act()
    return tables.nbytes / (perf_counter() - began) / 1e9
