"""Measures and prints: ``python -m bench [--only PART] [--rounds N] [--local] [--table | --json]``.

Each part is printed when it is done, as a table for people and as JSON lines for programs.  A
missed target is a result, printed as such; the status is 1 only where something could not be
measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from bench import references, reports, scan, survey
from bench.figures import Figure, json_line, table

_EMULATED: Final = ("mapping", "blackout")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Something that can be measured alone, given a number of rounds or None for its own."""

    name: str
    title: str
    measure: Callable[[int | None], list[Figure]]


def local_parts() -> list[Part]:
    """Those that need no emulated host."""
    return [
        Part(
            name="reports",
            title="From a record's bytes to the verdict, one core",
            measure=lambda rounds: reports.measure(rounds or reports.ROUNDS),
        ),
        Part(
            name="scan",
            title="Search of page tables in memory, one core",
            measure=lambda rounds: scan.measure(rounds or scan.ROUNDS),
        ),
        Part(
            name="survey",
            title="Survey of simulated guests, one core",
            measure=lambda rounds: survey.measure(rounds or survey.ROUNDS),
        ),
        Part(
            name="references",
            title=f"Survey of a simulated guest of {references.GIB} GiB that maps one page often",
            measure=lambda rounds: references.measure(rounds or references.ROUNDS),
        ),
    ]


@contextmanager
def emulated_parts() -> Iterator[list[Part]]:
    """Those that share an emulated host, which is booted when the first is measured."""
    # Only here: they need the tests' rig, which a machine for the other parts may lack.
    from bench import blackout, mapping
    from bench.rig import Rig

    rig = Rig()
    try:
        yield [
            Part(
                name="mapping",
                title="Full scan on an emulated host",
                measure=lambda rounds: mapping.measure(rounds or mapping.ROUNDS, rig),
            ),
            Part(
                name="blackout",
                title="A guest's blackout, on an emulated host",
                measure=lambda rounds: blackout.measure(rounds or blackout.ROUNDS, rig),
            ),
        ]
    finally:
        rig.stop()


def main(arguments: list[str]) -> int:
    """Run the parts that are asked for, each printed when it is done."""
    options = _parser().parse_args(arguments)
    status = _run(local_parts(), options)
    if options.local or (options.only and not set(options.only) & set(_EMULATED)):
        return status
    with emulated_parts() as parts:
        return max(status, _run(parts, options))


def _parser() -> argparse.ArgumentParser:
    names = [*(part.name for part in local_parts()), *_EMULATED]
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure what it costs.")
    parser.add_argument("--local", action="store_true", help="only what needs no emulated host")
    parser.add_argument(
        "--only", action="append", choices=names, help="only this part; may be given again"
    )
    parser.add_argument("--rounds", type=_positive, help="samples of each figure")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--table", action="store_true", help="print no JSON lines")
    form.add_argument("--json", action="store_true", help="print no tables")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number


def _run(parts: list[Part], options: argparse.Namespace) -> int:
    status = 0
    for part in parts:
        if options.only and part.name not in options.only:
            continue
        try:
            figures = part.measure(options.rounds)
        except Exception as error:  # noqa: BLE001 - the other parts are worth having all the same
            print(f"bench: {part.title}: {type(error).__name__}: {error}", file=sys.stderr)
            status = 1
            continue
        if not options.json:
            print(f"{part.title}\n{table(figures)}\n", flush=True)
        if not options.table:
            print("\n".join(json_line(figure) for figure in figures), flush=True)
        if not (options.json or options.table):
            print(flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
