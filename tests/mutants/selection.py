"""Which modules are mutated, and which tests are to notice.

mutmut runs of these tests those that come by the mutated function, the quickest first.  They are
chosen so that a survivor costs seconds: what only slow tests see is no reason to name those here,
but one to write a quick one.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_UNIT: Final = "tests/unit"
_CORE: Final = "pgofflined/core"
# The service with everything in it, on a simulated host.
_WHOLE: Final = ("test_promises.py", "test_retiring.py")

# Below tests/unit; a module of core/ has those of its own name as well, where there are any.
_TESTS: Final[dict[str, tuple[str, ...]]] = {
    f"{_CORE}/aftermath.py": ("test_savewatch.py", "test_leftovers.py"),
    f"{_CORE}/book.py": ("test_ledger.py", "test_unresolved.py", "test_metrics.py"),
    f"{_CORE}/classify.py": ("core/test_classify_recovery.py", "core/test_telemetry.py"),
    f"{_CORE}/errors.py": ("xen/test_control.py", "xen/test_memory.py"),
    f"{_CORE}/events.py": ("test_events.py", "test_journal_log.py"),
    f"{_CORE}/machine.py": ("core/test_telemetry.py", "core/test_classify.py"),
    f"{_CORE}/moves.py": ("exchanger", "test_jobstore.py"),
    f"{_CORE}/offline.py": ("test_triage.py",),
    f"{_CORE}/outcomes.py": ("core/test_ladder.py", "core/test_tally.py"),
    f"{_CORE}/pagetable.py": ("core/test_pages.py", "exchanger"),
    f"{_CORE}/patterns.py": ("test_config.py",),
    f"{_CORE}/policy.py": ("test_config.py",),
    f"{_CORE}/premigration.py": ("core/test_relocating.py",),
    f"{_CORE}/progress.py": ("relocation/test_xl.py",),
    f"{_CORE}/relocation_outcomes.py": ("core/test_tally.py", "core/test_relocating.py"),
    f"{_CORE}/reports.py": ("core/test_classify.py", "core/test_classify_recovery.py"),
    f"{_CORE}/saves.py": ("test_saving.py",),
    f"{_CORE}/schema.py": ("test_config.py",),
    f"{_CORE}/status.py": ("test_control.py", "test_metrics.py"),
    f"{_CORE}/tally.py": (),
    f"{_CORE}/units.py": ("test_config.py",),
    "pgofflined/consequences.py": (*_WHOLE, "test_uncorrected.py"),
    "pgofflined/exchanging.py": (*_WHOLE, "test_jobs.py"),
    "pgofflined/intake.py": _WHOLE,
    "pgofflined/jobs.py": (*_WHOLE, "test_jobs.py"),
    "pgofflined/ledger.py": (*_WHOLE, "test_ledger.py"),
    "pgofflined/metrics/collector.py": ("test_metrics.py",),
    "pgofflined/metrics/http.py": ("test_metrics.py", "test_serving.py"),
    "pgofflined/retiring.py": (*_WHOLE, "test_uncorrected.py"),
    "pgofflined/triage.py": (*_WHOLE, "test_triage.py"),
    "pgofflined/uncorrected.py": (*_WHOLE, "test_uncorrected.py"),
    "pgofflined/unresolved.py": (*_WHOLE, "test_unresolved.py"),
}


def modules(root: Path) -> Iterator[str]:
    """All of them that do anything, as paths from the root of the project."""
    core = (f"{_CORE}/{path.name}" for path in sorted((root / _CORE).glob("*.py")))
    for module in [*core, *(module for module in _TESTS if not module.startswith(_CORE))]:
        nodes = ast.walk(ast.parse((root / module).read_text()))
        if any(isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) for node in nodes):
            yield module


def tests_of(root: Path, module: str) -> tuple[str, ...]:
    """Files and folders of tests.  Raises KeyError for a module that is not mutated."""
    own = f"core/test_{Path(module).name}" if module.startswith(f"{_CORE}/") else None
    if own is None or not (root / _UNIT / own).is_file():
        return tuple(f"{_UNIT}/{name}" for name in _TESTS[module])
    return tuple(f"{_UNIT}/{name}" for name in (own, *_TESTS.get(module, ())))
