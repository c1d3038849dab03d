"""What an exchange must be able to undo or finish, kept so that it outlives the daemon.

Every job has a SQLite file of its own in one directory.  Why that is enough:

- *What can be lost.*  The daemon may be killed at any instruction, by a signal, the OOM killer or
  a fault.  The host may go down as well, but a guest ends with its host, and with it everything
  that a job could put right.  So what is kept has to outlive the process, not the host, and lies in
  memory: a file system that the kernel holds there, with nothing to wait for (``synchronous`` is
  off).  What a ``write()`` has handed to the kernel is there for the next process, whatever becomes
  of this one.
- *No half records.*  A record is one transaction in SQLite's write-ahead log.  The log's last frame
  makes it valid; a process that dies before has recorded nothing, or what it had kept before.  A
  record replaces the one before in the same transaction.
- *A record does not count by itself.*  Most of it is written while the guest still runs (``keep``),
  and written again, as far as it differs, when the guest stands still.  It counts as long as an
  empty file lies beside it, the marker.  That is made after the last transaction of ``keep`` and
  before the first change (``begin``), and removed when the guest's memory is whole (``settled``).
  Both are single system calls, made or not made when a process dies.  So without a marker nothing
  is to be undone, whatever the record holds; with one the record is what the guest was when it
  stood still, contents and all, and Xen is asked what has become of it.
- *No more than one group.*  A job has at most one group of pages under way.  When the next is
  recorded, everything of the one before is settled in the guest, and its marker is gone.
- *What is known from elsewhere is not recorded.*  Whether a page was exchanged, Xen knows; see
  ``exchanger.recovery``.

The files hold pages of guests.  They must never reach a disk: the directory has to be on ramfs, or
on a tmpfs that cannot be swapped out (``diskless``).  They are for root only, and what they
held is overwritten before they are removed.
"""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from pgofflined.core.domains import DomainIdentity
from pgofflined.core.errors import PortError
from pgofflined.core.frames import WORDS_PER_PAGE, Domid, Mfn
from pgofflined.core.pages import PageKind
from pgofflined.ports import JobRecord, OpenJob, UnfinishedJob

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pgofflined.core.moves import Chosen, Group

_log = logging.getLogger(__name__)

_VERSION: Final = 2
_SCHEMA: Final = """
CREATE TABLE job (
    domid INTEGER NOT NULL, uuid TEXT NOT NULL, shared_info INTEGER NOT NULL,
    cpu_time INTEGER NOT NULL, began REAL NOT NULL
) STRICT;
CREATE TABLE moving (
    number INTEGER PRIMARY KEY, kind TEXT NOT NULL, pinned INTEGER NOT NULL, mfns BLOB NOT NULL,
    pfns BLOB NOT NULL, slot_frames BLOB NOT NULL, slot_indexes BLOB NOT NULL,
    pages BLOB NOT NULL, levels BLOB NOT NULL, tables BLOB NOT NULL, indexes BLOB NOT NULL,
    entries BLOB NOT NULL, props BLOB NOT NULL
) STRICT;
CREATE TABLE page (mfn INTEGER PRIMARY KEY, contents BLOB NOT NULL) STRICT;
"""
_PUT: Final = "INSERT OR REPLACE INTO moving VALUES (1, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
_PUT_PAGE: Final = "INSERT OR REPLACE INTO page VALUES (?, ?)"
_SUFFIX: Final = ".job"
_ASIDE: Final = ".damaged"
_MARKER: Final = "-moving"
# In the order of removal: whoever finds the first file is to find all of them, and a record whose
# removal was begun does not count any more.
_ALL_SUFFIXES: Final = (_MARKER, "-wal", "-shm", "-journal", "")


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
            except (sqlite3.Error, ValueError, OverflowError, OSError) as error:
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
        self._marker = _marker(path)
        self._connection = connection
        self._kept: Group | None = None

    def keep(self, group: Group) -> None:
        """Keep a group in place of the one before; what is the same is not written again."""
        import numpy as np

        kept = self._kept
        changed = np.ones(len(group), dtype=np.bool_) if kept is None else _changed(kept, group)
        is_same = kept is not None and _is_same_plan(kept, group)
        if is_same and not changed.any():
            return
        rows = np.flatnonzero(changed).tolist()
        pages = [(int(group.mfns[row]), _blob(group.contents[row])) for row in rows]
        # Should it fail, nothing is taken for kept.
        self._kept = None
        try:
            with self._connection:
                if not is_same:
                    blobs = [_blob(array) for array in _arrays(group)]
                    self._connection.execute(_PUT, (group.kind.name, int(group.pinned), *blobs))
                self._connection.executemany(_PUT_PAGE, pages)
        except sqlite3.Error as error:
            raise PortError(f"{self._path} could not be written: {error}") from error
        self._kept = group

    def begin(self) -> None:
        """Make the marker."""
        try:
            os.close(os.open(self._marker, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
        except OSError as error:
            raise PortError(f"{self._marker} could not be made: {error}") from error

    def settled(self) -> None:
        """Remove the marker; the contents go when the job is closed, and nobody waits for that."""
        try:
            self._marker.unlink(missing_ok=True)
        except OSError as error:
            raise PortError(f"{self._marker} could not be removed: {error}") from error

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


def _arrays(group: Group) -> tuple[NDArray[Any], ...]:
    """All but the contents, in the order of their columns."""
    references = group.references
    return (
        *(group.mfns, group.pfns, group.slot_frames, group.slot_indexes),
        *(references.pages, references.levels, references.tables, references.indexes),
        *(references.values, group.props),
    )


def _blob(array: NDArray[Any]) -> bytes:
    return array.astype("<u8", copy=False).tobytes()


def _is_same_plan(kept: Group, group: Group) -> bool:
    """Whether two groups differ in nothing but their contents."""
    return (kept.kind, kept.pinned) == (group.kind, group.pinned) and all(
        _equal(one, other) for one, other in zip(_arrays(kept), _arrays(group), strict=True)
    )


def _equal(one: NDArray[Any], other: NDArray[Any]) -> bool:
    return one is other or (one.shape == other.shape and bool((one == other).all()))


def _changed(kept: Group, group: Group) -> Chosen:
    """Pages of a group whose contents are not those that were kept for their frames."""
    import numpy as np

    from pgofflined.core.moves import differing

    if _equal(kept.mfns, group.mfns):
        same = kept.contents is group.contents
        return np.zeros(len(group), np.bool_) if same else differing(kept.contents, group.contents)
    places = {mfn: place for place, mfn in enumerate(kept.mfns.tolist())}
    rows = np.array([places.get(mfn, -1) for mfn in group.mfns.tolist()], dtype=np.intp)
    changed: Chosen = rows < 0
    known = ~changed
    changed[known] = differing(kept.contents[rows[known]], group.contents[known])
    return changed


def _begin(path: Path, record: JobRecord) -> sqlite3.Connection:
    # SQLite would create it with the umask's mode.
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    connection = _connect(path)
    try:
        # One transaction, so that a daemon killed in here leaves nothing half made.
        connection.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {_VERSION}; COMMIT;")
        with connection:
            connection.execute(
                "INSERT INTO job VALUES (?, ?, ?, ?, ?)",
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
        group = _group(connection) if _marker(path).exists() else None
        return UnfinishedJob(record=_record(job), group=group, job=_StoredJob(path, connection))
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


def _group(connection: sqlite3.Connection) -> Group:
    import numpy as np

    from pgofflined.core.moves import Group, References

    row = connection.execute("SELECT * FROM moving").fetchone()
    if row is None:
        raise ValueError("it was begun without what is changed")
    _, kind, pinned, *blobs = row
    (mfns, pfns, frames, indexes, pages, levels, tables, rows, values, props) = (
        _array(blob) for blob in blobs
    )
    count, entries = len(mfns), len(pages)
    contents = [_contents(connection, mfn) for mfn in mfns.tolist()]
    if (
        {len(pfns), len(frames), len(indexes)} != {count}
        or {len(levels), len(tables), len(rows), len(values)} != {entries}
        or {len(words) for words in contents} != {WORDS_PER_PAGE}
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
        contents=np.stack(contents),
        props=props,
    )


def _contents(connection: sqlite3.Connection, mfn: int) -> NDArray[np.uint64]:
    row = connection.execute("SELECT contents FROM page WHERE mfn = ?", (mfn,)).fetchone()
    if row is None:
        raise ValueError(f"the contents of mfn {mfn:#x} are missing")
    return _array(row[0])


def _array(blob: object) -> NDArray[np.uint64]:
    import numpy as np

    if not isinstance(blob, bytes):
        raise ValueError("an array is no blob")
    return np.frombuffer(blob, dtype=np.uint64).copy()


def _marker(path: Path) -> Path:
    return path.with_name(path.name + _MARKER)


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
        if (file := path.with_name(path.name + suffix)).exists():
            file.rename(aside.with_name(aside.name + suffix))
