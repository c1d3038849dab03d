"""The identities of journal entries are an interface."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pgofflined.core.events import Event

CATALOG = Path(__file__).parents[2] / "systemd" / "pgofflined.catalog"
ENTRY = re.compile(
    r"^-- (?P<id>[0-9a-f]{32})\nSubject: (?P<subject>.+)\nDefined-By: pgofflined\n\n"
    r"(?P<text>(?:(?!-- ).*\n?)+)",
    re.MULTILINE,
)


def catalog() -> list[re.Match[str]]:
    return list(ENTRY.finditer(CATALOG.read_text(encoding="utf-8")))


def test_no_two_kinds_share_an_identity() -> None:
    # Enum makes a second name of one value an alias, which iteration does not show.
    assert len(Event.__members__) == len({kind.message_id for kind in Event})


@pytest.mark.parametrize("kind", Event)
def test_an_identity_is_a_random_uuid(kind: Event) -> None:
    assert re.fullmatch(r"[0-9a-f]{12}4[0-9a-f]{3}[89ab][0-9a-f]{15}", kind.message_id)


def test_the_catalogue_explains_every_kind_once_and_nothing_else() -> None:
    explained = [entry["id"] for entry in catalog()]
    assert sorted(explained) == sorted(kind.message_id for kind in Event)


def test_every_entry_of_the_catalogue_was_understood() -> None:
    assert CATALOG.read_text(encoding="utf-8").count("\n-- ") == len(catalog())


def test_the_catalogue_refers_only_to_fields_that_are_sent() -> None:
    used = {name for entry in catalog() for name in re.findall(r"@(\w+)@", entry["text"])}
    assert used <= {"MFN", "DOMID", "JOB"}
