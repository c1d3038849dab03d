"""Leaves a PV domain as a release that was killed in an exchange does: ... DOMID STAGE FORMAT.

The record of the job is written in an older (or unknown) FORMAT into the directory in which the
service looks for records; that service must not run.  STAGE says how far the exchange has come:

    asked      the guest has suspended itself, and no more
    held       it was paused as well
    cleared    what maps the page was taken out of the guest's page tables
    exchanged  the page was exchanged: the guest's data is in the record only

The guest is brought there by the present exchanger, whose record is then written anew; what writes
it must stay as it is for as long as the releases that wrote it may be upgraded from.  Prints the
page.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pgofflined.core.frames import Domid, Mfn
from pgofflined.core.offline import OfflineFlag
from pgofflined.jobstore import JobStore
from pgofflined.ports import UnfinishedJob
from pgofflined.sim.faults import Fault, FaultyHypervisor, Moment
from pgofflined.xen.hypervisor import XenHypervisor

from .exchange_pages import JOBS, run_job
from .pages import RNG, of_pv_guest

_RECORDS = Path("/run/pgofflined/jobs")
_CHILD_SECONDS = 60
_STAGES = ("asked", "held", "cleared", "exchanged")

# Format 3 (git show 9398b68:pgofflined/jobfile.py).  The stage, in a file of its own, is a
# letter and the processor time of a guest that is held, in hex.
_VERSION_3 = 3
_SCHEMA_3 = """
CREATE TABLE job (
    domid INTEGER NOT NULL, uuid TEXT NOT NULL, shared_info INTEGER NOT NULL,
    cpu_time INTEGER NOT NULL, began REAL NOT NULL
) STRICT;
CREATE TABLE moving (
    number INTEGER PRIMARY KEY, kind TEXT NOT NULL, pinned INTEGER NOT NULL, mfns BLOB NOT NULL,
    pfns BLOB NOT NULL, slot_frames BLOB NOT NULL, slot_indexes BLOB NOT NULL,
    pages BLOB NOT NULL, levels BLOB NOT NULL, tables BLOB NOT NULL, indexes BLOB NOT NULL,
    entries BLOB NOT NULL, props BLOB NOT NULL
) STRICT;
CREATE TABLE page (mfn INTEGER PRIMARY KEY, contents BLOB NOT NULL) STRICT;
"""


def main(domid: Domid, stage: str, version: int) -> None:
    """Bring it there."""
    xen = XenHypervisor()
    JOBS.mkdir(mode=0o700, exist_ok=True)
    mfn = _mark(xen, domid)
    child = os.fork()
    if not child:
        _die_in_an_exchange(domid, mfn, stage)
    _, status = os.waitpid(child, 0)
    if not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
        raise SystemExit(f"the exchange was not killed but ended with status {status}")
    [unfinished] = JobStore(JOBS).unfinished()
    _check(unfinished, stage)
    _RECORDS.mkdir(mode=0o700, exist_ok=True)
    _write(unfinished, version)
    unfinished.job.close()
    print(mfn)


def _mark(xen: XenHypervisor, domid: Domid) -> Mfn:
    found = of_pv_guest(xen, domid, "data")
    while True:
        mfn = Mfn(found[RNG.integers(len(found))][1])
        # What was of Xen's image at boot cannot be marked.
        if xen.offline(mfn).flags & OfflineFlag.PENDING:
            return mfn


def _die_in_an_exchange(domid: Domid, mfn: Mfn, stage: str) -> None:
    signal.alarm(_CHILD_SECONDS)
    try:
        xen = FaultyHypervisor(XenHypervisor())
        xen.plan.append(_fault(stage, xen))
        run_job(xen, domid, [mfn])
    finally:
        os._exit(1)


def _fault(stage: str, xen: FaultyHypervisor) -> Fault:
    match stage:
        case "asked":
            return Fault(method="suspend", moment=Moment.AFTER, act=_die)
        case "held":
            # With the next call it is asked for its processor time, which is noted then.
            return Fault(method="pause", moment=Moment.AFTER, act=_after(1, xen))
        case "cleared":
            return Fault(method="exchange", moment=Moment.BEFORE, act=_die)
        case "exchanged":
            return Fault(method="exchange", moment=Moment.AFTER, act=_die)
        case _:
            raise SystemExit(f"{stage} is none of {', '.join(_STAGES)}")


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _after(calls: int, xen: FaultyHypervisor) -> Callable[[], None]:
    """Have the process die before another call, when these have been made."""

    def plan() -> None:
        xen.plan.append(Fault(nth=len(xen.trace.calls) + calls + 1, act=_die))

    return plan


def _check(unfinished: UnfinishedJob, stage: str) -> None:
    hold, group = unfinished.hold, unfinished.group
    is_as_wanted = {
        "asked": hold is None and group is None,
        "held": hold is not None and hold.cpu_time is not None and group is None,
        "cleared": group is not None,
        "exchanged": group is not None,
    }[stage]
    if not is_as_wanted:
        raise SystemExit(f"it was killed elsewhere: hold {hold}, group {group}")


def _write(unfinished: UnfinishedJob, version: int) -> None:
    domain = unfinished.record.domain
    path = _RECORDS / f"d{domain.domid}-{domain.uuid}.job"
    path.touch(mode=0o600)
    connection = sqlite3.connect(path)
    if version == _VERSION_3:
        _fill_3(connection, unfinished)
    else:
        # Whose it is stands there in every format; of the rest nobody knows anything.
        connection.executescript(_SCHEMA_3.partition(";")[0] + ";")
        _fill_job(connection, unfinished)
        connection.execute("CREATE TABLE other (nobody INTEGER, knows BLOB)")
    connection.execute(f"PRAGMA user_version = {version}")
    connection.commit()
    connection.close()
    path.with_name(path.name + "-stage").write_bytes(_stage_3(unfinished))


def _stage_3(unfinished: UnfinishedJob) -> bytes:
    if unfinished.hold is None:
        return b""
    letter = b"H" if unfinished.group is None else b"M"
    return b"%b%016x" % (letter, unfinished.hold.cpu_time or 0)


def _fill_job(connection: sqlite3.Connection, unfinished: UnfinishedJob) -> None:
    record = unfinished.record
    connection.execute(
        "INSERT INTO job VALUES (?, ?, ?, ?, ?)",
        (
            record.domain.domid,
            str(record.domain.uuid),
            record.shared_info,
            record.cpu_time,
            record.began,
        ),
    )


def _fill_3(connection: sqlite3.Connection, unfinished: UnfinishedJob) -> None:
    connection.executescript(_SCHEMA_3)
    _fill_job(connection, unfinished)
    group = unfinished.group
    if group is None:
        return
    references = group.references
    arrays = (
        *(group.mfns, group.pfns, group.slot_frames, group.slot_indexes),
        *(references.pages, references.levels, references.tables, references.indexes),
        *(references.values, group.props),
    )
    blobs = [np.ascontiguousarray(array).astype("<u8").tobytes() for array in arrays]
    marks = ", ".join("?" * (3 + len(blobs)))
    connection.execute(
        f"INSERT INTO moving VALUES ({marks})",  # noqa: S608 - question marks
        (1, group.kind.name, int(group.pinned), *blobs),
    )
    pages = zip(group.mfns.tolist(), group.contents, strict=True)
    connection.executemany(
        "INSERT INTO page VALUES (?, ?)", [(mfn, words.tobytes()) for mfn, words in pages]
    )


if __name__ == "__main__":
    main(Domid(int(sys.argv[1])), sys.argv[2], int(sys.argv[3]))
