"""The process that saves a guest and restores it: whatever xl does, and wherever it is killed."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from uuid import UUID

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgofflined.core.domains import DomainIdentity, DomainInfo, GuestKind, ShutdownReason
from pgofflined.core.errors import PortError
from pgofflined.core.frames import Domid, Mfn
from pgofflined.core.saves import EX_RUNS_ON, EX_STAYS, EX_UNCLEAR, SaveNote, SavePhase
from pgofflined.jobstore import JobStore
from pgofflined.mover import carry_out
from pgofflined.ports import JobRecord
from pgofflined.savesteps import Mover, RunsOnError, StaysError, UnclearError
from pgofflined.saving import Saves, log_path, note_path, only_one, write_note

from .relocation.doubles import guest

UNIT = 7
IDENTITY = DomainIdentity(Domid(UNIT), UUID(int=UNIT))


REAL = {name: getattr(os, name) for name in ("open", "link", "unlink", "replace", "fsync")}


class Killed(BaseException):
    """SIGKILL, at the call where it is raised."""


class World:
    """A host with one guest, its directories, and an xl that does as it is told."""

    def __init__(self, root: Path) -> None:
        self.files = root / "files"
        self.notes = root / "notes"
        self.jobs = root / "jobs"
        for path in (self.files, self.notes, self.jobs):
            path.mkdir(mode=0o700)
        self.guests = [guest(0, uuid=0, kind=GuestKind.PV), guest(UNIT, kind=GuestKind.PV)]
        self.file = self.files / f"{IDENTITY.uuid}.state"
        self.is_whole = False
        self.has_run = False
        self.save = "works"
        self.destroy = "works"
        self.somebody_does: str | None = None
        self.somebody_at_look: int | None = None
        self.looks = 0
        self.restores = ["works"]
        self.calls: list[str] = []
        self.somebody: str | None = None
        self.serving: str | None = None
        self.kill_at: int | None = None
        self.fail_at: int | None = None
        self.looks_fail = False
        self.stopped = False
        self.slept: list[float] = []
        self.another: AbstractContextManager[int | None] | None = None
        self._steps = 0

    def step(self) -> None:
        """A call to the outside, at which the process may be killed."""
        if self._steps == self.kill_at:
            raise Killed
        self._steps += 1

    def call(self, function: Callable[..., object], *arguments: object, **more: object) -> object:
        """A call to the system, before which it may be killed, or which may fail."""
        self.step()
        if self._steps == self.fail_at:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return function(*arguments, **more)

    @contextmanager
    def its_calls(self) -> Iterator[None]:
        """Where what it has on the disk changes."""
        with pytest.MonkeyPatch.context() as patch:
            for name, call in REAL.items():
                patch.setattr(os, name, partial(self.call, call))
            yield

    def alive(self) -> list[DomainInfo]:
        return [one for one in self.guests if one.uuid == IDENTITY.uuid and not one.dying]

    def runs(self) -> bool:
        return [one.paused or one.shutdown is not None for one in self.alive()] == [False]

    def may_be_restored(self) -> bool:
        """Whether all that the guest has ever done is in its file."""
        return self.file.exists() and self.file.read_bytes() == b"memory" and not self.has_run

    def domains(self) -> Sequence[DomainInfo]:
        self.step()
        self.looks += 1
        if self.looks == self.somebody_at_look:
            self._interfere()
        if self.looks_fail and self.calls:
            raise PortError("Xen does not answer")
        return tuple(self.guests)

    def somebody_at(self, domid: Domid) -> str | None:
        assert domid == UNIT
        return self.somebody

    def serves(self, domid: Domid) -> str | None:
        assert domid == UNIT
        return self.serving

    def change(self, **changes: object) -> None:
        self.guests[-1] = replace(self.guests[-1], **changes)  # type: ignore[arg-type]

    def _interfere(self) -> None:
        """What a person does to a guest that he finds paused."""
        if not self.alive() or not self.guests[-1].paused or self.guests[-1].shutdown is not None:
            return
        match self.somebody_does:
            case "unpauses":
                self.change(paused=False)
            case "unpauses, pauses":
                pass
            case "resumes late":
                self.change(shutdown=ShutdownReason.SUSPEND)
            case _:
                raise AssertionError(self.somebody_does)
        self.change(cpu_time=self.guests[-1].cpu_time + 1)
        self.has_run = True

    def run_xl(self, arguments: Sequence[str], output: int, *, kept: Sequence[int] = ()) -> int:
        self.step()
        assert len(kept) == (arguments[0] != "restore")
        os.write(output, f"{arguments[0]}: no luck\n".encode())
        self.calls.append(arguments[0])
        note = self.note()
        assert note is not None
        phases = {"save": "saving", "destroy": "saved", "restore": "restoring"}
        assert note.phase == phases.get(arguments[0], note.phase)
        # Only what the mover itself does may fail as a call.
        with pytest.MonkeyPatch.context() as patch:
            for name, call in REAL.items():
                patch.setattr(os, name, call)
            status = self._do(arguments)
        self.step()
        return status

    def _do(self, arguments: Sequence[str]) -> int:
        match list(arguments):
            case ["save", "-p", "7", path]:
                assert path == str(self.file)
                return self._save()
            case ["destroy", "7"]:
                return self._destroy()
            case ["unpause", "7"]:
                self.change(paused=False)
                self.has_run = True
                return 0
            case ["restore", path]:
                return self._restore(path)
            case _:
                raise AssertionError(arguments)

    def _save(self) -> int:
        [domain] = self.alive()
        assert domain.domid == UNIT
        match self.save:
            case "works" | "works, status lost":
                self.file.write_bytes(b"memory")
                self.is_whole = True
                self.change(paused=True)
            case "works, another file":
                other = self.file.with_suffix(".other")
                other.write_bytes(b"memory")
                other.replace(self.file)
                self.is_whole = True
                self.change(paused=True)
            case "works, not resumed":
                self.file.write_bytes(b"memory")
                self.is_whole = True
                self.change(paused=True, shutdown=ShutdownReason.SUSPEND)
            case "works, destroyed":
                self.file.write_bytes(b"memory")
                self.is_whole = True
                self.change(dying=True)
            case "works, not paused":
                self.file.write_bytes(b"memory")
                self.has_run = True
            case "fails":
                self.file.write_bytes(b"mem")
            case "fails, suspended":
                self.file.write_bytes(b"mem")
                self.change(shutdown=ShutdownReason.SUSPEND)
            case _:
                raise AssertionError(self.save)
        return int("fails" in self.save or "lost" in self.save)

    def _destroy(self) -> int:
        [domain] = self.alive()
        assert domain.domid == UNIT
        assert self.may_be_restored(), "it would be lost"
        if self.destroy not in ("fails", "says so"):
            self.change(dying=True)
        return int("fails" in self.destroy)

    def _restore(self, path: str) -> int:
        assert self.may_be_restored(), "it would be rolled back"
        assert Path(path).read_bytes() == b"memory"
        assert not self.alive(), "it would run twice"
        how = self.restores.pop(0) if self.restores else "fails"
        if how != "fails":
            self.guests.append(guest(UNIT + 1, uuid=UNIT, kind=GuestKind.PV))
        if "paused" in how:
            self.change(paused=True)
        return int("fails" in how)

    def mover(self) -> Mover:
        return Mover(
            xen=self,
            domain=IDENTITY,
            directory=self.files,
            run_xl=self.run_xl,
            boot="boot",
            notes=self.notes,
            jobs=self.jobs,
            mounts=Path(os.devnull),
            told_to_stop=lambda: self.stopped,
            sleep=self.slept.append,
        )

    def has_traces(self) -> bool:
        return bool([*self.files.iterdir(), *self.notes.glob("*.*")])

    def note(self) -> SaveNote | None:
        path = note_path(IDENTITY.uuid, self.notes)
        return msgspec.json.decode(path.read_bytes(), type=SaveNote) if path.exists() else None


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_guest_is_saved_and_restored_and_nothing_is_left(world: World) -> None:
    world.mover().run()
    assert world.calls == ["save", "destroy", "restore"]
    assert world.runs()
    assert not world.has_traces()


def test_a_restore_that_left_nothing_is_tried_once_more(world: World) -> None:
    world.restores = ["fails", "works"]
    world.mover().run()
    assert world.calls == ["save", "destroy", "restore", "restore"]
    assert world.runs()
    assert world.slept == [10.0], "what has failed it has to have time to pass"


@pytest.mark.parametrize(
    ("save", "restores", "calls"),
    [
        ("works", ["fails", "fails"], ["save", "destroy", "restore", "restore"]),
        ("works", ["fails, paused"], ["save", "destroy", "restore"]),
        ("works", ["fails, runs"], ["save", "destroy", "restore"]),
        ("works", ["works, paused"], ["save", "destroy", "restore"]),
        ("works, another file", [], ["save"]),
        ("works, status lost", [], ["save"]),
        ("works, not resumed", [], ["save"]),
        ("works, destroyed", [], ["save"]),
        ("fails, suspended", [], ["save"]),
    ],
)
def test_what_is_not_certain_is_left_to_a_person_with_all_that_there_is(
    world: World, save: str, restores: list[str], calls: list[str]
) -> None:
    world.save, world.restores = save, restores
    with pytest.raises(UnclearError, match=f"{calls[-1]}: no luck") as caught:
        world.mover().run()
    assert world.calls == calls
    assert str(world.file) in str(caught.value)
    assert str(caught.value) in log_path(IDENTITY.uuid, world.notes).read_text()
    assert world.file.exists()
    note = world.note()
    assert note is not None
    assert note.file == str(world.file)
    [told] = Saves("boot", notes=world.notes).left_over(lambda: world.guests)
    assert str(world.file) in told.text
    assert str(note_path(IDENTITY.uuid, world.notes)) in told.text
    assert str(log_path(IDENTITY.uuid, world.notes)) in told.text


def test_a_guest_that_was_restored_is_not_to_be_restored_when_it_has_ended(world: World) -> None:
    world.restores = ["works, paused"]
    with pytest.raises(UnclearError, match="do not restore"):
        world.mover().run()
    [told] = Saves("boot", notes=world.notes).left_over(lambda: world.guests[:1])
    assert "do not restore" in told.text
    assert "start it anew" in told.text


def test_a_guest_runs_on_where_its_file_cannot_be_had_on_the_disk(world: World) -> None:
    def fsync(descriptor: int) -> None:
        if world.is_whole and os.fstat(descriptor).st_ino == world.file.stat().st_ino:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        REAL["fsync"](descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(StaysError, match=r"could not save.*Input/output error"):
            world.mover().run()
    assert world.calls == ["save", "unpause"]
    assert world.runs()
    assert not world.has_traces()


@pytest.mark.parametrize("destroy", ["fails", "fails, gone", "says so"])
def test_a_guest_that_was_not_destroyed_for_certain_is_not_restored(
    world: World, destroy: str
) -> None:
    world.destroy = destroy
    with pytest.raises(UnclearError, match="xl restore"):
        world.mover().run()
    assert world.calls == ["save", "destroy"]
    assert world.may_be_restored()
    note = world.note()
    assert note is not None
    assert note.phase is SavePhase.SAVED


def looks_before_destroy(root: Path) -> int:
    """Which look at the guest is the last one before it is destroyed."""
    root.mkdir()
    world = World(root)
    world.destroy = "fails"
    looks: list[int] = []

    def run_xl(arguments: Sequence[str], output: int, *, kept: Sequence[int] = ()) -> int:
        looks.append(world.looks)
        return world.run_xl(arguments, output, kept=kept)

    mover = world.mover()
    mover._run_xl = run_xl
    with pytest.raises(UnclearError):
        mover.run()
    return looks[-1]


def test_a_guest_that_was_let_run_while_its_file_was_had_on_the_disk_runs_on(
    world: World, tmp_path: Path
) -> None:
    world.somebody_at_look = looks_before_destroy(tmp_path / "other")
    world.somebody_does = "unpauses"
    with pytest.raises(StaysError, match="let it run"):
        world.mover().run()
    assert world.calls == ["save"]
    assert world.runs()
    assert not world.has_traces()


def test_a_guest_that_has_run_since_and_is_paused_again_is_never_to_be_restored(
    world: World, tmp_path: Path
) -> None:
    world.somebody_at_look = looks_before_destroy(tmp_path / "other")
    world.somebody_does = "unpauses, pauses"
    with pytest.raises(UnclearError, match="do not restore"):
        world.mover().run()
    assert world.calls == ["save"]
    note = world.note()
    assert note is not None
    assert note.phase is SavePhase.RESTORED
    [told] = Saves("boot", notes=world.notes).left_over(lambda: world.guests[:1])
    assert "do not restore" in told.text


@pytest.mark.parametrize("after", [1, 30, 59])
def test_a_guest_that_suspends_itself_when_xl_has_given_up_is_not_left_unseen(
    world: World, after: int
) -> None:
    def sleep(seconds: float) -> None:
        world.slept.append(seconds)
        if sum(world.slept) == after:
            assert world.note() is not None
            with only_one(world.notes) as lock:
                assert lock is None
            world.change(shutdown=ShutdownReason.SUSPEND)

    world.save = "fails"
    mover = world.mover()
    mover._sleep = sleep
    with pytest.raises(UnclearError, match="`xl resume 7`"):
        mover.run()
    assert world.note() is not None
    assert world.calls == ["save"]


def test_a_guest_is_watched_for_a_minute_after_a_save_that_failed(world: World) -> None:
    world.save = "fails"
    with pytest.raises(StaysError):
        world.mover().run()
    assert sum(world.slept) == 60


def test_a_guest_that_runs_after_a_restore_that_failed_is_not_to_be_restored(world: World) -> None:
    world.restores = ["fails, runs"]
    with pytest.raises(UnclearError, match="do not restore"):
        world.mover().run()
    note = world.note()
    assert note is not None
    assert note.phase is SavePhase.RESTORED


def test_a_note_that_cannot_be_had_on_the_disk_is_not_left(world: World) -> None:
    def fsync(descriptor: int) -> None:
        if os.path.exists(note_path(IDENTITY.uuid, world.notes)):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        REAL["fsync"](descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(StaysError, match="could not be written"):
            world.mover().run()
    assert world.note() is None
    assert world.calls == []


def test_a_guest_stays_where_the_mover_is_told_to_stop_before_its_save(world: World) -> None:
    world.stopped = True
    with pytest.raises(StaysError, match="told to stop"):
        world.mover().run()
    assert world.calls == []
    assert not world.has_traces()


def test_a_daemon_that_looks_at_notes_is_waited_for(world: World) -> None:
    daemon = only_one(world.notes)
    assert daemon.__enter__() is not None

    def sleep(seconds: float) -> None:
        world.slept.append(seconds)
        daemon.__exit__(None, None, None)

    mover = world.mover()
    mover._sleep = sleep
    mover.run()
    assert world.runs()
    assert len(world.slept) == 1


def test_the_record_of_an_exchange_that_was_put_aside_is_none_under_way(world: World) -> None:
    store = JobStore(world.jobs)
    record = JobRecord(domain=IDENTITY, shared_info=Mfn(1), cpu_time=0, began=0.0)
    job = store.open(record)
    with pytest.raises(StaysError, match="an exchange in d7"):
        world.mover().run()
    job.set_aside()
    world.mover().run()
    assert world.runs()


def test_a_guest_that_cannot_be_seen_any_more_is_left_to_a_person(world: World) -> None:
    world.looks_fail = True
    with pytest.raises(UnclearError, match="Xen does not answer"):
        world.mover().run()
    assert world.file.exists()
    assert world.note() is not None


@pytest.mark.parametrize("save", ["fails", "works, not paused"])
def test_a_save_that_fails_leaves_the_guest_running_and_no_trace(world: World, save: str) -> None:
    world.save = save
    mover = world.mover()
    with pytest.raises(RunsOnError, match="could not save"):
        mover.run()
    assert world.runs()
    assert not world.has_traces()


@pytest.mark.parametrize(
    ("end", "status"),
    [
        (StaysError("no"), EX_STAYS),
        (RunsOnError("no"), EX_RUNS_ON),
        (UnclearError("no"), EX_UNCLEAR),
        (None, 0),
    ],
)
def test_the_exit_status_says_how_the_guest_stands(
    world: World, end: Exception | None, status: int, capfd: pytest.CaptureFixture[str]
) -> None:
    mover = world.mover()

    def run() -> None:
        if end is not None:
            raise end

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mover, "run", run)
        assert carry_out(mover) == status
    assert capfd.readouterr().out.startswith("pgofflined: ")


def prevent(world: World, what: str) -> None:
    match what:
        case "somebody":
            world.somebody = "process 5 (xl save 7 x)"
        case "serves":
            world.serving = "serves devices to other domains"
        case "paused":
            world.change(paused=True)
        case "suspended":
            world.change(shutdown=ShutdownReason.SUSPEND)
        case "gone":
            world.guests.pop()
        case "another":
            world.change(uuid=UUID(int=8))
        case "twin":
            world.guests.append(guest(9, uuid=UNIT, kind=GuestKind.PV))
        case "hvm":
            world.change(kind=GuestKind.HVM)
        case "noted":
            note = SaveNote(domain=IDENTITY, phase=SavePhase.SAVING, file="/x", boot="boot")
            write_note(note, world.notes, new=True)
        case "exchange":
            (world.jobs / f"d{UNIT}-{IDENTITY.uuid}.job").touch()
        case "file":
            world.file.touch()
        case "directory":
            world.files.chmod(0o755)
        case "no directory":
            world.files.rmdir()
        case "no notes":
            world.notes.rmdir()
        case "another mover":
            world.another = only_one(world.notes)
            assert world.another.__enter__() is not None
        case _:
            raise AssertionError(what)


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("somebody", "process 5"),
        ("serves", "serves devices"),
        ("paused", "does not run"),
        ("suspended", "does not run"),
        ("gone", "is not there"),
        ("another", "is not there"),
        ("twin", "does not run"),
        ("hvm", "no PV guest"),
        ("noted", r"\.save"),
        ("exchange", "an exchange in d7 is under way"),
        ("file", "remove that file"),
        ("directory", "chmod 700"),
        ("no directory", "save_directory"),
        ("no notes", "cannot be used"),
        ("another mover", "another guest is being saved"),
    ],
)
def test_nothing_is_done_where_it_must_not_be(world: World, what: str, why: str) -> None:
    prevent(world, what)
    before = world.note(), world.file.exists()
    with pytest.raises(StaysError, match=why):
        world.mover().run()
    assert world.calls == []
    assert (world.note(), world.file.exists()) == before


_SAVES = st.sampled_from(
    [
        "works",
        "works, status lost",
        "works, another file",
        "works, not resumed",
        "works, destroyed",
        "works, not paused",
        "fails",
        "fails, suspended",
    ]
)
_DESTROYS = st.sampled_from(["works", "fails", "fails, gone", "says so"])
_SOMEBODY = st.sampled_from(["unpauses", "unpauses, pauses", "resumes late"])

_RESTORES = st.lists(
    st.sampled_from(["works", "works, paused", "fails", "fails, paused", "fails, runs"]),
    min_size=2,
    max_size=3,
)


@given(
    save=_SAVES,
    destroy=_DESTROYS,
    restores=_RESTORES,
    kill_at=st.none() | st.integers(0, 80),
    fail_at=st.none() | st.integers(0, 80),
    somebody=_SOMEBODY,
    at_look=st.none() | st.integers(3, 50),
)
@settings(deadline=None, max_examples=1000)
def test_a_guest_runs_at_most_once_and_its_state_is_never_lost(
    save: str,
    destroy: str,
    restores: list[str],
    kill_at: int | None,
    fail_at: int | None,
    somebody: str,
    at_look: int | None,
) -> None:
    with tempfile.TemporaryDirectory() as root:
        world = World(Path(root))
        world.save, world.destroy, world.restores = save, destroy, restores
        world.somebody_does, world.somebody_at_look = somebody, at_look
        world.kill_at, world.fail_at = kill_at, fail_at
        try:
            with world.its_calls():
                world.mover().run()
            assert world.runs()
        except StaysError:
            assert world.runs()
        except (UnclearError, Killed):
            pass
        assert len(world.alive()) <= 1
        if world.is_whole and not world.runs():
            assert world.alive() or world.file.read_bytes() == b"memory"
            assert world.note() is not None
        if world.note() is None:
            assert world.runs()
            assert not world.file.exists()
        if len(world.guests) > 2 or world.has_run:
            # It may have run: nobody is told to roll it back.
            told = Saves("boot", notes=world.notes).left_over(lambda: world.guests[:1])
            says = ("unless it has run since", "do not restore", f"{world.file} is not there")
            assert all(any(word in one.text for word in says) for one in told)
