"""Runs mutmut on one module, in the folder that ``workplace`` has prepared, and writes it down.

mutmut has no setting for three things that are wanted here, so that it is started from here instead
of from its command line: sentences for people are not mutated; what is called while modules are
imported is tried with modules that are imported anew, by all tests; and the difference that each
mutant makes is written down together with what became of it.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from mutmut import __main__ as mutmut
from mutmut.mutation import mutators
from mutmut.mutation.diff_apply import get_diff_for_mutant
from mutmut.runners.harness import BadTestExecutionCommandsException, PytestRunner
from mutmut.state import state
from mutmut.stats import status_by_exit_code
from mutmut.utils.format_utils import mangled_name_from_mutant_name

# Words with a space between them.  Where such a text matters to a program it is no sentence.
_SENTENCE = re.compile(r"[\w,.:;)'] +[\w(]")

_OURS: Final = ("pgofflined", "tests", "bench")

mutate_string = mutators.operator_string


def mutate_word(node: Any) -> Iterable[Any]:  # noqa: ANN401 - mutmut's own types are not here
    """Other strings in place of one, unless it is a sentence."""
    if not _SENTENCE.search(getattr(node, "value", "")):
        yield from mutate_string(node)


class _AtImport:
    """Functions that were called before the first test, such as what makes the values of a table.

    mutmut forks for each mutant when everything is imported: what they have made stays unmutated.
    """

    def __init__(self) -> None:
        self.functions: frozenset[str] = frozenset()

    def pytest_collection_finish(self) -> None:
        """For pytest, when all tests are imported."""
        self.functions = frozenset(state()._stats)
        state()._stats.clear()

    def pytest_sessionfinish(self) -> None:
        """For pytest, when all tests have run: any may notice."""
        for name in self.functions:
            state().tests_by_mangled_function_name[name].update(state().duration_by_test)


class _Runner(PytestRunner):  # type: ignore[misc]
    """Runs tests in a process of their own, for each mutant."""

    at_import: Final = _AtImport()

    def execute_pytest(self, params: list[str], **kwargs: Any) -> int:  # noqa: ANN401
        """Run pytest; mutmut gives plugins only where it wants to know which tests run what."""
        if kwargs.get("plugins"):
            kwargs["plugins"].append(self.at_import)
        return int(super().execute_pytest(params, **kwargs))

    def run_tests(self, *, mutant_name: str | None, tests: Iterable[str]) -> int:
        """Run the tests that may notice this mutant."""
        name = mutant_name and mangled_name_from_mutant_name(mutant_name)
        if name not in self.at_import.functions:
            return int(super().run_tests(mutant_name=mutant_name, tests=tests))
        for module in list(sys.modules):
            if module.partition(".")[0] in _OURS:
                del sys.modules[module]
        try:
            return int(super().run_tests(mutant_name=mutant_name, tests=tests) != 0)
        except BadTestExecutionCommandsException:
            return 1  # they cannot be imported


def main(results: str) -> None:
    """Try all mutants that have no verdict yet."""
    sys.modules["mutmut.workers.isolation"].PytestRunner = _Runner  # type: ignore[attr-defined]
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
