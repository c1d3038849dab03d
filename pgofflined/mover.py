"""Saves one PV guest into a file and restores it: a program of its own, which outlives the daemon.

    python3 -m pgofflined.mover DOMID UUID DIRECTORY

Told to stop before ``xl save`` is started, it does so; from then on it stops for no signal but
SIGKILL, ends nothing it has started, destroys the guest only where its file is on the disk and it
has not run since, and removes the file and its note only where it has seen the guest run.  It does
not depend on anybody who reads what it says, and neither does xl: that writes into a log beside the
note.

Exit status: 0, the guest was saved and restored; ``EX_STAYS``, it was not saved and runs as before;
``EX_RUNS_ON``, it was asked to suspend itself, was not saved, and was seen to run afterwards; any
other: whether it runs is not certain, and where a note is left a person has to look.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final
from uuid import UUID

from pgofflined.core.domains import DomainIdentity
from pgofflined.core.errors import PortError
from pgofflined.core.frames import Domid
from pgofflined.core.saves import EX_RUNS_ON, EX_STAYS, EX_UNCLEAR
from pgofflined.savesteps import MARK, NOT_STARTED, Mover, RunsOnError, StaysError, UnclearError
from pgofflined.saving import NOTES
from pgofflined.store import read_boot_id

# What `xl restore` leaves behind for the guest's life, its monitor and a device model, is to be as
# if a person had started it.
_UMASK: Final = 0o022
_OOM_SCORE: Final = Path("/proc/self/oom_score_adj")


def run_xl(arguments: Sequence[str], output: int, *, kept: Sequence[int] = ()) -> int:
    """Run xl, and be it not there or the host short of memory; ends it in no case."""
    stays = arguments[0] == "restore"
    try:
        # Not subprocess.run, which would kill it should we fail.  A descriptor of a file, and no
        # pipe: xl would die of the end of whoever reads it.
        child = subprocess.Popen(
            ["xl", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=kept,
            umask=_UMASK if stays else -1,
        )
    except OSError as error:
        with suppress(OSError):
            os.write(output, f"xl cannot be started: {error}\n".encode())
        return NOT_STARTED
    if stays:
        # It has ended already, at the worst.
        with suppress(OSError):
            Path(f"/proc/{child.pid}/oom_score_adj").write_text("0")
    return child.wait()


def heed_stops() -> Callable[[], bool]:
    """Be ended by no signal that asks for it; gives whether one has come."""
    told: list[int] = []
    # A handler, for what is ignored would be ignored by xl as well.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _: told.append(number))
    return lambda: bool(told)


def carry_out(mover: Mover) -> int:
    """Save and restore, and say what came of it; gives the exit status."""
    try:
        mover.run()
    except RunsOnError as error:
        return _tell(EX_RUNS_ON, str(error))
    except StaysError as error:
        return _tell(EX_STAYS, str(error))
    except UnclearError as error:
        return _tell(EX_UNCLEAR, str(error))
    return _tell(0, "saved and restored")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; gives the exit status."""
    from pgofflined.xen.hypervisor import XenHypervisor
    from pgofflined.xen.process import leave_no_core

    parser = argparse.ArgumentParser(prog="pgofflined.mover", description="Used by pgofflined.")
    parser.add_argument("domid", type=int)
    parser.add_argument("uuid", type=UUID)
    parser.add_argument("directory", type=Path)
    options = parser.parse_args(argv)
    told_to_stop = heed_stops()
    os.umask(0o077)
    try:
        leave_no_core()
        _OOM_SCORE.write_text("-900")
        NOTES.mkdir(mode=0o700, parents=True, exist_ok=True)
        mover = Mover(
            xen=XenHypervisor(),
            domain=DomainIdentity(Domid(options.domid), options.uuid),
            directory=options.directory,
            run_xl=run_xl,
            boot=read_boot_id(),
            told_to_stop=told_to_stop,
        )
    except (PortError, OSError, ValueError) as error:
        return _tell(EX_STAYS, str(error))
    return carry_out(mover)


def _tell(status: int, what: str) -> int:
    # Not print(): the reader may be gone, which must not become another status at our exit.
    with suppress(OSError):
        os.write(sys.stdout.fileno(), f"{MARK}{what}\n".encode())
    return status


if __name__ == "__main__":
    sys.exit(main())
