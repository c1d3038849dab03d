"""Metrics as Prometheus sees them."""

from __future__ import annotations

import asyncio
import gzip
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from pgofflined.core.conditions import ConditionCode
from pgofflined.core.frames import Mfn, Pfn
from pgofflined.core.outcomes import Blackout, Exchanged, ExchangeReport, Refusal, RefusalReason
from pgofflined.core.policy import TcpAddress, UnixAddress
from pgofflined.core.relocation_outcomes import Migrated, Relocated
from pgofflined.core.reports import REPORT_CLASSES, ErrorReport
from pgofflined.core.status import ReloadStatus, Snapshot, SourceStatus
from pgofflined.metrics import Metrics, MetricsServer, http
from pgofflined.serving import CannotListen
from tests.unit.rim_samples import NOW, SNAPSHOT, WEB

LOOPBACK = TcpAddress(host="127.0.0.1", port=0)
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def metrics_of(snapshot: Snapshot = SNAPSHOT) -> Metrics:
    return Metrics(lambda: snapshot, lambda: NOW)


def samples(text: str) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def read(metrics: Metrics) -> Samples:
    return samples(generate_latest(metrics.registry).decode())


def value(found: Samples, name: str, **labels: str) -> float:
    named = {key.rstrip("_"): text for key, text in labels.items()}
    return found[f"pgofflined_{name}", frozenset(named.items())]


def test_the_snapshot_is_told_in_base_units() -> None:
    found = read(metrics_of())
    assert value(found, "errors_total", class_="corrected", source="mcelog") == 12
    assert value(found, "records_lost_total", where="mcelog") == 3
    assert value(found, "pages", state="waiting") == 1
    assert value(found, "retired_bytes") == 3 * 4096
    assert value(found, "retire_budget_bytes") == 16 << 20
    assert value(found, "pages_pending_oldest_seconds") == 3600.0
    assert value(found, "last_record_timestamp_seconds") == NOW - 90.0
    assert value(found, "queue_pages") == 5
    assert value(found, "workers_busy") == 1
    assert value(found, "idle_scrub_pages") == 1
    assert value(found, "attention", severity="warning", reason="page_unresolved") == 1
    assert value(found, "source_up") == 1
    assert value(found, "source_info", source="mcelog") == 1
    assert value(found, "build_info", version="0.1.0", xen="4.20.4") == 1
    assert value(found, "policy_info", digest="3f2a", dry_run="false") == 1


def test_a_rejected_configuration_is_told_with_the_time_of_the_last_good_one() -> None:
    loaded = ReloadStatus(successful=True, when=NOW - 60, last_success=NOW - 60)
    found = read(metrics_of(replace(SNAPSHOT, reload=loaded)))
    assert value(found, "config_last_reload_successful") == 1
    assert value(found, "config_last_reload_success_timestamp_seconds") == NOW - 60
    rejected = replace(loaded, successful=False, when=NOW, problems=("no",))
    found = read(metrics_of(replace(SNAPSHOT, reload=rejected)))
    assert value(found, "config_last_reload_successful") == 0
    assert value(found, "config_last_reload_success_timestamp_seconds") == NOW - 60


def test_without_a_source_or_a_page_there_are_zeros() -> None:
    degraded = replace(
        SNAPSHOT,
        source=SourceStatus(name=None, note="nothing there"),
        oldest_unfinished=None,
        dry_run=True,
    )
    found = read(metrics_of(degraded))
    assert value(found, "source_up") == 0
    assert value(found, "source_info", source="none") == 1
    assert value(found, "last_record_timestamp_seconds") == 0
    assert value(found, "pages_pending_oldest_seconds") == 0
    assert value(found, "policy_info", digest="3f2a", dry_run="true") == 1


def test_every_series_of_a_known_set_is_there_from_the_start() -> None:
    found = read(metrics_of(replace(SNAPSHOT, reports={}, lost={}, pages_by_phase={})))
    for report_class in REPORT_CLASSES:
        assert value(found, "errors_total", class_=report_class, source="native") == 0
    for reason in RefusalReason:
        assert value(found, "exchange_pages_total", outcome=reason.value) == 0
    assert value(found, "pages", state="left") == 0
    assert value(found, "jobs_total", kind="relocation", outcome="failed") == 0
    assert value(found, "migrations_total", outcome="in_doubt") == 0
    assert value(found, "records_lost_total", where="undecodable") == 0
    assert value(found, "guest_blackout_seconds_count") == 0


def test_an_exchange_counts_its_job_its_pages_and_the_pause() -> None:
    metrics = metrics_of()
    metrics.observe_exchange(
        ExchangeReport(
            domain=WEB,
            results=(
                Exchanged(old=Mfn(1), new=Mfn(2), pfn=Pfn(3), references=1, offlined=True),
                Refusal(mfn=Mfn(4), reason=RefusalReason.GRANTED, detail=""),
            ),
            blackout=Blackout(whole=0.3, ours=0.05),
        )
    )
    metrics.observe_exchange(
        ExchangeReport(domain=WEB, results=(), blackout=None, stuck="it does not resume")
    )
    found = read(metrics)
    assert value(found, "jobs_total", kind="exchange", outcome="partly") == 1
    assert value(found, "jobs_total", kind="exchange", outcome="failed") == 1
    assert value(found, "exchange_pages_total", outcome="exchanged") == 1
    assert value(found, "exchange_pages_total", outcome="granted") == 1
    assert value(found, "guests_stuck_total") == 1
    assert value(found, "guest_blackout_seconds_count") == 1
    assert value(found, "guest_blackout_seconds_sum") == pytest.approx(0.3)
    assert value(found, "guest_blackout_seconds_bucket", le="0.25") == 0
    assert value(found, "guest_blackout_seconds_bucket", le="0.5") == 1
    # A bound belongs to its bucket: less than or equal.
    assert value(found, "guest_blackout_own_seconds_bucket", le="0.05") == 1
    assert value(found, "guest_blackout_own_seconds_bucket", le="0.025") == 0
    assert value(found, "guest_blackout_own_seconds_bucket", le="+Inf") == 1


def test_relocations_and_migrations_are_counted() -> None:
    metrics = metrics_of()
    metrics.observe_migration(Migrated())
    metrics.observe_relocation(
        Relocated(
            domain=WEB,
            mfns=frozenset({Mfn(1)}),
            new_domid=None,
            attempts=1,
            seconds=9.0,
        )
    )
    found = read(metrics)
    assert value(found, "migrations_total", outcome="migrated") == 1
    assert value(found, "jobs_total", kind="relocation", outcome="done") == 1


def test_what_is_done_again_counts_again() -> None:
    metrics = metrics_of()
    assert value(read(metrics), "guests_ended_total") == 0
    exchanged = Exchanged(old=Mfn(1), new=Mfn(2), pfn=Pfn(3), references=1, offlined=True)
    report = ExchangeReport(
        domain=WEB,
        results=(exchanged, exchanged),
        blackout=Blackout(whole=0.3, ours=0.05),
        stuck="it does not resume",
        ended="d7 crashed",
    )
    relocated = Relocated(domain=WEB, mfns=frozenset(), new_domid=None, attempts=1, seconds=1.0)
    for _ in range(2):
        metrics.observe_exchange(report)
        metrics.observe_relocation(relocated)
        metrics.observe_migration(Migrated())
        metrics.observe_end()
    found = read(metrics)
    assert value(found, "exchange_pages_total", outcome="exchanged") == 4
    assert value(found, "guests_stuck_total") == 2
    assert value(found, "guests_ended_total") == 4
    done = [found[key] for key in found if key[0] == "pgofflined_jobs_total" and found[key]]
    assert done == [2, 2]
    assert value(found, "migrations_total", outcome="migrated") == 2
    assert value(found, "guest_blackout_seconds_count") == 2
    assert value(found, "guest_blackout_seconds_sum") == pytest.approx(0.6)
    assert value(found, "guest_blackout_own_seconds_sum") == pytest.approx(0.1)
    # An exchange after which its guest runs is neither.
    metrics.observe_exchange(ExchangeReport(domain=WEB, results=(), blackout=None))
    found = read(metrics)
    assert value(found, "guests_stuck_total") == 2
    assert value(found, "guests_ended_total") == 4


def test_a_page_that_waits_since_later_than_now_has_not_waited() -> None:
    found = read(metrics_of(replace(SNAPSHOT, oldest_unfinished=NOW + 5)))
    assert value(found, "pages_pending_oldest_seconds") == 0


def test_the_names_are_an_interface() -> None:
    names = {name for name, _ in read(metrics_of()) if name.startswith("pgofflined_")}
    assert names == {
        f"pgofflined_{name}"
        for name in (
            *("attention", "build_info", "config_last_reload_successful"),
            *("config_last_reload_success_timestamp_seconds", "errors_total"),
            *("evicted_pages_total", "exchange_pages_total"),
            *("guest_blackout_seconds_bucket", "guest_blackout_seconds_count"),
            *("guest_blackout_seconds_sum", "guest_blackout_own_seconds_bucket"),
            *("guest_blackout_own_seconds_count", "guest_blackout_own_seconds_sum"),
            *("guests_ended_total", "guests_stuck_total", "idle_scrub_pages", "jobs_total"),
            *("last_record_timestamp_seconds", "migrations_total", "pages"),
            *("pages_pending_oldest_seconds", "policy_info", "queue_limit_pages", "queue_pages"),
            *("records_lost_total", "retire_budget_bytes", "retired_bytes", "source_info"),
            *("source_up", "tracked_pages", "worker_busy_longest_seconds", "workers"),
            "workers_busy",
        )
    }


def test_names_follow_the_rules_and_labels_are_bounded() -> None:
    metrics = metrics_of()
    text = generate_latest(metrics.registry).decode()
    labels: set[str] = set()
    for family in text_string_to_metric_families(text):
        assert family.name.startswith(("pgofflined_", "process_"))
        assert family.documentation
        labels.update(*(sample.labels for sample in family.samples))
    assert labels == {
        "class", "source", "where", "state", "kind", "outcome", "le",
        "version", "xen", "digest", "dry_run", "severity", "reason",
    }  # fmt: skip
    assert "_created" not in text
    assert "web-1" not in text
    assert "1a2b3" not in text


def test_every_condition_has_a_series_and_what_is_acknowledged_does_not_count() -> None:
    known = replace(SNAPSHOT.attention[0], acknowledged=True)
    found = read(metrics_of(replace(SNAPSHOT, attention=(known, *SNAPSHOT.attention[1:]))))
    series = {key: count for key, count in found.items() if key[0] == "pgofflined_attention"}
    assert len(series) == len(ConditionCode)
    for code in ConditionCode:
        count = 1 if code in (ConditionCode.PAGE_PUT_OFF, ConditionCode.IDLE_SCRUB) else 0
        assert value(found, "attention", severity=code.severity.value, reason=code.value) == count


def test_the_process_tells_of_itself() -> None:
    found = read(metrics_of())
    assert found["process_resident_memory_bytes", frozenset()] > 0


def test_every_kind_of_report_has_a_class() -> None:
    assert len(REPORT_CLASSES) == len(set(REPORT_CLASSES))
    assert len(get_args(ErrorReport)) == 4


@asynccontextmanager
async def served(
    address: TcpAddress | UnixAddress = LOOPBACK, metrics: Metrics | None = None
) -> AsyncIterator[MetricsServer]:
    server = MetricsServer.open(address, metrics or metrics_of())
    task = asyncio.create_task(server.serve())
    try:
        yield server
    finally:
        task.cancel()
        await asyncio.wait([task])
        server.close()


async def exchange(
    streams: tuple[asyncio.StreamReader, asyncio.StreamWriter], request: bytes
) -> tuple[str, dict[str, str], bytes]:
    reader, writer = streams
    writer.write(request)
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    assert int(headers["Content-Length"]) == len(body)
    assert headers["Connection"] == "close"
    return status, headers, body


async def ask(server: MetricsServer, request: bytes) -> tuple[str, dict[str, str], bytes]:
    return await exchange(await asyncio.open_connection("127.0.0.1", server.port), request)


async def test_a_scrape_gets_the_metrics() -> None:
    async with served() as server:
        status, headers, body = await ask(
            server, b"GET /metrics HTTP/1.1\r\nHost: x\r\nAccept-Encoding: identity\r\n\r\n"
        )
    assert status == "HTTP/1.1 200 OK"
    assert headers["Content-Type"].startswith("text/plain")
    assert value(samples(body.decode()), "retired_bytes") == 12288


async def test_a_scrape_may_be_compressed_and_in_openmetrics() -> None:
    request = (
        b"GET /metrics HTTP/1.1\r\nAccept: application/openmetrics-text; version=1.0.0\r\n"
        b"Accept-Encoding: gzip\r\n\r\n"
    )
    async with served() as server:
        _, headers, body = await ask(server, request)
    assert headers["Content-Type"].startswith("application/openmetrics-text")
    assert gzip.decompress(body).endswith(b"# EOF\n")


async def test_a_unix_socket_serves_as_well(tmp_path: Path) -> None:
    path = tmp_path / "metrics.sock"
    async with served(UnixAddress(path=str(path))):
        streams = await asyncio.open_unix_connection(str(path))
        status, _, _ = await exchange(streams, b"GET /metrics HTTP/1.0\r\n\r\n")
    assert status == "HTTP/1.1 200 OK"
    assert not path.exists()


@pytest.mark.parametrize(
    ("request_head", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "404 Not Found"),
        (b"GET /metrics?x=1 HTTP/1.1\r\n\r\n", "200 OK"),
        (b"POST /metrics HTTP/1.1\r\n\r\n", "405 Method Not Allowed"),
        (b"GET /metrics HTTP/2.0\r\n\r\n", "505 HTTP Version Not Supported"),
        (b"GET /metrics\r\n\r\n", "400 Bad Request"),
        (b"GET  /metrics HTTP/1.1\r\n\r\n", "400 Bad Request"),
        (b"G\xc3\x89T /metrics HTTP/1.1\r\n\r\n", "400 Bad Request"),
        (b"\r\n\r\n", "400 Bad Request"),
        (b"GET /metrics HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n", "400 Bad Request"),
        (b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\n\r\n", "431 Request Header Fields Too Large"),
    ],
)
async def test_what_is_no_scrape_gets_its_status(request_head: bytes, status: str) -> None:
    async with served() as server:
        assert (await ask(server, request_head))[0] == f"HTTP/1.1 {status}"


@pytest.mark.parametrize(
    ("request_head", "text"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "the metrics are at /metrics\n"),
        (b"POST /metrics HTTP/1.1\r\n\r\n", "405 Method Not Allowed\n"),
    ],
)
async def test_who_looks_elsewhere_is_told_in_words(request_head: bytes, text: str) -> None:
    async with served() as server:
        _, headers, body = await ask(server, request_head)
    assert headers["Content-Type"] == "text/plain; charset=utf-8"
    assert body.decode() == text


async def test_who_asks_for_some_series_gets_all() -> None:
    async with served() as server:
        request = b"GET /metrics?name[]=pgofflined_retired_bytes HTTP/1.1\r\n\r\n"
        _, _, body = await ask(server, request)
    assert value(samples(body.decode()), "retired_bytes") == 12288
    assert value(samples(body.decode()), "source_up") == 1


async def test_who_asks_for_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "_REQUEST_TIMEOUT", 0.05)
    async with served() as server, asyncio.timeout(10):
        assert (await ask(server, b"GET /met"))[0] == "HTTP/1.1 408 Request Timeout"


async def test_an_address_that_is_taken_is_told_with_its_key() -> None:
    async with served() as server:
        taken = TcpAddress(host="127.0.0.1", port=server.port)
        with pytest.raises(CannotListen, match=r"\(metrics\.listen\)"):
            MetricsServer.open(taken, metrics_of())


async def test_who_hangs_up_does_no_harm() -> None:
    async with served() as server:
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"GET /met")
        writer.close()
        await writer.wait_closed()
        assert (await ask(server, b"GET /metrics HTTP/1.1\r\n\r\n"))[0] == "HTTP/1.1 200 OK"


async def test_a_snapshot_that_fails_costs_one_scrape(caplog: pytest.LogCaptureFixture) -> None:
    snapshots = iter([SNAPSHOT])

    def fail_then_work() -> Snapshot:
        if "failed" not in seen:
            seen.append("failed")
            raise ZeroDivisionError
        return next(snapshots)

    seen: list[str] = []
    async with served(metrics=Metrics(fail_then_work, lambda: NOW)) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"GET /metrics HTTP/1.1\r\n\r\n")
        assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()
        assert (await ask(server, b"GET /metrics HTTP/1.1\r\n\r\n"))[0] == "HTTP/1.1 200 OK"
    assert re.search(r"a fault of ours \(metrics\)", caplog.text)
