"""Log entries with fields: to the journal where there is one, else as lines on stderr.

Nothing here writes to standard output, which belongs to what the command line prints.

A failing module can bring reports by the thousand.  Lines that only tell of them pass a ``Chatter``
before anybody builds them; what was decided about a page passes an ``Announced`` and is said once
for each page and state, so that it needs no rate and nothing of it is ever dropped.
"""

from __future__ import annotations

import logging
import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from typing import Final

from pgofflined.core.events import Event
from pgofflined.core.frames import Domid, Mfn
from pgofflined.core.telemetry import BankEntry
from pgofflined.core.text import printable

_log = logging.getLogger(__name__)

_IDENTIFIER: Final = "pgofflined"
_FIELDS: Final = "pgofflined_fields"
_MESSAGE_ID: Final = "MESSAGE_ID"

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
    fields: Mapping[str, str] | None = None,
) -> None:
    """Log one event, with its MESSAGE_ID and the fields that are given.

    The message is a whole sentence: who reads it need not know the fields.
    """
    sent = {**(fields or {}), _MESSAGE_ID: kind.message_id}
    if mfn is not None:
        sent["MFN"] = f"{mfn:#x}"
    if domid is not None:
        sent["DOMID"] = str(domid)
    if job is not None:
        sent["JOB"] = job
    # The message goes in as an argument: a per cent sign in a domain's name is no format.
    logger.log(level, "%s", message, extra={_FIELDS: sent}, stacklevel=2)


def bank_fields(bank: BankEntry | None) -> dict[str, str]:
    """The fields of a machine-check entry: all that was read of the bank.

    Reading consumed the only copy, so the journal is to have it.  What the record does not say is
    left out: SOCKET and APICID where it has no processor, MCG_CAP where nobody told it.
    """
    if bank is None:
        return {}
    fields = {
        "BANK": str(bank.bank),
        "STATUS": f"{bank.status:#018x}",
        "ADDR": f"{bank.addr:#x}",
        "MISC": f"{bank.misc:#x}",
        "MCG_STATUS": f"{bank.gstatus:#x}",
        "MC_FLAGS": f"{bank.flags:#x}",
    }
    if bank.socket is not None:
        fields["SOCKET"] = str(bank.socket)
    if bank.apicid is not None:
        fields["APICID"] = str(bank.apicid)
    if bank.mcg_cap is not None:
        fields["MCG_CAP"] = f"{bank.mcg_cap:#x}"
    return fields


class Chatter:
    """Lets only so many entries of a kind through, and says later how many were left out.

    Ask before the entry is built: ``if chatter.admits(kind): event(...)``.  ``now`` is a clock that
    never jumps, in seconds.  What was left out is told with the kind's next entry, and by
    ``close``.
    """

    def __init__(self, now: Callable[[], float], *, most: int = 20, seconds: float = 60.0) -> None:
        self._now = now
        self._most = most
        self._seconds = seconds
        # By kind: when its window began, and how many entries were asked for since.
        self._windows: dict[Event, tuple[float, int]] = {}

    def admits(self, kind: Event) -> bool:
        """Whether an entry of this kind is to be written now."""
        now = self._now()
        began, count = self._windows.get(kind, (now, 0))
        if now >= began + self._seconds:
            self._tell(kind, count)
            began, count = now, 0
        self._windows[kind] = (began, count + 1)
        return count < self._most

    def close(self) -> None:
        """Tell what was left out until now, of every kind."""
        for kind, (_, count) in self._windows.items():
            self._tell(kind, count)
        self._windows.clear()

    def _tell(self, kind: Event, count: int) -> None:
        if count > self._most:
            event(_log, logging.WARNING, kind, f"{count - self._most} such entries were left out")


class Announced:
    """What was said of which subject, so that it is said once until it changes.

    The subjects spoken of last are remembered, ``most`` of them; of one that was forgotten the same
    may be said again.
    """

    def __init__(self, *, most: int = 10_000) -> None:
        self._most = most
        self._said: OrderedDict[Hashable, Hashable] = OrderedDict()

    def is_news(self, subject: Hashable, state: Hashable) -> bool:
        """Whether this was not said of the subject last; it counts as said from now on."""
        if subject in self._said and self._said[subject] == state:
            self._said.move_to_end(subject)
            return False
        self._said[subject] = state
        self._said.move_to_end(subject)
        if len(self._said) > self._most:
            self._said.popitem(last=False)
        return True


def setup_logging(level: int) -> None:
    """Send all log entries from ``level`` on to the journal, or else to stderr.

    Libraries are heard from WARNING on.  Handlers from an earlier call are replaced.
    """
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    handler = _handler(under_journal=_stderr_is_the_journal())
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
