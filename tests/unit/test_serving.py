"""Listening: addresses, what is in the way, and the bounds."""

from __future__ import annotations

import asyncio
import socket
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from pgofflined.core.policy import TcpAddress, UnixAddress
from pgofflined.serving import CannotListen, Handler, Listener

SETTING = "metrics.listen"


def listen(path: Path) -> Listener:
    return Listener.open(UnixAddress(path=str(path)), mode=0o600, setting=SETTING)


@asynccontextmanager
async def served(path: Path, handle: Handler, *, most: int = 4) -> AsyncIterator[None]:
    listener = listen(path)
    task = asyncio.create_task(listener.serve(handle, most=most, limit=100, name="test"))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
        listener.close()


async def ask(path: Path, text: bytes = b"x\n") -> bytes:
    reader, writer = await asyncio.open_unix_connection(str(path))
    writer.write(text)
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return answer


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(await reader.readline())
    await writer.drain()


async def test_connections_are_answered_and_closed(tmp_path: Path) -> None:
    async with served(tmp_path / "s", echo):
        assert await ask(tmp_path / "s", b"one\n") == b"one\n"
        assert await ask(tmp_path / "s", b"two\n") == b"two\n"


async def test_a_fault_costs_one_connection_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def faulty(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if await reader.readline() == b"bad\n":
            raise ZeroDivisionError
        writer.write(b"good")

    async with served(tmp_path / "s", faulty):
        assert await ask(tmp_path / "s", b"bad\n") == b""
        assert await ask(tmp_path / "s", b"other\n") == b"good"
    assert "a fault of ours (test)" in caplog.text


async def test_an_answer_arrives_though_not_all_was_read(tmp_path: Path) -> None:
    async def curt(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"too long")

    async with served(tmp_path / "s", curt):
        assert await ask(tmp_path / "s", b"x" * 50_000) == b"too long"


async def test_only_so_many_are_attended_to_at_a_time(tmp_path: Path) -> None:
    here, most_here = 0, 0
    go = asyncio.Event()
    full = asyncio.Event()

    async def slow(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal here, most_here
        here += 1
        most_here = max(most_here, here)
        if here == 2:
            full.set()
        await go.wait()
        here -= 1
        writer.write(b"done")

    async with served(tmp_path / "s", slow, most=2), asyncio.TaskGroup() as group:
        asking = [group.create_task(ask(tmp_path / "s")) for _ in range(6)]
        await full.wait()
        go.set()
        assert [await task for task in asking] == [b"done"] * 6
    assert most_here == 2


def test_the_files_mode_is_as_asked_and_the_file_goes(tmp_path: Path) -> None:
    listener = listen(tmp_path / "s")
    assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o600
    listener.close()
    listener.close()
    assert not (tmp_path / "s").exists()


def test_a_socket_that_a_killed_daemon_left_is_replaced(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(tmp_path / "s"))
        killed.listen()
    listen(tmp_path / "s").close()


def test_a_socket_somebody_listens_on_is_left_alone(tmp_path: Path) -> None:
    first = listen(tmp_path / "s")
    with pytest.raises(CannotListen, match=r"another pgofflined, listens there.*metrics\.listen"):
        listen(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / "s"))
    first.close()


def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("precious")
    with pytest.raises(CannotListen, match="no socket"):
        listen(tmp_path / "s")
    assert (tmp_path / "s").read_text() == "precious"


def test_the_next_daemons_socket_is_not_removed(tmp_path: Path) -> None:
    first = listen(tmp_path / "s")
    (tmp_path / "s").unlink()
    second = listen(tmp_path / "s")
    first.close()
    assert (tmp_path / "s").exists()
    second.close()


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(CannotListen, match="the directory must exist"):
        listen(tmp_path / "none" / "s")


def test_a_path_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CannotListen, match="too long"):
        listen(tmp_path / ("s" * 120))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_taken_port_is_told(host: str) -> None:
    address = TcpAddress(host=host, port=0)
    listener = Listener.open(address, mode=0, setting=SETTING)
    taken = TcpAddress(host=host, port=listener.port)
    with pytest.raises(CannotListen, match=rf"{listener.port}: Address already in use; another"):
        Listener.open(taken, mode=0, setting=SETTING)
    listener.close()


def test_an_address_that_is_not_ours_is_told() -> None:
    address = TcpAddress(host="203.0.113.1", port=9709)
    with pytest.raises(CannotListen, match=r"203\.0\.113\.1:9709: .*no such address.*\(metrics"):
        Listener.open(address, mode=0, setting=SETTING)


def test_version_6_of_ip_is_served_where_the_host_has_it() -> None:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            host_has_it = True
    except OSError:
        host_has_it = False
    address = TcpAddress(host="::1", port=0)
    if host_has_it:
        Listener.open(address, mode=0, setting=SETTING).close()
    else:
        with pytest.raises(CannotListen, match=r"\[::1\]:0"):
            Listener.open(address, mode=0, setting=SETTING)
