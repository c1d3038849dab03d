"""A real Prometheus scrapes the demo, with the configuration that the README gives."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pytest
from prometheus_client.parser import text_string_to_metric_families

README = Path(__file__).parents[2] / "README.md"
LIMIT = 20.0
GUESTS = ("web", "database", "build", "mail")

T = TypeVar("T")
Series = frozenset[tuple[str, frozenset[tuple[str, str]]]]


class Running:
    """A program in a process group of its own, its output in a file."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self.log = log

    def port(self, pattern: str) -> int | None:
        """The port in the first line that the pattern is found in."""
        found = re.search(pattern, self.log.read_text())
        return int(found[1]) if found else None


@contextmanager
def running(command: Sequence[str], log: Path) -> Iterator[Running]:
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield Running(process, log)
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    # Once reaped, its number may be another's.
    if process.poll() is not None:
        return
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(what: str, look: Callable[[], T | None], *programs: Running) -> T:
    """What ``look`` gives as soon as it is something."""
    deadline = time.monotonic() + LIMIT
    while True:
        found = look()
        if found:
            return found
        ended = any(program.process.poll() is not None for program in programs)
        if ended or time.monotonic() > deadline:
            logs = "\n".join(program.log.read_text()[-2000:] for program in programs)
            pytest.fail(f"{'a program ended before' if ended else 'no'} {what}; logs:\n{logs}")
        time.sleep(0.05)


def get(port: int, path: str) -> str | None:
    """The body of a page; None where it cannot be had (yet)."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read().decode()
    except OSError:
        return None
    finally:
        connection.close()
    return body if response.status == 200 else None


def answer(port: int, expression: str) -> float | None:
    """The one value that Prometheus gives for an expression."""
    body = get(port, "/api/v1/query?" + urllib.parse.urlencode({"query": expression}))
    result = json.loads(body)["data"]["result"] if body else []
    return float(result[0]["value"][1]) if result else None


def tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.fail(f"{name} is missing; as root run: apt-get install prometheus")
    return found


def series(text: str) -> Series:
    return frozenset(
        (sample.name, frozenset(sample.labels.items()))
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    )


def scrape_config(port: int) -> str:
    """The README's example, for another port and in a hurry."""
    example: str
    (example,) = re.findall(r"^```yaml\n(scrape_configs:.*?)^```", README.read_text(), re.M | re.S)
    assert "127.0.0.1:9709" in example
    return "global: {scrape_interval: 1s}\n" + example.replace(":9709", f":{port}")


def test_prometheus_reads_what_the_demo_tells(tmp_path: Path) -> None:
    prometheus, promtool = tool("prometheus"), tool("promtool")
    command = [sys.executable, "-m", "pgofflined", "demo", "--port", "0", "--seconds", "600"]
    with running(command, tmp_path / "demo.log") as demo:
        port = wait_for("metrics", lambda: demo.port(r"Metrics: http://127\.0\.0\.1:(\d+)/"), demo)
        config = tmp_path / "prometheus.yml"
        config.write_text(scrape_config(port))
        command = [
            prometheus,
            f"--config.file={config}",
            f"--storage.tsdb.path={tmp_path / 'tsdb'}",
            "--web.listen-address=127.0.0.1:0",
        ]
        with running(command, tmp_path / "prometheus.log") as server:
            api = wait_for("API", lambda: server.port(r"address=127\.0\.0\.1:([1-9]\d*)"), server)

            def holds(expression: str) -> None:
                wait_for(expression, lambda: answer(api, expression) is not None, demo, server)

            holds('up{job="pgofflined"} == 1')
            holds("sum(pgofflined_errors_total) > 0")
            early = get(port, "/metrics")
            holds('pgofflined_pages{state="offlined"} > 1')
            late = get(port, "/metrics")
    assert early is not None
    assert late is not None
    assert_well_formed(promtool, late)
    # However many errors and pages there were: nothing has a series of its own.
    assert series(late) == series(early)
    # The policy's digest may have digits only.
    values = {value for _, labels in series(late) for name, value in labels if name != "digest"}
    assert not values & set(GUESTS)
    assert not [value for value in values if re.match(r"0x|d?\d+$", value)]


def assert_well_formed(promtool: str, text: str) -> None:
    check = subprocess.run(
        [promtool, "check", "metrics"], input=text, check=False, capture_output=True, text=True
    )
    assert (check.returncode, check.stdout + check.stderr) == (0, "")
