"""Runs mutmut on one module, in the folder that ``workplace`` has prepared, and writes it down.

mutmut has no setting for two things that are wanted here, so that it is started from here instead
of from its command line: sentences for people are not mutated, and the difference that each mutant
makes is written down together with what became of it.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mutmut import __main__ as mutmut
from mutmut.mutation import mutators
from mutmut.mutation.diff_apply import get_diff_for_mutant
from mutmut.stats import status_by_exit_code

# Words with a space between them.  Where such a text matters to a program it is no sentence.
_SENTENCE = re.compile(r"[\w,.:;)'] +[\w(]")

mutate_string = mutators.operator_string


def mutate_word(node: Any) -> Iterable[Any]:  # noqa: ANN401 - mutmut's own types are not here
    """Other strings in place of one, unless it is a sentence."""
    if not _SENTENCE.search(getattr(node, "value", "")):
        yield from mutate_string(node)


def main(results: str) -> None:
    """Try all mutants that have no verdict yet."""
    mutators.mutation_operators = [
        (kind, mutate_word if operator is mutate_string else operator)
        for kind, operator in mutators.mutation_operators
    ]
    # The list was imported by name already.
    sys.modules["mutmut.mutation.file_mutation"].mutation_operators = mutators.mutation_operators  # type: ignore[attr-defined]
    mutmut._run([], 1)
    _, found = mutmut.collect_source_file_mutation_data(mutant_names=[])
    Path(results).write_text(
        json.dumps(
            [
                {
                    "module": module,
                    "name": name,
                    "status": status_by_exit_code[code],
                    "difference": get_diff_for_mutant(name, path=Path(module)),
                }
                for module, data in found.items()
                for name, code in data.exit_code_by_key.items()
            ],
            indent=1,
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
