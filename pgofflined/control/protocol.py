"""Requests and replies on the control socket: one JSON object a line, each way.

Requests are read strictly: an unknown field is an error.  Replies may grow fields, so a client
ignores what it does not know.  Times are seconds since the epoch; frames are numbers here and
hexadecimal text in requests, as people write them.
"""

from __future__ import annotations

import heapq
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from pgofflined.core.book import PageEntry, Phase
from pgofflined.core.status import FrameAnswer, JobStatus, OfflineAnswer, Snapshot

MAX_REQUEST: Final = 4096
MAX_PAGES: Final = 500
MAX_JOBS: Final = 500
MAX_ATTENTION: Final = 100
# Texts are cut, so that no reply is larger than MAX_REPLY: JSON may need 6 bytes for a character.
MAX_REPLY: Final = 8 << 20
_MAX_TEXT: Final = 400
# What somebody has to do, with the names of the files that it is about.
MAX_ADVICE: Final = 1600

_MfnText = Annotated[str, Meta(min_length=1, max_length=32)]
_PageLimit = Annotated[int, Meta(ge=0, le=MAX_PAGES)]


class StatusRequest(
    msgspec.Struct, tag_field="request", tag="status", forbid_unknown_fields=True, frozen=True
):
    """The daemon at this moment, with at most ``pages`` pages, those that need somebody first."""

    pages: _PageLimit = 100


class QueryRequest(
    msgspec.Struct, tag_field="request", tag="query", forbid_unknown_fields=True, frozen=True
):
    """One frame."""

    mfn: _MfnText


class OfflineRequest(
    msgspec.Struct, tag_field="request", tag="offline", forbid_unknown_fields=True, frozen=True
):
    """Retire one frame, by the policy's rules."""

    mfn: _MfnText


class JobsRequest(
    msgspec.Struct, tag_field="request", tag="jobs", forbid_unknown_fields=True, frozen=True
):
    """The jobs that run or wait."""


Request = StatusRequest | QueryRequest | OfflineRequest | JobsRequest

ALLOWED_REQUESTS: Final = (
    '{"request": "status", "pages": 0 to 500}, {"request": "query", "mfn": "0x1a2b3"}, '
    '{"request": "offline", "mfn": "0x1a2b3"}, {"request": "jobs"}'
)


class Page(msgspec.Struct, frozen=True, kw_only=True):
    """One page as it stands in the book."""

    mfn: int
    cause: str
    state: str
    since: float
    marked: bool
    domid: int | None
    domain_uuid: str | None
    domain_name: str
    reason: str
    detail: str
    attempts: int
    next_try: float | None


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One job that runs or waits."""

    job: str
    kind: str
    domid: int
    domain_name: str
    pages: int
    state: str
    since: float
    attempts: int
    next_try: float | None
    detail: str


class ErrorCount(msgspec.Struct, frozen=True, kw_only=True, rename={"error_class": "class"}):
    """Reports of one class from one source."""

    error_class: str
    source: str
    count: int


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """Where machine checks come from; ``name`` is null while degraded."""

    name: str | None
    note: str
    last_record: float | None


class Workers(msgspec.Struct, frozen=True, kw_only=True):
    """The exchange workers and what waits for them."""

    workers: int
    busy: int
    queued_pages: int
    queue_limit: int
    longest_busy_seconds: float


class StatusReply(msgspec.Struct, tag_field="reply", tag="status", frozen=True, kw_only=True):
    """The daemon at one moment.  ``pages_omitted`` and its like count what was left out."""

    version: str
    started: float
    xen_version: str
    dry_run: bool
    attention: list[str]
    source: Source
    errors: list[ErrorCount]
    lost: dict[str, int]
    pages_by_state: dict[str, int]
    retired_frames: int
    cap_frames: int
    tracked_pages: int
    evicted_pages: int
    idle_scrub: int
    oldest_unfinished: float | None
    workers: Workers
    jobs: list[Job]
    jobs_omitted: int
    policy: list[str]
    policy_digest: str
    pages: list[Page]
    pages_omitted: int


class JobsReply(msgspec.Struct, tag_field="reply", tag="jobs", frozen=True, kw_only=True):
    """The jobs that run or wait."""

    jobs: list[Job]
    jobs_omitted: int


class QueryReply(msgspec.Struct, tag_field="reply", tag="query", frozen=True, kw_only=True):
    """One frame: Xen's state, the owner as far as known, our entry."""

    mfn: int
    state: str
    owner: str
    hits_in_window: int
    page: Page | None
    note: str


class OfflineReply(msgspec.Struct, tag_field="reply", tag="offline", frozen=True, kw_only=True):
    """Whether a frame was taken in hand, and why (not)."""

    mfn: int
    accepted: bool
    detail: str


class ErrorReply(msgspec.Struct, tag_field="reply", tag="error", frozen=True, kw_only=True):
    """What was wrong.

    ``code`` is ``bad_request``, ``not_allowed``, ``busy``, ``timeout``, ``failed`` (Xen could
    not be asked) or ``internal``.
    """

    code: str
    message: str


Reply = StatusReply | JobsReply | QueryReply | OfflineReply | ErrorReply

_encoder: Final = msgspec.json.Encoder()
_request_decoder: Final[msgspec.json.Decoder[Request]] = msgspec.json.Decoder(Request)
_reply_decoder: Final[msgspec.json.Decoder[Reply]] = msgspec.json.Decoder(Reply)


def encode(message: Request | Reply) -> bytes:
    """One line."""
    return _encoder.encode(message) + b"\n"


def decode_request(untrusted_line: bytes) -> Request:
    """Read a request.  Raises ValueError that says what is allowed."""
    try:
        return _request_decoder.decode(untrusted_line)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ValueError(f"{error}; allowed are {ALLOWED_REQUESTS}") from None


def decode_reply(line: bytes) -> Reply:
    """Read a reply.  Raises ValueError for what no daemon of this version sends."""
    try:
        return _reply_decoder.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ValueError(f"the daemon's reply was not understood: {error}") from None


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
        attention=[_clean(line, MAX_ADVICE) for line in snapshot.attention[:MAX_ATTENTION]],
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
    )


def offline_reply(answer: OfflineAnswer) -> OfflineReply:
    """The answer to a request to retire a frame."""
    return OfflineReply(mfn=answer.mfn, accepted=answer.accepted, detail=_clean(answer.detail))


# What somebody has to look at, then what is under way, then what is done; the latest first.
_ORDER: Final = {Phase.LEFT: 0, Phase.OFFLINED: 2}


def _urgency(entry: PageEntry) -> tuple[int, float, int]:
    return _ORDER.get(entry.phase, 1), -entry.since, entry.mfn


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
