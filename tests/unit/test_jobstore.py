from __future__ import annotations

import logging
import os
import shutil
import sqlite3
from pathlib import Path
from uuid import UUID

import numpy as np
import pytest

from pgofflined.core.domains import DomainIdentity
from pgofflined.core.errors import PortError
from pgofflined.core.frames import Domid, Mfn
from pgofflined.core.moves import Group, References, frames_of
from pgofflined.core.pages import PageKind
from pgofflined.jobstore import JobStore, may_reach_a_disk
from pgofflined.ports import JobRecord

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


def left(folder: Path) -> Path:
    """What another process finds: this one, which lives, still holds its locks."""
    copy = folder.with_name("left")
    shutil.copytree(folder, copy)
    return copy


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "jobs"


def test_a_group_comes_back_as_it_was(folder: Path) -> None:
    JobStore(folder).open(RECORD).intend(group())
    [found] = JobStore(left(folder)).unfinished()
    assert found.record == RECORD
    assert found.group is not None
    assert equal(found.group, group())


def test_the_last_group_replaces_those_before(folder: Path) -> None:
    job = JobStore(folder).open(RECORD)
    for mfn in (0x100, 0x200, 0x300):
        job.intend(group(mfn))
    [found] = JobStore(left(folder)).unfinished()
    assert found.group is not None
    assert equal(found.group, group(0x300))


def test_what_is_settled_is_forgotten_and_the_job_is_not(folder: Path) -> None:
    job = JobStore(folder).open(RECORD)
    job.intend(group())
    job.settled()
    [found] = JobStore(left(folder)).unfinished()
    assert found.group is None
    assert found.record == RECORD


def test_a_closed_job_leaves_no_file(folder: Path) -> None:
    job = JobStore(folder).open(RECORD)
    job.intend(group())
    job.close()
    assert list(folder.iterdir()) == []
    assert JobStore(folder).unfinished() == []


def test_what_was_kept_is_overwritten_before_it_is_removed(folder: Path) -> None:
    job = JobStore(folder).open(RECORD)
    job.intend(group())
    files = list(folder.iterdir())
    assert any(SECRET in file.read_bytes() for file in files)
    links = []
    for file in files:
        links.append(folder.with_name(file.name))
        os.link(file, links[-1])
    job.close()
    assert [link for link in links if any(link.read_bytes())] == []


def test_files_and_folder_are_for_their_owner_alone(folder: Path) -> None:
    JobStore(folder).open(RECORD).intend(group())
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o600}


def test_a_job_takes_the_place_of_an_earlier_one_of_its_domain(folder: Path) -> None:
    store = JobStore(folder)
    store.open(RECORD).intend(group(0x100))
    store.open(RECORD).intend(group(0x200))
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
        connection.execute("PRAGMA user_version = 1")
    connection.close()
    with caplog.at_level(logging.CRITICAL):
        assert JobStore(folder).unfinished() == []
    assert "d7-x.job cannot be read" in caplog.text
    assert "d7-x.damaged" in [file.name for file in folder.iterdir()]


def test_a_record_that_another_process_has_open_is_left_to_it(folder: Path) -> None:
    job = JobStore(folder).open(RECORD)
    job.intend(group())
    before = sorted(file.name for file in folder.iterdir())
    assert JobStore(folder).unfinished() == []
    assert sorted(file.name for file in folder.iterdir()) == before


def test_arrays_that_do_not_belong_together_are_not_believed(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    JobStore(folder).open(RECORD).intend(group())
    found = left(folder)
    [file] = found.glob("*.job")
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE moving SET pfns = ?", (bytes(8),))
    connection.close()
    with caplog.at_level(logging.CRITICAL):
        assert JobStore(found).unfinished() == []
    assert "do not belong together" in caplog.text


MOUNTS = """\
22 1 0:20 / / rw - ext4 /dev/root rw
23 22 0:21 / /run rw,nosuid shared:5 - tmpfs tmpfs rw,size=100k,mode=755
24 23 0:22 / /run/jobs rw - ramfs ramfs rw
25 23 0:23 / /run/kept rw - tmpfs tmpfs rw,noswap
26 22 0:24 / /run\\040away rw - xfs /dev/sda rw
"""
NO_SWAP = "Filename Type Size Used Priority\n"
SWAP = NO_SWAP + "/dev/sda2 partition 100 0 -2\n"


@pytest.mark.parametrize(
    ("directory", "swaps", "leaks"),
    [
        ("/run/jobs", SWAP, None),
        ("/run/jobs/deep", SWAP, None),
        ("/run/kept", SWAP, None),
        ("/run/other", SWAP, "swapped out"),
        ("/run/other", NO_SWAP, None),
        ("/run/jobsworth", SWAP, "swapped out"),
        ("/var/lib", NO_SWAP, "ext4"),
        ("/run away/x", NO_SWAP, "xfs"),
    ],
)
def test_only_memory_that_is_never_written_to_a_disk_will_do(
    directory: str, swaps: str, leaks: str | None, tmp_path: Path
) -> None:
    mounts_file, swaps_file = tmp_path / "mountinfo", tmp_path / "swaps"
    mounts_file.write_text(MOUNTS)
    swaps_file.write_text(swaps)
    found = may_reach_a_disk(Path(directory), mounts=mounts_file, swaps=swaps_file)
    if leaks is None:
        assert found is None
    else:
        assert found is not None
        assert leaks in found
