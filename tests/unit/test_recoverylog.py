"""What the journal says of exchanges that were cut off: how urgently, and of which guest."""

from __future__ import annotations

import logging
from uuid import UUID

import pytest

from pgofflined.core.domains import DomainIdentity
from pgofflined.core.events import Event
from pgofflined.core.frames import Domid, Mfn, Pfn
from pgofflined.core.outcomes import Damaged, Exchanged, PageResult
from pgofflined.core.recovery import Recovered, RecoveryReport
from pgofflined.recoverylog import tell

from .whole_pages import fields, told

GUEST = DomainIdentity(Domid(7), UUID(int=7))
EXCHANGED = Exchanged(old=Mfn(1), new=Mfn(2), pfn=Pfn(3), references=1, offlined=True)
DAMAGED = Damaged(old=Mfn(0x1A2B3), new=Mfn(4), pfn=Pfn(5), detail="its contents are lost")
CUT_OFF = "an exchange was cut off: so it is"
THEN = "; then it is tried again"
HELD = "; the guest is held, and it is tried again"


def report(outcome: Recovered, *results: PageResult) -> RecoveryReport:
    return RecoveryReport(domain=GUEST, outcome=outcome, detail="so it is", results=results)


@pytest.mark.parametrize(
    ("outcome", "level", "kind", "said"),
    [
        (Recovered.NOTHING_TO_DO, logging.INFO, Event.JOB_RECOVERED, CUT_OFF),
        (Recovered.GONE, logging.INFO, Event.JOB_RECOVERED, CUT_OFF),
        (Recovered.FINISHED, logging.WARNING, Event.JOB_RECOVERED, CUT_OFF),
        (Recovered.LEFT_ALONE, logging.CRITICAL, Event.JOB_NOT_RECOVERED, CUT_OFF),
        (Recovered.STANDS_STILL, logging.CRITICAL, Event.JOB_NOT_RECOVERED, CUT_OFF),
        (Recovered.HELD, logging.CRITICAL, Event.JOB_NOT_RECOVERED, CUT_OFF),
        (Recovered.CRASHED, logging.CRITICAL, Event.GUEST_ENDED, "so it is"),
    ],
)
def test_the_end_of_a_job_that_was_cut_off_is_an_event(
    outcome: Recovered, level: int, kind: Event, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    tell(report(outcome))
    [record] = caplog.records
    assert (record.levelno, record.getMessage()) == (level, said)
    assert fields(record) == {"MESSAGE_ID": kind.message_id, "DOMID": "7", "JOB": "recovery"}


@pytest.mark.parametrize(
    ("outcome", "level", "said"),
    [
        (Recovered.NOT_YET, logging.ERROR, CUT_OFF + HELD),
        (Recovered.BUSY, logging.WARNING, CUT_OFF + THEN),
    ],
)
def test_what_is_tried_again_is_not_the_end(
    outcome: Recovered, level: int, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    tell(report(outcome))
    [record] = caplog.records
    assert (record.levelno, record.getMessage()) == (level, said)


def test_a_guest_in_the_middle_of_a_change_that_somebody_saves_needs_a_person(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tell(report(Recovered.BUSY, EXCHANGED))
    [record] = told(caplog, Event.JOB_NOT_RECOVERED)
    assert (record.levelno, record.getMessage()) == (logging.CRITICAL, CUT_OFF)
    assert fields(record)["DOMID"] == "7"
    assert fields(record)["JOB"] == "recovery"


def test_each_page_that_a_guest_has_lost_is_told(caplog: pytest.LogCaptureFixture) -> None:
    tell(report(Recovered.LEFT_ALONE, EXCHANGED, DAMAGED))
    [record] = told(caplog, Event.PAGE_DAMAGED)
    assert record.levelno == logging.CRITICAL
    assert record.getMessage() == (
        "mfn 0x1a2b3 of d7 could not be put right: its contents are lost; restart it at once"
    )
    assert fields(record)["DOMID"] == "7"
    assert fields(record)["JOB"] == "recovery"
