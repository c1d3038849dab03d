"""Saves one PV guest into a file and restores it: a program of its own, which outlives the daemon.

    python3 -m pgofflined.mover DOMID UUID DIRECTORY

What it may do after each step is in ``core.saves``.  It stops for no signal but SIGKILL, ends
nothing it has started, and removes the file and its note only where it has seen the guest run.

Exit status: 0, the guest was saved and restored; ``EX_STAYS``, it was not saved and runs on; any
other: whether it runs is not certain, and where a note is left a person has to look.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final, Protocol, assert_never
from uuid import UUID

from pgofflined.core.domains import DomainIdentity, DomainInfo, GuestKind
from pgofflined.core.errors import PortError
from pgofflined.core.frames import Domid
from pgofflined.core.saves import (
    Again,
    FileSeen,
    GoOn,
    SaveNote,
    SavePhase,
    Stand,
    Stays,
    Unclear,
    after_restore,
    after_save,
    stand_of,
)
from pgofflined.saving import (
    NOTES,
    directory_trouble,
    note_path,
    only_one,
    see,
    sync_directory,
    unfinished_save,
    write_note,
)
from pgofflined.store import read_boot_id

EX_STAYS: Final = os.EX_TEMPFAIL
EX_UNCLEAR: Final = os.EX_SOFTWARE
JOBS: Final = Path("/run/pgofflined/jobs")
MARK: Final = "pgofflined: "

# A destroyed domain is dying at once; Xen only may be slow to say so.
_LOOKS: Final = 20
_BETWEEN_LOOKS: Final = 0.5
_OOM_SCORE: Final = Path("/proc/self/oom_score_adj")


class MoverHost(Protocol):
    """The part of ``ports.Hypervisor`` that a save needs."""

    def domains(self) -> Sequence[DomainInfo]:
        """All domains."""
        ...

    def somebody_at(self, domid: Domid) -> str | None:
        """Who saves or migrates the domain."""
        ...

    def serves(self, domid: Domid) -> str | None:
        """What other domains need it for."""
        ...


class StaysError(Exception):
    """Nothing was done to the guest, or it was seen to run on."""


class UnclearError(Exception):
    """Nothing more may be done without a person."""


class Mover:
    """One guest's save and restore.  ``run_xl`` runs xl with arguments, for its exit status."""

    def __init__(
        self,
        *,
        xen: MoverHost,
        domain: DomainIdentity,
        directory: Path,
        run_xl: Callable[[Sequence[str]], int],
        boot: str,
        notes: Path = NOTES,
        jobs: Path = JOBS,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._xen = xen
        self._domain = domain
        self._file = directory / f"{domain.uuid}.state"
        self._run_xl = run_xl
        self._boot = boot
        self._notes = notes
        self._jobs = jobs
        self._sleep = sleep

    def run(self) -> None:
        """Do it.  Raises StaysError, UnclearError."""
        with ExitStack() as stack:
            try:
                alone = stack.enter_context(only_one(self._notes))
            except OSError as error:
                raise StaysError(f"{self._notes} cannot be used: {error}") from error
            if not alone:
                raise StaysError("another guest is being saved and restored")
            self._run_alone()

    def _run_alone(self) -> None:
        self._refuse_what_changed()
        self._note(SavePhase.SAVING, new=True)
        try:
            made = self._make_file()
        except (OSError, StaysError) as error:
            self._forget_note()
            raise StaysError(f"{self._file} cannot be made: {error}") from error
        saved = self._save(made)
        self._note(SavePhase.RESTORING, new=False)
        self._restore(saved)
        self._file.unlink()
        self._forget_note()

    def _refuse_what_changed(self) -> None:
        """What the daemon has seen may be otherwise by now."""
        try:
            domid = self._domain.domid
            info = self._running()
            if info.kind is not GuestKind.PV or info.is_dom0:
                raise StaysError(f"d{domid} is no PV guest")
            problem = (
                directory_trouble(self._file.parent)
                or self._xen.serves(domid)
                or self._xen.somebody_at(domid)
                or unfinished_save(self._domain.uuid, self._notes)
            )
        except PortError as error:
            raise StaysError(f"nothing was done: {error}") from error
        if problem is not None:
            raise StaysError(f"d{domid} is not saved: {problem}")

    def _running(self) -> DomainInfo:
        """The guest, if it runs and is the one.  Raises StaysError, PortError."""
        domains = self._xen.domains()
        found = [info for info in domains if info.identity == self._domain]
        if not found or stand_of(self._domain.uuid, domains) is not Stand.RUNS:
            raise StaysError(f"d{self._domain.domid} is not there, or does not run")
        return found[0]

    def _make_file(self) -> FileSeen:
        """The empty file, which no other process was given.  Raises StaysError, OSError."""
        # Whoever exchanges pages of it has a record, looks for our note after he has made it, and
        # has made it before we look for that.
        records = list(self._jobs.glob(f"d{self._domain.domid}-*"))
        if records:
            raise StaysError(f"an exchange in d{self._domain.domid} is under way ({records[0]})")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        os.close(os.open(self._file, flags, 0o600))
        made = see(self._file)
        if made is None:
            raise StaysError("it is gone again")
        return made

    def _save(self, made: FileSeen) -> FileSeen:
        # Its xl has no time limit and is not ended: half-way it would leave the guest suspended.
        status = self._run_xl(["save", str(self._domain.domid), str(self._file)])
        file = see(self._file)
        stand = self._stand(Stand.RUNS if status else Stand.ABSENT)
        verdict = after_save(succeeded=not status, stand=stand, made=made, file=file)
        match verdict:
            case GoOn():
                assert file is not None  # noqa: S101 - GoOn says so
                self._have_it_on_disk()
                return file
            case Stays():
                self._file.unlink(missing_ok=True)
                self._forget_note()
                raise StaysError(f"xl could not save d{self._domain.domid} (status {status})")
            case Unclear(what=what):
                raise UnclearError(what)
            case _:
                assert_never(verdict)

    def _have_it_on_disk(self) -> None:
        descriptor = os.open(self._file, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        sync_directory(self._file.parent)

    def _restore(self, saved: FileSeen) -> None:
        tries = 0
        while True:
            tries += 1
            status = self._run_xl(["restore", str(self._file)])
            verdict = after_restore(
                succeeded=not status,
                stand=self._stand(Stand.ABSENT if status else Stand.RUNS),
                saved=saved,
                file=see(self._file),
                tries=tries,
            )
            match verdict:
                case GoOn():
                    return
                case Again():
                    continue
                case Unclear(what=what):
                    raise UnclearError(what)
                case _:
                    assert_never(verdict)

    def _stand(self, expected: Stand) -> Stand:
        """How the guest stands; looked at for a while until it is what is expected."""
        stand = Stand.SEVERAL
        problem: PortError | None = None
        for look in range(_LOOKS):
            if look:
                self._sleep(_BETWEEN_LOOKS)
            try:
                stand = stand_of(self._domain.uuid, self._xen.domains())
                problem = None
            except PortError as error:
                problem = error
                continue
            if stand is expected:
                break
        if problem is not None:
            raise UnclearError(f"whether the guest runs cannot be seen: {problem}")
        return stand

    def _note(self, phase: SavePhase, *, new: bool) -> None:
        note = SaveNote(domain=self._domain, phase=phase, file=str(self._file), boot=self._boot)
        try:
            write_note(note, self._notes, new=new)
        except OSError as error:
            what = f"the note in {self._notes} could not be written: {error}"
            raise (StaysError(what) if new else UnclearError(what)) from error

    def _forget_note(self) -> None:
        note_path(self._domain.uuid, self._notes).unlink(missing_ok=True)


def _run_xl(arguments: Sequence[str]) -> int:
    # What xl leaves behind to monitor the guest holds our output, and is not waited for.
    return subprocess.run(["xl", *arguments], stdin=subprocess.DEVNULL, check=False).returncode


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; gives the exit status."""
    from pgofflined.xen.hypervisor import XenHypervisor

    parser = argparse.ArgumentParser(prog="pgofflined.mover", description="Used by pgofflined.")
    parser.add_argument("domid", type=int)
    parser.add_argument("uuid", type=UUID)
    parser.add_argument("directory", type=Path)
    options = parser.parse_args(argv)
    # A handler, for what is ignored would be ignored by xl as well.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    os.umask(0o077)
    _OOM_SCORE.write_text("-900")
    domain = DomainIdentity(Domid(options.domid), options.uuid)
    try:
        NOTES.mkdir(mode=0o700, parents=True, exist_ok=True)
        mover = Mover(
            xen=XenHypervisor(),
            domain=domain,
            directory=options.directory,
            run_xl=_run_xl,
            boot=read_boot_id(),
        )
    except (PortError, OSError, ValueError) as error:
        return _tell(EX_STAYS, str(error))
    try:
        mover.run()
    except StaysError as error:
        return _tell(EX_STAYS, str(error))
    except UnclearError as error:
        path = note_path(domain.uuid)
        file = options.directory / f"{domain.uuid}.state"
        return _tell(
            EX_UNCLEAR,
            f"{error}; look at `xl list`. Only if the guest is nowhere, `xl restore {file}` lets "
            f"it run; then remove {path}",
        )
    return _tell(0, "saved and restored")


def _tell(status: int, what: str) -> int:
    print(f"{MARK}{what}", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
