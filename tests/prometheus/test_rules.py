"""The alert rules, by promtool's own unit tests: each fires, and each stays silent."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from pgofflined.core.conditions import Condition, ConditionCode, Severity
from pgofflined.metrics import Metrics
from tests.unit.rim_samples import NOW, SNAPSHOT

ROOT = Path(__file__).parents[2]
RULES = ROOT / "prometheus" / "pgofflined.rules.yml"
TARGET = 'job="pgofflined", instance="host:9709"'
Series = Mapping[str, str]

# Conditions that a rule of their own reports.
OWN_RULES = {
    ConditionCode.GUEST_STUCK: "PgofflinedGuestStuck",
    ConditionCode.WORKER_STUCK: "PgofflinedWorkerStuck",
    ConditionCode.NO_SOURCE: "PgofflinedNoSource",
    ConditionCode.CAP_REACHED: "PgofflinedCapReached",
    ConditionCode.CONFIG_REJECTED: "PgofflinedConfigRejected",
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """What makes a rule fire ``at`` a time, and what is just not enough; values by the minute."""

    fires: Series
    silent: tuple[Series, ...]
    at: str


def named(name: str, values: str, labels: str = "") -> Series:
    return {f"{name}{{{TARGET}{labels and ', '}{labels}}}": values}


def attention(code: ConditionCode, values: str) -> Series:
    return named(
        "pgofflined_attention", values, f'severity="{code.severity.value}", reason="{code.value}"'
    )


def lost(where: str, values: str) -> Series:
    return named("pgofflined_records_lost_total", values, f'where="{where}"')


def budget(retired: str) -> Series:
    budget_bytes = named("pgofflined_retire_budget_bytes", "1000x60")
    return {**named("pgofflined_retired_bytes", retired), **budget_bytes}


CASES = {
    "PgofflinedDown": Case(
        fires=named("up", "1 0x20"),
        silent=(named("up", "1x20"), named("up", "1x7 0x3")),
        at="10m",
    ),
    "PgofflinedAbsent": Case(
        fires={'up{job="other", instance="host:1"}': "1x30"},
        # Down is not absent.
        silent=(named("up", "0x30"),),
        at="20m",
    ),
    "PgofflinedCritical": Case(
        fires=attention(ConditionCode.UNCORRECTED_ERROR, "0x5 1x5"),
        silent=(
            attention(ConditionCode.UNCORRECTED_ERROR, "1x5 0x5"),
            attention(ConditionCode.PAGE_UNRESOLVED, "1x10"),
            attention(ConditionCode.GUEST_STUCK, "1x10"),
            attention(ConditionCode.WORKER_STUCK, "1x10"),
        ),
        at="8m",
    ),
    "PgofflinedWarning": Case(
        fires=attention(ConditionCode.PAGE_UNRESOLVED, "1x20"),
        silent=(
            attention(ConditionCode.PAGE_UNRESOLVED, "0x7 1x3"),
            attention(ConditionCode.IDLE_SCRUB, "5x20"),
            attention(ConditionCode.CONFIG_REJECTED, "1x20"),
        ),
        at="10m",
    ),
    "PgofflinedGuestStuck": Case(
        fires=attention(ConditionCode.GUEST_STUCK, "0x5 1x5"),
        silent=(
            attention(ConditionCode.GUEST_STUCK, "1x5 0x5"),
            named("pgofflined_guests_stuck_total", "3x40"),
            attention(ConditionCode.GUEST_ENDED, "1x10"),
            # Which must not be let run by hand.
            attention(ConditionCode.GUEST_HELD, "1x10"),
            attention(ConditionCode.GUEST_IN_DOUBT, "1x10"),
        ),
        at="9m",
    ),
    "PgofflinedNoSource": Case(
        fires=named("pgofflined_source_up", "0x20"),
        silent=(named("pgofflined_source_up", "1x20"), named("pgofflined_source_up", "1x6 0x4")),
        at="10m",
    ),
    "PgofflinedRecordsLost": Case(
        fires=lost("native", "0x10 4x20"),
        silent=(lost("native", "4x30"), lost("native", "0x2 4x40")),
        at="20m",
    ),
    "PgofflinedConfigRejected": Case(
        fires=attention(ConditionCode.CONFIG_REJECTED, "0x5 1x5"),
        silent=(attention(ConditionCode.CONFIG_REJECTED, "1x5 0x5"),),
        at="8m",
    ),
    "PgofflinedBudgetNearlyUsed": Case(
        fires=budget("801x60"),
        silent=(
            budget("800x60"),
            budget("100x20 900x40"),
            # Nothing may be retired at all: 0 of 0.
            {
                **named("pgofflined_retired_bytes", "0x60"),
                **named("pgofflined_retire_budget_bytes", "0x60"),
            },
        ),
        at="30m",
    ),
    "PgofflinedCapReached": Case(
        fires=attention(ConditionCode.CAP_REACHED, "1x20"),
        silent=(attention(ConditionCode.CAP_REACHED, "0x20"),),
        at="10m",
    ),
    "PgofflinedPagePending": Case(
        fires=named("pgofflined_pages_pending_oldest_seconds", "86400+60x60"),
        silent=(
            named("pgofflined_pages_pending_oldest_seconds", "80000+60x60"),
            named("pgofflined_pages_pending_oldest_seconds", "86400+60x20 0x40"),
        ),
        at="30m",
    ),
    "PgofflinedRestarts": Case(
        fires=named("process_start_time_seconds", "1x10 2x10 3x10 4x90"),
        silent=(
            named("process_start_time_seconds", "1x10 2x10 3x100"),
            named("process_start_time_seconds", "1x1 2x1 3x1 4x100"),
        ),
        at="70m",
    ),
    "PgofflinedWorkerStuck": Case(
        fires=named("pgofflined_worker_busy_longest_seconds", "0+60x10"),
        silent=(named("pgofflined_worker_busy_longest_seconds", "0 60 120 180 0x10"),),
        at="4m",
    ),
}
MORE_FIRES = {
    "PgofflinedGuestStuck": (named("pgofflined_guests_stuck_total", "0x5 1x5"), "9m"),
    "PgofflinedRecordsLost": (lost("hardware", "0x10 1x20"), "20m"),
    "PgofflinedWorkerStuck": (attention(ConditionCode.WORKER_STUCK, "0x2 1x5"), "4m"),
}


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    tool = shutil.which("promtool")
    if tool is None:
        pytest.fail("promtool is missing; as root run: apt-get install prometheus")
    return subprocess.run([tool, *arguments], check=False, capture_output=True, text=True)


def unit_test(folder: Path, *tests: Mapping[str, object]) -> None:
    file = folder / "rules_test.yml"
    document = {"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": tests}
    file.write_text(json.dumps(document))  # which is YAML as well
    done = promtool("test", "rules", file)
    assert done.returncode == 0, done.stdout + done.stderr


def count_of(series: Series, alerts: Mapping[str, int], at: str) -> Mapping[str, object]:
    """Whether so many alerts of each name fire."""
    return {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [
            {
                "expr": f'count(ALERTS{{alertname="{alert}", alertstate="firing"}})',
                "eval_time": at,
                "exp_samples": [{"labels": "{}", "value": count}] if count else [],
            }
            for alert, count in alerts.items()
        ],
    }


def rules() -> dict[str, str]:
    """Expressions by the alert's name."""
    found = re.findall(
        r"- alert: (\w+)\n.*?expr: (.*?)\n\s+(?:for|labels):", RULES.read_text(), re.S
    )
    return dict(found)


def exported(metrics: Metrics) -> Iterable[tuple[str, dict[str, str], float]]:
    text = generate_latest(metrics.registry).decode()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            yield sample.name, sample.labels, sample.value


def test_promtool_takes_the_rules() -> None:
    done = promtool("check", "rules", "--lint=all", "--lint-fatal", RULES)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(CASES)} rules found" in done.stdout


def test_every_rule_has_a_case() -> None:
    assert RULES.read_text().count("- alert:") == len(rules())
    assert rules().keys() == CASES.keys()


@pytest.mark.parametrize("alert", CASES)
def test_a_rule_fires_and_stays_silent(tmp_path: Path, alert: str) -> None:
    case = CASES[alert]
    fires = [count_of(case.fires, {alert: 1}, case.at)]
    if alert in MORE_FIRES:
        series, at = MORE_FIRES[alert]
        fires.append(count_of(series, {alert: 1}, at))
    silent = [count_of(series, {alert: 0}, case.at) for series in case.silent]
    unit_test(tmp_path, *fires, *silent)


@pytest.mark.parametrize("code", ConditionCode)
def test_every_condition_that_needs_somebody_has_one_alert(
    tmp_path: Path, code: ConditionCode
) -> None:
    own = OWN_RULES.get(code)
    generic = {Severity.CRITICAL: "PgofflinedCritical", Severity.WARNING: "PgofflinedWarning"}
    expected = dict.fromkeys(CASES, 0)
    expected["PgofflinedAbsent"] = 1  # for nothing else is there in this test
    if own is None and code.severity is not Severity.INFO:
        expected[generic[code.severity]] = 1
    elif own is not None and own != "PgofflinedNoSource":  # which goes by a gauge of its own
        expected[own] = 1
    unit_test(tmp_path, count_of(attention(code, "1x40"), expected, "30m"))


def test_what_an_alert_says_names_host_and_reason(tmp_path: Path) -> None:
    test = {
        "interval": "1m",
        "input_series": [
            {"series": name, "values": values}
            for name, values in attention(ConditionCode.PAGE_DAMAGED, "2x5").items()
        ],
        "alert_rule_test": [
            {
                "eval_time": "3m",
                "alertname": "PgofflinedCritical",
                "exp_alerts": [
                    {
                        "exp_labels": {
                            "severity": "critical",
                            "reason": "page_damaged",
                            "job": "pgofflined",
                            "instance": "host:9709",
                        },
                        "exp_annotations": {
                            "summary": "page_damaged on host:9709",
                            "description": "2 times. See: pgofflined status, and page_damaged in "
                            "the runbook.",
                        },
                    }
                ],
            }
        ],
    }
    unit_test(tmp_path, test)


def test_no_alert_tells_to_let_a_guest_run_by_hand() -> None:
    """Each of these may be about a guest that must not be; what is to be done `status` says."""
    texts = re.findall(r"(?:summary|description): .*", RULES.read_text())
    assert not [text for text in texts if re.search("xl (unpause|resume|restore)", text)]


@pytest.mark.parametrize("acknowledged", ["nothing", "everything"])
def test_a_host_that_nothing_is_wrong_with_fires_none(tmp_path: Path, acknowledged: str) -> None:
    """With every series of the real collector; neither does what somebody knows of."""
    conditions = [
        Condition(code=code, text="so", since=NOW, acknowledged=True)
        for code in ConditionCode
        if acknowledged == "everything"
    ]
    snapshot = replace(SNAPSHOT, attention=tuple(conditions))
    series = {"up{%s}" % TARGET: "1x90"}  # noqa: UP031 - braces
    for name, labels, value in exported(Metrics(lambda: snapshot, lambda: NOW)):
        text = ", ".join(f'{label}="{text}"' for label, text in labels.items())
        series |= named(name, f"{value:.6f}x90", text)
    unit_test(tmp_path, count_of(series, dict.fromkeys(CASES, 0), "80m"))


def test_rules_name_only_series_that_are_exported() -> None:
    found: dict[str, set[tuple[str, str]]] = {}
    for name, labels, _ in exported(Metrics(lambda: SNAPSHOT, lambda: NOW)):
        found.setdefault(name, set()).update(labels.items())
    for expression in rules().values():
        names = set(re.findall(r"\b(?:pgofflined|process)_\w+", expression))
        assert names or "up{" in expression
        assert names <= found.keys()
        for label, values in re.findall(r'(reason|severity|where)(?:=|!~)"([^"]+)"', expression):
            for text in values.split("|"):
                assert any((label, text) in found[name] for name in names)


def test_the_readme_documents_every_rule_and_how_to_install_them() -> None:
    readme = (ROOT / "README.md").read_text()
    assert "prometheus/pgofflined.rules.yml" in readme
    for alert in rules():
        assert f"`{alert}`" in readme
