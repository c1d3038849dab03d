"""Reads the record of a job that an earlier process left, or as much of it as can be read."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pgofflined import __version__
from pgofflined.core.frames import WORDS_PER_PAGE
from pgofflined.core.pages import PageKind
from pgofflined.core.text import printable
from pgofflined.jobfile import VERSION, LeftJob, StoredJob, connect
from pgofflined.jobheader import HEADER, UnreadJob, as_far_as_readable, record_of, stage_of
from pgofflined.ports import UnfinishedJob

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pgofflined.core.moves import Group

# Each release reads what the one before it wrote (decision 11): the formats that are read here.
_READS: Final = frozenset({VERSION})
_UNREADABLE: Final = (
    sqlite3.Error,
    OSError,
    ValueError,
    LookupError,
    TypeError,
    ArithmeticError,
)


class NeverBegun(Exception):
    """The process died before the job's first record, hence before it did anything."""


class InUse(Exception):
    """Another process has the record open."""


def load(path: Path, *, on_left: Callable[[LeftJob], None]) -> UnfinishedJob:
    """Read a record, or as much of it as can be read.

    Raises NeverBegun; InUse; ValueError where it cannot be told whose it is.
    """
    connection: sqlite3.Connection | None = None
    try:
        connection = connect(path)
        return _load(path, connection, on_left)
    except NeverBegun:
        _close(connection)
        raise
    except _UNREADABLE as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY:
            _close(connection)
            raise InUse from error
        try:
            return _load_header(path, connection, error, on_left)
        finally:
            _close(connection)
    except BaseException:
        _close(connection)
        raise


def _close(connection: sqlite3.Connection | None) -> None:
    with suppress(sqlite3.Error):
        if connection is not None:
            connection.close()


def _load(
    path: Path, connection: sqlite3.Connection, on_left: Callable[[LeftJob], None]
) -> UnfinishedJob:
    """Raises NeverBegun, and ``_UNREADABLE`` where it makes no sense here."""
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    row = None
    if version:
        if version not in _READS:
            raise ValueError(_of_another(path, version, connection))
        row = connection.execute(f"SELECT {HEADER} FROM job").fetchone()  # noqa: S608 - a constant
    hold, is_moving = stage_of(path)
    if row is None:
        if hold is not None:
            raise ValueError(f"{path} is empty")
        raise NeverBegun
    record = record_of(row)
    return UnfinishedJob(
        record=record,
        hold=hold,
        group=_group(connection) if is_moving else None,
        job=StoredJob(path, connection, record.domain, hold=hold, on_left=on_left),
    )


def _of_another(path: Path, version: int, connection: sqlite3.Connection) -> str:
    writer = "another version of pgofflined"
    with suppress(sqlite3.Error, TypeError):
        row = connection.execute("SELECT version FROM writer").fetchone()
        writer = f"pgofflined {printable(str(row[0])[:40])}"
    return (
        f"the record in {path} is of format {version} and was written by {writer}; this is "
        f"{__version__} and reads format {VERSION}. The version that wrote it ends the job when "
        "it is started"
    )


def _load_header(
    path: Path,
    connection: sqlite3.Connection | None,
    error: Exception,
    on_left: Callable[[LeftJob], None],
) -> UnfinishedJob:
    """What every release can read.  Raises ValueError where it cannot be told whose it is."""
    record = as_far_as_readable(path, connection)
    why = str(error)
    if str(path) not in why:
        why = f"the record in {path} cannot be read ({why})"
    try:
        hold, is_moving = stage_of(path)
    except (OSError, ValueError):
        hold, is_moving = None, True
    return UnfinishedJob(
        record=record,
        hold=hold,
        group=None,
        job=UnreadJob(path, record.domain, on_left=on_left),
        unreadable=why if is_moving else None,
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
