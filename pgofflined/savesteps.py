"""One guest's save and restore, step by step; ``pgofflined.mover`` is the program that does it.

What may be done after each step is in ``core.saves``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final, Protocol, assert_never

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
    after_destroy,
    after_restore,
    after_save,
    before_destroy,
    held,
    stand_of,
    when_unclear,
)
from pgofflined.saving import (
    MOUNTS,
    NOTES,
    directory_trouble,
    last_words,
    log_path,
    note_path,
    only_one,
    open_log,
    see,
    state_path,
    sync_directory,
    unfinished_save,
    write_note,
)

JOBS: Final = Path("/run/pgofflined/jobs")
MARK: Final = "pgofflined: "

# A destroyed domain is dying at once; Xen only may be slow to say so.
_LOOKS: Final = 20
_BETWEEN_LOOKS: Final = 0.5
# A guest that has taken notice of the request to suspend itself may follow it when xl has given up,
# after 60 s: Linux gives up freezing its processes within 20 s.
_LATE: Final = 60
_BETWEEN_LATE_LOOKS: Final = 1.0
# What a second restore could help with (memory that is not free yet, a device that is not let go)
# takes a while to pass.
_BEFORE_AGAIN: Final = 10.0
# As a shell says that a program cannot be started.
NOT_STARTED: Final = 127


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


class RunsOnError(StaysError):
    """It was asked to suspend itself, or did, and was seen to run on: it may suspend late."""


class UnclearError(Exception):
    """Nothing more may be done without a person."""


class RunXl(Protocol):
    """Runs xl to its end."""

    def __call__(self, arguments: Sequence[str], output: int, *, kept: Sequence[int] = ()) -> int:
        """The exit status.

        ``output`` is a descriptor for what it says, ``kept`` are further ones that it keeps open.
        """
        ...


class Mover:
    """One guest's save and restore.  ``told_to_stop`` is asked before anything is done to it."""

    def __init__(
        self,
        *,
        xen: MoverHost,
        domain: DomainIdentity,
        directory: Path,
        run_xl: RunXl,
        boot: str,
        told_to_stop: Callable[[], bool] = lambda: False,
        notes: Path = NOTES,
        jobs: Path = JOBS,
        mounts: Path = MOUNTS,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._xen = xen
        self._domain = domain
        self._file = state_path(domain.uuid, directory)
        self._run_xl = run_xl
        self._boot = boot
        self._told_to_stop = told_to_stop
        self._notes = notes
        self._jobs = jobs
        self._mounts = mounts
        self._sleep = sleep
        self._phase = SavePhase.SAVING

    def run(self) -> None:
        """Do it.  Raises StaysError, RunsOnError, UnclearError."""
        with ExitStack() as stack:
            lock = self._lock(stack)
            self._refuse_what_changed()
            try:
                log = open_log(self._domain.uuid, self._notes)
            except OSError as error:
                raise StaysError(f"{self._notes} cannot be used: {error}") from error
            try:
                self._run_alone(lock, log)
            except UnclearError as error:
                what = f"{error}; {self._advice()}"
                # Whoever reads what we say may be gone.
                with suppress(OSError):
                    os.write(log, f"{MARK}{what}\n".encode())
                raise UnclearError(what) from error
            finally:
                os.close(log)

    def _lock(self, stack: ExitStack) -> int:
        """Be the only one.  Raises StaysError."""
        for look in range(_LOOKS):
            if look:  # the daemon has it for moments, when it looks at notes
                self._sleep(_BETWEEN_LOOKS)
            try:
                lock = stack.enter_context(only_one(self._notes, self._domain.uuid))
            except OSError as error:
                raise StaysError(f"{self._notes} cannot be used: {error}") from error
            if lock is not None:
                return lock
        raise StaysError("another guest is being saved and restored")

    def _run_alone(self, lock: int, log: int) -> None:
        self._note(SavePhase.SAVING, new=True)
        try:
            saved, ran = self._save(self._make_file(), lock, log)
            self._have_it_on_disk(lock, log)
            self._destroy(saved, ran, lock, log)
            self._note(SavePhase.RESTORING, new=False)
            self._restore(saved, log)
            self._file.unlink()
            self._forget_note()
        except OSError as error:
            raise UnclearError(str(error)) from error

    def _refuse_what_changed(self) -> None:
        """What the daemon has seen may be otherwise by now."""
        try:
            domid = self._domain.domid
            info = self._running()
            if info.kind is not GuestKind.PV or info.is_dom0:
                raise StaysError(f"d{domid} is no PV guest")
            problem = (
                directory_trouble(self._file.parent, self._mounts)
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
        # has made it before we look for that.  One that was put aside has another suffix.
        records = list(self._jobs.glob(f"d{self._domain.domid}-*.job"))
        if records:
            raise self._stays(f"an exchange in d{self._domain.domid} is under way ({records[0]})")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            os.close(os.open(self._file, flags, 0o600))
        except FileExistsError as error:
            raise self._stays(
                f"{self._file} is there already, left by an earlier save, and "
                f"d{self._domain.domid} has run since: remove that file"
            ) from error
        except OSError as error:
            raise self._stays(f"{self._file} cannot be made: {error}") from error
        made = see(self._file)
        if made is None:
            raise self._stays(f"{self._file} is gone again")
        return made

    def _stays(self, why: str) -> StaysError:
        """To be raised where nothing was done to the guest, or it runs on.  Raises OSError."""
        self._forget_note()
        return StaysError(why)

    def _save(self, made: FileSeen, lock: int, log: int) -> tuple[FileSeen, int]:
        """The file, and for how long the guest had run, which is paused."""
        domid = self._domain.domid
        if self._told_to_stop():
            self._file.unlink()
            raise self._stays(f"d{domid} is not saved: this process was told to stop")
        # Paused, as xl would destroy it whether its file is on the disk or not.  It has no time
        # limit and is not ended: half-way it would leave the guest suspended.  It has the lock as
        # well: should we be killed, it goes on, and the guest is on its way.
        status = self._run_xl(["save", "-p", str(domid), str(self._file)], log, kept=[lock])
        file = see(self._file)
        stand, ran = self._look(Stand.RUNS if status else Stand.PAUSED)
        if status not in (0, NOT_STARTED):
            stand, ran = self._watch(stand, ran)
        verdict = after_save(
            succeeded=not status, stand=stand, is_held=ran is not None, made=made, file=file
        )
        match verdict:
            case GoOn():
                assert file is not None  # noqa: S101 - GoOn says so
                assert ran is not None  # noqa: S101
                return file, ran
            case Stays() if status == NOT_STARTED:
                self._file.unlink(missing_ok=True)
                raise self._stays(f"d{domid} is not saved: {last_words(log)}")
            case Stays():
                raise self._runs_on(f" (status {status}): {last_words(log)}")
            case Unclear(what=what):
                raise UnclearError(f"{what}; xl said: {last_words(log)}")
            case _:
                assert_never(verdict)

    def _watch(self, stand: Stand, ran: int | None) -> tuple[Stand, int | None]:
        """See whether the guest suspends itself although the save has failed."""
        for _ in range(_LATE):
            if stand is not Stand.RUNS:
                break
            self._sleep(_BETWEEN_LATE_LOOKS)
            stand, ran = self._look(Stand.RUNS)
        return stand, ran

    def _runs_on(self, why: str) -> RunsOnError:
        """To be raised where the guest stood still and was seen to run again.  Raises OSError."""
        self._file.unlink(missing_ok=True)
        self._forget_note()
        return RunsOnError(f"xl could not save d{self._domain.domid}{why}")

    def _have_it_on_disk(self, lock: int, log: int) -> None:
        try:
            descriptor = os.open(self._file, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            sync_directory(self._file.parent)
            self._note(SavePhase.SAVED, new=False)
        except (OSError, UnclearError) as error:
            self._phase = SavePhase.SAVING
            raise self._let_run(f" so that it is on the disk: {error}", lock, log) from error

    def _let_run(self, why: str, lock: int, log: int) -> StaysError | UnclearError:
        """Let the guest run that is paused; gives what to raise.  Raises UnclearError, OSError."""
        domid = self._domain.domid
        if self._look(Stand.PAUSED)[1] is not None:
            self._run_xl(["unpause", str(domid)], log, kept=[lock])
        if self._look(Stand.RUNS)[0] is Stand.RUNS:
            return self._runs_on(why)
        return UnclearError(
            f"xl could not save d{domid}{why}; it could not be let run; xl said: {last_words(log)}"
        )

    def _destroy(self, saved: FileSeen, ran: int, lock: int, log: int) -> None:
        domid = self._domain.domid
        stand, now = self._look(Stand.PAUSED)
        verdict = before_destroy(stand=stand, then=ran, now=now)
        match verdict:
            case GoOn():
                pass
            case Stays():
                raise self._runs_on(": somebody has let it run meanwhile")
            case Unclear(what=what, has_run=has_run):
                if has_run:
                    self._note(SavePhase.RESTORED, new=False)
                raise UnclearError(what)
            case _:
                assert_never(verdict)
        status = self._run_xl(["destroy", str(domid)], log, kept=[lock])
        done = after_destroy(
            succeeded=not status,
            stand=self._look(Stand.ABSENT)[0],
            saved=saved,
            file=see(self._file),
        )
        if isinstance(done, Unclear):
            raise UnclearError(f"{done.what}; xl said: {last_words(log)}")

    def _restore(self, saved: FileSeen, log: int) -> None:
        tries = 0
        while True:
            tries += 1
            # What xl leaves behind to monitor the guest would have the lock for ever.
            status = self._run_xl(["restore", str(self._file)], log)
            if status == 0:
                self._note_restored()
            stand, _ = self._look(Stand.ABSENT if status else Stand.RUNS)
            if status and stand is Stand.RUNS:
                self._note_restored()
            verdict = after_restore(
                succeeded=not status,
                stand=stand,
                saved=saved,
                file=see(self._file),
                tries=tries,
            )
            match verdict:
                case GoOn():
                    return
                case Again():
                    self._sleep(_BEFORE_AGAIN)
                case Unclear(what=what):
                    raise UnclearError(f"{what}; xl said: {last_words(log)}")
                case _:
                    assert_never(verdict)

    def _note_restored(self) -> None:
        # Where that fails it is as good to have seen the guest run, in a moment.
        with suppress(UnclearError):
            self._note(SavePhase.RESTORED, new=False)

    def _look(self, expected: Stand) -> tuple[Stand, int | None]:
        """How the guest stands, and for how long it has run, if it is held.

        Looked at for a while until it is what is expected.
        """
        stand, ran = Stand.SEVERAL, None
        problem: PortError | None = None
        for look in range(_LOOKS):
            if look:
                self._sleep(_BETWEEN_LOOKS)
            try:
                domains = self._xen.domains()
                stand, ran = stand_of(self._domain.uuid, domains), held(self._domain, domains)
                problem = None
            except PortError as error:
                problem = error
                continue
            if stand is expected:
                break
        if problem is not None:
            raise UnclearError(f"whether the guest runs cannot be seen: {problem}")
        return stand, ran

    def _note(self, phase: SavePhase, *, new: bool) -> None:
        self._phase = phase
        try:
            write_note(self._noted(), self._notes, new=new)
        except OSError as error:
            what = f"the note in {self._notes} could not be written: {error}"
            if new:
                self._forget_log()
                raise StaysError(what) from error
            raise UnclearError(what) from error

    def _noted(self) -> SaveNote:
        return SaveNote(
            domain=self._domain, phase=self._phase, file=str(self._file), boot=self._boot
        )

    def _forget_note(self) -> None:
        note_path(self._domain.uuid, self._notes).unlink(missing_ok=True)
        self._forget_log()

    def _forget_log(self) -> None:
        # Without a note nobody asks for it, and the next save makes it anew.
        with suppress(OSError):
            log_path(self._domain.uuid, self._notes).unlink()

    def _advice(self) -> str:
        return when_unclear(self._noted(), str(note_path(self._domain.uuid, self._notes)))
