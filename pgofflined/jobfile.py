"""One exchange job in a SQLite file, and in a file beside it how far the job has come.

``jobstore`` says why that is enough to end the job after any death of the process.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from pgofflined import __version__
from pgofflined.core.domains import DomainIdentity
from pgofflined.core.errors import PortError
from pgofflined.jobheader import (
    ASIDE,
    HEADER,
    HELD,
    MOVING,
    PAUSING,
    STAGE,
    WAL,
    beside,
    move,
    overwrite,
    remove,
)
from pgofflined.ports import Hold, JobRecord

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pgofflined.core.moves import Chosen, Group

_log = logging.getLogger(__name__)

VERSION: Final = 3
# The table ``job`` is never to change (``jobheader``).
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
CREATE TABLE writer (version TEXT NOT NULL) STRICT;
"""
_PUT: Final = "INSERT OR REPLACE INTO moving VALUES (1, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
_PUT_PAGE: Final = "INSERT OR REPLACE INTO page VALUES (?, ?)"


class LeftJob(Protocol):
    """A job that was left, to be ended some time."""

    domain: DomainIdentity

    def end(self) -> None:
        """End it: nobody needs its record any more."""
        ...


class StoredJob:
    """``ports.OpenJob`` in files.  ``on_left`` is told of a job that is left open."""

    def __init__(
        self,
        path: Path,
        connection: sqlite3.Connection,
        domain: DomainIdentity,
        *,
        hold: Hold | None = None,
        on_left: Callable[[LeftJob], None],
    ) -> None:
        self.domain = domain
        self._path = path
        self._connection = connection
        self._stage_path = beside(path, STAGE)
        self._stage = os.open(self._stage_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        # Once, here or with the object.
        self._close_stage = weakref.finalize(self, os.close, self._stage)
        self._hold = hold
        self._on_left = on_left
        self._is_damaged = False
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

    def hold(self, cpu_time: int | None) -> None:
        """Note that the guest stands still."""
        self._hold = Hold(cpu_time=cpu_time)
        self._note(HELD if cpu_time is not None else PAUSING)

    def begin(self) -> None:
        """Note that the kept group counts."""
        self._note(MOVING)

    def settled(self) -> None:
        """Note that it does not; the contents go with the job, and nobody waits for that."""
        self._note(HELD if self._hold and self._hold.cpu_time is not None else PAUSING)

    def _note(self, stage: bytes) -> None:
        cpu_time = (self._hold.cpu_time if self._hold else None) or 0
        try:
            os.pwrite(self._stage, b"%b%016x" % (stage, cpu_time), 0)
        except OSError as error:
            raise PortError(f"{self._stage_path} could not be written: {error}") from error

    def leave(self, *, damaged: bool = False) -> None:
        """Keep the record of the job, without what its guest's pages held, unless it is damaged."""
        self._is_damaged = damaged
        if not damaged:
            self._forget_pages()
        self._on_left(self)

    def end(self) -> None:
        """End a job that was left."""
        if self._is_damaged:
            self.set_aside()
        else:
            self.close()

    def _forget_pages(self) -> None:
        try:
            # Its contents must not be missing where they count.
            if self._hold is not None:
                self.settled()
            self._connection.execute("PRAGMA secure_delete = ON")
            with self._connection:
                self._connection.execute("DELETE FROM page")
                self._connection.execute("DELETE FROM moving")
            # With all of it in the file, nothing in the log is looked at any more.
            self._connection.execute("PRAGMA wal_checkpoint(FULL)")
            overwrite(beside(self._path, WAL))
        except (PortError, OSError, sqlite3.Error) as error:
            _log.error("%s holds pages of a guest still: %s", self._path, error)
        self._kept = None

    def close(self) -> None:
        """Remove the files.  What cannot be removed is told, and looked at by the next process."""
        try:
            # Before the connection is closed, which would remove the log as it is.
            remove(self._path)
        except OSError as error:
            _log.error("%s holds pages of a guest and could not be removed: %s", self._path, error)
        self._shut()

    def set_aside(self) -> None:
        """Leave the files under another name, which no process takes for a job."""
        aside = self._path.with_suffix(ASIDE)
        try:
            move(self._path, aside)
        except OSError as error:
            _log.error("%s could not be put aside: %s", self._path, error)
        else:
            _log.error("what was to be put right is kept in %s; remove it some time", aside)
        self._shut()

    def _shut(self) -> None:
        with suppress(sqlite3.Error):
            self._connection.close()
        self._close_stage()


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


def create(path: Path, record: JobRecord) -> sqlite3.Connection:
    """Make the file of a new job.  Raises OSError, sqlite3.Error."""
    # SQLite would create it with the umask's mode.
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    connection = connect(path)
    try:
        # One transaction, so that a daemon killed in here leaves nothing half made.
        connection.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {VERSION}; COMMIT;")
        with connection:
            connection.execute("INSERT INTO writer VALUES (?)", (__version__,))
            connection.execute(
                f"INSERT INTO job ({HEADER}) VALUES (?, ?, ?, ?, ?)",  # noqa: S608 - a constant
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


def connect(path: Path) -> sqlite3.Connection:
    """Open a job's file for this process alone.  Raises sqlite3.Error."""
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
