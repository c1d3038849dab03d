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
  and written again, as far as it differs, when the guest stands still.  Whether it counts says the
  stage, a few bytes in a file of their own, each time written by one system call that is made or
  not made when a process dies.  Empty: the guest may have been asked to suspend, no more.  Then,
  for a guest that has (``hold``): it is to be paused, or it is held, with the processor time that
  it had used until then.  From ``begin``, after the last transaction of ``keep`` and before the
  first change, until ``settled``, when the guest's memory is whole: what was kept may have been
  changed.  So at any other stage nothing is to be undone, whatever the record holds; at this one
  the record is what the guest was when it stood still, contents and all, and Xen is asked what has
  become of it.
- *Nothing is put right in a guest that has run since.*  The processor time tells: it is the same as
  long as no vCPU of it has run, whoever has resumed, paused or suspended it meanwhile.
- *No more than one group.*  A job has at most one group of pages under way.  When the next is
  recorded, everything of the one before is settled in the guest, and the stage says so.
- *What is known from elsewhere is not recorded.*  Whether a page was exchanged, Xen knows; see
  ``exchanger.recovery``.

The files hold pages of guests.  They must never reach a disk: the directory has to be on ramfs, or
on a tmpfs that cannot be swapped out (``diskless``), which is looked at before each job.  They are
for root only.  What they hold is overwritten before they are removed, and removed when the job has
no more use for it, which may be before its end (``leave``).
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from pgofflined.core.domains import DomainIdentity
from pgofflined.core.errors import PortError
from pgofflined.jobfile import LeftJob, StoredJob, create
from pgofflined.jobheader import ASIDE, SUFFIX, move, note_began, path_of, remove
from pgofflined.jobread import InUse, NeverBegun, load
from pgofflined.ports import JobRecord, OpenJob, UnfinishedJob

_log = logging.getLogger(__name__)


class JobStore:
    """``ports.Journal`` in a directory.

    Where ``refusal`` gives a reason no job is begun; what earlier processes left is read all the
    same.
    """

    def __init__(
        self, directory: Path, *, refusal: Callable[[], str | None] = lambda: None
    ) -> None:
        self._directory = directory
        self._refusal = refusal
        self._lock = threading.Lock()
        self._left: dict[DomainIdentity, LeftJob] = {}

    def open(self, record: JobRecord) -> OpenJob:
        """Begin a job, in place of one of the same domain that this process has ended.

        Raises PortError where it cannot be kept.
        """
        refusal = self._refusal()
        if refusal is not None:
            raise PortError(refusal)
        path = path_of(self._directory, record.domain)
        with self._lock:
            earlier = self._left.pop(record.domain, None)
            if earlier is not None:
                earlier.end()
            try:
                self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
                remove(path)
                job = StoredJob(path, create(path, record), record.domain, on_left=self._keep)
                note_began(path, record.began)
            except (OSError, sqlite3.Error) as error:
                raise PortError(
                    f"what an exchange changes in d{record.domain.domid} cannot be kept in "
                    f"{self._directory} ({error}); without that it is not begun"
                ) from error
            return job

    def _keep(self, job: LeftJob) -> None:
        with self._lock:
            self._left[job.domain] = job

    def done_with(self, domain: DomainIdentity) -> None:
        """Remove the record of a job that was left."""
        with self._lock:
            job = self._left.pop(domain, None)
            if job is not None:
                job.end()

    def unfinished(self) -> Sequence[UnfinishedJob]:
        """The jobs that earlier processes left, also those of which only the header can be read.

        Those of which it cannot even be read whose they are, are told and put aside.
        """
        for orphan in self._directory.glob(f"*{SUFFIX}-*"):
            owner = orphan.with_name(orphan.name.rpartition("-")[0])
            if not owner.exists():
                _tidy(owner, partial(remove, owner))
        paths = sorted(self._directory.glob(f"*{SUFFIX}"))
        return [found for path in paths if (found := self._load(path)) is not None]

    def _load(self, path: Path) -> UnfinishedJob | None:
        try:
            found = load(path, on_left=self._keep)
        except NeverBegun:
            _tidy(path, partial(remove, path))
            return None
        except InUse:
            _log.error("%s is in use by another process and left to it", path)
            return None
        except (ValueError, OSError) as error:
            aside = path.with_suffix(ASIDE)
            _log.critical(
                "the record of an exchange in %s cannot be read (%s), not even of which domain it "
                "is, and was moved to %s: look whether a domain stands still (`xl list`) that "
                "nobody works on, and restart it if one does",
                path,
                error,
                aside,
            )
            _tidy(path, partial(move, path, aside))
            return None
        return found


def _tidy(path: Path, act: Callable[[], None]) -> None:
    """What cannot be put away must keep nobody from the records of guests that stand still."""
    try:
        act()
    except OSError as error:
        _log.error("%s and what belongs to it could not be put away: %s", path, error)
