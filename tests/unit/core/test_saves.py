"""What may follow after a save and a restore."""

from __future__ import annotations

from dataclasses import replace
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgofflined.control.replies import MAX_ADVICE
from pgofflined.core.domains import DomainIdentity, ShutdownReason
from pgofflined.core.frames import Domid
from pgofflined.core.saves import (
    Again,
    FileSeen,
    GoOn,
    LeftOver,
    SaveNote,
    SavePhase,
    Stand,
    Stays,
    Unclear,
    after_destroy,
    after_restore,
    after_save,
    before_destroy,
    held,
    left_over,
    seen_to_run,
    stand_of,
    under_way,
    when_unclear,
    without_note,
)
from tests.unit.relocation.doubles import guest

FILE = FileSeen(device=1, inode=2, size=3)
EMPTY = replace(FILE, size=0)
OTHER = replace(FILE, inode=9)
FILES = st.sampled_from([None, FILE, EMPTY, OTHER])


@given(succeeded=st.booleans(), stand=st.sampled_from(Stand), is_held=st.booleans(), file=FILES)
def test_a_save_goes_on_only_with_a_guest_that_is_held_and_its_whole_file(
    *, succeeded: bool, stand: Stand, is_held: bool, file: FileSeen | None
) -> None:
    verdict = after_save(succeeded=succeeded, stand=stand, is_held=is_held, made=EMPTY, file=file)
    if isinstance(verdict, GoOn):
        assert succeeded
        assert is_held
        assert file == FILE
    assert isinstance(verdict, Stays) is (stand is Stand.RUNS)


@given(stand=st.sampled_from(Stand), now=st.sampled_from([None, 5, 6]))
def test_a_guest_is_destroyed_only_where_it_has_not_run_since(
    stand: Stand, now: int | None
) -> None:
    verdict = before_destroy(stand=stand, then=5, now=now)
    assert isinstance(verdict, GoOn) is (now == 5)
    if isinstance(verdict, Stays):
        assert stand is Stand.RUNS
    if isinstance(verdict, Unclear):
        assert verdict.has_run is (now == 6)


@given(succeeded=st.booleans(), stand=st.sampled_from(Stand), file=FILES)
def test_a_restore_is_begun_only_for_a_guest_that_is_nowhere_but_in_its_file(
    *, succeeded: bool, stand: Stand, file: FileSeen | None
) -> None:
    verdict = after_destroy(succeeded=succeeded, stand=stand, saved=FILE, file=file)
    is_certain = succeeded and stand is Stand.ABSENT and file == FILE
    assert isinstance(verdict, GoOn) is is_certain


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
    saved = after_save(succeeded=True, stand=Stand.PAUSED, is_held=True, made=EMPTY, file=FILE)
    assert saved == GoOn()
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
    assert stand_of(uuid, [replace(here, paused=True)]) is Stand.PAUSED
    suspended = replace(here, shutdown=ShutdownReason.SUSPEND)
    assert stand_of(uuid, [suspended]) is Stand.STANDS_STILL
    assert stand_of(uuid, [replace(suspended, paused=True)]) is Stand.STANDS_STILL


def test_held_is_only_the_very_domain_that_is_paused_and_alone() -> None:
    paused = replace(guest(7), paused=True, cpu_time=5)
    assert held(paused.identity, [guest(1), paused]) == 5
    for others in (
        [],
        [replace(paused, paused=False)],
        [replace(paused, shutdown=ShutdownReason.SUSPEND)],
        [replace(paused, dying=True)],
        [paused, guest(8, uuid=7)],
        [replace(paused, domid=Domid(8))],
    ):
        assert held(paused.identity, others) is None


NOTE = SaveNote(
    domain=DomainIdentity(Domid(7), UUID(int=7)), phase=SavePhase.SAVING, file="/s/x", boot="b"
)
LEFT = LeftOver(note=NOTE, path="/n/7", log=None, has_file=True, same_boot=True)


def left_in(phase: SavePhase) -> LeftOver:
    return replace(LEFT, note=replace(NOTE, phase=phase))


@pytest.mark.parametrize("stand", Stand)
@pytest.mark.parametrize("phase", SavePhase)
def test_what_is_left_is_removed_the_file_before_its_note(stand: Stand, phase: SavePhase) -> None:
    told = left_over(left_in(phase), stand)
    assert "remove /s/x, then /n/7" in told
    gone = left_over(replace(left_in(phase), has_file=False), stand)
    assert "remove /n/7" in gone
    assert "remove /s/x" not in gone


@pytest.mark.parametrize("has_file", [True, False])
@pytest.mark.parametrize("stand", Stand)
@pytest.mark.parametrize("phase", SavePhase)
def test_a_restore_is_advised_only_where_it_rolls_nothing_back(
    phase: SavePhase, stand: Stand, *, has_file: bool
) -> None:
    told = left_over(replace(left_in(phase), has_file=has_file), stand)
    half_made = phase is SavePhase.RESTORING and stand in (Stand.PAUSED, Stand.STANDS_STILL)
    both = half_made or (phase is SavePhase.SAVED and stand is Stand.PAUSED)
    advised = has_file and phase is not SavePhase.RESTORED and (stand is Stand.ABSENT or both)
    assert ("`xl restore /s/x` lets it run" in told) is advised
    assert ("unless it has run since /s/x was written" in told) is advised
    assert ("`xl destroy`" in told) is (both and has_file)


@pytest.mark.parametrize(
    ("stand", "says"),
    [
        (Stand.ABSENT, "start it anew"),
        (Stand.RUNS, "do not restore /s/x"),
        (Stand.STANDS_STILL, "do not restore /s/x"),
        (Stand.SEVERAL, "destroy all but one"),
    ],
)
@pytest.mark.parametrize("phase", SavePhase)
def test_a_person_is_told_what_to_do_with_what_is_left(
    stand: Stand, says: str, phase: SavePhase
) -> None:
    assert says in left_over(left_in(phase), stand)
    later = left_over(replace(left_in(phase), same_boot=False), stand)
    may_restore = stand is Stand.ABSENT and phase is not SavePhase.RESTORED
    if phase is not SavePhase.RESTORING:
        assert ("the host was booted since" in later) is may_restore


@pytest.mark.parametrize(
    ("phase", "stand", "says"),
    [
        (SavePhase.SAVING, Stand.PAUSED, "it stands still: `xl unpause` lets it run; do not"),
        (
            *(SavePhase.SAVING, Stand.STANDS_STILL),
            "stands still: `xl resume` (Xen 4.20 or later), then `xl unpause`, lets it run; do",
        ),
        (
            *(SavePhase.SAVING, Stand.ABSENT),
            "`xl restore /s/x` lets it run, if the file is whole, unless it has run",
        ),
        (SavePhase.SAVED, Stand.ABSENT, "`xl restore /s/x` lets it run, unless it has run"),
        (SavePhase.RESTORING, Stand.ABSENT, "`xl restore /s/x` lets it run, unless it has run"),
    ],
)
def test_the_command_that_lets_a_guest_run_is_that_for_how_it_stands(
    phase: SavePhase, stand: Stand, says: str
) -> None:
    told = left_over(left_in(phase), stand)
    assert says in told
    assert told.startswith(f"a save of the guest that was d7 (uuid {UUID(int=7)}) was cut off")
    assert told.endswith("; until then the guest is left alone")
    assert "instead; then remove" in told or stand is not Stand.ABSENT
    assert "booted since" not in told


@pytest.mark.parametrize(
    ("phase", "begins"),
    [
        (
            SavePhase.SAVING,
            (
                "look at `xl list`; if it is suspended, `xl resume 7` (Xen 4.20 or later), and if "
                "it is paused, `xl unpause 7` lets it run; only if the guest is nowhere"
            ),
        ),
        (
            SavePhase.SAVED,
            "look at `xl list`; if it is still there and paused, either `xl destroy` it",
        ),
        (
            SavePhase.RESTORING,
            "look at `xl list`; only if the guest is nowhere, `xl restore /s/x` lets it run",
        ),
        (SavePhase.RESTORED, "look at `xl list`; the guest has run since /s/x was written"),
    ],
)
def test_a_person_looks_first_at_a_guest_that_cannot_be_seen(phase: SavePhase, begins: str) -> None:
    assert when_unclear(replace(NOTE, phase=phase), "/n/7").startswith(begins)


def test_a_file_that_is_gone_may_be_on_a_file_system_that_is_not_mounted() -> None:
    told = left_over(replace(LEFT, has_file=False), Stand.ABSENT)
    assert "mount it" in told


def test_what_xl_said_is_named_where_it_was_kept() -> None:
    assert "/n/7.log" in left_over(replace(LEFT, log="/n/7.log"), Stand.ABSENT)
    assert "last words" not in left_over(LEFT, Stand.ABSENT)


def test_a_guest_that_was_seen_to_run_is_not_rolled_back_when_it_has_ended() -> None:
    for phase in SavePhase:
        later = seen_to_run(replace(NOTE, phase=phase))
        assert "do not restore" in left_over(replace(LEFT, note=later), Stand.ABSENT)


@pytest.mark.parametrize("phase", SavePhase)
def test_advice_for_a_guest_that_cannot_be_seen_rolls_nothing_back(phase: SavePhase) -> None:
    told = when_unclear(replace(NOTE, phase=phase), "/n/7")
    assert "remove /s/x, then /n/7" in told
    is_done = phase is SavePhase.RESTORED
    assert ("do not restore /s/x" in told) is is_done
    assert ("unless it has run since /s/x was written" in told) is not is_done


def test_a_file_without_a_note_is_told_of_with_what_to_do() -> None:
    told = without_note("/s/x", NOTE.domain.uuid)
    assert str(NOTE.domain.uuid) in told
    assert "has run since" in told


@pytest.mark.parametrize("phase", SavePhase)
@pytest.mark.parametrize("stand", Stand)
def test_what_a_person_is_told_reaches_him_whole(phase: SavePhase, stand: Stand) -> None:
    note = replace(LEFT.note, phase=phase, file="/" + "x" * 120 + "/" + str(UUID(int=7)) + ".state")
    path = f"/var/lib/pgofflined/notes/{UUID(int=7)}"
    left = replace(LEFT, note=note, path=f"{path}.save", log=f"{path}.log", same_boot=False)
    assert len(left_over(left, stand)) <= MAX_ADVICE


def test_a_save_that_an_earlier_daemon_began_is_named_and_left_to_itself() -> None:
    identity = DomainIdentity(Domid(7), UUID(int=7))
    note = SaveNote(domain=identity, phase=SavePhase.SAVED, file="/saves/x", boot="b")
    unfinished = under_way(note)
    assert unfinished.domain == identity
    assert unfinished.is_under_way
    assert unfinished.text.startswith(f"the guest that was d7 (uuid {UUID(int=7)}) is being saved")
    assert unfinished.text.endswith("do nothing about it")
