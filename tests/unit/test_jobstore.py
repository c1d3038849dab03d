from __future__ import annotations

import logging
import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import numpy as np
import pytest

from pgofflined.core.domains import DomainIdentity
from pgofflined.core.errors import PortError
from pgofflined.core.frames import Domid, Mfn
from pgofflined.core.moves import Group, References, frames_of
from pgofflined.core.pages import PageKind
from pgofflined.jobstore import JobStore
from pgofflined.ports import Hold, JobRecord, OpenJob
from tests.crash.killing import LEFT_BY_THE_DEAD

RECORD = JobRecord(
    domain=DomainIdentity(Domid(7), UUID(int=5)), shared_info=Mfn(0xAB), cpu_time=9, began=1.5
)
SECRET = b"a secret of the guest"


def group(mfn: int = 0x100) -> Group:
    contents = np.zeros((2, 512), dtype=np.uint64)
    contents[0, :3] = np.frombuffer(SECRET.ljust(24), dtype=np.uint64)
    contents[1, 511] = 2**64 - 1
    return Group(
        kind=PageKind.L2,
        pinned=True,
        mfns=frames_of([mfn, mfn + 1]),
        pfns=frames_of([1, 2]),
        slot_frames=frames_of([3, 4]),
        slot_indexes=frames_of([5, 511]),
        references=References(
            pages=np.array([0, 1, 1], dtype=np.intp),
            levels=np.array([1, 2, 4], dtype=np.uint8),
            tables=frames_of([6, 7, 8]),
            indexes=frames_of([9, 10, 11]),
            values=frames_of([12, 13, 2**63]),
        ),
        contents=contents,
        props=frames_of([20, 21]),
    )


def equal(one: Group, other: Group) -> bool:
    def parts(of: Group) -> list[object]:
        r = of.references
        arrays = (of.mfns, of.pfns, of.slot_frames, of.slot_indexes, of.contents, of.props)
        entries = (r.pages, r.levels, r.tables, r.indexes, r.values)
        return [of.kind, of.pinned, *(a.tolist() for a in arrays + entries)]

    return parts(one) == parts(other)


def begun(folder: Path, of: Group | None = None) -> OpenJob:
    """A job that may have changed its group."""
    job = JobStore(folder).open(RECORD)
    LEFT_BY_THE_DEAD.append(job)
    job.keep(of or group())
    job.begin()
    return job


def left(folder: Path, name: str = "left") -> Path:
    """What another process finds: this one, which lives, still holds its locks."""
    copy = folder.with_name(name)
    shutil.copytree(folder, copy)
    return copy


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "jobs"


def test_a_group_comes_back_as_it_was(folder: Path) -> None:
    begun(folder)
    [found] = JobStore(left(folder)).unfinished()
    assert found.record == RECORD
    assert found.group is not None
    assert equal(found.group, group())


def test_the_last_group_replaces_those_before(folder: Path) -> None:
    job = JobStore(folder).open(RECORD)
    for mfn in (0x100, 0x200, 0x300):
        job.keep(group(mfn))
        job.begin()
    [found] = JobStore(left(folder)).unfinished()
    assert found.group is not None
    assert equal(found.group, group(0x300))


def test_what_is_settled_is_forgotten_and_the_job_is_not(folder: Path) -> None:
    job = begun(folder)
    job.settled()
    [found] = JobStore(left(folder)).unfinished()
    assert found.group is None
    assert found.record == RECORD


def test_what_is_kept_does_not_count_before_the_change_begins(folder: Path) -> None:
    job = JobStore(folder).open(RECORD)
    job.keep(group())
    [found] = JobStore(left(folder)).unfinished()
    assert found.group is None
    assert found.record == RECORD


def test_a_group_that_is_kept_after_another_does_not_count_before_its_own_change(
    folder: Path,
) -> None:
    job = begun(folder)
    job.settled()
    job.keep(group(0x200))
    [found] = JobStore(left(folder)).unfinished()
    assert found.group is None


def test_a_job_may_begin_and_settle_again(folder: Path) -> None:
    job = begun(folder)
    job.settled()
    # Another process that has ended it says the same once more.
    job.settled()
    job.keep(group(0x200))
    job.begin()
    job.begin()
    [found] = JobStore(left(folder)).unfinished()
    assert found.group is not None
    assert equal(found.group, group(0x200))


def changes() -> Iterator[tuple[str, Group]]:
    """The group, each time with something else about it."""
    of = group()
    references = of.references
    words = of.contents.copy()
    words[1, 7] = 5
    yield "nothing", group()
    yield "one page", replace(of, contents=words)
    yield (
        "an entry's value",
        replace(of, references=replace(references, values=frames_of([12, 13, 14]))),
    )
    yield "an entry less", replace(of, references=references.chosen(np.array([0, 2])))
    yield "the props", replace(of, props=frames_of([20]))
    yield "no props", replace(of, props=frames_of([]))
    yield "the pin", replace(of, pinned=False)
    yield "the kind", replace(of, kind=PageKind.L3)
    yield "only the first page", of.only(np.array([True, False]))
    yield "only the second page", replace(of, contents=words).only(np.array([False, True]))
    yield "the order", replace(of, mfns=of.mfns[::-1].copy(), contents=of.contents[::-1].copy())


CHANGES = [pytest.param(changed, id=what) for what, changed in changes()]


@pytest.mark.parametrize("changed", CHANGES)
def test_what_differs_when_it_is_kept_again_is_what_comes_back(
    folder: Path, changed: Group
) -> None:
    job = JobStore(folder).open(RECORD)
    job.keep(group())
    job.keep(changed)
    job.begin()
    [found] = JobStore(left(folder)).unfinished()
    assert found.group is not None
    assert equal(found.group, changed)


def test_what_was_kept_of_a_page_before_is_not_taken_for_what_it_holds_when_it_comes_back(
    folder: Path,
) -> None:
    # A frame that was exchanged unmarked is free, and may come back with other contents.
    job = begun(folder, group(0x100))
    job.settled()
    job.keep(group(0x200))
    again = replace(group(0x100), contents=group().contents ^ np.uint64(3))
    job.keep(again)
    job.begin()
    [found] = JobStore(left(folder)).unfinished()
    assert found.group is not None
    assert equal(found.group, again)


def test_nothing_is_written_for_what_has_not_changed(folder: Path) -> None:
    job = JobStore(folder).open(RECORD)
    job.keep(group())
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    job.keep(group())
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_stage_that_cannot_be_written_is_a_failure(folder: Path) -> None:
    job = JobStore(folder).open(RECORD)
    job.keep(group())
    [stage] = folder.glob("*-stage")
    [number] = [each for each in os.listdir("/proc/self/fd") if _leads_to(each, stage)]
    read_only = os.open(stage, os.O_RDONLY)
    os.dup2(read_only, int(number))
    os.close(read_only)
    with pytest.raises(PortError, match="-stage could not be written"):
        job.hold(1)
    with pytest.raises(PortError, match="-stage could not be written"):
        job.begin()
    with pytest.raises(PortError, match="-stage could not be written"):
        job.settled()


def _leads_to(descriptor: str, file: Path) -> bool:
    with suppress(OSError):
        return os.readlink(f"/proc/self/fd/{descriptor}") == str(file)
    return False


@pytest.mark.parametrize("cpu_time", [None, 0, 5, 2**64 - 1])
def test_what_a_guest_had_used_when_it_stood_still_comes_back(
    folder: Path, cpu_time: int | None
) -> None:
    job = JobStore(folder).open(RECORD)
    assert JobStore(left(folder)).unfinished()[0].hold is None
    job.hold(None)
    job.hold(cpu_time)
    [found] = JobStore(left(folder, "held")).unfinished()
    assert found.hold == Hold(cpu_time=cpu_time)
    assert found.group is None


def test_it_is_the_same_while_pages_are_moved_and_for_the_process_that_ends_that(
    folder: Path,
) -> None:
    job = JobStore(folder).open(RECORD)
    job.hold(77)
    job.keep(group())
    job.begin()
    copy = left(folder)
    [found] = JobStore(copy).unfinished()
    assert found.hold == Hold(cpu_time=77)
    assert found.group is not None
    found.job.settled()
    [again] = JobStore(left(copy, "settled")).unfinished()
    assert again.hold == Hold(cpu_time=77)
    assert again.group is None


@pytest.mark.parametrize("stage", [b"M", b"X" + b"0" * 16, b"M" + b"g" * 16, b"M" + b"0" * 17])
def test_a_stage_that_says_nothing_sensible_is_taken_for_a_change_under_way(
    folder: Path, stage: bytes
) -> None:
    begun(folder)
    copy = left(folder)
    [file] = copy.glob("*-stage")
    file.write_bytes(stage)
    [found] = JobStore(copy).unfinished()
    assert (found.record, found.hold, found.group) == (RECORD, None, None)
    assert "cannot be read" in str(found.unreadable)


def test_an_unknown_kind_does_not_keep_other_jobs_from_being_found(folder: Path) -> None:
    begun(folder)
    copy = left(folder)
    [file] = copy.glob("*.job")
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE moving SET kind = 'L9'")
    connection.close()
    other = replace(RECORD, domain=DomainIdentity(Domid(8), UUID(int=6)))
    _open = JobStore(folder.with_name("other")).open(other)
    for source in folder.with_name("other").iterdir():
        shutil.copy(source, copy)
    one, two = JobStore(copy).unfinished()
    assert "L9" in str(one.unreadable)
    assert (two.record, two.unreadable) == (other, None)


def test_a_job_that_is_left_keeps_nothing_that_the_guests_pages_held(folder: Path) -> None:
    store = JobStore(folder)
    job = store.open(RECORD)
    job.hold(5)
    job.keep(group())
    files = list(folder.iterdir())
    assert any(SECRET in file.read_bytes() for file in files)
    job.leave()
    assert not any(SECRET in file.read_bytes() for file in folder.iterdir())
    [found] = JobStore(left(folder)).unfinished()
    assert (found.record, found.hold, found.group) == (RECORD, Hold(cpu_time=5), None)


def test_a_job_that_was_left_is_removed_when_its_guest_needs_it_no_more(folder: Path) -> None:
    store = JobStore(folder)
    store.open(RECORD).leave()
    store.done_with(DomainIdentity(Domid(8), UUID(int=5)))
    assert list(folder.glob("*.job"))
    store.done_with(RECORD.domain)
    assert list(folder.iterdir()) == []
    store.done_with(RECORD.domain)


def test_a_job_that_is_left_damaged_keeps_all_and_is_put_aside_in_the_end(folder: Path) -> None:
    store = JobStore(folder)
    job = store.open(RECORD)
    job.hold(5)
    job.keep(group())
    job.begin()
    job.leave(damaged=True)
    [found] = JobStore(left(folder)).unfinished()
    assert found.group is not None
    store.done_with(RECORD.domain)
    assert list(folder.glob("*.job")) == []
    assert len(list(folder.glob("*.damaged"))) == 1


def test_a_job_of_another_process_can_be_left_as_well(folder: Path) -> None:
    JobStore(folder).open(RECORD).hold(5)
    copy = left(folder)
    store = JobStore(copy)
    [found] = store.unfinished()
    found.job.leave()
    store.done_with(RECORD.domain)
    assert list(copy.iterdir()) == []


def test_a_job_under_way_is_not_removed_for_one_that_was_left_before_it(folder: Path) -> None:
    store = JobStore(folder)
    store.open(RECORD).leave()
    job = store.open(RECORD)
    job.keep(group())
    store.done_with(RECORD.domain)
    job.begin()
    [found] = JobStore(left(folder)).unfinished()
    assert found.group is not None


def test_a_stage_without_a_record_is_removed(folder: Path) -> None:
    folder.mkdir()
    (folder / "d7-x.job-stage").write_bytes(b"")
    assert JobStore(folder).unfinished() == []
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("name", ["d9-x.job-stage", "d0-x.job"])
def test_what_cannot_be_removed_keeps_no_guest_from_being_found(
    folder: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    JobStore(folder).open(RECORD).hold(5)
    copy = left(folder)
    # As a read-only mount would, and this for root, too.
    (copy / name).mkdir()
    if name.endswith("job"):
        (copy / f"{name}-wal").mkdir()
    [found] = JobStore(copy).unfinished()
    assert found.record == RECORD
    assert name in caplog.text


def test_a_change_under_way_whose_record_lacks_a_page_cannot_be_read(folder: Path) -> None:
    begun(folder)
    found = left(folder)
    [file] = found.glob("*.job")
    with sqlite3.connect(file) as connection:
        connection.execute("DELETE FROM page WHERE mfn = ?", (0x101,))
    connection.close()
    [job] = JobStore(found).unfinished()
    assert "mfn 0x101 are missing" in str(job.unreadable)
    job.job.set_aside()
    assert sorted(file.suffix for file in found.iterdir()) == [".damaged", ".damaged-stage"]


def test_a_job_that_is_put_aside_takes_its_stage_along(folder: Path) -> None:
    begun(folder).set_aside()
    assert JobStore(folder).unfinished() == []
    assert [file.name for file in folder.glob("*.job*")] == []
    assert len(list(folder.glob("*.damaged-stage"))) == 1


def test_a_closed_job_leaves_no_file(folder: Path) -> None:
    job = begun(folder)
    job.close()
    assert list(folder.iterdir()) == []
    assert JobStore(folder).unfinished() == []


def test_what_was_kept_is_overwritten_before_it_is_removed(folder: Path) -> None:
    job = begun(folder)
    files = list(folder.iterdir())
    assert any(SECRET in file.read_bytes() for file in files)
    links = []
    for file in files:
        links.append(folder.with_name(file.name))
        os.link(file, links[-1])
    job.close()
    assert [link for link in links if any(link.read_bytes())] == []


def test_files_and_folder_are_for_their_owner_alone(folder: Path) -> None:
    begun(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o600}


def test_a_job_takes_the_place_of_an_earlier_one_of_its_domain(folder: Path) -> None:
    begun(folder, group(0x100))
    begun(folder, group(0x200))
    [found] = JobStore(left(folder)).unfinished()
    assert found.group is not None
    assert equal(found.group, group(0x200))


def test_a_job_that_cannot_be_kept_is_not_begun(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(PortError, match="d7 cannot be kept"):
        JobStore(blocked / "jobs").open(RECORD)
    with pytest.raises(PortError, match="swap"):
        JobStore(tmp_path, refusal=lambda: "it may be swapped").open(RECORD)


def test_a_process_that_died_before_its_first_record_has_left_nothing(folder: Path) -> None:
    folder.mkdir()
    (folder / "d7-x.job").write_bytes(b"")
    assert JobStore(folder).unfinished() == []
    assert list(folder.iterdir()) == []


def test_a_damaged_record_is_told_and_put_aside(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder.mkdir()
    (folder / "d7-x.job").write_bytes(b"garbage" * 1000)
    with caplog.at_level(logging.CRITICAL):
        assert JobStore(folder).unfinished() == []
    assert "d7-x.job cannot be read" in caplog.text
    assert [file.name for file in folder.iterdir()] == ["d7-x.damaged"]


def test_a_record_without_its_tables_is_told_and_put_aside(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder.mkdir()
    with sqlite3.connect(folder / "d7-x.job") as connection:
        connection.execute("PRAGMA user_version = 3")
    connection.close()
    with caplog.at_level(logging.CRITICAL):
        assert JobStore(folder).unfinished() == []
    assert "d7-x.job cannot be read" in caplog.text
    assert "d7-x.damaged" in [file.name for file in folder.iterdir()]


def test_a_record_that_another_process_has_open_is_left_to_it(folder: Path) -> None:
    _open = begun(folder)
    before = sorted(file.name for file in folder.iterdir())
    assert JobStore(folder).unfinished() == []
    assert sorted(file.name for file in folder.iterdir()) == before


def test_arrays_that_do_not_belong_together_are_not_believed(folder: Path) -> None:
    begun(folder)
    found = left(folder)
    [file] = found.glob("*.job")
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE moving SET pfns = ?", (bytes(8),))
    connection.close()
    [job] = JobStore(found).unfinished()
    assert "do not belong together" in str(job.unreadable)


def of_another_format(folder: Path, version: int = 9) -> Path:
    """What a later release leaves, of which no more is known than was promised."""
    found = left(folder, "later")
    [file] = found.glob("*.job")
    with sqlite3.connect(file) as connection:
        connection.executescript(
            "DROP TABLE moving; DROP TABLE page; ALTER TABLE job ADD COLUMN reason TEXT;"
            "UPDATE writer SET version = '7.1'"
        )
        connection.execute(f"PRAGMA user_version = {version}")
    connection.close()
    return found


@pytest.mark.parametrize("stage", ["asked", "held", "settled"])
@pytest.mark.parametrize("version", [1, 2, 4, 9])
def test_a_record_of_another_format_whose_guest_is_whole_is_read(
    folder: Path, stage: str, version: int
) -> None:
    job = JobStore(folder).open(RECORD)
    if stage != "asked":
        job.hold(77)
    if stage == "settled":
        job.keep(group())
        job.begin()
        job.settled()
    found = of_another_format(folder, version)
    store = JobStore(found)
    [read] = store.unfinished()
    assert (read.record, read.group, read.unreadable) == (RECORD, None, None)
    assert read.hold == (None if stage == "asked" else Hold(cpu_time=77))
    read.job.leave()
    assert len(list(found.glob("*.job"))) == 1
    store.done_with(RECORD.domain)
    assert list(found.iterdir()) == []


def test_a_record_of_another_format_in_the_middle_of_a_change_says_who_wrote_it(
    folder: Path,
) -> None:
    job = JobStore(folder).open(RECORD)
    job.hold(77)
    job.keep(group())
    job.begin()
    found = of_another_format(folder)
    before = sorted(file.name for file in found.iterdir())
    [read] = JobStore(found).unfinished()
    assert (read.record, read.hold, read.group) == (RECORD, Hold(cpu_time=77), None)
    for word in ("format 9", "pgofflined 7.1", "reads format 3"):
        assert word in str(read.unreadable)
    assert sorted(file.name for file in found.iterdir()) == before, "its writer can read it"
    with pytest.raises(PortError, match="cannot be read"):
        read.job.settled()


@pytest.mark.parametrize("stage", [b"", b"H" + b"%016x" % 77, b"M" + b"%016x" % 77])
def test_of_a_damaged_record_the_name_and_the_stage_are_used(folder: Path, stage: bytes) -> None:
    folder.mkdir()
    name = f"d{RECORD.domain.domid}-{RECORD.domain.uuid}.job"
    (folder / name).write_bytes(b"garbage" * 1000)
    (folder / f"{name}-stage").write_bytes(stage)
    [read] = JobStore(folder).unfinished()
    assert read.record.domain == RECORD.domain
    assert read.record.shared_info is None
    assert read.hold == (Hold(cpu_time=77) if stage else None)
    assert (read.unreadable is None) is (stage[:1] != b"M")


def test_an_empty_record_of_a_guest_that_is_held_is_none_of_a_process_that_died_early(
    folder: Path,
) -> None:
    folder.mkdir()
    name = f"d{RECORD.domain.domid}-{RECORD.domain.uuid}.job"
    (folder / name).write_bytes(b"")
    (folder / f"{name}-stage").write_bytes(b"H" + b"%016x" % 77)
    [read] = JobStore(folder).unfinished()
    assert (read.record.domain, read.hold) == (RECORD.domain, Hold(cpu_time=77))


def test_a_record_of_the_release_before_is_read_whole(folder: Path) -> None:
    # Format 3 as it was first written, without the table that names its writer.
    begun(folder)
    found = left(folder)
    [file] = found.glob("*.job")
    with sqlite3.connect(file) as connection:
        connection.executescript("DROP TABLE writer; PRAGMA user_version = 3")
    connection.close()
    [read] = JobStore(found).unfinished()
    assert read.group is not None
    assert equal(read.group, group())
