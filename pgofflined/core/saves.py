"""Saving a guest into a file and restoring it: what may follow what.

A guest that is saved exists in a file only, until it is restored.  Two mistakes would ruin it: to
start it twice, which destroys its disks, and to lose the file while it runs nowhere.  So the
process that does both steps goes on only where it has seen with its own eyes how the step before
ended, and stops for a person in every other case.  Nobody else goes on with its work: what a
process that died has left is described, and touched no more.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, assert_never
from uuid import UUID

from pgofflined.core.domains import DomainIdentity, DomainInfo

_RESTORE_TRIES: Final = 2


class SavePhase(StrEnum):
    """What was begun last.  Each is noted before it is begun."""

    SAVING = "saving"
    RESTORING = "restoring"


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveNote:
    """What outlives the process that saves and restores a guest.

    ``file`` is the absolute path of the guest's state.  ``boot`` is the host's boot, for a guest
    does not survive it but the file does.
    """

    domain: DomainIdentity
    phase: SavePhase
    file: str
    boot: str


class Stand(StrEnum):
    """How a guest stands on this host, by its uuid.  A domain that is dying runs no more."""

    ABSENT = "absent"
    RUNS = "runs"
    STANDS_STILL = "stands_still"
    SEVERAL = "several"


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSeen:
    """A file by its device, inode and size in bytes."""

    device: int
    inode: int
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GoOn:
    """The step has done what it should."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Again:
    """The step has done nothing, certainly, and may be tried once more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stays:
    """The guest was not saved and runs on as it was."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unclear:
    """Nothing more may be done without a person."""

    what: str


def stand_of(uuid: UUID, domains: Iterable[DomainInfo]) -> Stand:
    """How the guest with this uuid stands."""
    found = [domain for domain in domains if domain.uuid == uuid and not domain.dying]
    if not found:
        return Stand.ABSENT
    if len(found) > 1:
        return Stand.SEVERAL
    still = found[0].paused or found[0].shutdown is not None
    return Stand.STANDS_STILL if still else Stand.RUNS


def after_save(
    *, succeeded: bool, stand: Stand, made: FileSeen, file: FileSeen | None
) -> GoOn | Stays | Unclear:
    """What follows when the toolstack has ended saving; ``made`` is the file that it was given.

    The toolstack destroys the domain only when all of it is in the file, and lets it run on where
    that failed.
    """
    if not succeeded:
        if stand is Stand.RUNS:
            return Stays()
        return Unclear(what="the save failed, and the guest does not run")
    if stand is not Stand.ABSENT:
        return Unclear(what="the save succeeded, and the guest is still there")
    if file is None or (file.device, file.inode) != (made.device, made.inode) or not file.size:
        return Unclear(what="the save succeeded, and its file is not there or not the one it was")
    return GoOn()


def after_restore(
    *, succeeded: bool, stand: Stand, saved: FileSeen, file: FileSeen | None, tries: int
) -> GoOn | Again | Unclear:
    """What follows when the toolstack has ended restoring, for the ``tries``-th time."""
    if succeeded:
        if stand is Stand.RUNS:
            return GoOn()
        return Unclear(what="the restore succeeded, and the guest does not run")
    if stand is not Stand.ABSENT:
        return Unclear(what="the restore failed, and has left something of the guest")
    if file != saved:
        return Unclear(what="the restore failed, and the file is not what was saved")
    if tries >= _RESTORE_TRIES:
        return Unclear(what=f"the restore failed {tries} times")
    return Again()


def under_way(note: SaveNote) -> str:
    """What is told of a save that an earlier daemon began and that goes on."""
    return (
        f"the guest that was d{note.domain.domid} (uuid {note.domain.uuid}) is being saved and "
        "restored, as an earlier daemon began it; do nothing about it"
    )


def left_over(note: SaveNote, stand: Stand, *, same_boot: bool, path: str) -> str:
    """What a person is to do about a save that nobody goes on with; ``path`` is its note's."""
    domid = note.domain.domid
    begin = (
        f"a save of the guest that was d{domid} (uuid {note.domain.uuid}) was cut off; once no xl "
        "is at work on it any more (`pgrep -a xl`)"
    )
    done = f"then remove {path}; until then the guest is left alone"
    match stand:
        case Stand.ABSENT:
            if note.phase is SavePhase.SAVING:
                how = f"`xl restore {note.file}` lets it run, if the file is whole"
            else:
                how = f"`xl restore {note.file}` lets it run"
            if not same_boot:
                how += ", unless it has run elsewhere since the host was booted"
            return f"{begin} and it does not run: {how}; {done}"
        case Stand.RUNS:
            return f"{begin} and it runs: do not restore {note.file} any more, remove it; {done}"
        case Stand.STANDS_STILL:
            return (
                f"{begin} and it stands still: `xl resume` or `xl unpause` lets it run; do not "
                f"restore {note.file} as well; {done}"
            )
        case Stand.SEVERAL:
            return (
                f"{begin} and several domains have its uuid: destroy all but one at once, or its "
                f"disks will be ruined; {done}"
            )
        case _:
            assert_never(stand)


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveFacts:
    """What decides whether a PV guest may be saved, besides what decides on any migration.

    ``serves`` says what other domains need it for, ``unfinished`` is the path of the note of an
    earlier save.  ``trouble`` is what is wrong with the directory, in which ``free`` bytes are.
    """

    serves: str | None
    unfinished: str | None
    has_config: bool
    trouble: str | None
    free: int
