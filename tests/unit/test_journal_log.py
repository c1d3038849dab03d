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
from pgofflined.core.telemetry import BankEntry
from pgofflined.journal_log import (
    Announced,
    Chatter,
    FieldHandler,
    LineHandler,
    bank_fields,
    event,
    setup_logging,
)

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
    ours = logging.getLogger("pgofflined")
    ours.addHandler(handler)
    ours.setLevel(logging.DEBUG)
    yield handler
    ours.removeHandler(handler)


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


@pytest.mark.usefixtures("handler")
def test_a_machine_check_has_all_that_was_read_of_its_bank(journal: Journal) -> None:
    bank = BankEntry(
        bank=13, status=0xCC001380000800C0, addr=0xD6DB0B8C0, misc=0x8C,
        gstatus=5, apicid=34, socket=0, flags=0x21, mcg_cap=0xF000C14,
    )  # fmt: skip
    event(
        log, logging.WARNING, Event.ERROR_SEEN, "a machine check",
        mfn=Mfn(0xD6DB0B), fields=bank_fields(bank),
    )  # fmt: skip
    ((_, fields),) = journal.entries
    expected = {
        "BANK": "13",
        "STATUS": "0xcc001380000800c0",
        "ADDR": "0xd6db0b8c0",
        "MISC": "0x8c",
        "SOCKET": "0",
        "APICID": "34",
        "MCG_STATUS": "0x5",
        "MCG_CAP": "0xf000c14",
        "MC_FLAGS": "0x21",
        "MFN": "0xd6db0b",
        "MESSAGE_ID": Event.ERROR_SEEN.message_id,
    }
    assert {name: fields[name] for name in expected} == expected


def test_what_a_record_does_not_say_is_no_field() -> None:
    assert bank_fields(None) == {}
    bare = bank_fields(BankEntry(bank=1, status=0, addr=0, misc=0))
    assert not {"SOCKET", "APICID", "MCG_CAP"} & bare.keys()
    assert bare["STATUS"] == "0x0000000000000000"


class Clock:
    """A time that tests set."""

    def __init__(self) -> None:
        self.time = 100.0

    def now(self) -> float:
        return self.time


@pytest.mark.usefixtures("handler")
def test_a_storm_is_cut_short_and_counted(journal: Journal) -> None:
    clock = Clock()
    chatter = Chatter(clock.now, most=3, seconds=60.0)
    passed = []
    for _ in range(10):
        passed.append(chatter.admits(Event.ERROR_SEEN))
        clock.time += 1.0
    assert passed == [True] * 3 + [False] * 7
    assert chatter.admits(Event.QUEUE_FULL), "of another kind"
    clock.time = 159.9
    assert not chatter.admits(Event.ERROR_SEEN)
    assert journal.entries == []
    clock.time = 160.0
    assert chatter.admits(Event.ERROR_SEEN)
    [(message, fields)] = journal.entries
    assert message == "8 such entries were left out"
    assert fields["MESSAGE_ID"] == Event.ERROR_SEEN.message_id
    assert [chatter.admits(Event.ERROR_SEEN) for _ in range(3)] == [True, True, False]


@pytest.mark.usefixtures("handler")
def test_what_was_left_out_is_told_at_the_end_if_no_further_entry_comes(journal: Journal) -> None:
    chatter = Chatter(Clock().now, most=1)
    for kind in (Event.ERROR_SEEN, Event.ERROR_SEEN, Event.QUEUE_FULL, Event.RECORDS_LOST):
        chatter.admits(kind)
    chatter.admits(Event.RECORDS_LOST)
    chatter.admits(Event.RECORDS_LOST)
    chatter.close()
    assert [(message, fields["MESSAGE_ID"]) for message, fields in journal.entries] == [
        ("1 such entries were left out", Event.ERROR_SEEN.message_id),
        ("2 such entries were left out", Event.RECORDS_LOST.message_id),
    ]
    chatter.close()
    assert len(journal.entries) == 2


def test_news_is_said_once_until_it_changes() -> None:
    announced = Announced()
    assert announced.is_news(1, "cap of 8")
    assert announced.is_news(2, "cap of 8")
    assert not announced.is_news(1, "cap of 8")
    assert announced.is_news(1, "cap of 9")
    assert announced.is_news(1, "cap of 8")
    assert not announced.is_news(2, "cap of 8")


def test_what_was_said_longest_ago_is_forgotten_first() -> None:
    announced = Announced(most=2)
    for subject in (1, 2, 1, 3):
        announced.is_news(subject, "same")
    assert not announced.is_news(1, "same")
    assert not announced.is_news(3, "same")
    assert announced.is_news(2, "same")
