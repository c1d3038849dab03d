"""Replies on the control socket, made of what the daemon knows."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from itertools import islice
from typing import Final

from pgofflined.control.protocol import (
    MAX_ATTENTION,
    MAX_JOBS,
    AcknowledgeReply,
    Condition,
    ErrorCount,
    Job,
    JobsReply,
    OfflineReply,
    Page,
    QueryReply,
    Source,
    StatusReply,
    Workers,
)
from pgofflined.core import conditions
from pgofflined.core.book import PageEntry, Phase
from pgofflined.core.incidents import Acknowledged
from pgofflined.core.status import FrameAnswer, JobStatus, OfflineAnswer, Snapshot

# Texts are cut, so that no reply is larger than protocol.MAX_REPLY: JSON may need 6 bytes for a
# character.
_MAX_TEXT: Final = 400
# What somebody has to do, with the names of the files that it is about.
MAX_ADVICE: Final = 1600


def status_reply(snapshot: Snapshot, *, pages: int) -> StatusReply:
    """The snapshot with at most so many pages."""
    shown = heapq.nsmallest(pages, snapshot.pages, key=_urgency)
    jobs = jobs_reply(snapshot)
    source, workers = snapshot.source, snapshot.workers
    return StatusReply(
        version=snapshot.version,
        started=snapshot.started,
        xen_version=snapshot.xen_version,
        dry_run=snapshot.dry_run,
        attention=_conditions(snapshot.attention),
        attention_omitted=max(0, len(snapshot.attention) - MAX_ATTENTION),
        source=Source(name=source.name, note=_clean(source.note), last_record=source.last_record),
        errors=[
            ErrorCount(error_class=error_class, source=name, count=count)
            for (error_class, name), count in sorted(snapshot.reports.items())
        ],
        lost=dict(snapshot.lost),
        pages_by_state=dict(snapshot.pages_by_phase),
        retired_frames=snapshot.retired_frames,
        cap_frames=snapshot.cap_frames,
        tracked_pages=snapshot.tracked_pages,
        evicted_pages=snapshot.evicted_pages,
        idle_scrub=snapshot.idle_scrub,
        oldest_unfinished=snapshot.oldest_unfinished,
        workers=Workers(
            workers=workers.workers,
            busy=workers.busy,
            queued_pages=workers.queued_pages,
            queue_limit=workers.queue_limit,
            longest_busy_seconds=workers.longest_busy_seconds,
        ),
        jobs=jobs.jobs,
        jobs_omitted=jobs.jobs_omitted,
        policy=[_clean(line) for line in snapshot.policy],
        policy_digest=snapshot.policy_digest,
        pages=[_page(entry) for entry in shown],
        pages_omitted=len(snapshot.pages) - len(shown),
    )


def jobs_reply(snapshot: Snapshot) -> JobsReply:
    """The snapshot's jobs."""
    shown = snapshot.jobs[:MAX_JOBS]
    return JobsReply(
        jobs=[_job(job) for job in shown], jobs_omitted=len(snapshot.jobs) - len(shown)
    )


def query_reply(answer: FrameAnswer) -> QueryReply:
    """The answer to a query."""
    return QueryReply(
        mfn=answer.mfn,
        state=answer.state,
        owner=_clean(answer.owner),
        hits_in_window=answer.hits_in_window,
        page=None if answer.entry is None else _page(answer.entry),
        note=_clean(answer.note),
        uncorrected=answer.uncorrected,
    )


def offline_reply(answer: OfflineAnswer) -> OfflineReply:
    """The answer to a request to retire a frame, or to wait for its end."""
    return OfflineReply(mfn=answer.mfn, fate=answer.fate.value, detail=_clean(answer.detail))


def acknowledge_reply(answer: Acknowledged) -> AcknowledgeReply:
    """The answer to an acknowledgement."""
    return AcknowledgeReply(acknowledged=_conditions(answer.done), kept=_conditions(answer.kept))


# What somebody has to look at, then what is under way, then what is done; the latest first.
_ORDER: Final = {Phase.LEFT: 0, Phase.OFFLINED: 2}


def _urgency(entry: PageEntry) -> tuple[int, float, int]:
    return _ORDER.get(entry.phase, 1), -entry.since, entry.mfn


def _conditions(found: Iterable[conditions.Condition]) -> list[Condition]:
    return [
        Condition(
            code=condition.code.value,
            severity=condition.severity.value,
            mfn=condition.mfn,
            domid=condition.domid,
            since=condition.since,
            text=_clean(condition.text, MAX_ADVICE),
            acknowledged=condition.acknowledged,
        )
        for condition in islice(found, MAX_ATTENTION)
    ]


def _page(entry: PageEntry) -> Page:
    domain = entry.domain
    return Page(
        mfn=entry.mfn,
        cause=entry.cause.value,
        state=entry.phase.value,
        since=entry.since,
        marked=entry.marked,
        domid=None if domain is None else domain.domid,
        domain_uuid=None if domain is None else str(domain.uuid),
        domain_name=_clean(entry.domain_name),
        reason=_clean(entry.reason),
        detail=_clean(entry.detail),
        attempts=entry.attempts,
        next_try=entry.next_try,
    )


def _job(job: JobStatus) -> Job:
    return Job(
        job=job.job,
        kind=job.kind,
        domid=job.domid,
        domain_name=_clean(job.domain_name),
        pages=job.pages,
        state=job.state,
        since=job.since,
        attempts=job.attempts,
        next_try=job.next_try,
        detail=_clean(job.detail),
    )


def _clean(text: str, most: int = _MAX_TEXT) -> str:
    """Short enough for a reply, and without the lone surrogates of a name that was no UTF-8."""
    cut = text if len(text) <= most else text[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"
    return cut.encode("utf-8", "backslashreplace").decode()
