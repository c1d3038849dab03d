"""Log entries with fields: to the journal where there is one, else as lines on stderr.

Nothing here writes to standard output, which belongs to what the command line prints.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Mapping
from typing import Final

from pgofflined.core.events import Event
from pgofflined.core.frames import Domid, Mfn
from pgofflined.core.text import printable

_IDENTIFIER: Final = "pgofflined"
_FIELDS: Final = "pgofflined_fields"
_MESSAGE_ID: Final = "MESSAGE_ID"

# Kinds that a failing module can bring by the thousand: (entries, seconds) that are let through.
# journald's own limit would stop everything the service says, the verdicts too.
_LIMITS: Final[Mapping[Event, tuple[int, float]]] = {
    Event.ERROR_SEEN: (20, 60.0),
    Event.RECORD_UNDECODABLE: (20, 60.0),
    Event.RECORDS_LOST: (20, 60.0),
    Event.PAGE_WOULD_RETIRE: (20, 60.0),
    Event.CAP_REACHED: (20, 60.0),
    Event.QUEUE_FULL: (20, 60.0),
}

# syslog(3) priorities, as the journal and the <N> prefix of sd-daemon(3) have them.
_PRIORITIES: Final = (
    (logging.CRITICAL, 2),
    (logging.ERROR, 3),
    (logging.WARNING, 4),
    (logging.INFO, 6),
)
_PRIORITY_DEBUG: Final = 7

Send = Callable[..., object]
"""``systemd.journal.send``: the message, then fields by keyword."""


def event(
    logger: logging.Logger,
    level: int,
    kind: Event,
    message: str,
    *,
    mfn: Mfn | None = None,
    domid: Domid | None = None,
    job: str | None = None,
) -> None:
    """Log one event, with its MESSAGE_ID and the fields that are given.

    The message is a whole sentence: who reads it need not know the fields.
    """
    fields = {_MESSAGE_ID: kind.message_id}
    if mfn is not None:
        fields["MFN"] = f"{mfn:#x}"
    if domid is not None:
        fields["DOMID"] = str(domid)
    if job is not None:
        fields["JOB"] = job
    # The message goes in as an argument: a per cent sign in a domain's name is no format.
    logger.log(level, "%s", message, extra={_FIELDS: fields}, stacklevel=2)


def setup_logging(level: int) -> None:
    """Send all log entries from ``level`` on to the journal, or else to stderr.

    Libraries are heard from WARNING on.  Handlers from an earlier call are replaced.
    """
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    handler = _handler(under_journal=_stderr_is_the_journal())
    handler.addFilter(RateLimit(_LIMITS))
    root.addHandler(handler)
    root.setLevel(max(level, logging.WARNING))
    logging.getLogger(_IDENTIFIER).setLevel(level)


def _handler(*, under_journal: bool) -> logging.Handler:
    if not under_journal:
        return LineHandler()
    try:
        from systemd.journal import send
    except ImportError:
        return LineHandler(priority_prefix=True)
    return FieldHandler(send)


def _stderr_is_the_journal() -> bool:
    """Whether JOURNAL_STREAM names what stderr really is; children inherit the variable."""
    device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    try:
        stderr = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError, AttributeError):
        return False
    return (device, inode) == (str(stderr.st_dev), str(stderr.st_ino))


def _fields_of(record: logging.LogRecord) -> dict[str, str]:
    fields = getattr(record, _FIELDS, None)
    return dict(fields) if isinstance(fields, dict) else {}


def _priority(level: int) -> int:
    return next((number for least, number in _PRIORITIES if level >= least), _PRIORITY_DEBUG)


def _text(record: logging.LogRecord) -> str:
    text = printable(record.getMessage())
    if record.exc_info:
        text += "\n" + logging.Formatter().formatException(record.exc_info)
    return text


class FieldHandler(logging.Handler):
    """Sends entries to the journal with their fields."""

    def __init__(self, send: Send) -> None:
        super().__init__()
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        """Send one entry; one that the journal does not take goes to stderr instead."""
        try:
            self._send(
                _text(record),
                PRIORITY=str(_priority(record.levelno)),
                SYSLOG_IDENTIFIER=_IDENTIFIER,
                LOGGER=record.name,
                CODE_FILE=record.pathname,
                CODE_LINE=record.lineno,
                CODE_FUNC=record.funcName or "",
                **_fields_of(record),
            )
        except OSError:
            LineHandler(priority_prefix=True).emit(record)


class LineHandler(logging.Handler):
    """Writes entries to stderr as lines, the fields behind the message.

    ``priority_prefix`` starts each with the ``<N>`` that journald reads as its priority.
    """

    def __init__(self, *, priority_prefix: bool = False) -> None:
        super().__init__()
        self._prefix = priority_prefix
        self._time = logging.Formatter()

    def emit(self, record: logging.LogRecord) -> None:
        """Write one entry."""
        fields = _fields_of(record)
        fields.pop(_MESSAGE_ID, None)
        behind = "".join(f" {name}={printable(value)}" for name, value in fields.items())
        first, *more = _text(record).splitlines() or [""]
        start = (
            f"<{_priority(record.levelno)}>"
            if self._prefix
            else f"{self._time.formatTime(record)} {record.levelname.lower()}: "
        )
        try:
            print(start + first + behind, *more, sep="\n", file=sys.stderr, flush=True)
        except OSError:
            self.handleError(record)


class RateLimit(logging.Filter):
    """Lets only so many entries of some kinds through; the next one says how many it kept back."""

    def __init__(self, limits: Mapping[Event, tuple[int, float]]) -> None:
        super().__init__()
        self._limits = {kind.message_id: limit for kind, limit in limits.items()}
        self._seen: dict[str, tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the entry is to be written."""
        kind = _fields_of(record).get(_MESSAGE_ID, "")
        limit = self._limits.get(kind)
        if limit is None:
            return True
        most, seconds = limit
        began, count = self._seen.get(kind, (record.created, 0))
        # A clock that was set back must not silence a kind until it has caught up.
        if not began <= record.created < began + seconds:
            if count > most:
                record.msg = f"{record.getMessage()} ({count - most} such entries were left out)"
                record.args = None
            began, count = record.created, 0
        self._seen[kind] = (began, count + 1)
        return count < most
