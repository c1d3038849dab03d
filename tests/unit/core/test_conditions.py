"""What is a condition, how urgent it is, and which reports are uncorrected errors."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from pgofflined.core.conditions import (
    Condition,
    ConditionCode,
    Severity,
    by_urgency,
    uncorrected_error,
    unreported_error,
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


@pytest.mark.parametrize("owner", [None, Domid(4)])
def test_an_uncorrected_error_names_the_guest_that_xen_names(owner: Domid | None) -> None:
    in_page = UncorrectedPageError(
        mfn=Mfn(7), kind=OtherKind.UNCORRECTED_NOT_SIGNALLED, domid=owner, bank=bank(UC)
    )
    elsewhere = OtherError(kind=OtherKind.FATAL, bank=replace(bank(UC), domid=owner))
    for report in (in_page, elsewhere):
        incident = uncorrected_error(report, 9.0)
        assert incident is not None
        assert incident.domid == owner


def test_a_page_that_xen_has_broken_by_itself_is_told_with_what_ends_it() -> None:
    incident = unreported_error(Mfn(0x77), "restart d4", 9.0)
    assert (incident.code, incident.mfn, incident.domid, incident.since) == (
        *(ConditionCode.UNCORRECTED_ERROR, 0x77, None, 9.0),
    )
    assert incident.text == (
        "mfn 0x77 has had an uncorrected error, of which no record came: restart d4; `pgofflined "
        "query 0x77` says whose page it is and what ends this"
    )


def test_of_what_is_as_urgent_the_oldest_comes_first_then_the_lowest_page() -> None:
    code = ConditionCode.PAGE_UNRESOLVED
    old, low, high = (
        Condition(code=code, text="", since=1.0, mfn=Mfn(9)),
        Condition(code=code, text="", since=2.0, mfn=Mfn(1)),
        Condition(code=code, text="", since=2.0, mfn=Mfn(5)),
    )
    # One without a page comes before all; another code of the same severity after all.
    nowhere = Condition(code=code, text="", since=2.0)
    cap = Condition(code=ConditionCode.CAP_REACHED, text="", since=0.0)
    assert sorted([cap, high, low, nowhere, old], key=by_urgency) == [old, nowhere, low, high, cap]


def test_only_errors_of_known_pages_end_by_themselves() -> None:
    assert condition(ConditionCode.UNCORRECTED_ERROR, mfn=Mfn(0)).ends_by_itself
    assert not condition(ConditionCode.UNCORRECTED_ERROR, domid=Domid(3)).ends_by_itself
    assert not condition(ConditionCode.PAGE_DAMAGED, mfn=Mfn(1)).ends_by_itself
