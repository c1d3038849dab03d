"""What is a condition, how urgent it is, and which reports are uncorrected errors."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pgofflined.core.conditions import (
    Condition,
    ConditionCode,
    Severity,
    by_urgency,
    uncorrected_error,
)
from pgofflined.core.frames import Domid, Mfn
from pgofflined.core.reports import (
    CorrectedPageError,
    HypervisorActed,
    HypervisorResult,
    OtherError,
    OtherKind,
    UncorrectedPageError,
)
from pgofflined.core.telemetry import BankEntry

RUNBOOK = Path(__file__).parents[3] / "docs" / "runbook.md"
VAL = 1 << 63
UC = VAL | 1 << 61
CORRECTED = 0x8000_0000_0000_0000
SECTION = re.compile(
    r"^### `(?P<code>\w+)` \((?P<severity>\w+)\)\n\n(?P<text>(?:(?!#).*\n?)+)", re.M
)


def condition(code: ConditionCode, **changes: object) -> Condition:
    return Condition(code=code, text="so it is", since=5.0, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("code", ConditionCode)
def test_the_runbook_says_of_every_code_what_it_means_and_what_to_do(code: ConditionCode) -> None:
    sections = {found["code"]: found for found in SECTION.finditer(RUNBOOK.read_text())}
    assert sections[code.value]["severity"] == code.severity.value
    assert "**Means:**" in sections[code.value]["text"]
    assert "**Do:**" in sections[code.value]["text"]
    says_how = f"pgofflined acknowledge {code.value}" in sections[code.value]["text"]
    # What is for information needs no acknowledgement, though it can be given.
    assert says_how == (code.can_be_acknowledged and code.severity is not Severity.INFO)


def test_the_runbook_has_no_section_for_a_code_that_is_gone() -> None:
    found = [section["code"] for section in SECTION.finditer(RUNBOOK.read_text())]
    assert sorted(found) == sorted(code.value for code in ConditionCode)


def test_where_a_guest_stands_still_or_nothing_is_seen_nobody_can_acknowledge_it_away() -> None:
    assert {code for code in ConditionCode if not code.can_be_acknowledged} == {
        ConditionCode.GUEST_STUCK,
        ConditionCode.GUEST_HELD,
        ConditionCode.GUEST_IN_DOUBT,
        ConditionCode.WORKER_STUCK,
        ConditionCode.SAVE_UNFINISHED,
        ConditionCode.SAVE_OVERDUE,
        ConditionCode.NO_SOURCE,
        ConditionCode.CONFIG_REJECTED,
    }


@pytest.mark.parametrize(
    "code", [ConditionCode.IDLE_SCRUB, ConditionCode.NO_POLLING, ConditionCode.FREE_FRAMES_UNSAFE]
)
def test_what_only_a_reboot_or_an_update_ends_is_for_information(code: ConditionCode) -> None:
    assert code.severity is Severity.INFO
    assert not condition(code).counts


def test_the_most_urgent_comes_first_and_what_is_known_last() -> None:
    scrub = condition(ConditionCode.IDLE_SCRUB)
    cap = condition(ConditionCode.CAP_REACHED)
    stuck = condition(ConditionCode.GUEST_STUCK)
    known = condition(ConditionCode.GUEST_ENDED, acknowledged=True)
    assert sorted([known, scrub, cap, stuck], key=by_urgency) == [stuck, cap, scrub, known]


def test_a_condition_is_of_its_page_or_else_of_its_guest() -> None:
    code = ConditionCode.UNCORRECTED_ERROR
    page = condition(code, mfn=Mfn(1), domid=Domid(2))
    assert page.key == condition(code, mfn=Mfn(1)).key
    assert condition(code, domid=Domid(2)).key != condition(code, domid=Domid(3)).key


def other(kind: OtherKind, status: int = CORRECTED) -> OtherError:
    return OtherError(kind=kind, bank=bank(status))


def bank(status: int) -> BankEntry:
    return BankEntry(bank=3, status=status, addr=0x7000, misc=0)


@pytest.mark.parametrize(
    "report",
    [
        other(OtherKind.FATAL),
        other(OtherKind.UNCORRECTED_SIGNALLED),
        other(OtherKind.UNCORRECTED_NOT_SIGNALLED),
        # Deferred errors of AMD's have no UC, nor has a patrol scrubber's on some.
        UncorrectedPageError(
            mfn=Mfn(7),
            kind=OtherKind.UNCORRECTED_NOT_SIGNALLED,
            domid=None,
            bank=bank(CORRECTED),
        ),
        other(OtherKind.NOT_MEMORY, UC),
        other(OtherKind.NORMALIZED_ADDRESS, UC),
        other(OtherKind.UNKNOWN_VENDOR, UC),
    ],
)
def test_uncorrected_errors_of_every_kind_are_incidents(
    report: OtherError | UncorrectedPageError,
) -> None:
    incident = uncorrected_error(report, 9.0)
    assert incident is not None
    assert (incident.code, incident.mfn) == (ConditionCode.UNCORRECTED_ERROR, report.mfn)
    assert incident.since == 9.0
    assert "bank 3" in incident.text


@pytest.mark.parametrize(
    "report",
    [
        other(OtherKind.NO_ERROR, UC & ~VAL),
        other(OtherKind.NOT_MEMORY),
        other(OtherKind.NORMALIZED_ADDRESS),
        other(OtherKind.COMMAND_OR_ADDRESS_PARITY),
        CorrectedPageError(
            mfn=Mfn(7),
            count=1,
            overflow=False,
            granularity=64,
            domid=None,
            bank=bank(CORRECTED),
        ),
    ],
)
def test_what_was_corrected_is_no_incident(report: OtherError | CorrectedPageError) -> None:
    assert uncorrected_error(report, 9.0) is None


@pytest.mark.parametrize(
    ("mfn", "said"),
    [
        (Mfn(0x77), "`pgofflined query 0x77` says whose page it is"),
        (None, "which page is not known"),
    ],
)
def test_what_xen_acted_on_is_an_incident_with_or_without_its_page(
    mfn: Mfn | None, said: str
) -> None:
    report = HypervisorActed(
        mfn=mfn,
        domid=Domid(4),
        broken=True,
        result=HypervisorResult.OFFLINED,
        reason="gone",
        bank=bank(UC),
    )
    incident = uncorrected_error(report, 9.0)
    assert incident is not None
    assert incident.key == (ConditionCode.UNCORRECTED_ERROR, mfn, None if mfn else Domid(4))
    assert said in incident.text
    assert incident.ends_by_itself is (mfn is not None)
