from __future__ import annotations

import logging
import os
import shutil
import sqlite3
from collections.abc import Iterator
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
from pgofflined.ports import JobRecord, OpenJob

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
    job.keep(of or group())
    job.begin()
    return job


def left(folder: Path) -> Path:
    """What another process finds: this one, which lives, still holds its locks."""
    copy = folder.with_name("left")
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


def test_a_marker_that_cannot_be_made_or_removed_is_a_failure(folder: Path) -> None:
    job = JobStore(folder).open(RECORD)
    job.keep(group())
    [file] = folder.glob("*.job")
    marker = file.with_name(file.name + "-moving")
    marker.mkdir()
    with pytest.raises(PortError, match="could not be made"):
        job.begin()
    with pytest.raises(PortError, match="could not be removed"):
        job.settled()


def test_a_marker_without_a_record_is_removed(folder: Path) -> None:
    folder.mkdir()
    (folder / "d7-x.job-moving").write_bytes(b"")
    assert JobStore(folder).unfinished() == []
    assert list(folder.iterdir()) == []


def test_a_marker_whose_record_lacks_a_page_is_told_and_put_aside(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    begun(folder)
    found = left(folder)
    [file] = found.glob("*.job")
    with sqlite3.connect(file) as connection:
        connection.execute("DELETE FROM page WHERE mfn = ?", (0x101,))
    connection.close()
    with caplog.at_level(logging.CRITICAL):
        assert JobStore(found).unfinished() == []
    assert "mfn 0x101 are missing" in caplog.text
    assert sorted(file.suffix for file in found.iterdir()) == [".damaged", ".damaged-moving"]


def test_a_job_that_is_put_aside_takes_its_marker_along(folder: Path) -> None:
    begun(folder).set_aside()
    assert JobStore(folder).unfinished() == []
    assert [file.name for file in folder.glob("*.job*")] == []
    assert len(list(folder.glob("*.damaged-moving"))) == 1


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
        JobStore(tmp_path, refusal="it may be swapped").open(RECORD)


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
        connection.execute("PRAGMA user_version = 2")
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


def test_arrays_that_do_not_belong_together_are_not_believed(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    begun(folder)
    found = left(folder)
    [file] = found.glob("*.job")
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE moving SET pfns = ?", (bytes(8),))
    connection.close()
    with caplog.at_level(logging.CRITICAL):
        assert JobStore(found).unfinished() == []
    assert "do not belong together" in caplog.text
