"""Requests and replies on the control socket: one JSON object a line, each way.

Requests are read strictly: an unknown field is an error.  Replies may grow fields, so a client
ignores what it does not know.  Each request names the version of the protocol that its sender
speaks; who leaves it out means the daemon's.  Times are seconds since the epoch; frames are numbers
in replies and hexadecimal text in requests, as people write them.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from pgofflined import __version__
from pgofflined.core.conditions import ConditionCode

# To be raised with every change that a client or daemon of the version before would misread.
PROTOCOL: Final = 1
MAX_REQUEST: Final = 4096
MAX_PAGES: Final = 500
MAX_JOBS: Final = 500
MAX_ATTENTION: Final = 100
# A client that waits longer asks again: one that is gone must not be waited for.
MAX_WAIT: Final = 60.0
MAX_REPLY: Final = 8 << 20

_MfnText = Annotated[str, Meta(min_length=1, max_length=32)]
_PageLimit = Annotated[int, Meta(ge=0, le=MAX_PAGES)]
_WaitSeconds = Annotated[float, Meta(ge=0.0, le=MAX_WAIT)]
_DomidNumber = Annotated[int, Meta(ge=0, lt=1 << 16)]


class _Request(
    msgspec.Struct, tag_field="request", forbid_unknown_fields=True, frozen=True, kw_only=True
):
    """What all requests have."""

    protocol: int = PROTOCOL


class StatusRequest(_Request, tag="status", frozen=True, kw_only=True):
    """The daemon at this moment, with at most ``pages`` pages, those that need somebody first."""

    pages: _PageLimit = 100


class QueryRequest(_Request, tag="query", frozen=True, kw_only=True):
    """One frame."""

    mfn: _MfnText


class OfflineRequest(_Request, tag="offline", frozen=True, kw_only=True):
    """Retire one frame, by the policy's rules.

    Answered when the first look at it is over; at once if not ``wait``, or if many wait already.
    """

    mfn: _MfnText
    wait: bool = True


class WaitRequest(_Request, tag="wait", frozen=True, kw_only=True):
    """What has become of a frame in hand; answered at its end, or after so many seconds."""

    mfn: _MfnText
    seconds: _WaitSeconds = 0.0


class JobsRequest(_Request, tag="jobs", frozen=True, kw_only=True):
    """The jobs that run or wait."""


class AcknowledgeRequest(_Request, tag="acknowledge", frozen=True, kw_only=True):
    """A person knows of the conditions of this code (null: any), page and guest."""

    code: ConditionCode | None
    mfn: _MfnText | None = None
    domid: _DomidNumber | None = None


Request = (
    StatusRequest | QueryRequest | OfflineRequest | WaitRequest | JobsRequest | AcknowledgeRequest
)

ALLOWED_REQUESTS: Final = (
    '{"request": "status", "pages": 0 to 500}, {"request": "query", "mfn": "0x1a2b3"}, '
    '{"request": "offline", "mfn": "0x1a2b3", "wait": true}, {"request": "wait", '
    '"mfn": "0x1a2b3", "seconds": 0 to 60}, {"request": "jobs"}, {"request": "acknowledge", '
    '"code": CODE or null, "mfn": "0x1a2b3", "domid": 7}'
)


class _Version(msgspec.Struct, frozen=True):
    """The part of a request that every version understands."""

    protocol: int = PROTOCOL


class OtherVersion(Exception):
    """A request is of another version of the protocol."""

    def __init__(self, theirs: int) -> None:
        super().__init__(
            f"this daemon is pgofflined {__version__} and speaks version {PROTOCOL} of the "
            f"protocol, the command speaks version {theirs}; after an upgrade restart the daemon: "
            "systemctl restart pgofflined"
        )


class Condition(msgspec.Struct, frozen=True, kw_only=True):
    """What needs a person, or what a person should know.  ``code`` is of docs/runbook.md."""

    code: str
    severity: str
    mfn: int | None
    domid: int | None
    since: float
    text: str
    acknowledged: bool


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
    attention: list[Condition]
    attention_omitted: int
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
    uncorrected: bool


class OfflineReply(msgspec.Struct, tag_field="reply", tag="offline", frozen=True, kw_only=True):
    """What has become of a frame: a value of ``core.status.Fate``, and why."""

    mfn: int
    fate: str
    detail: str


class AcknowledgeReply(
    msgspec.Struct, tag_field="reply", tag="acknowledge", frozen=True, kw_only=True
):
    """What is acknowledged now, and what was meant but cannot be."""

    acknowledged: list[Condition]
    kept: list[Condition]


class ErrorReply(msgspec.Struct, tag_field="reply", tag="error", frozen=True, kw_only=True):
    """What was wrong.

    ``code`` is ``bad_request`` (it was not understood), ``bad_value``, ``other_version``,
    ``not_allowed``, ``busy``, ``timeout``, ``failed`` (Xen could not be asked) or ``internal``.
    """

    code: str
    message: str


Reply = StatusReply | JobsReply | QueryReply | OfflineReply | AcknowledgeReply | ErrorReply

_encoder: Final = msgspec.json.Encoder()
_version_decoder: Final[msgspec.json.Decoder[_Version]] = msgspec.json.Decoder(_Version)
_request_decoder: Final[msgspec.json.Decoder[Request]] = msgspec.json.Decoder(Request)
_reply_decoder: Final[msgspec.json.Decoder[Reply]] = msgspec.json.Decoder(Reply)


def encode(message: Request | Reply) -> bytes:
    """One line."""
    return _encoder.encode(message) + b"\n"


def decode_request(untrusted_line: bytes) -> Request:
    """Read a request.  Raises OtherVersion, and ValueError that says what is allowed."""
    with suppress(msgspec.MsgspecError, UnicodeDecodeError):
        theirs = _version_decoder.decode(untrusted_line).protocol
        if theirs != PROTOCOL:
            raise OtherVersion(theirs)
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
