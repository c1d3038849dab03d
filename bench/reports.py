"""How many error reports a second go from raw bytes to a verdict, on one core.

The wanted rate is 20,000: a failing module reports at most a few thousand corrected errors a
second before the processors throttle it.
"""

from __future__ import annotations

import random
import struct
from collections import Counter
from time import perf_counter
from typing import Final

from bench.figures import AtLeast, Figure
from pgofflined.core.classify import classify
from pgofflined.core.frames import Mfn
from pgofflined.core.history import History
from pgofflined.core.machine import CpuVendor, Machine
from pgofflined.core.policy import RetirePolicy, decide
from pgofflined.core.reports import CorrectedPageError
from pgofflined.core.telemetry import decode

TARGET: Final = AtLeast(20_000)
_RECORDS: Final = 50_000
ROUNDS: Final = 5
_HOST_FRAMES: Final = 16 << 20  # 64 GiB
_CORRECTED: Final = 0x8C00_0040_0000_0090
_NOT_MEMORY: Final = 0x9400_0000_0000_0151


def measure(rounds: int = ROUNDS) -> list[Figure]:
    """Reports per second of each record format, in interleaved rounds."""
    kinds = _records(random.Random(1))  # noqa: S311 - a workload
    rates: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(rounds):
        for name, records in kinds.items():
            rates[name].append(_rate(name, records))
    return [
        Figure(name=f"reports from {name}", unit="1/s", samples=tuple(samples), target=TARGET)
        for name, samples in rates.items()
    ]


def _records(chance: random.Random) -> dict[str, list[bytes]]:
    """Records as from a failing module: few pages hit often, many hit once, some other errors."""
    kinds: dict[str, list[bytes]] = {"mc_info": [], "xen_mce": []}
    for _ in range(_RECORDS):
        frame = chance.randrange(100) if chance.random() < 0.3 else chance.randrange(_HOST_FRAMES)
        status = _CORRECTED if chance.random() < 0.9 else _NOT_MEMORY
        kinds["mc_info"].append(_mc_info(status, frame << 12))
        kinds["xen_mce"].append(_xen_mce(status, frame << 12))
    return kinds


def _mc_info(status: int, addr: int) -> bytes:
    head = struct.pack("<II", 2, 0)
    common = struct.pack("<HHHHIHHIIQ", 0, 32, 0x7FF4, 0xFFFF, 0, 0, 0, 3, 9, 0)
    bank = struct.pack("<HHHHQQQQQ", 1, 48, 9, 5, status, addr, 0x8C, 0, 0)
    return (head + common + bank).ljust(768, b"\0")


def _xen_mce(status: int, addr: int) -> bytes:
    head = struct.pack("<QQQ", status, 0x8C, addr).ljust(56, b"\0") + b"\1"
    return (head.ljust(65, b"\0") + b"\x09").ljust(112, b"\0")


def _rate(record_format: str, records: list[bytes]) -> float:
    machine = Machine(
        vendor=CpuVendor.INTEL, family=6, physical_bits=46, max_mfn=Mfn(_HOST_FRAMES - 1)
    )
    policy = RetirePolicy()
    history = History(
        window=policy.window,
        threshold=policy.corrected_errors,
        max_pages=policy.max_tracked_pages,
    )
    verdicts: Counter[str] = Counter()
    began = perf_counter()
    for number, record in enumerate(records):
        for report in classify(decode(record_format, record), machine):
            hits = 0
            if isinstance(report, CorrectedPageError):
                hits = history.record(report.mfn, number * 0.001, 1)
            verdict = decide(report, hits, policy, retired_frames=0, host_frames=_HOST_FRAMES)
            verdicts[type(verdict).__name__] += 1
    seconds = perf_counter() - began
    assert verdicts.total() == len(records)
    assert {"Retire", "Watch", "Ignore"} == verdicts.keys()
    return len(records) / seconds
