"""What may follow after a save and a restore."""

from __future__ import annotations

from dataclasses import replace
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgofflined.core.domains import DomainIdentity, ShutdownReason
from pgofflined.core.frames import Domid
from pgofflined.core.saves import (
    Again,
    FileSeen,
    GoOn,
    SaveNote,
    SavePhase,
    Stand,
    Stays,
    after_restore,
    after_save,
    left_over,
    stand_of,
)
from tests.unit.relocation.doubles import guest

FILE = FileSeen(device=1, inode=2, size=3)
EMPTY = replace(FILE, size=0)
OTHER = replace(FILE, inode=9)
FILES = st.sampled_from([None, FILE, EMPTY, OTHER])


@given(succeeded=st.booleans(), stand=st.sampled_from(Stand), file=FILES)
def test_a_restore_is_begun_only_for_a_guest_that_is_nowhere_but_in_its_file(
    *, succeeded: bool, stand: Stand, file: FileSeen | None
) -> None:
    verdict = after_save(succeeded=succeeded, stand=stand, made=EMPTY, file=file)
    if isinstance(verdict, GoOn):
        assert succeeded
        assert stand is Stand.ABSENT
        assert file == FILE
    if isinstance(verdict, Stays):
        assert stand is Stand.RUNS


@given(succeeded=st.booleans(), stand=st.sampled_from(Stand), file=FILES, tries=st.integers(1, 3))
def test_a_restore_is_tried_again_only_where_it_has_certainly_done_nothing(
    *, succeeded: bool, stand: Stand, file: FileSeen | None, tries: int
) -> None:
    verdict = after_restore(succeeded=succeeded, stand=stand, saved=FILE, file=file, tries=tries)
    if isinstance(verdict, GoOn):
        assert succeeded
        assert stand is Stand.RUNS
    if isinstance(verdict, Again):
        assert not succeeded
        assert stand is Stand.ABSENT
        assert file == FILE
        assert tries == 1


def test_saves_and_restores_that_went_well_go_on() -> None:
    assert after_save(succeeded=True, stand=Stand.ABSENT, made=EMPTY, file=FILE) == GoOn()
    done = after_restore(succeeded=True, stand=Stand.RUNS, saved=FILE, file=FILE, tries=2)
    assert done == GoOn()


def test_how_a_guest_stands_is_told_by_its_uuid() -> None:
    uuid = UUID(int=7)
    here, there = guest(3, uuid=7), guest(4, uuid=7)
    assert stand_of(uuid, [guest(1), here]) is Stand.RUNS
    assert stand_of(uuid, [guest(1)]) is Stand.ABSENT
    assert stand_of(uuid, [here, there]) is Stand.SEVERAL
    assert stand_of(uuid, [replace(here, dying=True)]) is Stand.ABSENT
    assert stand_of(uuid, [replace(here, dying=True), there]) is Stand.RUNS
    assert stand_of(uuid, [replace(here, paused=True)]) is Stand.STANDS_STILL
    suspended = replace(here, shutdown=ShutdownReason.SUSPEND)
    assert stand_of(uuid, [suspended]) is Stand.STANDS_STILL


@pytest.mark.parametrize(
    ("stand", "says", "not_says"),
    [
        (Stand.ABSENT, "`xl restore /s/x` lets it run", "do not restore"),
        (Stand.RUNS, "do not restore /s/x", "xl restore"),
        (Stand.STANDS_STILL, "do not restore /s/x", "xl restore"),
        (Stand.SEVERAL, "destroy all but one", "xl restore"),
    ],
)
@pytest.mark.parametrize("phase", SavePhase)
def test_a_person_is_told_what_to_do_with_what_is_left(
    stand: Stand, says: str, not_says: str, phase: SavePhase
) -> None:
    domain = DomainIdentity(Domid(7), UUID(int=7))
    note = SaveNote(domain=domain, phase=phase, file="/s/x", boot="b")
    told = left_over(note, stand, same_boot=True, path="/n/7")
    assert says in told
    assert not_says not in told
    assert "remove /n/7" in told
    later = left_over(note, stand, same_boot=False, path="/n/7")
    assert ("run elsewhere" in later) is (stand is Stand.ABSENT)
