"""Log entries with fields, in the journal's form and as lines."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pgofflined.core.events import Event
from pgofflined.core.frames import Domid, Mfn
from pgofflined.journal_log import FieldHandler, LineHandler, RateLimit, event, setup_logging

log = logging.getLogger("pgofflined.test")


class Journal:
    """Takes entries as ``systemd.journal.send`` does."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, dict[str, object]]] = []

    def send(self, message: str, **fields: object) -> None:
        self.entries.append((message, fields))


@pytest.fixture(autouse=True)
def loggers_as_before() -> Iterator[None]:
    root, ours = logging.getLogger(), logging.getLogger("pgofflined")
    handlers, levels = root.handlers[:], [(each, each.level) for each in (root, ours, log)]
    yield
    root.handlers[:] = handlers
    for each, level in levels:
        each.setLevel(level)


@pytest.fixture
def journal() -> Journal:
    return Journal()


@pytest.fixture
def handler(journal: Journal) -> Iterator[FieldHandler]:
    handler = FieldHandler(journal.send)
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    yield handler
    log.removeHandler(handler)


@pytest.mark.usefixtures("handler")
def test_an_event_has_its_fields(journal: Journal) -> None:
    event(
        log, logging.WARNING, Event.PAGE_OFFLINED, "mfn 0x1a2b3 of d7 is out of use",
        mfn=Mfn(0x1A2B3), domid=Domid(7), job="x3",
    )  # fmt: skip
    ((message, fields),) = journal.entries
    assert message == "mfn 0x1a2b3 of d7 is out of use"
    assert fields["MESSAGE_ID"] == Event.PAGE_OFFLINED.message_id
    assert (fields["MFN"], fields["DOMID"], fields["JOB"]) == ("0x1a2b3", "7", "x3")
    assert (fields["PRIORITY"], fields["SYSLOG_IDENTIFIER"]) == ("4", "pgofflined")
    assert (fields["CODE_FILE"], fields["LOGGER"]) == (__file__, "pgofflined.test")


@pytest.mark.usefixtures("handler")
def test_fields_that_are_not_known_are_not_sent(journal: Journal) -> None:
    event(log, logging.INFO, Event.STARTED, "100 %s", domid=Domid(0))
    log.debug("plain %d", 3)
    (first, fields), (second, plain) = journal.entries
    assert (first, second) == ("100 %s", "plain 3")
    assert fields["DOMID"] == "0"
    assert not {"MFN", "JOB"} & fields.keys()
    assert "MESSAGE_ID" not in plain
    assert plain["PRIORITY"] == "7"


@pytest.mark.usefixtures("handler")
def test_a_name_from_outside_cannot_begin_another_line(journal: Journal) -> None:
    log.warning("guest %s", "a\nJun 01 pgofflined: all is well\x1b[2J")
    assert journal.entries[0][0] == "guest a\\nJun 01 pgofflined: all is well\\x1b[2J"


@pytest.mark.usefixtures("handler")
def test_a_traceback_keeps_its_lines(journal: Journal) -> None:
    try:
        raise ValueError("bad")
    except ValueError:
        log.exception("failed")
    lines = journal.entries[0][0].splitlines()
    assert (lines[0], lines[1], lines[-1]) == (
        "failed",
        "Traceback (most recent call last):",
        "ValueError: bad",
    )


def test_what_the_journal_does_not_take_goes_to_stderr(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(_message: str, **_fields: object) -> None:
        raise OSError("no room")

    record = log.makeRecord(log.name, logging.ERROR, "f", 1, "it broke", (), None)
    FieldHandler(refuse).emit(record)
    assert capsys.readouterr().err == "<3>it broke\n"


def test_lines_have_the_fields_behind(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(logging.INFO)
    event(log, logging.INFO, Event.PAGE_MARKED, "mfn 0x10 is marked", mfn=Mfn(16), job="x\n1")
    log.debug("too fine")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith(" info: mfn 0x10 is marked MFN=0x10 JOB=x\\n1\n")
    assert err.count("\n") == 1


def test_libraries_are_heard_from_warning_on(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(logging.DEBUG)
    logging.getLogger("asyncio").info("chatter")
    logging.getLogger("asyncio").warning("trouble")
    log.debug("ours")
    err = capsys.readouterr().err
    assert "chatter" not in err
    assert "trouble" in err
    assert "ours" in err


def test_the_journal_is_told_from_a_redirected_stderr(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOURNAL_STREAM", "8:12345")
    with (tmp_path / "stderr").open("w") as file:
        monkeypatch.setattr(sys, "stderr", file)
        setup_logging(logging.INFO)
        log.info("redirected")
        found = os.fstat(file.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:{found.st_ino}")
        setup_logging(logging.INFO)
        (handler,) = logging.getLogger().handlers
        if isinstance(handler, LineHandler):  # no systemd-python here: priorities as prefixes
            log.info("journal")
            assert (tmp_path / "stderr").read_text().endswith("\n<6>journal\n")
        else:
            assert isinstance(handler, FieldHandler)
    assert " info: redirected\n" in (tmp_path / "stderr").read_text()


def record_at(when: float, kind: Event = Event.ERROR_SEEN) -> logging.LogRecord:
    fields = {"MESSAGE_ID": kind.message_id}
    record = log.makeRecord(
        log.name, logging.INFO, "f", 1, "%s", ("error",), None, extra={"pgofflined_fields": fields}
    )
    record.created = when
    return record


def test_a_storm_is_cut_short_and_counted() -> None:
    limit = RateLimit({Event.ERROR_SEEN: (3, 60.0)})
    passed = [limit.filter(record_at(100.0 + second)) for second in range(10)]
    assert passed == [True] * 3 + [False] * 7
    assert limit.filter(record_at(120.0, Event.PAGE_OFFLINED))
    later = record_at(161.0)
    assert limit.filter(later)
    assert later.getMessage() == "error (7 such entries were left out)"
    assert limit.filter(record_at(162.0))


def test_a_clock_set_back_does_not_silence() -> None:
    limit = RateLimit({Event.ERROR_SEEN: (1, 60.0)})
    assert limit.filter(record_at(5000.0))
    assert not limit.filter(record_at(5001.0))
    assert limit.filter(record_at(4000.0))
