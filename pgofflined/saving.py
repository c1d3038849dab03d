"""The notes of saves under way, and what else a save of a guest depends on in dom0.

A note is a small file that outlives the process that wrote it, and a boot of the host, as the saved
guest does.  As long as it is there, nobody here touches its domain.  Beside it is a log of what xl
said.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final
from uuid import UUID

import msgspec

from pgofflined.core.domains import DomainIdentity, DomainInfo
from pgofflined.core.errors import PortError
from pgofflined.core.saves import (
    FileSeen,
    LeftOver,
    SaveFacts,
    SaveNote,
    Stand,
    UnfinishedSave,
    left_over,
    seen_to_run,
    stand_of,
    under_way,
    without_note,
)
from pgofflined.core.text import printable

NOTES: Final = Path("/var/lib/pgofflined/notes")
# Where libxl keeps the configuration of the guests it has created (libxl_internal.c,
# libxl__userdata_path); `xl save` puts it into the file.
_CONFIGS: Final = Path("/var/lib/xen")
# Where libvirt keeps the state of its running guests, as XML (libxl_conf.c: stateDir).
_LIBVIRT: Final = Path("/run/libvirt/libxl")
MOUNTS: Final = Path("/proc/self/mountinfo")
_IN_MEMORY: Final = frozenset({"ramfs", "tmpfs"})
# The host's own programs need the file system as well; the smaller of the two is kept free.
_RESERVE_PART: Final = 20
_RESERVE: Final = 1 << 30
_SUFFIX: Final = ".save"
_LOG_SUFFIX: Final = ".log"
_STATE_SUFFIX: Final = ".state"
_LOCK: Final = "lock"
_MAX_NOTE: Final = 1 << 16
_MAX_XML: Final = 1 << 20
_TAIL: Final = 4096
_LAST_LINES: Final = 4
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


def log_path(uuid: UUID, notes: Path = NOTES) -> Path:
    """Where what xl says of a guest is."""
    return notes / f"{uuid}{_LOG_SUFFIX}"


def state_path(uuid: UUID, directory: Path) -> Path:
    """Where a guest is saved to."""
    return directory / f"{uuid}{_STATE_SUFFIX}"


def open_log(uuid: UUID, notes: Path = NOTES) -> int:
    """A descriptor of an empty log.  Raises OSError."""
    # To append: xl and its helper write through descriptors of their own.
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
    return os.open(log_path(uuid, notes), flags, 0o600)


def last_words(log: int) -> str:
    """The last lines of a log, on one line."""
    try:
        size = os.fstat(log).st_size
        tail = os.pread(log, _TAIL, max(0, size - _TAIL))
    except OSError as error:
        return f"its log cannot be read: {error}"
    lines = [line.strip() for line in tail.decode("utf-8", "replace").splitlines()]
    said = [printable(line) for line in lines if line]
    return "; ".join(said[-_LAST_LINES:]) or "nothing"


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
    """Write a note so that it is on the disk.

    Raises OSError, also for a new one that is there already; a new one then is not left behind.
    """
    path = note_path(note.domain.uuid, notes)
    if new and os.path.lexists(path):
        raise FileExistsError(f"{path} is there already")
    fresh = path.with_suffix(".new")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    with os.fdopen(os.open(fresh, flags, 0o600), "wb") as file:
        file.write(msgspec.json.encode(note))
        file.flush()
        os.fsync(file.fileno())
    if not new:
        fresh.replace(path)
        sync_directory(notes)
        return path
    os.link(fresh, path)
    try:
        fresh.unlink()
        sync_directory(notes)
    except OSError:
        path.unlink()
        raise
    return path


def sync_directory(path: Path) -> None:
    """Have a directory's entries on the disk.  Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def directory_trouble(path: Path, mounts: Path = MOUNTS) -> str | None:
    """Why guests must not be saved into a directory; None where they may."""
    try:
        found = path.stat(follow_symlinks=False)
        kind = _file_system(found.st_dev, mounts.read_text(encoding="utf-8", errors="replace"))
    except OSError as error:
        return f"{path} (relocation.save_directory) cannot be used: {error.strerror or error}"
    if not stat.S_ISDIR(found.st_mode):
        return f"{path} (relocation.save_directory) is no directory"
    if found.st_uid != os.geteuid() or found.st_mode & _OTHERS:
        return (
            f"{path} (relocation.save_directory) may be read or changed by others, and guests' "
            f"memory would lie there; `chown root {path}` and `chmod 700 {path}`"
        )
    if kind in _IN_MEMORY:
        return (
            f"{path} (relocation.save_directory) is on {kind}: a saved guest would take dom0's "
            "memory and be lost with a boot of the host; choose a directory on a disk"
        )
    return None


def _file_system(device: int, mountinfo: str) -> str | None:
    """Type of the file system with this device number, if it is mounted (proc(5), mountinfo)."""
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in mountinfo.splitlines():
        fields, _, rest = line.partition(" - ")
        if fields.split()[2:3] == [number]:
            return rest.partition(" ")[0]
    return None  # btrfs has numbers of its own for its subvolumes


@contextmanager
def only_one(notes: Path = NOTES, name: UUID | None = None) -> Iterator[int | None]:
    """Be the one process that saves and restores, as long as it lives; None where another is.

    No process that it starts is taken for it, unless that is given the descriptor.  ``name`` is
    the guest that it is for.  Raises OSError.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(notes / _LOCK, flags, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            # Nobody is to be told that the last one is still at it.
            os.ftruncate(descriptor, 0)
            if name is not None:
                os.pwrite(descriptor, str(name).encode(), 0)
            yield descriptor
    finally:
        os.close(descriptor)


def _is_at_work_on(notes: Path) -> str:
    """The uuid of the guest that the holder of the lock is for."""
    return (notes / _LOCK).read_text(encoding="ascii", errors="replace")


def is_under_way(uuid: UUID, notes: Path = NOTES) -> bool:
    """Whether a process saves and restores this guest now."""
    try:
        with only_one(notes) as alone:
            return alone is None and _is_at_work_on(notes) == str(uuid)
    except OSError:
        return False  # nor could anybody else have the lock


class Saves:
    """Looks at notes and directories.  ``boot`` tells this boot of the host from any other."""

    def __init__(
        self,
        boot: str = "",
        *,
        notes: Path = NOTES,
        configs: Path = _CONFIGS,
        libvirt: Path = _LIBVIRT,
        mounts: Path = MOUNTS,
    ) -> None:
        self._boot = boot
        self._notes = notes
        self._configs = configs
        self._libvirt = libvirt
        self._mounts = mounts

    def facts(self, domain: DomainIdentity, directory: Path, serves: str | None) -> SaveFacts:
        """What decides whether a guest may be saved.  Raises PortError."""
        trouble = directory_trouble(directory, self._mounts)
        try:
            free = 0 if trouble is not None else _free(directory)
            has_config = self._userdata(domain, "libxl-json").is_file()
            manager = self._manager(domain)
        except OSError as error:
            raise PortError(
                f"whether d{domain.domid} may be saved cannot be told: {error}"
            ) from error
        return SaveFacts(
            serves=serves,
            manager=manager,
            unfinished=unfinished_save(domain.uuid, self._notes),
            has_config=has_config,
            trouble=trouble,
            free=free,
        )

    def _userdata(self, domain: DomainIdentity, kind: str) -> Path:
        return self._configs / f"userdata-d.{domain.domid}.{domain.uuid}.{kind}"

    def _manager(self, domain: DomainIdentity) -> str | None:
        # libxl keeps the configuration of whatever client has created the guest; libvirt takes
        # those for its own that have this beside it (libxl_driver.c, libxlReconnectDomain).
        if self._userdata(domain, "libvirt-xml").exists():
            return "libvirt"
        # Files are named after guests, and names are no good to look up: every one is read.
        for path in self._libvirt.glob("*.xml"):
            with suppress(FileNotFoundError), path.open("rb") as file:
                if str(domain.uuid).encode() in file.read(_MAX_XML):
                    return "libvirt"
        return None

    def left_over(self, look: Callable[[], Iterable[DomainInfo]]) -> tuple[UnfinishedSave, ...]:
        """The save of each note; ``look`` gives all domains.  Raises PortError."""
        try:
            paths = sorted(self._notes.glob(f"*{_SUFFIX}"))
            if not paths:
                return ()
            # While we hold it, nobody saves: what runs then is no guest on its way into a file.
            with only_one(self._notes) as alone:
                busy = None if alone is not None else _is_at_work_on(self._notes)
                domains = tuple(look())
                return tuple(self._describe(path, domains, busy=busy) for path in paths)
        except OSError as error:
            raise PortError(f"notes of saves in {self._notes} cannot be read: {error}") from error

    def _describe(
        self, path: Path, domains: tuple[DomainInfo, ...], *, busy: str | None
    ) -> UnfinishedSave:
        try:
            with path.open("rb") as file:
                note = msgspec.json.decode(file.read(_MAX_NOTE), type=SaveNote)
        except (OSError, msgspec.MsgspecError) as error:
            text = (
                f"{path}, the note of a save, cannot be read ({error}): look with `xl list` "
                "whether its guest runs, and for its file in relocation.save_directory"
            )
            return UnfinishedSave(text=text)
        if busy == str(note.domain.uuid):
            return under_way(note)
        stand = stand_of(note.domain.uuid, domains)
        mine = note_path(note.domain.uuid, self._notes)
        if busy is None and stand is Stand.RUNS and path == mine:
            note = self._seen_to_run(note)
        log = log_path(note.domain.uuid, self._notes)
        left = LeftOver(
            note=note,
            path=str(path),
            log=str(log) if log.exists() else None,
            has_file=see(Path(note.file)) is not None,
            same_boot=note.boot == self._boot,
        )
        return UnfinishedSave(text=left_over(left, stand), domain=note.domain)

    def _seen_to_run(self, note: SaveNote) -> SaveNote:
        later = seen_to_run(note)
        if later != note:
            with suppress(OSError):  # it is tried again with the next look
                write_note(later, self._notes, new=False)
        return later

    def without_note(self, directory: Path) -> tuple[str, ...]:
        """What a person is to do about each guest's file that no note is of."""
        told = []
        with suppress(OSError):  # whoever wants to save a guest is told what is with it
            for path in sorted(directory.glob(f"*{_STATE_SUFFIX}")):
                try:
                    uuid = UUID(path.stem)
                except ValueError:
                    continue  # somebody else's
                # In this order: what is removed with its note meanwhile is not told of.
                if not os.path.lexists(note_path(uuid, self._notes)) and see(path) is not None:
                    told.append(without_note(str(path), uuid))
        return tuple(told)


def _free(directory: Path) -> int:
    """Bytes that may be written into a directory's file system."""
    space = os.statvfs(directory)
    reserve = min(_RESERVE, space.f_blocks * space.f_frsize // _RESERVE_PART)
    return max(0, space.f_bavail * space.f_frsize - reserve)
