"""One measured figure: its samples, what sums them up, and how it is shown."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AtLeast:
    """The figure should not be lower."""

    bound: float

    def met(self, value: float) -> bool:
        """Whether a value is good enough."""
        return value >= self.bound

    def fields(self) -> dict[str, float]:
        """For JSON."""
        return {"at_least": self.bound}

    def __str__(self) -> str:
        return f">= {number(self.bound)}"


@dataclass(frozen=True, slots=True)
class AtMost:
    """The figure should not be higher."""

    bound: float

    def met(self, value: float) -> bool:
        """Whether a value is good enough."""
        return value <= self.bound

    def fields(self) -> dict[str, float]:
        """For JSON."""
        return {"at_most": self.bound}

    def __str__(self) -> str:
        return f"<= {number(self.bound)}"


Target = AtLeast | AtMost


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """Repeated measurements of one thing."""

    name: str
    unit: str
    samples: tuple[float, ...]
    target: Target | None = None

    def __post_init__(self) -> None:
        if not self.samples:
            raise ValueError(f"nothing was measured for {self.name}")

    @property
    def median(self) -> float:
        """What the figure stands for: one sample that was disturbed does not move it."""
        return statistics.median(self.samples)

    @property
    def spread(self) -> tuple[float, float]:
        """The lowest and the highest sample."""
        return min(self.samples), max(self.samples)

    @property
    def met(self) -> bool | None:
        """Whether the median meets the target; None where there is none."""
        return None if self.target is None else self.target.met(self.median)


def ratio(
    name: str, over: Sequence[float], under: Sequence[float], *, target: Target | None = None
) -> Figure:
    """``over`` / ``under``, sample by sample.

    The samples of one round were taken one after the other: what else the machine did at that
    time slowed both, and dividing takes it out again.
    """
    samples = tuple(a / b for a, b in zip(over, under, strict=True))
    return Figure(name=name, unit="ratio", samples=samples, target=target)


def number(value: float) -> str:
    """A number with three significant digits, or all that stand before the point."""
    if abs(value) >= 99.95:
        return f"{value:,.0f}"
    return f"{value:#.3g}"


def table(figures: Iterable[Figure]) -> str:
    """Figures for a reader, one a line."""
    rows = [("", "median", "unit", "lowest .. highest", "of", "target", "")]
    for figure in figures:
        low, high = figure.spread
        rows.append(
            (
                figure.name,
                number(figure.median),
                figure.unit,
                f"{number(low)} .. {number(high)}",
                str(len(figure.samples)),
                "" if figure.target is None else str(figure.target),
                {None: "", True: "met", False: "missed"}[figure.met],
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            # Numbers line up at their right.
            cell.rjust(width) if column in {1, 4} else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def json_line(figure: Figure) -> str:
    """A figure for a program: one line of JSON."""
    return json.dumps(
        {
            "name": figure.name,
            "value": figure.median,
            "unit": figure.unit,
            "median": figure.median,
            "spread": figure.spread,
            "samples": figure.samples,
            "target": None if figure.target is None else figure.target.fields(),
            "met": figure.met,
        }
    )
