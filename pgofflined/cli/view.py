"""The daemon's replies as people read them: what is wrong first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import msgspec

from pgofflined.control.protocol import (
    AcknowledgeReply,
    Condition,
    Job,
    JobsReply,
    OfflineReply,
    Page,
    QueryReply,
    Reply,
    StatusReply,
    encode,
)
from pgofflined.core.book import Cause
from pgofflined.core.conditions import Severity
from pgofflined.core.frames import PAGE_SIZE
from pgofflined.core.status import Fate
from pgofflined.core.text import printable

_MINUTE: Final = 60
_HOUR: Final = 60 * _MINUTE
_DAY: Final = 24 * _HOUR


def as_json(reply: Reply) -> str:
    """The reply as it came, laid out."""
    return msgspec.json.format(encode(reply), indent=2).decode().rstrip("\n")


def status(reply: StatusReply, now: float) -> list[str]:
    """How things stand."""
    up = _duration(now - reply.started)
    lines = [f"pgofflined {reply.version} on Xen {reply.xen_version}, up {up}", ""]
    if reply.dry_run:
        lines += ["DRY RUN: decisions are logged only", ""]
    lines += [*_attention(reply, now), ""]
    lines += _facts(_summary(reply, now))
    if reply.jobs:
        lines += ["", "JOBS", *_job_table(reply.jobs, reply.jobs_omitted, now)]
    if reply.pages or reply.pages_omitted:
        lines += ["", "PAGES", *_page_table(reply, now)]
    return lines


def jobs(reply: JobsReply, now: float) -> list[str]:
    """The jobs that run or wait."""
    if not reply.jobs:
        return ["No job runs or waits."]
    return _job_table(reply.jobs, reply.jobs_omitted, now)


def query(reply: QueryReply, now: float) -> list[str]:
    """One frame."""
    facts = [
        ("mfn", f"{reply.mfn:#x}"),
        ("Xen says", printable(reply.state.lower())),
        ("owner", printable(reply.owner)),
        ("errors", f"{reply.hits_in_window} in the window"),
    ]
    if reply.note:
        facts.append(("note", printable(reply.note)))
    page = reply.page
    if page is None:
        facts.append(("status", "the daemon has not been asked to retire it"))
    else:
        facts.append(("status", f"{page.state}, for {_duration(now - page.since)}"))
        facts.append(("cause", _CAUSES.get(page.cause, page.cause)))
        facts.append(("detail", _why(page, now)))
    return _facts(facts)


_CAUSES: Final = {
    Cause.CORRECTED.value: "corrected errors",
    Cause.UNCORRECTED.value: "an uncorrected error",
    Cause.OPERATOR.value: "an operator's request",
}


def offline(reply: OfflineReply) -> list[str]:
    """What has become of a frame."""
    mfn, why = f"{reply.mfn:#x}", printable(reply.detail)
    match reply.fate:
        case Fate.OUT_OF_USE:
            return [f"mfn {mfn} is out of use: {why}"]
        case Fate.REFUSED:
            return [f"mfn {mfn} is not retired: {why}"]
        case Fate.UNRESOLVED:
            return [f"mfn {mfn} stays in use: {why}"]
        case Fate.UNDER_WAY:
            return [
                f"mfn {mfn} is under way: {why}",
                f"see what becomes of it: pgofflined query {mfn}",
            ]
        case _:
            return [f"mfn {mfn}: {why}"]


def acknowledge(reply: AcknowledgeReply, now: float) -> list[str]:
    """What is acknowledged now, and what cannot be."""
    if not reply.acknowledged and not reply.kept:
        return ["Nothing of this kind waits to be acknowledged; see: pgofflined status"]
    lines = []
    if reply.acknowledged:
        lines += ["Acknowledged:", *_condition_lines(reply.acknowledged, now)]
    if reply.kept:
        lines += ["Ends only with its cause:", *_condition_lines(reply.kept, now)]
    return lines


def _attention(reply: StatusReply, now: float) -> list[str]:
    """What needs a person first; "All is well" only where nothing else is to be said.

    What is acknowledged is listed behind it.
    """
    open_ones = [one for one in reply.attention if not one.acknowledged]
    known = [one for one in reply.attention if one.acknowledged]
    urgent = [one for one in open_ones if one.severity != Severity.INFO]
    notes = [one for one in open_ones if one.severity == Severity.INFO]
    lines = []
    if urgent:
        lines += ["ATTENTION", *_condition_lines(urgent, now, marker="!")]
    if notes and urgent:
        lines += ["FOR INFORMATION", *_condition_lines(notes, now)]
    elif notes:
        heading = "Nothing needs you now; for information:"
        lines += [heading, *_condition_lines(notes, now)]
    elif not urgent:
        lines.append("All is well: nothing needs you.")
    if known:
        lines += ["ACKNOWLEDGED", *_condition_lines(known, now)]
    if reply.attention_omitted:
        lines.append(f"  and {reply.attention_omitted} more conditions")
    return lines


def _condition_lines(
    conditions: Iterable[Condition], now: float, *, marker: str = "-"
) -> Iterator[str]:
    for one in conditions:
        age = _duration(now - one.since)
        severity = "" if one.severity == Severity.INFO else f"{one.severity} "
        yield f"  {marker} {severity}{one.code} ({age}): {printable(one.text)}"


def _summary(reply: StatusReply, now: float) -> list[tuple[str, str]]:
    source = reply.source
    last = source.last_record
    record = "no record yet" if last is None else f"last record {_duration(now - last)} ago"
    name = "NONE" if source.name is None else source.name
    note = f" ({printable(source.note)})" if source.note else ""
    share = f"{_bytes(reply.retired_frames)} of {_bytes(reply.cap_frames)}"
    errors = (f"{error.count} {error.error_class} ({error.source})" for error in reply.errors)
    states = (f"{count} {state}" for state, count in reply.pages_by_state.items() if count)
    oldest = reply.oldest_unfinished
    under_way = "" if oldest is None else f"; longest under way {_duration(now - oldest)}"
    workers = reply.workers
    busy = f" for up to {_duration(workers.longest_busy_seconds)}" if workers.busy else ""
    lost = sum(reply.lost.values())
    facts = [
        ("source", f"{name}{note}, {record}"),
        ("retired", f"{reply.retired_frames} pages (limit {reply.cap_frames}), {share}"),
        ("pages", (", ".join(states) or "none") + under_way),
        ("errors", ", ".join(errors) or "none"),
        ("watched", f"{reply.tracked_pages} pages have had errors"),
        (
            "workers",
            f"{workers.busy} of {workers.workers} busy{busy}, {workers.queued_pages} pages wait",
        ),
        ("policy", reply.policy_digest),
    ]
    if lost:
        places = ", ".join(f"{count} {place}" for place, count in reply.lost.items() if count)
        facts.append(("LOST", f"{lost} records: {places}"))
    return facts


def _facts(facts: Iterable[tuple[str, str]]) -> list[str]:
    return [f"{name:<10}{text}" for name, text in facts]


def _page_table(reply: StatusReply, now: float) -> list[str]:
    rows = [
        (
            f"{page.mfn:#x}",
            page.state,
            _domain(page.domid, page.domain_name),
            _duration(now - page.since),
            _why(page, now),
        )
        for page in reply.pages
    ]
    return _table(("MFN", "STATE", "DOMAIN", "SINCE", "WHY"), rows, reply.pages_omitted)


def _job_table(shown: Sequence[Job], omitted: int, now: float) -> list[str]:
    rows = [
        (
            job.job,
            job.kind,
            _domain(job.domid, job.domain_name),
            str(job.pages),
            job.state,
            _duration(now - job.since),
            _joined(printable(job.detail), _tries(job.attempts, job.next_try, now)),
        )
        for job in shown
    ]
    return _table(("JOB", "KIND", "DOMAIN", "PAGES", "STATE", "SINCE", "DETAIL"), rows, omitted)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], omitted: int) -> list[str]:
    widths = [max(len(row[column]) for row in (heads, *rows)) for column in range(len(heads))]
    lines = []
    for row in (heads, *rows):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append(f"  {'  '.join(cells)}".rstrip())
    if omitted:
        lines.append(f"  and {omitted} more")
    return lines


def _why(page: Page, now: float) -> str:
    tries = _tries(page.attempts, page.next_try, now)
    return _joined(printable(page.detail or page.reason), tries) or "-"


def _tries(attempts: int, next_try: float | None, now: float) -> str:
    if next_try is None:
        return f"tried {attempts} times" if attempts > 1 else ""
    soon = "now" if next_try <= now else f"in {_duration(next_try - now)}"
    return f"try {attempts + 1} {soon}"


def _joined(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


def _domain(domid: int | None, name: str) -> str:
    return "-" if domid is None else f"d{domid} {printable(name)}".rstrip()


def _bytes(frames: int) -> str:
    size = frames * PAGE_SIZE
    exponent = 3 if size >= 1 << 30 else 2 if size >= 1 << 20 else 1
    return f"{size / 1024**exponent:.4g} {'BKMG'[exponent]}iB"


def _duration(seconds: float) -> str:
    """Two units at most: somebody wants to know whether it is minutes or days."""
    whole = max(0, round(seconds))
    if whole < _MINUTE:
        return f"{whole} s"
    if whole < _HOUR:
        return f"{whole // _MINUTE} min {whole % _MINUTE} s"
    if whole < _DAY:
        return f"{whole // _HOUR} h {whole % _HOUR // _MINUTE} min"
    return f"{whole // _DAY} d {whole % _DAY // _HOUR} h"
