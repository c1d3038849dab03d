"""Saving a guest into a file and restoring it: what may follow what.

The guest is paused while its file is had on the disk, and destroyed only then: it exists in a file
only from there until it is restored.  Two mistakes would ruin it: to start it twice, which destroys
its disks, and to lose the file while it runs nowhere.  So the process that does all steps goes on
only where it has seen with its own eyes how the step before ended, and stops for a person in every
other case.  Nobody else goes on with its work: what a
process that died has left is described, and touched no more.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final, assert_never
from uuid import UUID

from pgofflined.core.domains import DomainIdentity, DomainInfo

# How the process ends that saves and restores (sysexits(3): TEMPFAIL, IOERR, SOFTWARE).
EX_STAYS: Final = 75
EX_RUNS_ON: Final = 74
EX_UNCLEAR: Final = 70
_RESTORE_TRIES: Final = 2


class SavePhase(StrEnum):
    """What was begun last, noted before it is begun; the last one when it is seen to be done.

    ``SAVED``: all of the guest is in the file, which is on the disk, and it is being destroyed.
    ``RESTORED``: the guest has run since its file was written, which would roll it back.
    """

    SAVING = "saving"
    SAVED = "saved"
    RESTORING = "restoring"
    RESTORED = "restored"


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
    """How a guest stands on this host, by its uuid.  A domain that is dying runs no more.

    ``PAUSED`` is paused only; ``STANDS_STILL`` has suspended itself, has crashed or is shut down.
    """

    ABSENT = "absent"
    RUNS = "runs"
    PAUSED = "paused"
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
    """Nothing more may be done without a person.

    ``has_run``: certainly since the file was written.
    """

    what: str
    has_run: bool = False


def stand_of(uuid: UUID, domains: Iterable[DomainInfo]) -> Stand:
    """How the guest with this uuid stands."""
    found = [domain for domain in domains if domain.uuid == uuid and not domain.dying]
    if not found:
        return Stand.ABSENT
    if len(found) > 1:
        return Stand.SEVERAL
    if found[0].shutdown is not None:
        return Stand.STANDS_STILL
    return Stand.PAUSED if found[0].paused else Stand.RUNS


def held(domain: DomainIdentity, domains: Iterable[DomainInfo]) -> int | None:
    """For how long this very domain has run, where it is paused and no other has its uuid.

    None where that is not so.  As long as it is the same, the domain is what it was.
    """
    found = [one for one in domains if one.uuid == domain.uuid and not one.dying]
    if stand_of(domain.uuid, found) is not Stand.PAUSED or found[0].identity != domain:
        return None
    return found[0].cpu_time


def after_save(
    *, succeeded: bool, stand: Stand, is_held: bool, made: FileSeen, file: FileSeen | None
) -> GoOn | Stays | Unclear:
    """What follows when the toolstack has ended saving; ``made`` is the file that it was given.

    The toolstack leaves the domain paused when all of it is in the file, and lets it run on where
    that failed.  Where it runs, its file is old in either case.
    """
    if stand is Stand.RUNS:
        return Stays()
    if not succeeded:
        return Unclear(what="the save failed, and the guest does not run")
    if not is_held:
        return Unclear(what="the save succeeded, and the guest is not just paused")
    if file is None or (file.device, file.inode) != (made.device, made.inode) or not file.size:
        return Unclear(what="the save succeeded, and its file is not there or not the one it was")
    return GoOn()


def before_destroy(*, stand: Stand, then: int, now: int | None) -> GoOn | Stays | Unclear:
    """Whether the guest may be destroyed, its file being on the disk.

    ``then`` and ``now`` are for how long it had run when the save had ended and has run by now,
    None where it is not held any more.
    """
    if now == then:
        return GoOn()
    if stand is Stand.RUNS:
        return Stays()
    what = "somebody has let the guest run, or destroyed it, while its file was had on the disk"
    return Unclear(what=what, has_run=now is not None)


def after_destroy(
    *, succeeded: bool, stand: Stand, saved: FileSeen, file: FileSeen | None
) -> GoOn | Unclear:
    """What follows when the toolstack has ended destroying the guest that was saved."""
    if not succeeded:
        return Unclear(what="the guest was saved, and could not be destroyed")
    if stand is not Stand.ABSENT:
        return Unclear(what="the guest was saved and destroyed, and is still there")
    if file != saved:
        return Unclear(what="the guest was destroyed, and the file is not what was saved")
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


def seen_to_run(note: SaveNote) -> SaveNote:
    """The note of a save that nobody is at any more, once its guest was seen to run.

    Its file is older than what the guest has done since, also when it does not run any more.
    """
    return replace(note, phase=SavePhase.RESTORED)


@dataclass(frozen=True, slots=True, kw_only=True)
class UnfinishedSave:
    """A save whose note is there, and in a sentence what a person is to do about it.

    ``domain`` is what the guest was, None where the note cannot be read.  ``is_under_way``: a
    process is at work on it, so nothing is to be done.
    """

    text: str
    domain: DomainIdentity | None = None
    is_under_way: bool = False


def under_way(note: SaveNote) -> UnfinishedSave:
    """A save that an earlier daemon began and that goes on."""
    text = (
        f"the guest that was d{note.domain.domid} (uuid {note.domain.uuid}) is being saved and "
        "restored, as an earlier daemon began it; do nothing about it"
    )
    return UnfinishedSave(text=text, domain=note.domain, is_under_way=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOver:
    """A save that nobody goes on with.

    ``path`` is its note's, ``log`` that of xl's output, None where there is none; ``has_file`` is
    whether the guest's file is there.
    """

    note: SaveNote
    path: str
    log: str | None
    has_file: bool
    same_boot: bool


def left_over(left: LeftOver, stand: Stand) -> str:
    """What a person is to do about it."""
    note = left.note
    begin = (
        f"a save of the guest that was d{note.domain.domid} (uuid {note.domain.uuid}) was cut off; "
        "once no xl is at work on it any more (`pgrep -af 'libxl-save-helper|xl save'`; an `xl "
        "restore` beside a guest that runs is what monitors it)"
    )
    remove = f"remove {note.file}, then {left.path}" if left.has_file else f"remove {left.path}"
    log = "" if left.log is None else f" ({left.log} has xl's last words)"
    done = f"then {remove}; until then the guest is left alone{log}"
    match stand:
        case Stand.ABSENT:
            return f"{begin} and it does not run: {_when_absent(left)}; {done}"
        case Stand.RUNS:
            return f"{begin} and it runs: do not restore {note.file} any more; {done}"
        case Stand.PAUSED | Stand.STANDS_STILL:
            return f"{begin} and it stands still: {_when_still(left, stand)}; {done}"
        case Stand.SEVERAL:
            return (
                f"{begin} and several domains have its uuid: destroy all but one at once, or its "
                f"disks will be ruined; {done}"
            )
        case _:
            assert_never(stand)


def _when_still(left: LeftOver, stand: Stand) -> str:
    note = left.note
    if note.phase is SavePhase.RESTORING and left.has_file:
        # Let go, what is restored in part only would run on memory that is not its own.
        return (
            "if `xl list` shows 0.0 as its time, it is restored in part only, so `xl destroy` it; "
            f"then {_when_absent(left)}; otherwise `xl unpause` lets it run, and do not restore "
            f"{note.file} as well"
        )
    if note.phase is SavePhase.SAVED and stand is Stand.PAUSED and left.has_file:
        return _either(note)
    lets_it_run = (
        "`xl unpause`"
        if stand is Stand.PAUSED
        else "`xl resume` (Xen 4.20 or later), then `xl unpause`,"
    )
    return f"{lets_it_run} lets it run; do not restore {note.file} as well"


def _either(note: SaveNote) -> str:
    # Of a guest that is destroyed in part, devices may be gone: only its file is whole then.
    return (
        f"either `xl destroy` it, after which `xl restore {note.file}` lets it run, "
        f"{_unless_it_has_run(note.file)}; or `xl unpause` lets it run, if nothing of it is "
        "destroyed yet; never both"
    )


def _when_absent(left: LeftOver) -> str:
    note = left.note
    if note.phase is SavePhase.RESTORED:
        return (
            f"it has run since {note.file} was written, so do not restore that, which would roll "
            "it back; start it anew"
        )
    if not left.has_file:
        return (
            f"{note.file} is not there; if that is because its file system is not mounted, mount "
            "it; if the file is lost, start the guest anew"
        )
    whole = ", if the file is whole" if note.phase is SavePhase.SAVING else ""
    boot = "" if left.same_boot else " (the host was booted since)"
    return f"`xl restore {note.file}` lets it run{whole}, {_unless_it_has_run(note.file)}{boot}"


def _unless_it_has_run(file: str) -> str:
    return (
        f"unless it has run since {file} was written, here or elsewhere; then it would be rolled "
        "back: start it anew instead"
    )


def when_unclear(note: SaveNote, path: str) -> str:
    """What a person is to do where it is not known how the guest stands; ``path`` is the note's."""
    look = "look at `xl list`"
    done = f"then remove {note.file}, then {path}"
    if note.phase is SavePhase.RESTORED:
        return (
            f"{look}; the guest has run since {note.file} was written, so it would be "
            f"rolled back: do not restore {note.file}; if it is nowhere, start it anew; {done}"
        )
    still = ""
    if note.phase is SavePhase.SAVING:
        domid = note.domain.domid
        still = (
            f"; if it is suspended, `xl resume {domid}` (Xen 4.20 or later), and if it is paused, "
            f"`xl unpause {domid}` lets it run"
        )
    elif note.phase is SavePhase.SAVED:
        still = f"; if it is still there and paused, {_either(note)}"
    return (
        f"{look}{still}; only if the guest is nowhere, `xl restore {note.file}` lets it run, "
        f"{_unless_it_has_run(note.file)}; {done}"
    )


def without_note(file: str, uuid: UUID) -> str:
    """What a person is to do about a file that no note is of."""
    return (
        f"{file} holds the memory of the guest with uuid {uuid}, and no save of it is noted: if "
        "the guest runs (`xl vm-list`), or has run since the file was written, remove it; only if "
        f"not, `xl restore {file}` lets it run; as long as the file is there, the guest is not "
        "saved again"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveFacts:
    """What decides whether a PV guest may be saved, besides what decides on any migration.

    ``serves`` says what other domains need it for, ``manager`` is who else looks after it,
    ``unfinished`` is the path of the note of an earlier save.  ``trouble`` is what is wrong with
    the directory, in which ``free`` bytes are, a reserve left out.
    """

    serves: str | None
    manager: str | None
    unfinished: str | None
    has_config: bool
    trouble: str | None
    free: int
