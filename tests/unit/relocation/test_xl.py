"""Running xl, with an executable in its place that behaves as it does."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from itertools import compress
from pathlib import Path
from uuid import UUID

import pytest

from pgofflined.core.domains import DomainIdentity
from pgofflined.core.frames import Domid
from pgofflined.core.relocation_outcomes import InDoubt, Migrated, MigrationOutcome, NotMigrated
from pgofflined.core.saves import EX_RUNS_ON, EX_STAYS
from pgofflined.relocation import xl as xl_module
from pgofflined.relocation.processes import SessionLauncher, UnitLauncher
from pgofflined.relocation.relocator import BreakOff
from pgofflined.relocation.transcript import Transcript
from pgofflined.relocation.xl import MOVER_UNIT, XlRelocator
from pgofflined.saving import note_path, only_one
from tests.unit.relocation.doubles import VirtualTime, quiet

GUEST = DomainIdentity(Domid(7), UUID(int=7))
LIMIT = 1800.0


class FakeXl:
    """The executable, its folder, and a relocator that uses it."""

    def __init__(self, folder: Path, time: VirtualTime) -> None:
        self.folder = folder
        self.path = folder / "xl"
        self.time = time
        source = Path(__file__).with_name("fake_xl.py").read_text()
        self.path.write_text(f"#!{sys.executable}\n{source}")
        self.path.chmod(0o755)
        self.ssh = "ssh"

    def relocator(self) -> XlRelocator:
        return XlRelocator(
            launcher=SessionLauncher(),
            sleep=self.time.sleep,
            ssh_command=lambda: self.ssh,
            xl=str(self.path),
        )

    def migrate(
        self,
        scenario: str,
        *,
        target: str = "localhost",
        name: str = "web",
        off: BreakOff | None = None,
    ) -> asyncio.Task[MigrationOutcome]:
        (self.folder / "scenario").write_text(scenario)
        return asyncio.create_task(self.relocator().migrate(GUEST, name, target, LIMIT, off))

    @property
    def argv(self) -> list[str]:
        found: list[str] = json.loads((self.folder / "argv.json").read_text())
        return found


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeXl]:
    yield FakeXl(tmp_path, VirtualTime())
    # What the fake still runs must not outlive the test.
    if (tmp_path / "pid").exists():
        pid = int((tmp_path / "pid").read_text())
        with suppress(ChildProcessError):  # the usual case: it has been waited for
            if os.waitpid(pid, os.WNOHANG) == (0, 0):
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


@pytest.fixture
def ready(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Set once the relocator has read "ready" from xl."""
    event = asyncio.Event()

    class Observed(Transcript):
        def feed(self, untrusted_output: bytes) -> None:
            super().feed(untrusted_output)
            if b"ready" in untrusted_output:
                event.set()

    monkeypatch.setattr(xl_module, "Transcript", Observed)
    return event


async def test_success(fake: FakeXl) -> None:
    assert await fake.migrate("success") == Migrated()
    assert fake.time.sleepers == []


async def test_this_host_is_a_receiving_command_without_ssh(fake: FakeXl) -> None:
    await fake.migrate("success")
    assert fake.argv == ["migrate", "-s", "", "7", f"{fake.path} migrate-receive"]


async def test_another_host_is_reached_by_the_ssh_command(fake: FakeXl) -> None:
    fake.ssh = "ssh -i /root/key"
    await fake.migrate("success", target="root@spare.example")
    assert fake.argv == ["migrate", "-s", "ssh -i /root/key", "7", "root@spare.example"]


@pytest.mark.parametrize("name", ["--debug", "-C /etc/shadow", "a; reboot", "", "x\n\x1b[2J"])
async def test_a_name_from_outside_never_reaches_xl(fake: FakeXl, name: str) -> None:
    assert await fake.migrate("success", name=name) == Migrated()
    assert fake.argv[3] == "7"
    assert not name or name not in fake.argv


@pytest.mark.parametrize(
    "target", ["-oProxyCommand=reboot", "spare; reboot", "spare host", "$(reboot)", "a@b@c", ""]
)
async def test_a_target_that_a_shell_would_interpret_is_refused(fake: FakeXl, target: str) -> None:
    outcome = await fake.migrate("success", target=target)
    assert isinstance(outcome, NotMigrated)
    assert "relocation.target" in outcome.detail
    assert not (fake.folder / "argv.json").exists()


@pytest.mark.parametrize("ssh", ["", "ssh; reboot", "ssh `reboot`", "ssh 'a'", "-s"])
async def test_an_ssh_command_that_a_shell_would_interpret_is_refused(
    fake: FakeXl, ssh: str
) -> None:
    fake.ssh = ssh
    outcome = await fake.migrate("success", target="spare")
    assert isinstance(outcome, NotMigrated)
    assert "relocation.ssh_command" in outcome.detail


@pytest.mark.parametrize(
    ("scenario", "said"),
    [
        ("failure", "no assigned devices"),
        ("refuses", "No config file"),
        ("startup_failure", "Resumed OK"),
        ("killed", "signal 9"),
        ("talks_too_much", "the end of it"),
    ],
)
async def test_a_failure_says_what_xl_said(fake: FakeXl, scenario: str, said: str) -> None:
    outcome = await fake.migrate(scenario)
    assert isinstance(outcome, NotMigrated)
    assert said in outcome.detail
    assert not outcome.timed_out
    assert len(outcome.detail) < 20_000


@pytest.mark.parametrize("scenario", ["final_handshake", "glued", "undefined", "pretends"])
async def test_where_permission_may_have_been_given_a_failure_is_in_doubt(
    fake: FakeXl, scenario: str
) -> None:
    outcome = await fake.migrate(scenario)
    assert isinstance(outcome, InDoubt)


@pytest.mark.parametrize("scenario", ["startup_failure", "called_resumed"])
async def test_a_guest_that_was_resumed_as_xl_says_may_run_there_for_all_that(
    fake: FakeXl, scenario: str
) -> None:
    outcome = await fake.migrate(scenario)
    assert isinstance(outcome, NotMigrated)
    assert outcome.may_run_there


async def test_no_xl_is_a_failure_with_its_reason(fake: FakeXl) -> None:
    fake.path.unlink()
    outcome = await fake.migrate("success")
    assert isinstance(outcome, NotMigrated)
    assert "cannot be started" in outcome.detail


async def test_at_the_time_limit_a_connection_that_hangs_is_given_up(
    fake: FakeXl, ready: asyncio.Event
) -> None:
    migration = fake.migrate("hangs_connecting", target="spare")
    await ready.wait()
    await fake.time.advance(LIMIT)
    outcome = await migration
    assert isinstance(outcome, NotMigrated)
    assert outcome.timed_out
    assert "unexpected EOF" in outcome.detail  # xl ended by itself


async def test_at_the_time_limit_only_the_helper_that_saves_this_guest_is_stopped(
    fake: FakeXl, ready: asyncio.Event
) -> None:
    migration = fake.migrate("hangs_saving")
    await ready.wait()
    await fake.time.advance(LIMIT - 1)
    assert not migration.done()
    await fake.time.advance(1)
    outcome = await migration
    assert isinstance(outcome, NotMigrated)
    assert outcome.timed_out
    assert "resuming at sender" in outcome.detail
    assert "the bystander was spared: True" in outcome.detail


async def test_in_the_handshake_nothing_is_stopped_however_long_it_takes(
    fake: FakeXl, ready: asyncio.Event, caplog: pytest.LogCaptureFixture
) -> None:
    os.mkfifo(fake.folder / "release")
    migration = fake.migrate("hangs_in_the_handshake", target="spare")
    await ready.wait()
    await fake.time.advance(LIMIT)
    await fake.time.advance(3600)
    assert not migration.done()
    assert "cannot be stopped safely" in caplog.text
    (fake.folder / "release").open("w").close()
    assert await migration == Migrated()


async def test_a_migration_that_reads_an_uncorrected_error_is_broken_off_as_at_the_time_limit(
    fake: FakeXl, ready: asyncio.Event
) -> None:
    off = BreakOff()
    migration = fake.migrate("hangs_saving", off=off)
    await ready.wait()
    assert not migration.done()
    off.ask("mfn 0x77 has had an uncorrected error")
    outcome = await migration
    assert isinstance(outcome, NotMigrated)
    assert not outcome.timed_out
    assert outcome.detail.startswith("mfn 0x77 has had an uncorrected error; ")
    assert "resuming at sender" in outcome.detail
    assert "the bystander was spared: True" in outcome.detail


async def test_in_the_handshake_nothing_is_broken_off(
    fake: FakeXl, ready: asyncio.Event, caplog: pytest.LogCaptureFixture
) -> None:
    os.mkfifo(fake.folder / "release")
    off = BreakOff()
    migration = fake.migrate("hangs_in_the_handshake", target="spare", off=off)
    await ready.wait()
    off.ask("mfn 0x77 has had an uncorrected error")
    await quiet()
    assert not migration.done()
    assert "cannot be stopped safely" in caplog.text
    (fake.folder / "release").open("w").close()
    assert await migration == Migrated()


async def test_what_xl_leaves_running_is_not_waited_for(fake: FakeXl) -> None:
    try:
        assert await fake.migrate("leaves_a_daemon") == Migrated()
    finally:
        os.kill(int((fake.folder / "daemon.pid").read_text()), signal.SIGTERM)


async def test_cancelled_it_leaves_xl_alone(fake: FakeXl, ready: asyncio.Event) -> None:
    migration = fake.migrate("hangs_saving")
    await ready.wait()
    migration.cancel()
    with pytest.raises(asyncio.CancelledError):
        await migration
    await quiet()
    pid = int((fake.folder / "pid").read_text())
    os.kill(pid, 0)  # it is still there


def test_under_systemd_xl_gets_a_unit_of_its_own() -> None:
    command = UnitLauncher().command(["xl", "migrate", "7"], "unit-1")
    assert command[0] == "systemd-run"
    assert "--unit=unit-1.service" in command
    assert "--property=KillMode=process" in command
    assert command[command.index("--") + 1 :] == ["xl", "migrate", "7"]


def test_a_host_that_shuts_down_waits_for_a_mover_and_then_ends_its_guests() -> None:
    command = UnitLauncher().command(["mover"], "unit-1", MOVER_UNIT)
    properties = [word.removeprefix("--property=") for word in command if "--property=" in word]
    assert {*MOVER_UNIT} < {*properties}
    assert {
        "After=xendomains.service",
        "After=libvirtd.service",
        "After=xen.service",
        "After=xenstored.service",
        "TimeoutStopSec=infinity",
        "SendSIGKILL=no",
        "OOMPolicy=continue",
        "LimitCORE=0",
        "MemorySwapMax=0",
    } == {*MOVER_UNIT}
    assert "KillMode=process" in properties
    migration = UnitLauncher().command(["xl", "migrate", "7"], "unit-1")
    assert not {*MOVER_UNIT} & {word.removeprefix("--property=") for word in migration}


def test_systemd_knows_what_a_movers_unit_is_told(tmp_path: Path) -> None:
    command = UnitLauncher().command(["mover"], "unit-1", MOVER_UNIT)
    properties = [word.removeprefix("--property=") for word in command if "--property=" in word]
    is_of_unit = [one.startswith("After=") for one in properties]
    text = "\n".join(
        [
            *("[Unit]", *compress(properties, is_of_unit)),
            *("[Service]", *compress(properties, [not one for one in is_of_unit])),
            *("Type=exec", "ExecStart=/bin/true", "Typo=yes"),
        ]
    )
    unit = tmp_path / "unit-1.service"
    unit.write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "--man=no", "--recursive-errors=no", "verify", str(unit)],
        capture_output=True,
        text=True,
        check=False,
    )
    complaints = [line for line in done.stderr.splitlines() if str(unit) in line]
    # What it does not know it does tell.
    assert [line for line in complaints if "Typo" not in line] == []
    assert len(complaints) == 1, done.stderr


def test_a_unit_owns_no_process_of_ours() -> None:
    assert not UnitLauncher().owns(os.getpid(), os.getpid(), "pgofflined-migration-7-00000000")


class FakeMover:
    """A program in place of the mover, and the directory of its notes."""

    def __init__(self, folder: Path, time: VirtualTime) -> None:
        self.notes = folder
        self.time = time

    async def run(self, script: str) -> MigrationOutcome:
        relocator = XlRelocator(
            launcher=SessionLauncher(),
            sleep=self.time.sleep,
            mover=(sys.executable, "-c", script),
            notes=self.notes,
        )
        return await relocator.save_and_restore(GUEST, "/saves")


@pytest.fixture
def mover(tmp_path: Path) -> FakeMover:
    return FakeMover(tmp_path, VirtualTime())


async def test_the_mover_is_told_which_guest_and_where(mover: FakeMover) -> None:
    script = f"import sys; sys.exit(sys.argv[1:] != ['7', '{GUEST.uuid}', '/saves'])"
    assert await mover.run(script) == Migrated()


@pytest.mark.parametrize(
    ("end", "was_asked"),
    [
        (f"sys.exit({EX_STAYS})", False),
        (f"sys.exit({EX_RUNS_ON})", True),
        # Whether it had begun is not known.
        ("os.kill(os.getpid(), 9)", True),
    ],
)
async def test_a_guest_of_which_no_note_is_left_was_asked_to_suspend_itself_or_not(
    mover: FakeMover, end: str, *, was_asked: bool
) -> None:
    outcome = await mover.run(
        f"import os, sys; print('pgofflined: no room'); sys.stdout.flush(); {end}"
    )
    assert isinstance(outcome, NotMigrated)
    assert "no room" in outcome.detail
    assert outcome.was_asked is was_asked


@pytest.mark.parametrize("end", ["sys.exit(70)", "sys.exit(75)", "os.kill(os.getpid(), 9)"])
async def test_a_mover_that_left_its_note_leaves_the_guest_to_a_person(
    mover: FakeMover, end: str
) -> None:
    note = note_path(GUEST.uuid, mover.notes)
    outcome = await mover.run(f"import os, sys; open({str(note)!r}, 'w'); {end}")
    assert isinstance(outcome, InDoubt)


@pytest.mark.parametrize("leaves_note", [False, True])
async def test_a_mover_that_goes_on_without_who_has_started_it_is_waited_for(
    mover: FakeMover, monkeypatch: pytest.MonkeyPatch, *, leaves_note: bool
) -> None:
    asleep, sleep = asyncio.Event(), mover.time.sleep

    async def sleeps(seconds: float) -> None:
        asleep.set()
        await sleep(seconds)

    monkeypatch.setattr(mover.time, "sleep", sleeps)
    note = note_path(GUEST.uuid, mover.notes)
    note.touch()
    async with asyncio.timeout(30):
        with only_one(mover.notes, GUEST.uuid):
            saving = asyncio.create_task(mover.run("import os; os.kill(os.getpid(), 9)"))
            await asleep.wait()
            await mover.time.advance(3600)
            assert not saving.done()
            if not leaves_note:
                note.unlink()
        await mover.time.advance(60)
        outcome = await saving
    assert isinstance(outcome, InDoubt if leaves_note else NotMigrated)
    assert "was not told" in outcome.detail


async def test_no_mover_is_a_failure_with_its_reason(mover: FakeMover) -> None:
    relocator = XlRelocator(
        launcher=SessionLauncher(), sleep=mover.time.sleep, mover=("/nowhere",), notes=mover.notes
    )
    outcome = await relocator.save_and_restore(GUEST, "/saves")
    assert isinstance(outcome, NotMigrated)
    assert "/nowhere" in outcome.detail
