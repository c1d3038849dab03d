"""State that outlives the daemon but not the host: a small SQLite database under /run.

Losing it costs little (pages that Xen holds back are found by asking it, hits are counted anew), so
nothing about it ever keeps the daemon from its work: what cannot be written stays in memory and
is tried again with the next write, and ``trouble`` says so meanwhile.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import time as clock
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple, Self
from uuid import UUID

from pgofflined.core.book import Cause, PageEntry, Phase
from pgofflined.core.domains import DomainIdentity
from pgofflined.core.events import Event
from pgofflined.core.frames import Domid, Mfn
from pgofflined.core.history import PageHits
from pgofflined.journal_log import event

_log = logging.getLogger(__name__)

# 1 had the times of hits in seconds since the epoch, 2 has them by the monotonic clock.
_SCHEMA_VERSION: Final = 2
_SCHEMA: Final = """
CREATE TABLE pages (
    mfn INTEGER PRIMARY KEY, cause TEXT NOT NULL, phase TEXT NOT NULL, since REAL NOT NULL,
    marked INTEGER NOT NULL, domid INTEGER, uuid TEXT, domain_name TEXT NOT NULL,
    reason TEXT NOT NULL, detail TEXT NOT NULL, attempts INTEGER NOT NULL, next_try REAL
) STRICT;
CREATE TABLE hits (
    number INTEGER PRIMARY KEY, mfn INTEGER NOT NULL, time REAL NOT NULL, weight INTEGER NOT NULL
) STRICT;
CREATE INDEX hits_by_mfn ON hits (mfn);
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
"""
_BOOT_ID: Final = "boot_id"
_LOST: Final = "lost"
_PUT_META: Final = "INSERT OR REPLACE INTO meta VALUES (?, ?)"

# What may wait in memory for a disk that takes nothing; the oldest hits go first.
_MAX_WAITING_HITS: Final = 10_000

BOOT_ID_FILE: Final = Path("/proc/sys/kernel/random/boot_id")


class StoreInUse(Exception):
    """Another daemon has the state open; two of them must not work on one host."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"{path} is in use: another pgofflined runs on this host; "
            "stop it first (systemctl stop pgofflined)"
        )


class StoredHit(NamedTuple):
    """Errors of one page at one time, in seconds of the monotonic clock of this boot."""

    mfn: Mfn
    time: float
    weight: int


class _Unusable(Exception):
    """The file holds nothing that this version could use; the message says why."""


def read_boot_id(path: Path = BOOT_ID_FILE) -> str:
    """What tells this boot of the host from any other."""
    return path.read_text(encoding="ascii").strip()


class Store:
    """The database.  To be used from the thread that opened it; every call is short."""

    def __init__(
        self, connection: sqlite3.Connection, *, max_hits: int, trouble: str | None = None
    ) -> None:
        self._connection = connection
        self._max_hits = max_hits
        self._pages: dict[Mfn, PageEntry | None] = {}
        self._meta: dict[str, str] = {}
        self._hits: list[StoredHit] = []
        self._without_file = trouble
        self._is_found_again = False
        self._trouble: str | None = None

    @classmethod
    def open(
        cls, path: Path, boot_id: str, *, max_hits: int = 250_000, epoch: float | None = None
    ) -> Self:
        """Open the state of this boot of the host, or begin it.

        The state of another boot is discarded, that of the release before is taken over.  A damaged
        file, or one of any other version, is moved aside and a new one begun; where none can be
        had, state is kept in memory only.  ``epoch`` is what the date says less what the monotonic
        clock does.

        Raises StoreInUse while another process has it open.
        """
        if epoch is None:
            epoch = clock.time() - clock.monotonic()
        lost = None
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                connection = _open(path, boot_id, epoch)
            except (sqlite3.DatabaseError, _Unusable) as error:
                if _is_busy(error):
                    raise
                lost = f"the state in {path} could not be used ({error})"
                _move_aside(path, error)
                connection = _open(path, boot_id, epoch)
        except (sqlite3.Error, _Unusable, OSError) as error:
            if _is_busy(error):
                raise StoreInUse(path) from error
            trouble = f"no state can be kept in {path} ({error}); a restart will lose it"
            event(_log, logging.ERROR, Event.STATE_NOT_STORED, trouble)
            return cls(_begin(":memory:", boot_id), max_hits=max_hits, trouble=trouble)
        store = cls(connection, max_hits=max_hits)
        if lost is not None:
            # Whoever has it open next has to know as well.
            store.set_meta(_LOST, lost)
        return store

    @property
    def lost(self) -> str | None:
        """Why what an earlier daemon of this boot may have stored cannot be had, until it is."""
        if self._is_found_again:
            return None
        return self._without_file or self.get_meta(_LOST) or None

    def found_again(self) -> None:
        """What can be known without it is known."""
        self._is_found_again = True
        if self._without_file is None:
            self.set_meta(_LOST, "")

    @property
    def trouble(self) -> str | None:
        """Why a restart of the daemon would lose state now; None where it would not."""
        return self._without_file or self._trouble

    def load_pages(self) -> tuple[PageEntry, ...]:
        """All pages that were in hand.  A row that makes no sense is left out and logged."""
        entries = []
        for row in self._read("SELECT * FROM pages ORDER BY since"):
            try:
                entries.append(_entry(row))
            except ValueError as error:
                _log.error("the stored state of mfn %s makes no sense: %s", row[0], error)
        return tuple(entries)

    def put_page(self, entry: PageEntry) -> None:
        """Store what has become of a page."""
        self._pages[entry.mfn] = entry
        self._write()

    def remove_page(self, mfn: Mfn) -> None:
        """Forget a page and its hits."""
        self._pages[mfn] = None
        self._hits = [hit for hit in self._hits if hit.mfn != mfn]
        self._write()

    def add_hits(self, batch: Iterable[StoredHit]) -> None:
        """Store hits.  Beyond ``max_hits`` the oldest are forgotten."""
        self._hits.extend(batch)
        if self._hits:
            self._write()

    def load_hits(self, since: float) -> tuple[PageHits, ...]:
        """Hits later than ``since`` by page, the page hit longest ago first."""
        hits: dict[Mfn, list[tuple[float, int]]] = {}
        rows = self._read(
            "SELECT mfn, time, weight FROM hits WHERE time > ? ORDER BY number", since
        )
        for number, time, weight in rows:
            mfn = Mfn(_integer(number))
            # Taken out and put back: the page that was hit last comes last.
            of_page = hits.pop(mfn, [])
            of_page.append((_real(time), _integer(weight)))
            hits[mfn] = of_page
        return tuple(PageHits(mfn=mfn, hits=tuple(found)) for mfn, found in hits.items())

    def prune(self, *, before: float) -> None:
        """Forget hits up to ``before``, which no window reaches any more."""
        self._hits = [hit for hit in self._hits if hit.time > before]
        self._write(("DELETE FROM hits WHERE time <= ?", (before,)))

    def get_meta(self, key: str) -> str | None:
        """A value by its key."""
        if key in self._meta:
            return self._meta[key]
        rows = self._read("SELECT value FROM meta WHERE key = ?", key)
        return str(rows[0][0]) if rows else None

    def set_meta(self, key: str, value: str) -> None:
        """Store a value; its key must not be the boot's."""
        if key == _BOOT_ID:
            raise ValueError(f"{key!r} is the store's own key")
        self._meta[key] = value
        self._write()

    def close(self) -> None:
        """Write what still waits and let go of the file."""
        if self._pages or self._meta or self._hits:
            self._write()
        # Closing folds the log into the file, which a full disk may refuse; the next open does it.
        with suppress(sqlite3.Error):
            self._connection.close()

    def _read(self, statement: str, *values: object) -> list[tuple[object, ...]]:
        try:
            return self._connection.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            event(
                _log,
                logging.ERROR,
                Event.STATE_DISCARDED,
                f"stored state could not be read and is done without: {error}",
            )
            return []

    def _write(self, *statements: tuple[str, tuple[object, ...]]) -> None:
        """Write everything that waits, and ``statements`` before it, in one transaction."""
        try:
            with self._connection:
                for statement, values in statements:
                    self._connection.execute(statement, values)
                self._write_waiting()
        except sqlite3.Error as error:
            del self._hits[:-_MAX_WAITING_HITS]
            if self._trouble is None:
                self._trouble = (
                    f"state could not be stored ({error}); a restart would lose what is new; "
                    "free space where the state lies, it is tried again with each change"
                )
                event(_log, logging.ERROR, Event.STATE_NOT_STORED, self._trouble)
            return
        self._pages.clear()
        self._meta.clear()
        self._hits.clear()
        if self._trouble is not None:
            self._trouble = None
            _log.info("state is stored again, nothing of it is missing but maybe old hits")

    def _write_waiting(self) -> None:
        execute, execute_many = self._connection.execute, self._connection.executemany
        for mfn, entry in self._pages.items():
            if entry is None:
                execute("DELETE FROM pages WHERE mfn = ?", (mfn,))
                execute("DELETE FROM hits WHERE mfn = ?", (mfn,))
            else:
                execute(
                    "INSERT OR REPLACE INTO pages VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    _row(entry),
                )
        execute_many(_PUT_META, self._meta.items())
        if self._hits:
            execute_many("INSERT INTO hits (mfn, time, weight) VALUES (?, ?, ?)", self._hits)
            execute(
                "DELETE FROM hits WHERE number <= (SELECT max(number) FROM hits) - ?",
                (self._max_hits,),
            )


def _open(path: Path, boot_id: str, epoch: float) -> sqlite3.Connection:
    """Open the file, or begin it anew where it is of another boot."""
    if not path.exists():
        return _begin(path, boot_id)
    connection = _connect(path)
    try:
        found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise _Unusable(str(found))
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version not in (1, _SCHEMA_VERSION):
            raise _Unusable(f"it is of version {version}, this is {_SCHEMA_VERSION}")
        if version == 1:
            _take_over(connection, epoch)
        stored = connection.execute("SELECT value FROM meta WHERE key = ?", (_BOOT_ID,)).fetchone()
    except BaseException:
        connection.close()
        raise
    if stored == (boot_id,):
        return connection
    connection.close()
    _log.info("the state in %s is of an earlier boot of the host and is discarded", path)
    for file in _files(path):
        file.unlink(missing_ok=True)
    return _begin(path, boot_id)


def _take_over(connection: sqlite3.Connection, epoch: float) -> None:
    """Turn the state of the release before into that of this one."""
    with connection:
        connection.execute("UPDATE hits SET time = time - ?", (epoch,))
        connection.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")


def _begin(path: Path | str, boot_id: str) -> sqlite3.Connection:
    connection = _connect(path)
    try:
        # One transaction, so that a daemon killed in here leaves nothing half made.
        connection.executescript(
            f"BEGIN; {_SCHEMA} PRAGMA user_version = {_SCHEMA_VERSION}; COMMIT;"
        )
        with connection:
            connection.execute(_PUT_META, (_BOOT_ID, boot_id))
    except BaseException:
        connection.close()
        raise
    return connection


def _connect(path: Path | str) -> sqlite3.Connection:
    if isinstance(path, Path):
        # SQLite would create it with the umask's mode.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    connection = sqlite3.connect(path, timeout=0)
    try:
        # The lock is taken with the first access and held: it tells a second daemon that the
        # host is taken.  With it, the write-ahead log needs no shared memory either.
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        connection.execute("PRAGMA journal_mode = WAL")
        # A kill of the daemon cannot lose what the kernel has, and the state of a host that
        # went down is worth nothing: no need to wait for a disk.
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("PRAGMA wal_autocheckpoint = 256")
        connection.execute("BEGIN IMMEDIATE").execute("COMMIT")
    except BaseException:
        connection.close()
        raise
    return connection


def _files(path: Path) -> tuple[Path, ...]:
    return tuple(path.with_name(path.name + suffix) for suffix in ("", "-wal", "-shm", "-journal"))


def _move_aside(path: Path, error: Exception) -> None:
    """Put the file and its log under another name, in place of any that were put there before."""
    aside = path.with_name(path.name + ".damaged")
    for old, new in zip(_files(path), _files(aside), strict=True):
        new.unlink(missing_ok=True)
        if old.exists():
            old.rename(new)
    event(
        _log,
        logging.WARNING,
        Event.STATE_DISCARDED,
        f"the state in {path} cannot be used ({error}); it was moved to {aside} and is begun anew",
    )


def _is_busy(error: Exception) -> bool:
    code: int = getattr(error, "sqlite_errorcode", 0)
    # The low byte is the primary code, whatever the extended one says in detail.
    return code & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def _row(entry: PageEntry) -> tuple[object, ...]:
    domain = entry.domain
    return (
        entry.mfn,
        entry.cause.value,
        entry.phase.value,
        entry.since,
        int(entry.marked),
        None if domain is None else domain.domid,
        None if domain is None else str(domain.uuid),
        _storable(entry.domain_name),
        _storable(entry.reason),
        _storable(entry.detail),
        entry.attempts,
        entry.next_try,
    )


def _storable(text: str) -> str:
    # Names that were no UTF-8 carry lone surrogates, which SQLite cannot be given.
    return text.encode("utf-8", "backslashreplace").decode()


def _entry(row: tuple[object, ...]) -> PageEntry:
    (mfn, cause, phase, since, marked, domid, uuid, name, reason, detail, attempts, next_try) = row
    return PageEntry(
        mfn=Mfn(_integer(mfn)),
        cause=Cause(str(cause)),
        phase=Phase(str(phase)),
        since=_real(since),
        marked=bool(marked),
        domain=None if domid is None else DomainIdentity(Domid(_integer(domid)), UUID(str(uuid))),
        domain_name=str(name),
        reason=str(reason),
        detail=str(detail),
        attempts=_integer(attempts),
        next_try=None if next_try is None else _real(next_try),
    )


def _integer(value: object) -> int:
    if not isinstance(value, int):
        raise ValueError(f"{value!r} is no integer")
    return value


def _real(value: object) -> float:
    if not isinstance(value, float):
        raise ValueError(f"{value!r} is no time")
    return value
