"""The notes of saves under way, and what else a save of a guest depends on in dom0.

A note is a small file that outlives the process that wrote it, and a boot of the host, as the saved
guest does.  As long as it is there, nobody here touches its domain.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final
from uuid import UUID

import msgspec

from pgofflined.core.domains import DomainIdentity, DomainInfo
from pgofflined.core.errors import PortError
from pgofflined.core.saves import FileSeen, SaveFacts, SaveNote, left_over, stand_of, under_way

NOTES: Final = Path("/var/lib/pgofflined/notes")
# Where libxl keeps the configuration of the guests it has created (libxl_internal.c,
# libxl__userdata_path); `xl save` puts it into the file.
_CONFIGS: Final = Path("/var/lib/xen")
_SUFFIX: Final = ".save"
_LOCK: Final = "lock"
_MAX_NOTE: Final = 1 << 16
_OTHERS: Final = stat.S_IRWXG | stat.S_IRWXO


def see(path: Path) -> FileSeen | None:
    """A regular file as it is now, None where there is none."""
    try:
        found = path.lstat()
    except OSError:
        return None
    if not stat.S_ISREG(found.st_mode):
        return None
    return FileSeen(device=found.st_dev, inode=found.st_ino, size=found.st_size)


def note_path(uuid: UUID, notes: Path = NOTES) -> Path:
    """Where the note of a guest is."""
    return notes / f"{uuid}{_SUFFIX}"


def unfinished_save(uuid: UUID, notes: Path = NOTES) -> str | None:
    """The path of the note of a guest, None where it has none.  Raises PortError."""
    path = note_path(uuid, notes)
    try:
        path.lstat()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise PortError(f"whether {path} is there cannot be told: {error}") from error
    return str(path)


def write_note(note: SaveNote, notes: Path = NOTES, *, new: bool) -> Path:
    """Write a note so that it is on the disk.  Raises OSError, also for a new one that is there."""
    path = note_path(note.domain.uuid, notes)
    if new and os.path.lexists(path):
        raise FileExistsError(f"{path} is there already")
    fresh = path.with_suffix(".new")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    with os.fdopen(os.open(fresh, flags, 0o600), "wb") as file:
        file.write(msgspec.json.encode(note))
        file.flush()
        os.fsync(file.fileno())
    if new:
        os.link(fresh, path)
        fresh.unlink()
    else:
        fresh.replace(path)
    sync_directory(notes)
    return path


def sync_directory(path: Path) -> None:
    """Have a directory's entries on the disk.  Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def directory_trouble(path: Path) -> str | None:
    """Why guests must not be saved into a directory; None where they may."""
    try:
        found = path.stat(follow_symlinks=False)
    except OSError as error:
        return f"{path} (relocation.save_directory) cannot be used: {error.strerror or error}"
    if not stat.S_ISDIR(found.st_mode):
        return f"{path} (relocation.save_directory) is no directory"
    if found.st_uid != os.geteuid() or found.st_mode & _OTHERS:
        return (
            f"{path} (relocation.save_directory) may be read or changed by others, and guests' "
            f"memory would lie there; `chown root {path}` and `chmod 700 {path}`"
        )
    return None


@contextmanager
def only_one(notes: Path = NOTES) -> Iterator[bool]:
    """Be the one process that saves and restores, as long as it lives; False where another is.

    No process that it starts is taken for it.  Raises OSError.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(notes / _LOCK, flags, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def _is_one_at_work(notes: Path) -> bool:
    try:
        descriptor = os.open(notes / _LOCK, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        # Shared: two that look do not take each other for one at work.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


class Saves:
    """Looks at notes and directories.  ``boot`` tells this boot of the host from any other."""

    def __init__(
        self,
        boot: str = "",
        *,
        notes: Path = NOTES,
        configs: Path = _CONFIGS,
    ) -> None:
        self._boot = boot
        self._notes = notes
        self._configs = configs

    def facts(self, domain: DomainIdentity, directory: Path, serves: str | None) -> SaveFacts:
        """What decides whether a guest may be saved.  Raises PortError."""
        trouble = directory_trouble(directory)
        free = 0
        if trouble is None:
            space = os.statvfs(directory)
            free = space.f_bavail * space.f_frsize
        config = self._configs / f"userdata-d.{domain.domid}.{domain.uuid}.libxl-json"
        return SaveFacts(
            serves=serves,
            unfinished=unfinished_save(domain.uuid, self._notes),
            has_config=config.is_file(),
            trouble=trouble,
            free=free,
        )

    def left_over(self, domains: Iterable[DomainInfo]) -> tuple[str, ...]:
        """What a person is to do about each note.  Raises PortError."""
        known = tuple(domains)
        try:
            paths = sorted(self._notes.glob(f"*{_SUFFIX}"))
        except OSError as error:
            raise PortError(f"notes of saves in {self._notes} cannot be read: {error}") from error
        at_work = _is_one_at_work(self._notes)
        return tuple(self._describe(path, known, at_work=at_work) for path in paths)

    def _describe(self, path: Path, domains: tuple[DomainInfo, ...], *, at_work: bool) -> str:
        try:
            with path.open("rb") as file:
                note = msgspec.json.decode(file.read(_MAX_NOTE), type=SaveNote)
        except (OSError, msgspec.MsgspecError) as error:
            return (
                f"{path}, the note of a save, cannot be read ({error}): look with `xl list` "
                "whether its guest runs, and for its file in relocation.save_directory"
            )
        if at_work:
            return under_way(note)
        stand = stand_of(note.domain.uuid, domains)
        same_boot = note.boot == self._boot
        return left_over(note, stand, same_boot=same_boot, path=str(path))
