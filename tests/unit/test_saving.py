"""Notes of saves, and the directories that guests may be saved into."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pytest

from pgofflined.core.domains import DomainIdentity, DomainInfo
from pgofflined.core.errors import PortError
from pgofflined.core.frames import Domid
from pgofflined.core.saves import SaveNote, SavePhase, UnfinishedSave
from pgofflined.saving import (
    Saves,
    directory_trouble,
    last_words,
    log_path,
    note_path,
    only_one,
    open_log,
    unfinished_save,
    write_note,
)

from .relocation.doubles import guest

NO_MOUNTS = Path(os.devnull)
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
    told = Saves("this", notes=tmp_path).left_over(lambda: [guest(0)])
    assert len(told) == 2
    assert "/saves/7 is not there" in told[0].text
    assert "garbage.save" in told[1].text


@pytest.fixture
def note(tmp_path: Path) -> SaveNote:
    """A note in ``tmp_path`` whose file is there."""
    (tmp_path / "saves").mkdir(mode=0o700)
    file = tmp_path / "saves" / f"{GUEST.uuid}.state"
    file.write_bytes(b"memory")
    note = replace(NOTE, file=str(file))
    write_note(note, tmp_path, new=True)
    return note


def test_what_may_have_changed_since_another_boot_is_told(tmp_path: Path, note: SaveNote) -> None:
    [same] = Saves(note.boot, notes=tmp_path).left_over(list)
    [other] = Saves("other", notes=tmp_path).left_over(list)
    assert "booted since" not in same.text
    assert "booted since" in other.text


def test_a_guest_that_was_seen_to_run_is_never_to_be_restored(
    tmp_path: Path, note: SaveNote
) -> None:
    saves = Saves(note.boot, notes=tmp_path)
    assert f"`xl restore {note.file}`" in saves.left_over(list)[0].text
    assert "remove" in saves.left_over(lambda: [guest(8, uuid=7)])[0].text
    [told] = Saves(note.boot, notes=tmp_path).left_over(list)
    assert "do not restore" in told.text
    assert "start it anew" in told.text


def test_a_guest_that_runs_while_it_is_saved_has_not_run_since(
    tmp_path: Path, note: SaveNote
) -> None:
    saves = Saves(note.boot, notes=tmp_path)
    with only_one(tmp_path, GUEST.uuid):
        assert "is being saved" in saves.left_over(lambda: [guest(7)])[0].text
    assert f"`xl restore {note.file}`" in saves.left_over(list)[0].text


def test_two_who_look_at_a_save_that_was_cut_off_do_not_take_each_other_for_it(
    tmp_path: Path, note: SaveNote
) -> None:
    with only_one(tmp_path, GUEST.uuid):
        pass
    inner: list[UnfinishedSave] = []

    def look() -> list[DomainInfo]:
        inner.extend(Saves(note.boot, notes=tmp_path).left_over(list))
        return []

    outer = Saves(note.boot, notes=tmp_path).left_over(look)
    assert len(inner) == 1
    assert all("was cut off" in save.text for save in (*inner, *outer))


def test_while_one_guest_is_saved_another_ones_note_is_told_of(
    tmp_path: Path, note: SaveNote
) -> None:
    with only_one(tmp_path, UUID(int=8)):
        [told] = Saves(note.boot, notes=tmp_path).left_over(list)
    assert f"`xl restore {note.file}`" in told.text


def test_a_file_without_a_note_is_told_of(tmp_path: Path, note: SaveNote) -> None:
    directory = Path(note.file).parent
    (directory / "other.state").touch()
    saves = Saves(notes=tmp_path)
    assert saves.without_note(directory) == ()
    note_path(GUEST.uuid, tmp_path).unlink()
    [told] = saves.without_note(directory)
    assert note.file in told
    assert saves.without_note(tmp_path / "nowhere") == ()


@pytest.mark.parametrize("kind", ["tmpfs", "ramfs"])
def test_a_directory_in_memory_is_none_to_save_into(tmp_path: Path, kind: str) -> None:
    device = tmp_path.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    (tmp_path / "mounts").write_text(
        f"21 1 0:999 / /elsewhere rw - ext4 /dev/sda rw\n"
        f"22 1 {number} / /x rw,nosuid shared:2 - {kind} none rw\n"
    )
    directory = tmp_path / "saves"
    directory.mkdir(mode=0o700)
    assert kind in str(directory_trouble(directory, tmp_path / "mounts"))


@pytest.fixture
def saves(tmp_path: Path) -> Saves:
    """One to whom xl's configuration of the guest is known."""
    tmp_path.chmod(0o700)
    (tmp_path / f"userdata-d.7.{GUEST.uuid}.libxl-json").touch()
    return Saves(notes=tmp_path, configs=tmp_path, libvirt=tmp_path / "libvirt", mounts=NO_MOUNTS)


def test_a_guest_that_xl_has_created_is_managed_by_nobody(tmp_path: Path, saves: Saves) -> None:
    facts = saves.facts(GUEST, tmp_path, None)
    assert facts.has_config
    assert facts.manager is None


def test_a_guest_that_libvirt_has_created_is_managed_by_it(tmp_path: Path, saves: Saves) -> None:
    (tmp_path / f"userdata-d.7.{GUEST.uuid}.libvirt-xml").touch()
    assert saves.facts(GUEST, tmp_path, None).manager == "libvirt"


def test_a_guest_that_libvirt_knows_is_managed_by_it_whatever_its_name(
    tmp_path: Path, saves: Saves
) -> None:
    (tmp_path / "libvirt").mkdir()
    (tmp_path / "libvirt" / "..xml").write_text(f"<uuid>{UUID(int=8)}</uuid>")
    assert saves.facts(GUEST, tmp_path, None).manager is None
    (tmp_path / "libvirt" / "-.xml").write_text(f"<domstatus><uuid>{GUEST.uuid}</uuid>")
    assert saves.facts(GUEST, tmp_path, None).manager == "libvirt"


def test_a_reserve_stays_free(tmp_path: Path, saves: Saves) -> None:
    space = os.statvfs(tmp_path)
    free, whole = space.f_bavail * space.f_frsize, space.f_blocks * space.f_frsize
    reserve = min(1 << 30, whole // 20)
    # Others write to it as well.
    assert abs(saves.facts(GUEST, tmp_path, None).free - max(0, free - reserve)) < reserve / 2


def test_what_cannot_be_looked_at_is_an_error_of_the_host(tmp_path: Path) -> None:
    too_long = tmp_path / ("x" * 300)
    with pytest.raises(PortError, match="d7"):
        Saves(notes=tmp_path, configs=too_long, mounts=NO_MOUNTS).facts(GUEST, tmp_path, None)


@pytest.mark.parametrize("said", [b"", b"one\n", b"x" * 100_000 + b"\nfirst\r\nnext\x1b[2J\n\nend"])
def test_the_last_words_of_a_log_are_few_and_on_one_line(tmp_path: Path, said: bytes) -> None:
    log = open_log(GUEST.uuid, tmp_path)
    os.write(log, said)
    told = last_words(log)
    os.close(log)
    assert told.isprintable()
    assert len(told) < 10_000
    assert told.endswith({b"": "nothing", b"one\n": "one"}.get(said, "end"))
    assert log_path(GUEST.uuid, tmp_path).stat().st_mode & 0o777 == 0o600


def test_a_directory_has_to_be_there_and_closed_to_others(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    assert directory_trouble(tmp_path, NO_MOUNTS) is None
    for mode in (0o750, 0o705, 0o720):
        tmp_path.chmod(mode)
        assert "chmod 700" in str(directory_trouble(tmp_path))
    tmp_path.chmod(0o700)
    assert "cannot be used" in str(directory_trouble(tmp_path / "nowhere"))
    (tmp_path / "file").touch()
    assert "no directory" in str(directory_trouble(tmp_path / "file"))
    (tmp_path / "link").symlink_to(tmp_path)
    assert "no directory" in str(directory_trouble(tmp_path / "link"))


def test_a_save_that_goes_on_is_not_taken_for_one_that_was_cut_off(
    tmp_path: Path, note: SaveNote
) -> None:
    saves = Saves(note.boot, notes=tmp_path)
    with only_one(tmp_path, GUEST.uuid) as lock:
        assert lock is not None
        [told] = saves.left_over(list)
        assert "is being saved" in told.text
        assert "xl restore" not in told.text
        with only_one(tmp_path) as another:
            assert another is None
    [told] = saves.left_over(list)
    assert "xl restore" in told.text
