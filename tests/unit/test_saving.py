"""Notes of saves, and the directories that guests may be saved into."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

import pytest

from pgofflined.core.domains import DomainIdentity
from pgofflined.core.errors import PortError
from pgofflined.core.frames import Domid
from pgofflined.core.saves import SaveNote, SavePhase
from pgofflined.saving import (
    Saves,
    directory_trouble,
    note_path,
    only_one,
    unfinished_save,
    write_note,
)

from .relocation.doubles import guest

GUEST = DomainIdentity(Domid(7), UUID(int=7))
NOTE = SaveNote(domain=GUEST, phase=SavePhase.SAVING, file="/saves/7", boot="this")


def test_a_note_is_there_until_it_is_removed(tmp_path: Path) -> None:
    assert unfinished_save(GUEST.uuid, tmp_path) is None
    path = write_note(NOTE, tmp_path, new=True)
    assert unfinished_save(GUEST.uuid, tmp_path) == str(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]
    path.unlink()
    assert unfinished_save(GUEST.uuid, tmp_path) is None


def test_a_note_is_not_written_over_an_earlier_one(tmp_path: Path) -> None:
    path = write_note(NOTE, tmp_path, new=True)
    before = path.read_bytes()
    with pytest.raises(FileExistsError):
        write_note(NOTE, tmp_path, new=True)
    assert path.read_bytes() == before


def test_a_guest_has_a_note_also_where_that_is_a_dangling_link(tmp_path: Path) -> None:
    note_path(GUEST.uuid, tmp_path).symlink_to("/nowhere")
    assert unfinished_save(GUEST.uuid, tmp_path) is not None


def test_notes_that_cannot_be_looked_for_are_an_error_and_not_none(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    with pytest.raises(PortError):
        unfinished_save(GUEST.uuid, blocked)


def test_every_note_is_told_of_at_a_start_also_one_that_cannot_be_read(tmp_path: Path) -> None:
    write_note(NOTE, tmp_path, new=True)
    (tmp_path / "garbage.save").write_bytes(b"\xff{")
    told = Saves("this", notes=tmp_path).left_over([guest(0)])
    assert len(told) == 2
    assert "xl restore /saves/7" in told[0]
    assert "garbage.save" in told[1]


def test_what_may_have_changed_since_another_boot_is_told(tmp_path: Path) -> None:
    write_note(NOTE, tmp_path, new=True)
    [same] = Saves("this", notes=tmp_path).left_over([])
    [other] = Saves("other", notes=tmp_path).left_over([])
    assert "run elsewhere" not in same
    assert "run elsewhere" in other


def test_a_directory_has_to_be_there_and_closed_to_others(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    assert directory_trouble(tmp_path) is None
    for mode in (0o750, 0o705, 0o720):
        tmp_path.chmod(mode)
        assert "chmod 700" in str(directory_trouble(tmp_path))
    tmp_path.chmod(0o700)
    assert "cannot be used" in str(directory_trouble(tmp_path / "nowhere"))
    (tmp_path / "file").touch()
    assert "no directory" in str(directory_trouble(tmp_path / "file"))
    (tmp_path / "link").symlink_to(tmp_path)
    assert "no directory" in str(directory_trouble(tmp_path / "link"))


def test_a_save_that_goes_on_is_not_taken_for_one_that_was_cut_off(tmp_path: Path) -> None:
    write_note(NOTE, tmp_path, new=True)
    saves = Saves("this", notes=tmp_path)
    with only_one(tmp_path) as alone:
        assert alone
        [told] = saves.left_over([])
        assert "is being saved" in told
        assert "xl restore" not in told
        with only_one(tmp_path) as another:
            assert not another
    [told] = saves.left_over([])
    assert "xl restore" in told
