"""What an exchange must be able to undo or finish, kept so that it outlives the daemon.

Every job has a SQLite file of its own in one directory.  Why that is enough:

- *What can be lost.*  The daemon may be killed at any instruction, by a signal, the OOM killer or
  a fault.  The host may go down as well, but a guest ends with its host, and with it everything
  that a job could put right.  So what is kept has to outlive the process, not the host, and lies in
  memory: a file system that the kernel holds there, with nothing to wait for (``synchronous`` is
  off).  What a ``write()`` has handed to the kernel is there for the next process, whatever becomes
  of this one.
- *No half records.*  A record is one transaction in SQLite's write-ahead log.  The log's last frame
  makes it valid; a process that dies before has not recorded anything, and has not changed anything
  either, since a change is made only after its record (``intend``).  A record replaces the one
  before in the same transaction.
- *No more than one group.*  A job has at most one group of pages under way.  When the next is
  recorded, everything of the one before is settled in the guest, and the record can go.
- *What is known from elsewhere is not recorded.*  Whether a page was exchanged, Xen knows; see
  ``exchanger.recovery``.

The files hold pages of guests.  They must never reach a disk: the directory has to be on ramfs, or
on a tmpfs that cannot be swapped out (``may_reach_a_disk``).  They are for root only, and what they
held is overwritten before they are removed.
"""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final
from uuid import UUID

from pgofflined.core.domains import DomainIdentity
from pgofflined.core.errors import PortError
from pgofflined.core.frames import WORDS_PER_PAGE, Domid, Mfn
from pgofflined.core.pages import PageKind
from pgofflined.ports import JobRecord, OpenJob, UnfinishedJob

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pgofflined.core.moves import Group

_log = logging.getLogger(__name__)

_VERSION: Final = 1
_SCHEMA: Final = """
CREATE TABLE job (
    domid INTEGER NOT NULL, uuid TEXT NOT NULL, shared_info INTEGER NOT NULL,
    cpu_time INTEGER NOT NULL, began REAL NOT NULL, moving INTEGER NOT NULL
) STRICT;
CREATE TABLE moving (
    number INTEGER PRIMARY KEY, kind TEXT NOT NULL, pinned INTEGER NOT NULL, mfns BLOB NOT NULL,
    pfns BLOB NOT NULL, slot_frames BLOB NOT NULL, slot_indexes BLOB NOT NULL,
    pages BLOB NOT NULL, levels BLOB NOT NULL, tables BLOB NOT NULL, indexes BLOB NOT NULL,
    entries BLOB NOT NULL, contents BLOB NOT NULL, props BLOB NOT NULL
) STRICT;
"""
_PUT: Final = "INSERT OR REPLACE INTO moving VALUES (1, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
_MOVING: Final = ("UPDATE job SET moving = 1", ())
_SETTLED: Final = ("UPDATE job SET moving = 0", ())
_SUFFIX: Final = ".job"
_ASIDE: Final = ".damaged"
# In the order of removal: whoever finds the first file is to find all of them.
_ALL_SUFFIXES: Final = ("-wal", "-shm", "-journal", "")


class JobStore:
    """``ports.Journal`` in a directory.

    With ``refusal`` no job is begun, for that reason; what earlier processes left is read all the
    same.
    """

    def __init__(self, directory: Path, *, refusal: str | None = None) -> None:
        self._directory = directory
        self.refusal = refusal

    def open(self, record: JobRecord) -> OpenJob:
        """Begin a job, in place of one of the same domain that this process has ended.

        Raises PortError where it cannot be kept.
        """
        if self.refusal is not None:
            raise PortError(self.refusal)
        path = self._directory / f"d{record.domain.domid}-{record.domain.uuid}{_SUFFIX}"
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            _remove(path)
            connection = _begin(path, record)
        except (OSError, sqlite3.Error) as error:
            raise PortError(
                f"what an exchange changes in d{record.domain.domid} cannot be kept in "
                f"{self._directory} ({error}); without that it is not begun"
            ) from error
        return _StoredJob(path, connection)

    def unfinished(self) -> Sequence[UnfinishedJob]:
        """The jobs that earlier processes left; those that cannot be read are told and kept."""
        found = []
        for orphan in self._directory.glob(f"*{_SUFFIX}-*"):
            owner = orphan.with_name(orphan.name.rpartition("-")[0])
            if not owner.exists():
                _remove(owner)
        for path in sorted(self._directory.glob(f"*{_SUFFIX}")):
            try:
                found.append(_load(path))
            except _NeverBegun:
                _remove(path)
            except (sqlite3.Error, ValueError, OSError) as error:
                if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY:
                    _log.error("%s is in use by another process and left to it", path)
                    continue
                aside = path.with_suffix(_ASIDE)
                _log.critical(
                    "the record of an exchange in %s cannot be read (%s) and was moved to %s: look "
                    "whether that domain stands still (`xl list`), and restart it if it does",
                    path,
                    error,
                    aside,
                )
                _move(path, aside)
        return found


class _NeverBegun(Exception):
    """The process died before the job's first record, hence before it did anything."""


class _StoredJob:
    """``ports.OpenJob`` in a file."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self._path = path
        self._connection = connection

    def intend(self, group: Group) -> None:
        """Keep a group in place of the one before."""
        references = group.references
        arrays = (
            *(group.mfns, group.pfns, group.slot_frames, group.slot_indexes),
            *(references.pages, references.levels, references.tables, references.indexes),
            *(references.values, group.contents, group.props),
        )
        blobs = [array.astype("<u8", copy=False).tobytes() for array in arrays]
        self._write((_PUT, (group.kind.name, int(group.pinned), *blobs)), _MOVING)

    def settled(self) -> None:
        """Forget the group; its contents go when the job is closed, and nobody waits for that."""
        self._write(_SETTLED)

    def close(self) -> None:
        """Remove the file.  What cannot be removed is told, and looked at by the next process."""
        try:
            # Before the connection is closed, which would remove the log as it is.
            _remove(self._path)
        except OSError as error:
            _log.error("%s holds pages of a guest and could not be removed: %s", self._path, error)
        with suppress(sqlite3.Error):
            self._connection.close()

    def set_aside(self) -> None:
        """Leave the file under another name, which no process takes for a job."""
        aside = self._path.with_suffix(_ASIDE)
        try:
            _move(self._path, aside)
        except OSError as error:
            _log.error("%s could not be put aside: %s", self._path, error)
        else:
            _log.error("what was to be put right is kept in %s; remove it some time", aside)
        with suppress(sqlite3.Error):
            self._connection.close()

    def _write(self, *statements: tuple[str, tuple[object, ...]]) -> None:
        """In one transaction."""
        try:
            with self._connection:
                for statement, values in statements:
                    self._connection.execute(statement, values)
        except sqlite3.Error as error:
            raise PortError(f"{self._path} could not be written: {error}") from error


def _begin(path: Path, record: JobRecord) -> sqlite3.Connection:
    # SQLite would create it with the umask's mode.
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    connection = _connect(path)
    try:
        # One transaction, so that a daemon killed in here leaves nothing half made.
        connection.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {_VERSION}; COMMIT;")
        with connection:
            connection.execute(
                "INSERT INTO job VALUES (?, ?, ?, ?, ?, 0)",
                (
                    record.domain.domid,
                    str(record.domain.uuid),
                    record.shared_info,
                    record.cpu_time,
                    record.began,
                ),
            )
    except BaseException:
        connection.close()
        raise
    return connection


def _connect(path: Path) -> sqlite3.Connection:
    # One thread at a time, not always the same: a job that could not be ended is tried again.
    connection = sqlite3.connect(path, timeout=0, check_same_thread=False)
    try:
        # A record has pages of 4 KiB whole in it: with pages of its own that are larger there are
        # fewer pieces to write and to check.
        connection.execute("PRAGMA page_size = 16384")
        # Without other readers, the write-ahead log needs no shared memory.
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = OFF")
        # The log is folded into the file by nobody: the guest would wait for it.
        connection.execute("PRAGMA wal_autocheckpoint = 0")
    except BaseException:
        connection.close()
        raise
    return connection


def _load(path: Path) -> UnfinishedJob:
    """Read a record.  Raises sqlite3.Error, ValueError, OSError, _NeverBegun."""
    connection = _connect(path)
    try:
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            raise _NeverBegun
        if version != _VERSION:
            raise ValueError(f"it is of version {version}, this is {_VERSION}")
        job = connection.execute("SELECT * FROM job").fetchone()
        if job is None:
            raise _NeverBegun
        *record, is_moving = job
        group = None
        if is_moving:
            group = _group(connection.execute("SELECT * FROM moving").fetchone()[1:])
        return UnfinishedJob(
            record=_record(record),
            group=group,
            job=_StoredJob(path, connection),
        )
    except BaseException:
        connection.close()
        raise


def _record(row: Sequence[object]) -> JobRecord:
    domid, uuid, shared_info, cpu_time, began = row
    return JobRecord(
        domain=DomainIdentity(Domid(int(str(domid))), UUID(str(uuid))),
        shared_info=Mfn(int(str(shared_info))),
        cpu_time=int(str(cpu_time)),
        began=float(str(began)),
    )


def _group(row: tuple[object, ...]) -> Group:
    import numpy as np

    from pgofflined.core.moves import Group, References

    kind, pinned, *blobs = row
    (mfns, pfns, frames, indexes, pages, levels, tables, rows, values, contents, props) = (
        _array(blob) for blob in blobs
    )
    count, entries = len(mfns), len(pages)
    if (
        {len(pfns), len(frames), len(indexes)} != {count}
        or {len(levels), len(tables), len(rows), len(values)} != {entries}
        or len(contents) != count * WORDS_PER_PAGE
        or (entries and (int(pages.max()) >= count or int(levels.max()) > PageKind.L4.value))
    ):
        raise ValueError("its arrays do not belong together")
    return Group(
        kind=PageKind[str(kind)],
        pinned=bool(pinned),
        mfns=mfns,
        pfns=pfns,
        slot_frames=frames,
        slot_indexes=indexes,
        references=References(
            pages=pages.astype(np.intp),
            levels=levels.astype(np.uint8),
            tables=tables,
            indexes=rows,
            values=values,
        ),
        contents=contents.reshape(count, WORDS_PER_PAGE),
        props=props,
    )


def _array(blob: object) -> NDArray[np.uint64]:
    import numpy as np

    if not isinstance(blob, bytes):
        raise ValueError("an array is no blob")
    return np.frombuffer(blob, dtype=np.uint64).copy()


def _remove(path: Path) -> None:
    """Overwrite and remove a job's files.  Raises OSError."""
    for suffix in _ALL_SUFFIXES:
        file = path.with_name(path.name + suffix)
        if file.exists():
            with file.open("r+b", buffering=0) as opened:
                opened.write(bytes(file.stat().st_size))
            file.unlink()


def _move(path: Path, aside: Path) -> None:
    for suffix in _ALL_SUFFIXES:
        file = path.with_name(path.name + suffix)
        if file.exists():
            file.rename(aside.with_name(aside.name + suffix))


def may_reach_a_disk(
    directory: Path,
    *,
    mounts: Path = Path("/proc/self/mountinfo"),
    swaps: Path = Path("/proc/swaps"),
) -> str | None:
    """Why what lies in a directory may be written to a disk; None where it stays in memory."""
    kind, options = _file_system(directory, mounts.read_text(encoding="utf-8"))
    if kind == "ramfs":
        return None
    if kind != "tmpfs":
        return f"{directory} is on {kind}, which is not in memory"
    has_swap = len(swaps.read_text(encoding="utf-8").splitlines()) > 1
    if has_swap and "noswap" not in options:
        return f"{directory} is on a tmpfs that may be swapped out"
    return None


def _file_system(directory: Path, mountinfo: str) -> tuple[str, frozenset[str]]:
    """Type and options of the file system that a path is on (proc_pid_mountinfo(5))."""
    best: tuple[int, str, frozenset[str]] = (-1, "an unknown file system", frozenset())
    for line in mountinfo.splitlines():
        fields, _, rest = line.partition(" - ")
        point = Path(fields.split()[4].encode().decode("unicode_escape"))
        kind, _, options = rest.split(" ", 2)
        # Of several at the same place the last one covers those before.
        if directory.is_relative_to(point) and len(point.parts) >= best[0]:
            best = (len(point.parts), kind, frozenset(options.split(",")))
    return best[1], best[2]
