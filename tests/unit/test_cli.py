"""The command line, as it is called, against a control server that listens for real."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest

from pgofflined import __version__
from pgofflined.cli import main, view
from pgofflined.control import ControlServer, client
from pgofflined.control.protocol import Reply, Request, WaitRequest
from pgofflined.control.replies import status_reply
from pgofflined.core.conditions import Condition, ConditionCode
from pgofflined.core.errors import PortError
from pgofflined.core.frames import Domid, Mfn
from pgofflined.core.incidents import Acknowledged
from pgofflined.core.status import Fate, FrameAnswer, OfflineAnswer, Snapshot, SourceStatus
from pgofflined.xen import hypervisor
from tests.unit.rim_samples import (
    NOW,
    OFFLINED_PAGE,
    PUT_OFF,
    SCRUB,
    SNAPSHOT,
    UNRESOLVED,
    WAITING_PAGE,
)

ROOT = Path(__file__).parents[2]


STUCK = Condition(code=ConditionCode.GUEST_STUCK, text="d7 stands still", since=NOW, domid=Domid(7))


class Daemon:
    """Answers as the daemon would; knows one page, and retires even ones only."""

    def snapshot(self) -> Snapshot:
        return SNAPSHOT

    def max_mfn(self) -> Mfn:
        return Mfn(0xFFFFF)

    async def query(self, mfn: Mfn) -> FrameAnswer:
        entry = WAITING_PAGE if mfn == WAITING_PAGE.mfn else None
        return FrameAnswer(
            mfn=mfn, state="OFFLINE_PENDING", owner="d7 (pv) web-1", hits_in_window=2, entry=entry
        )

    async def offline(self, mfn: Mfn, *, is_awaited: bool) -> OfflineAnswer:
        assert is_awaited
        fates = (Fate.UNDER_WAY, Fate.REFUSED, Fate.UNRESOLVED, Fate.OUT_OF_USE)
        fate = Fate.UNDER_WAY if mfn >= 0x3000 else fates[mfn % 4]
        return OfflineAnswer(mfn=mfn, fate=fate, detail="so it is")

    async def wait(self, mfn: Mfn, seconds: float) -> OfflineAnswer:
        fate = Fate.UNDER_WAY if mfn == 0x3000 else (Fate.OUT_OF_USE, Fate.UNRESOLVED)[mfn % 2]
        if fate is Fate.UNDER_WAY:
            await asyncio.sleep(seconds)
        return OfflineAnswer(mfn=mfn, fate=fate, detail="after a while")

    def acknowledge(
        self, code: ConditionCode | None, mfn: Mfn | None, domid: Domid | None, *, uid: int
    ) -> Acknowledged:
        del uid
        found = (UNRESOLVED,) if code in (None, UNRESOLVED.code) and domid is None else ()
        stuck = (STUCK,) if code in (None, STUCK.code) else ()
        return Acknowledged(done=found if mfn in (None, UNRESOLVED.mfn) else (), kept=stuck)


def serve(path: Path, allowed_uids: set[int] | None, up: threading.Event) -> None:
    async def until_stopped() -> None:
        server = ControlServer.open(str(path), Daemon(), allowed_uids=allowed_uids)
        task = asyncio.create_task(server.serve())
        stops[path] = (asyncio.get_running_loop(), task)
        up.set()
        await asyncio.wait([task])
        server.close()

    asyncio.run(until_stopped())


stops: dict[Path, tuple[asyncio.AbstractEventLoop, asyncio.Task[None]]] = {}


def served(path: Path, allowed_uids: set[int] | None = None) -> Iterator[Path]:
    up = threading.Event()
    thread = threading.Thread(target=serve, args=(path, allowed_uids, up))
    thread.start()
    assert up.wait(10)
    yield path
    loop, task = stops.pop(path)
    loop.call_soon_threadsafe(task.cancel)
    thread.join()


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Path]:
    yield from served(tmp_path / "control.sock")


@pytest.fixture
def picky(tmp_path: Path) -> Iterator[Path]:
    yield from served(tmp_path / "control.sock", {os.geteuid() + 1})


def test_status_tells_first_what_needs_somebody(
    running: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", "--socket", str(running)]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[2] == "ATTENTION"
    assert lines[3].startswith("  ! warning page_unresolved (")
    assert lines[3].endswith("mfn 0x1a2b3 stays in use although it is failing: it belongs to dom0")
    assert lines[4] == "FOR INFORMATION"
    assert lines[5].startswith("  - page_put_off (")
    assert lines[6].startswith("  - idle_scrub (")
    assert "source    mcelog (VIRQ_MCA is the kernel's), last record" in out
    assert "retired   3 pages (limit 4096), 12 KiB of 16 MiB" in out
    assert "errors    12 corrected (mcelog)" in out
    assert "LOST      3 records: 3 mcelog" in out
    mfns = [line.split()[0] for line in lines[lines.index("PAGES") + 2 :]]
    assert mfns == ["0x1a2b3", "0x2000", "0x3000"]


def text(snapshot: Snapshot, pages: int = 50) -> str:
    return "\n".join(view.status(status_reply(snapshot, pages=pages), NOW))


def test_a_calm_status_says_so() -> None:
    calm = replace(SNAPSHOT, attention=(), jobs=(), pages=(), lost={}, oldest_unfinished=None)
    shown = text(calm)
    assert "All is well: nothing needs you." in shown
    assert "up 2 h 0 min" in shown
    for absent in ("ATTENTION", "JOBS", "PAGES", "LOST", "DRY RUN", "INFORMATION", "ACKNOWLEDGED"):
        assert absent not in shown


@pytest.mark.parametrize("note", [PUT_OFF, SCRUB], ids=lambda note: note.code.value)
def test_what_is_only_to_be_known_is_shown_and_all_is_not_called_well(note: Condition) -> None:
    shown = text(replace(SNAPSHOT, attention=(note,)))
    assert f"Nothing needs you now; for information:\n  - {note.code.value} (" in shown
    assert "All is well" not in shown
    assert "ATTENTION" not in shown


def test_what_is_acknowledged_is_listed_and_needs_nobody() -> None:
    known = replace(STUCK, acknowledged=True)
    shown = text(replace(SNAPSHOT, attention=(known,)))
    assert "All is well: nothing needs you.\nACKNOWLEDGED\n  - critical guest_stuck (0 s)" in shown
    assert "ATTENTION" not in shown


@pytest.mark.parametrize("code", [one for one in ConditionCode if one.severity != "info"])
def test_all_is_well_is_not_said_while_anything_needs_a_person(code: ConditionCode) -> None:
    shown = text(replace(SNAPSHOT, attention=(Condition(code=code, text="so", since=NOW), SCRUB)))
    assert f"ATTENTION\n  ! {code.severity.value} {code.value} (0 s): so\n" in shown
    for untrue in ("All is well", "Nothing needs you"):
        assert untrue not in shown


def test_a_dry_run_and_a_missing_source_stand_out() -> None:
    shown = text(
        replace(SNAPSHOT, dry_run=True, source=SourceStatus(name=None, note="mcelog is taken"))
    )
    assert "DRY RUN: decisions are logged only" in shown
    assert "source    NONE (mcelog is taken), no record yet" in shown


def test_pages_and_jobs_tell_why_and_when() -> None:
    shown = text(SNAPSHOT)
    assert (
        "0x2000   waiting   d7 web-1  1 h 0 min   the page is granted to d0; try 3 in 5 min 0 s"
        in shown
    )
    assert "x4   exchange  d7 web-1  5      running  3 s" in shown


def test_what_was_left_out_is_counted() -> None:
    assert text(SNAPSHOT, pages=1).endswith("\n  and 2 more")


def test_a_guests_name_cannot_take_over_the_terminal() -> None:
    page = replace(WAITING_PAGE, domain_name="\x1b[2Jall\nwell")
    shown = text(replace(SNAPSHOT, pages=(page,)))
    assert "\x1b" not in shown
    assert "d7 \\x1b[2Jall\\nwell" in shown


@pytest.mark.parametrize("command", ["status", "jobs"])
def test_json_is_one_document(
    running: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert main([command, "--json", "--socket", str(running)]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["reply"] == command
    assert document["jobs"][0]["domain_name"] == "web-1"


def test_the_fields_of_status_are_an_interface(
    running: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["status", "--json", "--socket", str(running)])
    document = json.loads(capsys.readouterr().out)
    assert set(document) == {
        "reply", "version", "started", "xen_version", "dry_run", "attention", "attention_omitted",
        "source", "errors", "lost", "pages_by_state", "retired_frames", "cap_frames",
        "tracked_pages", "evicted_pages", "idle_scrub", "oldest_unfinished", "workers", "jobs",
        "jobs_omitted", "policy", "policy_digest", "pages", "pages_omitted",
    }  # fmt: skip
    assert document["errors"] == [{"class": "corrected", "source": "mcelog", "count": 12}]
    assert document["pages"][0]["mfn"] == 0x1A2B3
    assert document["attention"][0] == {
        "code": "page_unresolved", "severity": "warning", "mfn": 0x1A2B3, "domid": None,
        "since": UNRESOLVED.since, "text": UNRESOLVED.text, "acknowledged": False,
    }  # fmt: skip


def test_a_query_tells_of_the_page(running: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["query", "0x2000", "--socket", str(running)]) == 0
    out = capsys.readouterr().out
    assert "Xen says  offline_pending" in out
    assert "owner     d7 (pv) web-1" in out
    assert "status    waiting, for" in out
    assert "cause     an operator's request" in out
    assert "detail    the page is granted to d0; try 3" in out
    assert main(["query", "5", "--socket", str(running)]) == 0
    assert "status    the daemon has not been asked to retire it" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("0x2000",), 0, "mfn 0x2000 is under way: so it is\nsee what becomes of it: pgofflined"),
        (("0x2001",), 1, "mfn 0x2001 is not retired: so it is"),
        (("0x2002",), 1, "mfn 0x2002 stays in use: so it is"),
        (("0x2003",), 0, "mfn 0x2003 is out of use: so it is"),
        (("0x3002", "--wait"), 0, "mfn 0x3002 is out of use: after a while"),
        (("0x3001", "--wait"), 1, "mfn 0x3001 stays in use: after a while"),
        (("0x2001", "--wait"), 1, "mfn 0x2001 is not retired: so it is"),
        (
            ("0x3000", "--wait", "--timeout", "20ms"),
            os.EX_TEMPFAIL,
            "mfn 0x3000 is under way: after a while",
        ),
    ],
)
def test_the_exit_status_of_offline_is_the_pages_fate(
    running: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    status: int,
    said: str,
) -> None:
    assert main(["offline", *arguments, "--socket", str(running)]) == status
    assert capsys.readouterr().out.startswith(said)


def test_who_waits_tries_again_while_the_daemon_has_enough_who_wait(
    running: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pgofflined.cli.asking._BUSY_PAUSE", 0.001)
    turned_away: list[Request] = []
    ask = client.ask

    def busy_at_first(path: Path, request: Request) -> Reply:
        if isinstance(request, WaitRequest) and len(turned_away) < 3:
            turned_away.append(request)
            raise client.Busy("8 requests wait already")
        return ask(path, request)

    monkeypatch.setattr(client, "ask", busy_at_first)
    assert main(["offline", "0x3002", "--wait", "--socket", str(running)]) == 0
    assert len(turned_away) == 3
    assert capsys.readouterr().out == "mfn 0x3002 is out of use: after a while\n"


def test_a_query_of_a_busy_daemon_is_75(
    running: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(path: Path, request: Request) -> Reply:
        raise client.Busy(f"{request} at {path}")

    monkeypatch.setattr(client, "ask", busy)
    assert main(["query", "1", "--socket", str(running)]) == os.EX_TEMPFAIL
    assert "QueryRequest" in capsys.readouterr().err


def test_acknowledging_says_what_is_done_and_what_cannot_be(
    running: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["acknowledge", "all", "--socket", str(running)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Acknowledged:\n  - warning page_unresolved (")
    assert "Ends only with its cause:\n  - critical guest_stuck (" in out
    mine = ["acknowledge", "page_unresolved", "--mfn", "0x1a2b3", "--socket", str(running)]
    assert main(mine) == 0
    assert main([*mine, "--domid", "3"]) == 1
    assert "Nothing of this kind" in capsys.readouterr().out
    assert main(["acknowledge", "guest_stuck", "--socket", str(running)]) == 1


def test_a_frame_beyond_the_host_fails(running: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["offline", "0xfffffff", "--socket", str(running)]) == 1
    assert "beyond the host's last frame 0xfffff" in capsys.readouterr().err


def test_the_socket_is_the_configurations(
    running: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "pgofflined.toml"
    config.write_text(f'[control]\nsocket = "{running}"\n')
    assert main(["jobs", "--config", str(config)]) == 0
    assert "web-1" in capsys.readouterr().out


def test_without_a_daemon_the_status_is_69(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", "--socket", str(tmp_path / "none")]) == os.EX_UNAVAILABLE
    assert "systemctl start pgofflined" in capsys.readouterr().err


def test_who_is_turned_away_gets_77(picky: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["jobs", "--socket", str(picky)]) == os.EX_NOPERM
    assert "only root" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "required: COMMAND"),
        (["dance"], "invalid choice"),
        (["query"], "required: MFN"),
        (["query", "0xzz"], "no mfn"),
        (["offline", "1", "2"], "unrecognized arguments: 2"),
        (["status", "--pages", "501"], "from 0 to 500"),
        (["status", "--pages", "-1"], "from 0 to 500"),
        (["status", "--colour"], "unrecognized arguments: --colour"),
        (["acknowledge"], "required: CODE"),
        (["acknowledge", "guest"], "give `all` or one of guest_ended, page_damaged"),
        (["acknowledge", "all", "--domid", "32752"], "from 0 to 32751"),
        (["offline", "1", "--wait", "--timeout", "9"], "a number with its unit"),
    ],
)
def test_wrong_usage_is_64(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == os.EX_USAGE
    assert said in capsys.readouterr().err


def test_a_good_configuration_is_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "good.toml").write_text('[retire]\nwindow = "24 h"\n')
    assert main(["check-config", str(tmp_path / "good.toml")]) == 0
    assert "retire.window = 86400 s" in capsys.readouterr().out


DOUBTFUL = '[relocation]\nsave_directory = "/tmp/saves"\n[metrics]\nlisten = "0.0.0.0:9709"\n'


@pytest.mark.parametrize(("options", "status"), [([], 0), (["--strict"], 1)])
def test_what_is_doubtful_is_told_and_is_no_error_unless_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], status: int
) -> None:
    path = tmp_path / "doubtful.toml"
    path.write_text(DOUBTFUL)
    assert main(["check-config", *options, str(path)]) == status
    shown = capsys.readouterr()
    assert [line.partition(": ")[0] for line in shown.err.splitlines()] == ["warning"] * 2
    assert f"{path}: line 2: relocation.save_directory: " in shown.err
    assert f"{path}: line 4: metrics.listen: " in shown.err
    assert "metrics.listen = 0.0.0.0:9709" in shown.out


def test_a_quiet_check_says_what_is_wrong_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "pgofflined.toml"
    path.write_text(DOUBTFUL)
    assert main(["check-config", "--quiet", str(path)]) == 0
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("warning: ") == 2
    path.write_text("")
    assert main(["check-config", "--quiet", "--strict", str(path)]) == 0
    assert capsys.readouterr() == ("", "")
    path.write_text("[retire]\nwindow = 24\n")
    assert main(["check-config", "--quiet", str(path)]) == os.EX_CONFIG
    assert f"{path}: line 2: retire.window: found 24" in capsys.readouterr().err


def test_a_bad_configuration_is_78(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.toml").write_text("[retire]\nwindow = 24\nwindows = 3\n")
    assert main(["check-config", str(tmp_path / "bad.toml")]) == os.EX_CONFIG
    err = capsys.readouterr().err
    assert "retire.window: found 24" in err
    assert "retire.windows" in err


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_the_daemon_refuses_a_bad_configuration_with_78(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("[retire]\nwindow = 24\n")
    done = run("-m", "pgofflined", "run", "--config", str(tmp_path / "bad.toml"))
    assert done.returncode == os.EX_CONFIG
    assert "retire.window: found 24" in done.stderr
    assert done.stdout == ""


def test_the_module_is_a_program() -> None:
    done = run("-m", "pgofflined", "--version")
    assert (done.returncode, done.stdout) == (0, f"pgofflined {__version__}\n")


def test_the_demos_options_are_its_own() -> None:
    done = run("-m", "pgofflined", "demo", "--help")
    assert done.returncode == 0
    assert "--seconds" in done.stdout


def test_a_reader_that_had_enough_is_no_error(running: Path) -> None:
    program = (
        "import os, sys; from pgofflined.cli import main; r, w = os.pipe(); os.close(r);"
        f"os.dup2(w, 1); sys.exit(main(['status', '--socket', {str(running)!r}]))"
    )
    done = run("-c", program)
    assert (done.returncode, done.stderr) == (0, "")


def test_asking_the_daemon_loads_nothing_heavy() -> None:
    done = run(
        "-c",
        "import sys, pgofflined.cli; print({'numpy', 'pyroute2', 'prometheus_client', 'systemd', "
        "'sqlite3'} & set(sys.modules))",
    )
    assert done.stdout == "set()\n"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0 s"), (59.4, "59 s"), (61, "1 min 1 s"), (7199, "1 h 59 min"), (90000, "1 d 1 h")],
)
def test_durations_have_two_units(seconds: float, shown: str) -> None:
    page = replace(OFFLINED_PAGE, since=NOW - seconds)
    assert f"-       {shown}" in text(replace(SNAPSHOT, pages=(page,)))


def test_monitors_are_not_released_where_xen_cannot_be_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_xen() -> NoReturn:
        raise PortError("xencall_open failed with ENOENT")

    monkeypatch.setattr(hypervisor, "XenCall", no_xen)
    assert main(["release-monitors"]) == os.EX_UNAVAILABLE
    assert capsys.readouterr().err == "pgofflined: xencall_open failed with ENOENT\n"
