"""What the journal is told of a guest that is migrated, or saved and restored."""

from __future__ import annotations

import logging

from pgofflined.core.events import Event
from pgofflined.core.frames import Domid
from pgofflined.core.policy import RelocationPolicy
from pgofflined.core.relocating import RelocationJob
from pgofflined.journal_log import event

log = logging.getLogger(__name__)

NO_MORE_SAVES = (
    "saves of it have failed before, each of which may have kept it still; see to the cause (disk "
    "and space of relocation.save_directory, /var/log/xen), then `systemctl reload pgofflined` and "
    "`pgofflined offline MFN`"
)


def begun(job: RelocationJob, policy: RelocationPolicy) -> None:
    """A guest is about to be migrated, or saved."""
    domid = job.domain.domid
    if not job.by_saving:
        log.info(
            "d%d (%r) is being migrated to %s off %d bad pages, try %d",
            domid,
            job.name,
            policy.target,
            len(job.mfns),
            job.attempts,
        )
        return
    _tell(
        job,
        logging.WARNING,
        Event.SAVE_BEGUN,
        f"d{domid} is being saved into {policy.save_directory} and restored, off "
        f"{len(job.mfns)} bad pages that cannot be exchanged, try {job.attempts}",
    )


def put_off(job: RelocationJob, detail: str) -> None:
    """Something that passes is in the way."""
    level = logging.INFO if job.deferrals <= 1 else logging.DEBUG
    what = f"the {_noun(job)} of d{job.domain.domid} is put off: {detail}"
    _tell(job, level, Event.MIGRATION_DEFERRED, what)


def failed(job: RelocationJob, detail: str, wait: float) -> None:
    """A try has failed, and the next one is ``wait`` seconds away."""
    what = (
        f"the {_noun(job)} of d{job.domain.domid} failed: {detail}; the next try is in {wait:.0f} s"
    )
    _tell(job, logging.WARNING, Event.MIGRATION_FAILED, what)


def given_up(job: RelocationJob, detail: str) -> None:
    """Nothing more is done by itself."""
    what = f"d{job.domain.domid} was not taken off its bad pages: {detail}"
    _tell(job, logging.ERROR, Event.MIGRATION_FAILED, what)


def done(job: RelocationJob, new_domid: Domid | None) -> None:
    """Every page is out of use."""
    where = f" and is d{new_domid} now" if new_domid is not None else ""
    what = f"d{job.domain.domid} is off its {len(job.mfns)} bad pages, which are offline{where}"
    _tell(job, logging.INFO, Event.MIGRATION_DONE, what)


def stuck(job: RelocationJob, what: str | None) -> None:
    """The guest does not run, if it does not, and what helps."""
    if what is not None:
        _tell(job, logging.CRITICAL, Event.GUEST_IN_DOUBT, what)


def save_unfinished(job: RelocationJob, what: str) -> None:
    """The guest may be in a file; ``what`` says what a person has to do."""
    _tell(job, logging.CRITICAL, Event.SAVE_UNFINISHED, what)


def save_takes_long(job: RelocationJob, policy: RelocationPolicy, seconds: float) -> str:
    """A save goes on beyond the policy's limit; gives what was told."""
    domid = job.domain.domid
    what = (
        f"d{domid} has been saved and restored for {seconds / 60:.0f} min, longer than "
        f"relocation.time_limit, and stands still; look whether {policy.save_directory} or its "
        f"server hangs (`dmesg`, `systemctl status 'pgofflined-save-{domid}-*'`, `xl list`); "
        "end nothing, for it goes on by itself then, and run no `xl resume` or `xl unpause`"
    )
    _tell(job, logging.ERROR, Event.SAVE_UNFINISHED, what)
    return what


def _noun(job: RelocationJob) -> str:
    return "save" if job.by_saving else "migration"


def _tell(job: RelocationJob, level: int, kind: Event, what: str) -> None:
    event(log, level, kind, what, domid=job.domain.domid, job=job.label)
