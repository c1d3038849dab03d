"""Tries whether the tests notice mistakes: ``python -m tests.mutants [--again] [MODULE ...]``.

Each module is printed when it is done; the survivors go to a file.  The status is 1 only where
something could not be tried, or where an explanation is of no mutant that survives.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from tests.mutants.selection import GROUPS
from tests.mutants.workplace import Mutant, Workplace

_ROOT: Final = Path(__file__).resolve().parents[2]
_BUILD: Final = _ROOT / "build/mutants"
_EXPLAINED: Final = Path(__file__).with_name("explained.toml")
_REFUSED: Final = "caught by type check"
_SURVIVED: Final = ("survived", "no tests")
_HUNG: Final = "timeout"
_COLUMNS: Final = ("mutants", "killed", "timed out", "survived", "explained", "score")


def main(arguments: Sequence[str]) -> int:
    """Try the modules that are asked for; each group of them is printed when it is done."""
    options = _parser().parse_args(arguments)
    explained = explanations(_EXPLAINED.read_text())
    width = max(len(module) for group in GROUPS for module in group.modules)
    print(_line("", _COLUMNS, width), flush=True)
    total: Counter[str] = Counter()
    status = 0
    for group in GROUPS:
        wanted = [name for name in group.modules if not options.modules or name in options.modules]
        if not wanted:
            continue
        place = Workplace(_ROOT, _BUILD, group, wanted)
        place.prepare(again=options.again)
        try:
            found = place.run()
        except subprocess.CalledProcessError as error:
            print(f"mutants: {group.name}: {error}; see its log", file=sys.stderr)
            status = 1
            continue
        for module in wanted:
            mutants = [mutant for mutant in found if mutant.module == module]
            if not mutants:
                continue  # it has nothing but constants and fields
            counts = count(mutants, explained)
            print(_line(module, cells(counts), width), flush=True)
            total += counts
            status = max(status, _tell(module, mutants, explained))
    print(_line("all", cells(total), width))
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutants", description="Try whether the tests notice mistakes."
    )
    parser.add_argument(
        "--again",
        action="store_true",
        help="only those that were not killed the last time, and what has changed since",
    )
    parser.add_argument("modules", nargs="*", type=_module, metavar="MODULE")
    return parser


def _module(text: str) -> str:
    if not any(text in group.modules for group in GROUPS):
        raise argparse.ArgumentTypeError(f"{text} is not mutated")
    return text


def explanations(text: str) -> dict[str, str]:
    """Why mutants may survive, by their keys."""
    return {
        key: entry["reason"] for entry in tomllib.loads(text)["because"] for key in entry["mutants"]
    }


def count(found: Sequence[Mutant], explained: Mapping[str, str]) -> Counter[str]:
    """The columns of a module, but the score."""
    counts: Counter[str] = Counter()
    for mutant in found:
        if mutant.status == _REFUSED:
            continue
        counts["mutants"] += 1
        if mutant.status in _SURVIVED:
            counts["survived"] += 1
            counts["explained"] += mutant.key in explained
        else:
            counts["timed out" if mutant.status == _HUNG else "killed"] += 1
    return counts


def cells(counts: Mapping[str, int]) -> list[str]:
    """A row of the table."""
    mutants = counts.get("mutants", 0)
    noticed = mutants - counts.get("survived", 0)
    score = f"{100 * noticed / mutants:.1f} %" if mutants else ""
    return [*(str(counts.get(column, 0)) for column in _COLUMNS[:-1]), score]


def _line(name: str, row: Sequence[str], width: int) -> str:
    numbers = (cell.rjust(max(len(column), 7)) for column, cell in zip(_COLUMNS, row, strict=True))
    return "  ".join([name.ljust(width), *numbers]).rstrip()


def _tell(module: str, found: Sequence[Mutant], explained: Mapping[str, str]) -> int:
    """Write down what survives; whether something is explained that does not."""
    survivors = [mutant for mutant in found if mutant.status in _SURVIVED]
    path = _BUILD / "survivors" / module.removesuffix(".py").replace("/", ".")
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        "".join(
            f"{mutant.key}\n{mutant.difference.rstrip()}\n\n"
            for mutant in survivors
            if mutant.key not in explained
        )
    )
    # One that a busy machine has let time out may survive as well.
    keys = {mutant.key for mutant in found if mutant.status in (*_SURVIVED, _HUNG)}
    stale = [key for key in explained if key.split(" ", 1)[0] == module and key not in keys]
    for key in stale:
        print(f"mutants: explained, but it does not survive: {key}", file=sys.stderr)
    return bool(stale)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
