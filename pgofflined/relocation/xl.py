"""Migrates guests with Xen's own toolstack, xl."""

from __future__ import annotations

import asyncio
import logging
import re
import shlex
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path, PurePath
from secrets import token_hex
from typing import Any, Final

from pgofflined.core.domains import DomainIdentity
from pgofflined.core.errors import PortError
from pgofflined.core.frames import Domid
from pgofflined.core.relocation_outcomes import InDoubt, Migrated, MigrationOutcome, NotMigrated
from pgofflined.core.saves import EX_STAYS
from pgofflined.relocation.processes import Found, Launcher, Run
from pgofflined.relocation.relocator import BreakOff
from pgofflined.relocation.transcript import Stage, Transcript
from pgofflined.saving import NOTES, is_under_way, unfinished_save

log = logging.getLogger(__name__)

LOCALHOST: Final = "localhost"
# Isolated: nothing that lies about where the daemon was started is imported as root.
MOVER: Final = (sys.executable, "-I", "-m", "pgofflined.mover")
# While the mover is at work its guest may be in a file only, so a host that shuts down waits for
# it (until systemd's own limit for that, 30 minutes).  Units are stopped before those that they
# come after: xendomains and libvirtd would save or shut down the same guest beside it, and it needs
# xenstored.  Not for migrations, whose guest always is in the memory of one of both hosts.
MOVER_UNIT: Final = (
    "After=xendomains.service",
    "After=libvirtd.service",
    "After=xen.service",
    "After=xenstored.service",
    "TimeoutStopSec=infinity",
    "SendSIGKILL=no",
    # What is out of memory is one of its programs, whose end it sees.
    "OOMPolicy=continue",
    # A core would hold pages of the guest, and so would swap space.
    "LimitCORE=0",
    "MemorySwapMax=0",
)

# xl hands host and ssh command to a shell and to ssh, so no blank, no shell character and no
# leading dash: a host name or address, with a user in front of it at most.
_HOST: Final = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9][A-Za-z0-9.:_-]*")
_SSH_COMMAND: Final = re.compile(r"[A-Za-z0-9/][A-Za-z0-9 /=.,:@%_+-]*")

# Once told to stop, libxl cleans up and resumes the guest within seconds.
_FIRST_GRACE: Final = 30.0
_LAST_GRACE: Final = 480.0
# Seconds between two looks at a save whose end will not be told.
_BETWEEN_LOOKS: Final = 5.0


class XlRelocator:
    """Runs ``xl migrate``.

    At the time limit, or when it is to be broken off, only libxl's own helper that sends the memory
    is told to stop, as libxl itself does to abort a save: xl then fails in the regular way and
    resumes the guest.  xl is never killed, and once the target may start the guest nothing is
    stopped at all.
    """

    def __init__(
        self,
        *,
        launcher: Launcher,
        sleep: Callable[[float], Awaitable[None]],
        ssh_command: Callable[[], str] = lambda: "ssh",
        xl: str = "xl",
        mover: Sequence[str] = MOVER,
        notes: Path = NOTES,
    ) -> None:
        """``ssh_command`` gives what the policy says at the moment."""
        self._mover = mover
        self._notes = notes
        self._launcher = launcher
        self._sleep = sleep
        self._ssh_command = ssh_command
        self._xl = xl

    async def migrate(
        self,
        domain: DomainIdentity,
        name: str,
        target: str,
        time_limit: float,
        off: BreakOff | None = None,
    ) -> MigrationOutcome:
        """Migrate a guest; comes back when xl has ended.

        Cancelled, it leaves xl to finish by itself.
        """
        del name  # it comes from xenstore and may look like an option: xl gets the domid
        try:
            argv = self.command(domain.domid, target)
        except ValueError as error:
            return NotMigrated(detail=str(error))
        transcript = Transcript()
        unit = f"pgofflined-migration-{domain.domid}-{token_hex(4)}"
        try:
            run = Run(argv, unit, self._launcher, transcript.feed)
        except OSError as error:
            return NotMigrated(detail=f"{self._xl} cannot be started: {error}")
        try:
            return await self._watch(run, transcript, domain.domid, time_limit, off or BreakOff())
        except asyncio.CancelledError:
            log.warning(
                "the migration of d%d goes on without us (process %d)", domain.domid, run.pid
            )
            raise
        finally:
            run.close()

    def command(self, domid: Domid, target: str) -> list[str]:
        """The command for a target.  Raises ValueError for one that no shell may see."""
        if target == LOCALHOST:
            # With an empty ssh command xl runs the "host" as the receiving command.
            receive = f"{shlex.quote(self._xl)} migrate-receive"
            return [self._xl, "migrate", "-s", "", str(domid), receive]
        ssh = self._ssh_command()
        if not _HOST.fullmatch(target):
            raise ValueError(
                f"relocation.target {target!r} is no host name or address, so d{domid} stays"
            )
        if not _SSH_COMMAND.fullmatch(ssh):
            raise ValueError(
                f"relocation.ssh_command {ssh!r} is empty or has characters that a shell would "
                f"interpret, so d{domid} stays; put such things into ssh's configuration file"
            )
        return [self._xl, "migrate", "-s", ssh, str(domid), target]

    async def save_and_restore(self, domain: DomainIdentity, directory: str) -> MigrationOutcome:
        """Save a PV guest and restore it, by ``pgofflined.mover``; comes back when that has ended.

        Cancelled, it leaves that to finish by itself.
        """
        transcript = Transcript()
        unit = f"pgofflined-save-{domain.domid}-{token_hex(4)}"
        argv = [*self._mover, str(domain.domid), str(domain.uuid), directory]
        try:
            run = Run(argv, unit, self._launcher, transcript.feed, MOVER_UNIT)
        except OSError as error:
            return NotMigrated(detail=f"{argv[0]} cannot be started: {error}")
        try:
            status = await run.ended()
            # What has ended may be systemd-run alone, and the mover at work, or the mover, and xl.
            is_lost = False
            while status != 0 and is_under_way(domain.uuid, self._notes):
                is_lost = True
                await self._sleep(_BETWEEN_LOOKS)
        except asyncio.CancelledError:
            log.warning("the save of d%d goes on without us (process %d)", domain.domid, run.pid)
            raise
        finally:
            run.close()
        if status == 0:
            return Migrated()
        what = "saving and restoring failed"
        if is_lost:
            what = f"how saving and restoring d{domain.domid} ended was not told"
        detail = f"{what}: {transcript.last_words()}"
        return self._not_saved(domain, detail, was_asked=status != EX_STAYS)

    def _not_saved(
        self, domain: DomainIdentity, detail: str, *, was_asked: bool
    ) -> MigrationOutcome:
        try:
            note = unfinished_save(domain.uuid, self._notes)
        except PortError as error:
            return InDoubt(detail=f"{detail}; {error}")
        # A note is written before anything is done, and removed when the guest was seen to run.
        if note is not None:
            return InDoubt(detail=detail)
        return NotMigrated(detail=detail, was_asked=was_asked)

    async def _watch(
        self, run: Run, transcript: Transcript, domid: Domid, time_limit: float, off: BreakOff
    ) -> MigrationOutcome:
        ended = asyncio.create_task(run.ended())
        asked = asyncio.create_task(off.asked.wait())
        timed_out = False
        try:
            await self._within(time_limit, ended, asked)
            grace = _FIRST_GRACE
            while not ended.done():
                timed_out = off.why is None
                self._stop(run, transcript, domid, off.why or _exceeded(time_limit))
                await self._within(grace, ended)
                grace = min(2 * grace, _LAST_GRACE)
            why = _exceeded(time_limit) if timed_out else off.why
            return _outcome(ended.result(), transcript, timed_out=timed_out, why=why)
        finally:
            ended.cancel()
            asked.cancel()

    async def _within(self, seconds: float, *events: asyncio.Future[Any]) -> None:
        """Wait for one of several events, but not longer than so many seconds."""
        limit: asyncio.Future[Any] = asyncio.ensure_future(self._sleep(seconds))
        try:
            await asyncio.wait({*events, limit}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            limit.cancel()

    def _stop(self, run: Run, transcript: Transcript, domid: Domid, why: str) -> None:
        """Stop a migration that must not go on, as far as that is safe."""
        victims: list[Found] = []
        if transcript.stage is Stage.CONNECTING:
            # xl waits for the other end; without its transport it gives up by itself.
            victims = [found for found in run.processes() if _is_transport(found)]
        elif transcript.stage is Stage.SAVING:
            victims = [found for found in run.processes() if _is_saver(found, domid)]
        if not victims:
            log.error(
                "the migration of d%d is to be broken off (%s) and cannot be stopped safely now; "
                "xl says: %s",
                domid,
                why,
                transcript.last_words(),
            )
        for found in victims:
            log.warning(
                "the migration of d%d is broken off (%s); ending process %d (%s)",
                domid,
                why,
                found.pid,
                found.argv[0],
            )
            run.terminate(found)


def _exceeded(time_limit: float) -> str:
    return f"the time limit of {time_limit:g} s was exceeded"


def _outcome(
    status: int, transcript: Transcript, *, timed_out: bool, why: str | None
) -> MigrationOutcome:
    if status == 0:
        return Migrated()
    how = f"was ended by signal {-status}" if status < 0 else f"failed with status {status}"
    detail = f"xl {how}; it said: {transcript.last_words()}"
    if transcript.is_in_doubt:
        return InDoubt(detail=detail)
    if why is not None:
        detail = f"{why}; {detail}"
    return NotMigrated(
        detail=detail,
        timed_out=timed_out,
        may_run_there=transcript.may_run_there,
        was_asked=transcript.stage is not Stage.CONNECTING,
    )


def _follows(found: Found, program: str, argument: str) -> int | None:
    """Where in the arguments a program's first argument stands, if it is this one."""
    for at, (before, here) in enumerate(zip(found.argv, found.argv[1:], strict=False), start=1):
        if here == argument and PurePath(before).name == program:
            return at
    return None


def _is_transport(found: Found) -> bool:
    """Whether a process is neither xl's sending half nor a helper that touches the guest."""
    return (
        _follows(found, "xl", "migrate") is None
        and _follows(found, "libxl-save-helper", "--save-domain") is None
    )


def _is_saver(found: Found, domid: Domid) -> bool:
    """Whether a process is the helper that sends this domain's memory (libxl_save_helper.c)."""
    at = _follows(found, "libxl-save-helper", "--save-domain")
    # --save-domain IO_FD RECV_FD DOMID FLAGS ...
    return at is not None and found.argv[at + 3 : at + 4] == (str(domid),)
