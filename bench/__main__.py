"""Measures and prints: ``python -m bench [--local] [--json]``.

A missed target is a result, printed as such; the status is 1 only where something could not be
measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from bench import reports, scan
from bench.figures import Figure, json_line, table

Part = Callable[[], list[Figure]]


def main(arguments: list[str]) -> int:
    """Run the parts that are asked for, each printed when it is done."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure what it costs.")
    parser.add_argument("--local", action="store_true", help="only what needs no emulated host")
    parser.add_argument("--json", action="store_true", help="print JSON lines instead of tables")
    options = parser.parse_args(arguments)
    parts: list[tuple[str, Part]] = [
        ("From a record's bytes to the verdict, one core", reports.measure),
        ("Search of page tables, one core", scan.measure),
    ]
    if not options.local:
        # Only here: it needs the tests' rig, which a machine for the other parts may lack.
        from bench.blackout import measure

        parts.append(("A guest's blackout, on an emulated host", measure))
    status = 0
    for title, part in parts:
        try:
            figures = part()
        except Exception as error:  # noqa: BLE001 - the other parts are worth having all the same
            print(f"bench: {title}: {type(error).__name__}: {error}", file=sys.stderr)
            status = 1
            continue
        if options.json:
            print("\n".join(json_line(figure) for figure in figures), flush=True)
        else:
            print(f"{title}\n{table(figures)}\n", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
