"""The control socket, server and client, on real sockets."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pgofflined.control import ControlServer
from pgofflined.control.client import Busy, NotAllowed, NotRunning, RequestFailed, ask
from pgofflined.control.protocol import (
    MAX_ATTENTION,
    MAX_JOBS,
    MAX_PAGES,
    MAX_REPLY,
    PROTOCOL,
    AcknowledgeReply,
    AcknowledgeRequest,
    JobsReply,
    JobsRequest,
    OfflineReply,
    OfflineRequest,
    QueryReply,
    QueryRequest,
    Request,
    StatusReply,
    StatusRequest,
    WaitRequest,
    decode_reply,
    decode_request,
    encode,
)
from pgofflined.control.replies import status_reply
from pgofflined.core.conditions import Condition, ConditionCode
from pgofflined.core.errors import PortError
from pgofflined.core.frames import Domid, Mfn
from pgofflined.core.incidents import Acknowledged
from pgofflined.core.status import Fate, FrameAnswer, OfflineAnswer, Snapshot
from pgofflined.serving import CannotListen
from tests.unit.rim_samples import LEFT_PAGE, OFFLINED_PAGE, SNAPSHOT, UNRESOLVED, WAITING_PAGE

STUCK = Condition(code=ConditionCode.GUEST_STUCK, text="d7 stands still", since=1.0)


class Daemon:
    """Answers as the daemon would."""

    def __init__(self) -> None:
        self.status = SNAPSHOT
        self.asked: list[Mfn] = []
        self.awaited: list[bool] = []
        self.waited: list[float] = []
        self.acknowledged: list[tuple[ConditionCode | None, Mfn | None, Domid | None, int]] = []
        self.hold: asyncio.Event | None = None
        self.held = asyncio.Semaphore(0)

    def snapshot(self) -> Snapshot:
        return self.status

    def max_mfn(self) -> Mfn:
        return Mfn(0xFFFFF)

    async def query(self, mfn: Mfn) -> FrameAnswer:
        if mfn == 0xBAD:
            raise PortError("sysctl failed with EPERM")
        if mfn == 0xB06:
            raise ZeroDivisionError
        if self.hold is not None:
            self.held.release()
            await self.hold.wait()
        entry = WAITING_PAGE if mfn == WAITING_PAGE.mfn else None
        return FrameAnswer(
            mfn=mfn, state="OFFLINE_PENDING", owner="d7", hits_in_window=2, entry=entry
        )

    async def offline(self, mfn: Mfn, *, is_awaited: bool) -> OfflineAnswer:
        self.asked.append(mfn)
        self.awaited.append(is_awaited)
        if self.hold is not None and is_awaited:
            self.held.release()
            await self.hold.wait()
        return OfflineAnswer(mfn=mfn, fate=Fate.UNDER_WAY, detail="exchange of d7")

    async def wait(self, mfn: Mfn, seconds: float) -> OfflineAnswer:
        self.waited.append(seconds)
        if self.hold is not None:
            self.held.release()
            await self.hold.wait()
        return OfflineAnswer(mfn=mfn, fate=Fate.OUT_OF_USE, detail="d7 was moved off it")

    def acknowledge(
        self, code: ConditionCode | None, mfn: Mfn | None, domid: Domid | None, *, uid: int
    ) -> Acknowledged:
        self.acknowledged.append((code, mfn, domid, uid))
        return Acknowledged(done=(UNRESOLVED,), kept=(STUCK,))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "control.sock"


@pytest.fixture
async def daemon(path: Path) -> AsyncIterator[Daemon]:
    daemon = Daemon()
    async with served(path, daemon):
        yield daemon


@asynccontextmanager
async def served(
    path: Path, daemon: Daemon, allowed_uids: set[int] | None = None
) -> AsyncIterator[None]:
    server = ControlServer.open(str(path), daemon, allowed_uids=allowed_uids)
    task = asyncio.create_task(server.serve())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
        server.close()


async def send(path: Path, lines: bytes) -> list[dict[str, Any]]:
    """Send bytes as they are, and read until the daemon hangs up."""
    reader, writer = await asyncio.open_unix_connection(str(path), limit=MAX_REPLY)
    writer.write(lines)
    writer.write_eof()
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return [msgspec.json.decode(line) for line in answer.splitlines()]


async def test_status_tells_the_snapshot(path: Path, daemon: Daemon) -> None:
    reply = await asyncio.to_thread(ask, path, StatusRequest())
    assert isinstance(reply, StatusReply)
    told = [(one.code, one.severity, one.mfn, one.text) for one in reply.attention]
    assert told == [(one.code, one.severity, one.mfn, one.text) for one in daemon.status.attention]
    assert (reply.retired_frames, reply.cap_frames) == (3, 4096)
    assert reply.errors[0].error_class == "corrected"
    assert reply.jobs[0].domain_name == "web-1"
    assert reply == status_reply(SNAPSHOT, pages=100)


@pytest.mark.usefixtures("daemon")
async def test_status_shows_first_what_needs_somebody(path: Path) -> None:
    reply = await asyncio.to_thread(ask, path, StatusRequest(pages=2))
    assert isinstance(reply, StatusReply)
    assert [page.mfn for page in reply.pages] == [LEFT_PAGE.mfn, WAITING_PAGE.mfn]
    assert reply.pages_omitted == 1


@pytest.mark.usefixtures("daemon")
async def test_a_query_gives_the_frame_and_our_entry(path: Path) -> None:
    reply = await asyncio.to_thread(ask, path, QueryRequest(mfn="0x2000"))
    assert isinstance(reply, QueryReply)
    assert (reply.mfn, reply.state) == (0x2000, "OFFLINE_PENDING")
    assert reply.page is not None
    assert reply.page.domain_uuid == "0f8fad5b-d9cb-469f-a165-70867728950e"


async def test_an_offline_request_reaches_the_daemon(path: Path, daemon: Daemon) -> None:
    reply = await asyncio.to_thread(ask, path, OfflineRequest(mfn="4096"))
    assert reply == OfflineReply(mfn=4096, fate="under_way", detail="exchange of d7")
    assert daemon.asked == [4096]


async def test_who_waits_for_a_page_gets_its_fate(path: Path, daemon: Daemon) -> None:
    reply = await asyncio.to_thread(ask, path, WaitRequest(mfn="4096", seconds=0.5))
    assert reply == OfflineReply(mfn=4096, fate="out_of_use", detail="d7 was moved off it")
    assert (daemon.waited, daemon.asked) == ([0.5], [])


async def test_an_acknowledgement_reaches_the_daemon_with_who_made_it(
    path: Path, daemon: Daemon
) -> None:
    code = ConditionCode.UNCORRECTED_ERROR
    reply = await asyncio.to_thread(ask, path, AcknowledgeRequest(code=code, mfn="0x1000", domid=7))
    assert isinstance(reply, AcknowledgeReply)
    assert [one.code for one in reply.acknowledged] == ["page_unresolved"]
    assert [one.code for one in reply.kept] == ["guest_stuck"]
    await asyncio.to_thread(ask, path, AcknowledgeRequest(code=None))
    uid = os.geteuid()
    assert daemon.acknowledged == [(code, 0x1000, 7, uid), (None, None, None, uid)]


@pytest.mark.usefixtures("daemon")
async def test_jobs_are_told(path: Path) -> None:
    reply = await asyncio.to_thread(ask, path, JobsRequest())
    assert isinstance(reply, JobsReply)
    assert [job.job for job in reply.jobs] == ["x4"]


@pytest.mark.usefixtures("daemon")
async def test_one_connection_may_ask_several_times(path: Path) -> None:
    replies = await send(path, encode(JobsRequest()) + encode(QueryRequest(mfn="7")))
    assert [reply["reply"] for reply in replies] == ["jobs", "query"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"status", "JSON"),
        (b"{}", "request"),
        (b"[]", "Expected `object`"),
        (b'{"request": "reboot"}', "Invalid value 'reboot'"),
        (b'{"request": "status", "page": 1}', "unknown field `page`"),
        (b'{"request": "status", "pages": 501}', "<= 500"),
        (b'{"request": "status", "pages": -1}', ">= 0"),
        (b'{"request": "status", "pages": "9"}', "Expected `int`"),
        (b'{"request": "offline"}', "missing required field `mfn`"),
        (b'{"request": "offline", "mfn": 4096}', "Expected `str`"),
        (b'{"request": "offline", "mfn": "1", "force": true}', "unknown field `force`"),
        (b'{"request": "query", "mfn": "' + b"1" * 33 + b'"}', "length <= 32"),
        (b'{"request": "query", "mfn": "\xff"}', "utf-8"),
        (b'{"request": "jobs"} {}', "trailing"),
        (b'{"request": "wait", "mfn": "1", "seconds": 61}', "<= 60.0"),
        (b'{"request": "wait", "mfn": "1", "seconds": -1}', ">= 0.0"),
        (b'{"request": "acknowledge", "code": "guest"}', "Invalid enum value 'guest'"),
        (b'{"request": "acknowledge"}', "missing required field `code`"),
        (b'{"request": "acknowledge", "code": null, "domid": 65536}', "<= 65535"),
    ],
)
async def test_what_is_no_request_is_told_what_is(
    path: Path, daemon: Daemon, line: bytes, said: str
) -> None:
    (reply,) = await send(path, line + b"\n")
    assert (reply["reply"], reply["code"]) == ("error", "bad_request")
    assert said in reply["message"]
    assert 'allowed are {"request": "status"' in reply["message"]
    assert daemon.asked == []


@pytest.mark.parametrize(
    ("mfn", "said"),
    [("0x100000", "beyond the host's last frame 0xfffff"), ("1G", "no mfn"), ("-1", "no mfn")],
)
async def test_a_frame_the_host_does_not_have_is_refused(
    path: Path, daemon: Daemon, mfn: str, said: str
) -> None:
    with pytest.raises(RequestFailed, match=said):
        await asyncio.to_thread(ask, path, OfflineRequest(mfn=mfn))
    assert daemon.asked == []


@pytest.mark.usefixtures("daemon")
@pytest.mark.parametrize("tail", [b"", b"\n"], ids=["endless", "ended"])
async def test_a_request_too_long_is_refused(path: Path, tail: bytes) -> None:
    (reply,) = await send(path, b'{"request": "' + b"x" * 20_000 + tail)
    assert reply["message"] == "a request has at most 4096 bytes"


@pytest.mark.usefixtures("daemon")
async def test_half_a_request_is_refused(path: Path) -> None:
    (reply,) = await send(path, b'{"request": "jobs"}')
    assert reply["message"] == "a request ends with a line break"


@pytest.mark.usefixtures("daemon")
async def test_who_says_nothing_gets_nothing(path: Path) -> None:
    assert await send(path, b"") == []


@pytest.mark.usefixtures("daemon")
async def test_what_xen_refuses_is_told(path: Path) -> None:
    with pytest.raises(RequestFailed, match="EPERM"):
        await asyncio.to_thread(ask, path, QueryRequest(mfn="0xbad"))


@pytest.mark.usefixtures("daemon")
async def test_a_fault_of_ours_is_logged_and_the_daemon_goes_on(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(RequestFailed, match="journalctl -u pgofflined"):
        await asyncio.to_thread(ask, path, QueryRequest(mfn="0xb06"))
    assert "ZeroDivisionError" in caplog.text
    assert isinstance(await asyncio.to_thread(ask, path, JobsRequest()), JobsReply)


async def test_status_is_answered_while_xen_is_not(path: Path, daemon: Daemon) -> None:
    daemon.hold = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        hanging = [group.create_task(send(path, encode(QueryRequest(mfn="1")))) for _ in range(8)]
        for _ in hanging:
            await daemon.held.acquire()
        (busy,) = await send(path, encode(QueryRequest(mfn="1")))
        (status,) = await send(path, encode(StatusRequest()))
        daemon.hold.set()
    assert (busy["reply"], busy["code"]) == ("error", "busy")
    assert status["reply"] == "status"
    assert all(task.result()[0]["reply"] == "query" for task in hanging)


@pytest.mark.parametrize(
    "slow", [QueryRequest(mfn="1"), WaitRequest(mfn="1", seconds=60.0)], ids=["query", "wait"]
)
async def test_who_waits_leaves_connections_to_everybody_else(
    path: Path, daemon: Daemon, slow: Request
) -> None:
    daemon.hold = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        waiting = [group.create_task(send(path, encode(slow))) for _ in range(8)]
        for _ in waiting:
            await daemon.held.acquire()
        for _ in range(20):
            (refused,) = await send(path, encode(slow))
            assert refused["code"] == "busy"
        (status,) = await send(path, encode(StatusRequest()))
        assert status["reply"] == "status"
        with pytest.raises(Busy, match="try again later"):
            await asyncio.to_thread(ask, path, slow)
        daemon.hold.set()
    assert all(task.result()[0]["reply"] != "error" for task in waiting)
    (again,) = await send(path, encode(slow))
    assert again["reply"] != "error"


async def test_no_page_is_refused_because_many_wait_for_theirs(path: Path, daemon: Daemon) -> None:
    daemon.hold = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        lines = [encode(OfflineRequest(mfn=str(number))) for number in range(8)]
        waiting = [group.create_task(send(path, line)) for line in lines]
        for _ in waiting:
            await daemon.held.acquire()
        (ninth,) = await send(path, encode(OfflineRequest(mfn="8")))
        daemon.hold.set()
    assert (ninth["reply"], ninth["fate"]) == ("offline", "under_way")
    await send(path, encode(OfflineRequest(mfn="9", wait=False)))
    await send(path, encode(OfflineRequest(mfn="10")))
    assert sorted(daemon.asked) == list(range(11))
    assert daemon.awaited == [True] * 8 + [False, False, True]


async def test_others_than_root_are_turned_away(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    daemon = Daemon()
    async with served(path, daemon, allowed_uids={os.geteuid() + 1}):
        with pytest.raises(NotAllowed, match="only root"):
            await asyncio.to_thread(ask, path, OfflineRequest(mfn="1"))
    assert daemon.asked == []
    assert f"uid {os.geteuid()} was turned away" in caplog.text


async def test_the_socket_is_for_its_owner_and_goes_with_the_daemon(path: Path) -> None:
    async with served(path, Daemon()):
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        with pytest.raises(CannotListen, match=r"another pgofflined.*control\.socket"):
            ControlServer.open(str(path), Daemon())
    with pytest.raises(FileNotFoundError):
        os.stat(path)


def test_without_a_daemon_the_client_says_how_to_start_it(path: Path) -> None:
    with pytest.raises(NotRunning, match="systemctl start pgofflined"):
        ask(path, JobsRequest())
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))
    with pytest.raises(NotRunning, match="refused"):
        ask(path, JobsRequest())


@pytest.fixture
def impostor(path: Path) -> Iterator[list[bytes]]:
    """Something that replies with what it is given, then hangs up; or never, given nothing."""
    answers: list[bytes] = []
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()

        def reply() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(4096)
                if answers:
                    connection.sendall(answers[0])
                else:
                    connection.recv(1)

        thread = threading.Thread(target=reply)
        thread.start()
        yield answers
        thread.join()


def test_a_daemon_that_ends_before_it_replies_is_told(path: Path, impostor: list[bytes]) -> None:
    impostor.append(b'{"reply": "jo')
    with pytest.raises(NotRunning, match="it ended before it replied"):
        ask(path, JobsRequest())


def test_a_reply_that_makes_no_sense_is_told(path: Path, impostor: list[bytes]) -> None:
    impostor.append(b'{"reply": "poem"}\n')
    with pytest.raises(RequestFailed, match="not understood"):
        ask(path, JobsRequest())


def test_a_daemon_of_an_earlier_version_is_named_as_the_reason(
    path: Path, impostor: list[bytes]
) -> None:
    impostor.append(
        b'{"reply": "error", "code": "bad_request", "message": "Invalid value \'wait\'"}\n'
    )
    with pytest.raises(RequestFailed, match=r"restart the daemon \(systemctl restart pgofflined"):
        ask(path, WaitRequest(mfn="1"))


async def test_a_command_of_another_version_is_told_so(path: Path, daemon: Daemon) -> None:
    # Whatever else that version has in its requests.
    line = b'{"request": "status", "protocol": %d, "news": 1}\n' % (PROTOCOL + 1)
    (reply,) = await send(path, line)
    assert reply["code"] == "other_version"
    assert f"speaks version {PROTOCOL} " in reply["message"]
    assert f"the command speaks version {PROTOCOL + 1}" in reply["message"]
    assert "systemctl restart pgofflined" in reply["message"]
    assert daemon.asked == []


def test_a_daemon_that_does_not_reply_is_not_waited_for_for_ever(
    path: Path, impostor: list[bytes]
) -> None:
    assert impostor == []
    with pytest.raises(RequestFailed, match=r"did not reply within 0\.05 s"):
        ask(path, JobsRequest(), timeout=0.05)


def test_the_largest_reply_is_one_the_client_takes() -> None:
    name = "\x01" * 2000  # what JSON needs most bytes for
    page = replace(WAITING_PAGE, domain_name=name, reason=name, detail=name)
    advice = replace(UNRESOLVED, text=name)
    pages = tuple(replace(page, mfn=Mfn(number)) for number in range(2 * MAX_PAGES))
    jobs = tuple(
        replace(SNAPSHOT.jobs[0], domain_name=name, detail=name) for _ in range(3 * MAX_JOBS)
    )
    snapshot = replace(SNAPSHOT, pages=pages, jobs=jobs, attention=(advice,) * 1000)
    reply = status_reply(snapshot, pages=MAX_PAGES)
    assert (len(reply.attention), reply.attention_omitted) == (MAX_ATTENTION, 1000 - MAX_ATTENTION)
    assert (reply.pages_omitted, reply.jobs_omitted) == (MAX_PAGES, 2 * MAX_JOBS)
    assert len(encode(reply)) < MAX_REPLY


def test_names_that_are_no_utf8_can_be_told() -> None:
    page = replace(OFFLINED_PAGE, domain_name="caf\udce9")
    line = encode(status_reply(replace(SNAPSHOT, pages=(page,)), pages=1))
    reply = decode_reply(line)
    assert isinstance(reply, StatusReply)
    assert reply.pages[0].domain_name == "caf\\udce9"


REQUESTS = (
    StatusRequest(pages=5),
    QueryRequest(mfn="0x1"),
    OfflineRequest(mfn="2"),
    WaitRequest(mfn="3", seconds=1.5),
    JobsRequest(),
    AcknowledgeRequest(code=ConditionCode.RECORDS_LOST, mfn="4", domid=5),
)


@pytest.mark.parametrize("sent", REQUESTS)
def test_requests_are_read_as_they_were_written(sent: Request) -> None:
    assert decode_request(encode(sent)) == sent
