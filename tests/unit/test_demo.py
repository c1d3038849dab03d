"""The demo from outside, as somebody who looks for the first time starts it."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys

DEMO = [sys.executable, "-m", "pgofflined", "demo"]
LIMIT = 60


def demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*DEMO, *arguments], check=False, capture_output=True, text=True, timeout=LIMIT
    )


def test_a_short_run_ends_by_itself_with_a_summary() -> None:
    run = demo("--seconds", "2", "--port", "0")
    assert run.returncode == 0, run.stderr
    assert "Metrics: http://127.0.0.1:" in run.stderr
    assert "1 of the 2 corrected errors that retire a page" in run.stderr
    assert "stood still for" in run.stderr
    assert "Errors reported: 5\n" in run.stdout
    assert "Pages taken in hand: 1 offlined\n" in run.stdout
    assert run.stdout.count(": every page as it should be\n") == 3


def test_ctrl_c_ends_it_early_with_a_summary() -> None:
    with subprocess.Popen(
        [*DEMO, "--seconds", "600", "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            assert process.stderr is not None
            next(line for line in process.stderr if line.startswith("Metrics: "))
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=LIMIT)
        finally:
            process.kill()
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert out.count(": every page as it should be\n") == 3


def test_a_port_that_is_taken_is_named_with_the_remedy() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        run = demo("--seconds", "1", "--port", str(port))
    assert run.returncode == 1
    assert f"cannot listen at 127.0.0.1:{port}" in run.stderr
    assert "--port 0" in run.stderr
    assert "Traceback" not in run.stderr


def test_a_port_that_is_none_is_refused() -> None:
    run = demo("--port", "65536")
    assert run.returncode == 2
    assert "give a number from 0 to 65535" in run.stderr
