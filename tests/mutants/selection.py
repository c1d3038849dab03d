"""Which modules are mutated, and which tests are to notice.

mutmut runs of the tests of a group those that come by the mutated function, the quickest first.
They are chosen so that a survivor costs seconds: what only slow tests see is no reason to name
those here, but one to write a quick one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Modules that are told by the same tests."""

    name: str
    modules: tuple[str, ...]
    tests: tuple[str, ...]


def _core(*names: str) -> tuple[str, ...]:
    return tuple(f"pgofflined/core/{name}.py" for name in names)


def _beside(*names: str) -> tuple[str, ...]:
    return tuple(f"pgofflined/{name}.py" for name in names)


def _unit(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/unit/{name}" for name in names)


GROUPS: Final = (
    Group(
        name="decisions",
        modules=_core(
            *("aftermath", "book", "domains", "errors", "events", "frames", "history", "ladder"),
            *("patterns", "policy", "premigration", "relocating", "relocation_outcomes", "saves"),
            *("schedule", "schema", "tally", "text", "units"),
        ),
        tests=_unit(
            *(f"core/test_{name}.py" for name in ("aftermath", "book", "domains", "errors")),
            *(f"core/test_{name}.py" for name in ("frames", "history", "ladder", "patterns")),
            *(f"core/test_{name}.py" for name in ("policy", "policy_waits", "premigration")),
            *(f"core/test_{name}.py" for name in ("relocating", "saves")),
            *(f"core/test_{name}.py" for name in ("schedule", "tally", "text", "units")),
            *("test_config.py", "test_events.py", "test_journal_log.py", "test_ledger.py"),
            *("test_metrics.py", "test_unresolved.py"),
        ),
    ),
    Group(
        name="records",
        modules=_core("classify", "machine", "reports", "telemetry", "xenversion"),
        tests=_unit(
            *("core/test_classify.py", "core/test_classify_recovery.py", "core/test_machine.py"),
            *("core/test_public_reports.py", "core/test_telemetry.py", "core/test_xenversion.py"),
        ),
    ),
    Group(
        name="people",
        modules=(
            *_core("conditions", "incidents", "suspending"),
            *_beside("attention", "endwatch", "indoubt", "marks", "operations"),
        ),
        tests=_unit(
            *("core/test_conditions.py", "core/test_incidents.py", "core/test_suspending.py"),
            *(
                "exchanger/test_marks.py",
                "test_attention.py",
                "test_indoubt.py",
                "test_promises.py",
            ),
            *("test_service_attention.py", "test_service_people.py", "test_service_questions.py"),
            "test_word_of_ends.py",
        ),
    ),
    Group(
        name="exchange",
        modules=_core("moves", "offline", "outcomes", "pages", "pagetable", "progress"),
        tests=_unit(
            *("core/test_ladder.py", "core/test_moves.py", "core/test_offline.py"),
            *("core/test_outcomes.py", "core/test_pages.py", "core/test_progress.py"),
            *("core/test_tally.py", "exchanger"),
        ),
    ),
    Group(
        name="pages",
        modules=_beside("jobs", "ledger", "owners", "triage", "uncorrected", "unresolved"),
        tests=_unit(
            *("test_jobs.py", "test_ledger.py", "test_owners.py"),
            *("test_triage.py", "test_triage_answers.py", "test_triage_marks.py"),
            *("test_uncorrected.py", "test_unresolved.py"),
        ),
    ),
    Group(
        name="exchanging",
        modules=_beside("exchanging", "recoverylog"),
        # What an earlier process has left is ended here as well.
        tests=_unit(
            *("exchanger", "test_exchanging.py", "test_leftovers.py", "test_next_daemon.py"),
            *("test_recoverylog.py", "test_retirer.py", "test_service_pages.py"),
            *("test_service_suspend.py", "test_stop.py"),
        ),
    ),
    Group(
        name="service",
        modules=_beside("consequences", "intake", "retiring"),
        # The service with everything in it, on a simulated host.
        tests=_unit(
            *("test_consequences.py", "test_dispositions.py", "test_intake.py", "test_promises.py"),
            *("test_retirer.py", "test_retirer_guests.py", "test_retirer_waits.py"),
            "test_retiring.py",
            *("test_service_errors.py", "test_service_pages.py", "test_service_xen.py"),
        ),
    ),
    Group(
        name="metrics",
        modules=_beside("metrics/collector", "metrics/http"),
        tests=_unit("test_metrics.py", "test_serving.py"),
    ),
)
