"""What systemd runs when the daemon has ended, however it did: guests first, then all else.

A daemon that was told to stop has seen its guests out as far as it could.  One that was killed, by
its watchdog, for want of memory or by a person, has not, and there may be no next one: the package
is removed, the configuration is bad, or it has been started too often.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from pgofflined.core.errors import PortError
from pgofflined.daemon import JOBS, LOCK, Host, recover_first
from pgofflined.jobheader import SUFFIX
from pgofflined.jobstore import JobStore
from pgofflined.journal_log import setup_logging
from pgofflined.leftovers import only_daemon

log = logging.getLogger(__name__)

# A daemon that is told to stop takes its time before.  In this much, recovery gives up what keeps
# failing (``exchanging.RECOVERY_TRIES``).
_SECONDS: Final = 90.0
# systemd starts a daemon that has failed after RestartSec (5 s), and that one ends what is left
# before anything else.  Where none was started by then, nobody else does.
_NEXT_DAEMON_SECONDS: Final = 60


def main(*, after_stop: bool) -> int:
    """Recover what a daemon has left, on this host; gives the exit status."""
    setup_logging(logging.INFO)
    return recover(Host(), os.environ if after_stop else {})


def recover(host: Host, environ: Mapping[str, str]) -> int:
    """End what is left of exchanges; xl's monitors go on, dom0's vCPUs have their affinity back.

    Nothing is done while a daemon runs, which does that itself.  ``environ`` is what systemd tells
    of the service that has ended: where it may start another, this does not go on for longer than
    one try, and comes back later in case it does not.
    """
    jobs = host.directory / JOBS.name
    with only_daemon(host.directory / LOCK, wait=host.lock_wait) as is_only:
        if not is_only:
            log.info("nothing is recovered here: a daemon runs, which does so itself")
            return 0
        try:
            xen = host.open_xen()
        except PortError as error:
            is_owed = any(jobs.glob(f"*{SUFFIX}"))
            level = logging.CRITICAL if is_owed else logging.WARNING
            log.log(level, "what is left of exchanges cannot be ended: %s", error)
            return os.EX_UNAVAILABLE
        short = replace(host, times=replace(host.times, stop=_SECONDS))
        leftovers = recover_first(short, xen, JobStore(jobs))
        if leftovers.is_owed and _may_be_restarted(environ) and _later():
            leftovers.tell_left()
            return 0
        return 0 if leftovers.see_out(host.clock.wait) else 1


def _may_be_restarted(environ: Mapping[str, str]) -> bool:
    """Whether systemd may start the service that has ended again (systemd.exec(5), SERVICE_RESULT).

    It does not say whether it does: a stop that took too long is a failure as well, and so is one
    too many.
    """
    final = (str(os.EX_USAGE), str(os.EX_CONFIG))  # RestartPreventExitStatus
    return (
        environ.get("SERVICE_RESULT", "success") != "success"
        and environ.get("EXIT_STATUS") not in final
    )


def _later() -> bool:
    """Have it done again, apart from the service, when a next daemon would have; False if not."""
    command = (
        *("systemd-run", "--quiet", "--collect", f"--on-active={_NEXT_DAEMON_SECONDS}"),
        *(sys.executable, "-I", "-m", "pgofflined", "recover"),
    )
    try:
        return subprocess.run(command, check=False).returncode == 0
    except OSError as error:
        log.error("systemd-run cannot be run: %s", error)
        return False
