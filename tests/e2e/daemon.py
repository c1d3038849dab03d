"""The installed daemon in dom0, as tests drive it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from .rig.host import Host
from .rig.waiting import wait_until

UNIT = "pgofflined.service"
CONFIG = "/etc/pgofflined/pgofflined.toml"
TESTS = "cd /opt/pgofflined-tests && python3 -m tests.e2e.dom0"
JOBS = "/run/pgofflined/jobs"
POLL_LIMIT = 60.0
"""Seconds within which Xen's poll must have found an error: 16 on real time, with a margin."""
JOB_LIMIT = 120.0

# MCi_STATUS of an error that a memory controller found as it read: valid, uncorrected, enabled,
# with MISC and ADDR, neither signalled nor to be acted on.  MCi_MISC: it strikes a whole page.
UCNA = 0xBC00_0000_0000_0090
MISC_PAGE = 0x8C

# Asks at the control socket as the command line does, without the seconds that its start takes
# under emulation; all that it is given, at once.
ASK = """
import socket, sys
asking = socket.socket(socket.AF_UNIX)
asking.connect("/run/pgofflined/control.sock")
asking.sendall("".join(line + "\\n" for line in sys.argv[1:]).encode())
answers = asking.makefile()
for _ in sys.argv[1:]:
    sys.stdout.write(answers.readline())
"""

# Retries within the time of a test; room for all the pages of a test run.
POLICY = """
[retire]
max_retired = "64MiB"

[exchange]
acknowledge_timeout = "5s"
retry_first = "5s"
retry_last = "5s"
attempts = 2

[relocation]
target = "localhost"
free_memory_reserve = "64MiB"
"""


@dataclass(frozen=True)
class Daemon:
    """A running pgofflined.service."""

    host: Host

    def journal(self) -> str:
        """What the unit has logged since this boot of the host."""
        return self.host.journal(UNIT)

    def entries(self) -> list[dict[str, Any]]:
        """The same with all fields."""
        return [json.loads(line) for line in self.host.journal(UNIT, fields=True).splitlines()]

    def ask(self, request: str, **fields: object) -> Any:  # noqa: ANN401 - what it answers
        """A request's answer, see pgofflined/control/protocol.py."""
        [answer] = self.ask_all([{"request": request, **fields}])
        return answer

    def ask_all(self, requests: Iterable[Mapping[str, object]]) -> list[Any]:
        """The answers to several requests, of which none waits for another's answer."""
        lines = [json.dumps(request) for request in requests]
        done = self.host.run(["python3", "-I", "-S", "-c", ASK, *lines])
        return [json.loads(line) for line in done.out.splitlines()]

    def status(self) -> Any:  # noqa: ANN401
        """What `pgofflined status --json` shows."""
        return self.ask("status", pages=500)

    def page(self, mfn: int) -> Mapping[str, Any]:
        """The daemon's entry for a page; empty when it has none."""
        return next((page for page in self.status()["pages"] if page["mfn"] == mfn), {})

    def state(self, mfn: int) -> str:
        """Xen's state of a page."""
        return str(self.ask("query", mfn=f"{mfn:#x}")["state"])

    def request_offline(self, mfn: int) -> Any:  # noqa: ANN401
        """Ask for a page to be retired; the answer."""
        return self.ask("offline", mfn=f"{mfn:#x}")

    def offline(self, mfn: int) -> None:
        """Have a page retired."""
        answer = self.request_offline(mfn)
        assert answer["fate"] != "refused", answer

    def wait_for(self, mfn: int, *states: str, limit: float = JOB_LIMIT) -> Mapping[str, Any]:
        """Wait until the daemon's entry for a page is in one of these states."""
        try:
            wait_until(
                lambda: self.page(mfn).get("state") in states,
                timeout=limit,
                what=f"mfn {mfn:#x} to be {' or '.join(states)}",
                interval=1,
            )
        except AssertionError as error:
            error.add_note(f"it is {self.page(mfn)}")
            raise
        return self.page(mfn)

    def metric(self, name: str, **labels: str) -> float:
        """One value of the metrics; KeyError when there is no such series."""
        text = self.host.run(["curl", "-sf", "http://127.0.0.1:9709/metrics"]).out
        inside = ",".join(f'{key}="{value}"' for key, value in sorted(labels.items()))
        series = f"pgofflined_{name}" + (f"{{{inside}}}" if inside else "")
        values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[:1] != "#")
        return float(values[series])

    def wait_for_the_next(self, before: int) -> None:
        """Wait until another process than that serves."""
        wait_until(
            lambda: (
                self.host.run(["systemctl", "is-active", UNIT], check=False).out.strip() == "active"
                and self.pid() not in (0, before)
            ),
            timeout=180,
            what="the next daemon",
            interval=1,
        )

    def pid(self) -> int:
        """The daemon's process."""
        return int(self.host.run(["systemctl", "show", "-P", "MainPID", UNIT]).out)

    def inject_ce(self, *mfns: int) -> None:
        """Let a corrected error strike each page, and wait until the daemon has heard of all.

        At most as many pages as the host has banks: 20.
        """
        with self._hearing_of(len(mfns)):
            for number, mfn in enumerate(mfns):
                self.host.inject_ce(mfn << 12, cpu=1 - number // 10, bank=9 - number % 10)

    def inject_ucna(self, mfn: int, *, bank: int = 8) -> None:
        """The same with an uncorrected error that needs no action: nobody has used the data yet."""
        error = [1, bank, UCNA, mfn << 12, MISC_PAGE]
        with self._hearing_of(1):
            self.host.run(f"{TESTS}.inject", stdin=json.dumps([error]).encode())

    @contextmanager
    def _hearing_of(self, errors: int) -> Iterator[None]:
        before = self._reports()
        yield
        wait_until(
            lambda: self._reports() >= before + errors,
            timeout=POLL_LIMIT,
            what=f"the daemon's reports of {errors} errors",
            interval=1,
        )

    def reload(self, policy: str) -> None:
        """Put another policy in force."""
        before = self.status()["policy_digest"]
        self.host.write_text(CONFIG, policy)
        self.host.run(["systemctl", "reload", UNIT])
        wait_until(
            lambda: self.status()["policy_digest"] != before, timeout=30, what="the new policy"
        )

    def attention(self, *words: str) -> list[str]:
        """What `status` says needs somebody, as far as it has one of these words in it."""
        told = [json.dumps(line) for line in self.status()["attention"]]
        return [line for line in told if any(word in line for word in words)]

    def _reports(self) -> int:
        return sum(count["count"] for count in self.status()["errors"])


@contextmanager
def running(host: Host, policy: str = POLICY) -> Iterator[Daemon]:
    """Start the service with this policy and nothing remembered; stop it in the end."""
    host.write_text(CONFIG, policy)
    host.run(["systemctl", "stop", UNIT])
    host.run(f"rm -rf /run/pgofflined/state.db* {JOBS}/*")
    host.run(["systemctl", "start", UNIT], timeout=120)
    try:
        yield Daemon(host)
    finally:
        if host.lost is None:
            host.run(["systemctl", "stop", UNIT], timeout=300)


def frames(host: Host, kind: str, domid: int, count: int) -> list[int]:
    """Mfns of a domain, see tests/e2e/dom0/pages.py."""
    done = host.run(
        f"cd /opt/pgofflined-tests && python3 -m tests.e2e.dom0.pages {domid} {kind} {count}",
        timeout=120,
    )
    found = [mfn for _, mfn in json.loads(done.out)]
    assert len(found) == count, f"asked for {count} {kind} pages of d{domid}, found {len(found)}"
    return found


def announce_suspend(host: Host, domid: int) -> None:
    """Say for a guest that it can suspend itself, which one that cannot does not do."""
    host.run(["xenstore-write", f"/local/domain/{domid}/control/feature-suspend", "1"])
