"""What every release can read of a job's record, whichever release wrote it: whose it is, how far.

An upgrade, or a downgrade, may come while a guest stands still.  Whoever starts next must know that
guest, and whether it may run, even where the rest of the record is of a format that it does not
know, or is damaged.  So this much is promised never to change:

- the name of the file, ``d<domid>-<uuid>.job``, and of its stage, the same with ``-stage``;
- the table ``job`` of the SQLite file with the columns ``HEADER`` names;
- the stage: nothing (the guest was asked to suspend at most), or 17 bytes: a letter, then the
  processor time in ns that the guest had used when it stood still, in hex.  P and H: it stands
  still for us and its memory is whole; without its processor time with P.  M: it may be in the
  middle of a change.  Any other letter is taken for M.

While the stage is empty, its time of modification says when the guest was asked, in seconds of the
monotonic clock: nobody writes to it before the guest stands still, and no step of the date touches
it.  It serves where the table cannot be read.  Releases that do not set it leave a date, which is
later than any time since the boot.

What only was asked or held is ended with that.  A guest in the middle of a change is held until
somebody reads the record who can (decision 11).
"""

from __future__ import annotations

import logging
import os
import re
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final
from uuid import UUID

from pgofflined.core.domains import DomainIdentity
from pgofflined.core.errors import PortError
from pgofflined.core.frames import Domid, Mfn
from pgofflined.ports import Hold, JobRecord

if TYPE_CHECKING:
    from pgofflined.core.moves import Group
    from pgofflined.ports import OpenJob

_log = logging.getLogger(__name__)

SUFFIX: Final = ".job"
ASIDE: Final = ".damaged"
STAGE: Final = "-stage"
WAL: Final = "-wal"
# In the order of removal.  Without the first no process takes the others for a job, whereas a
# record without its stage would be taken for another one.
_ALL_SUFFIXES: Final = ("", WAL, "-shm", "-journal", STAGE)
HEADER: Final = "domid, uuid, shared_info, cpu_time, began"
# A letter and the processor time in hex: so short that the kernel takes it whole or not at all.
PAUSING: Final = b"P"
HELD: Final = b"H"
MOVING: Final = b"M"
STAGE_BYTES: Final = 17
_NAME: Final = re.compile(r"d(0|[1-9]\d{0,4})-([0-9a-f-]{36})\.job", re.ASCII)


def path_of(directory: Path, domain: DomainIdentity) -> Path:
    """The file of a domain's job."""
    return directory / f"d{domain.domid}-{domain.uuid}{SUFFIX}"


def domain_of(path: Path) -> DomainIdentity:
    """Whose job a file is, by its name.  Raises ValueError."""
    found = _NAME.fullmatch(path.name)
    if found is None:
        raise ValueError(f"the name of {path} is that of no domain")
    return DomainIdentity(Domid(int(found[1])), UUID(found[2]))


def record_of(row: Sequence[object]) -> JobRecord:
    """The record by the columns of ``HEADER``.  Raises ValueError."""
    domid, uuid, shared_info, cpu_time, began = row
    return JobRecord(
        domain=DomainIdentity(Domid(int(str(domid))), UUID(str(uuid))),
        shared_info=Mfn(int(str(shared_info))),
        cpu_time=int(str(cpu_time)),
        began=float(str(began)),
    )


def stage_of(path: Path) -> tuple[Hold | None, bool]:
    """Whether the guest stands still, and whether it is being changed.  Raises ValueError."""
    file = beside(path, STAGE)
    raw = file.read_bytes() if file.exists() else b""
    if not raw:
        return None, False
    stage, digits = raw[:1], raw[1:]
    if len(raw) != STAGE_BYTES or stage not in (PAUSING, HELD, MOVING):
        raise ValueError(f"the stage in {file} cannot be read: {raw[:STAGE_BYTES]!r}")
    cpu_time = int(digits, 16)
    return Hold(cpu_time=None if stage == PAUSING else cpu_time), stage == MOVING


def note_began(path: Path, began: float) -> None:
    """Note beside the record, too, when its job was begun.  Raises OSError."""
    nanoseconds = int(began * 1e9)
    os.utime(beside(path, STAGE), ns=(nanoseconds, nanoseconds))


def _noted_began(path: Path) -> float:
    """When the guest was asked, by the stage; minus infinity where that says nothing.

    It may be a date: later than now.
    """
    with suppress(OSError):
        found = beside(path, STAGE).stat()
        if not found.st_size:
            return found.st_mtime_ns / 1e9
    return float("-inf")


def as_far_as_readable(path: Path, connection: sqlite3.Connection | None) -> JobRecord:
    """The record, from the table where that can be read, else by the file's name alone.

    Raises ValueError where not even that tells whose it is.
    """
    domain = domain_of(path)
    if connection is not None:
        with suppress(sqlite3.Error, ValueError, TypeError):
            # The columns are named above, none is from outside.
            row = connection.execute(f"SELECT {HEADER} FROM job").fetchone()  # noqa: S608
            record = record_of(row)
            if record.domain == domain:
                return record
    return JobRecord(domain=domain, shared_info=None, cpu_time=0, began=_noted_began(path))


class UnreadJob:
    """``ports.OpenJob`` of a record that cannot be read; nothing is written to it.

    ``on_left`` is told of a job that is left open.
    """

    def __init__(
        self, path: Path, domain: DomainIdentity, *, on_left: Callable[[UnreadJob], None]
    ) -> None:
        self.domain = domain
        self._path = path
        self._on_left = on_left

    def keep(self, group: Group) -> None:
        """Not here.  Raises PortError."""
        del group
        raise self._refusal()

    def hold(self, cpu_time: int | None) -> None:
        """Not here.  Raises PortError."""
        del cpu_time
        raise self._refusal()

    def begin(self) -> None:
        """Not here.  Raises PortError."""
        raise self._refusal()

    def settled(self) -> None:
        """Not here.  Raises PortError."""
        raise self._refusal()

    def _refusal(self) -> PortError:
        return PortError(f"{self._path} is a record that cannot be read, and is not written to")

    def leave(self, *, damaged: bool = False) -> None:
        """It stays as it is."""
        del damaged
        self._on_left(self)

    def end(self) -> None:
        """End a job that was left."""
        self.close()

    def close(self) -> None:
        """Remove the files."""
        try:
            remove(self._path)
        except OSError as error:
            _log.error("%s holds pages of a guest and could not be removed: %s", self._path, error)

    def set_aside(self) -> None:
        """Leave the files under another name, which no process takes for a job."""
        aside = self._path.with_suffix(ASIDE)
        try:
            move(self._path, aside)
        except OSError as error:
            _log.error("%s could not be put aside: %s", self._path, error)
        else:
            _log.error("what could not be read is kept in %s; remove it some time", aside)


def beside(path: Path, suffix: str) -> Path:
    """Another file of the same job."""
    return path.with_name(path.name + suffix)


def overwrite(file: Path) -> None:
    """Leave nothing of what it holds.  Raises OSError."""
    with file.open("r+b", buffering=0) as opened:
        opened.write(bytes(file.stat().st_size))


def remove(path: Path) -> None:
    """Overwrite and remove a job's files.  Raises OSError."""
    for suffix in _ALL_SUFFIXES:
        file = beside(path, suffix)
        if file.exists():
            overwrite(file)
            file.unlink()


def move(path: Path, aside: Path) -> None:
    """Give a job's files another name.  Raises OSError."""
    for suffix in _ALL_SUFFIXES:
        if (file := beside(path, suffix)).exists():
            file.rename(beside(aside, suffix))


if TYPE_CHECKING:

    def _fulfils(job: UnreadJob) -> OpenJob:
        return job
