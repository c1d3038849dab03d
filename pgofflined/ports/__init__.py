"""What the project needs of a host, as protocols that Xen and the simulated host both fulfil.

Every method is synchronous and may be called from any thread.  Failures are those of
``pgofflined.core.errors``.  Frame arrays are one-dimensional ``uint64``; page contents are
``uint64`` arrays of shape (number of frames, 512) and always *copies*: no mapping of foreign
memory outlives a call, or the block of a ``window``, so that our own mappings can never be the
reference that makes Xen refuse an exchange.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pgofflined.ports.clock import Clock
from pgofflined.ports.ends import DomainEnds
from pgofflined.ports.hypervisor import (
    BY_NAME_ONLY,
    DomainControl,
    ForeignMemory,
    FrameControl,
    FrameExchange,
    FrameWindow,
    Hypervisor,
    PageTableControl,
    SuspendLimits,
    Swapped,
    VcpuFrames,
    nothing,
)
from pgofflined.ports.journal import Hold, JobRecord, Journal, OpenJob, UnfinishedJob
from pgofflined.ports.telemetry import RecordFormat, TelemetryBatch, TelemetrySource

if TYPE_CHECKING:
    from pgofflined.ports.hypervisor import FrameArray, TypeArray, Words

__all__ = [
    "BY_NAME_ONLY",
    "Clock",
    "DomainControl",
    "DomainEnds",
    "ForeignMemory",
    "FrameArray",
    "FrameControl",
    "FrameExchange",
    "FrameWindow",
    "Hold",
    "Hypervisor",
    "JobRecord",
    "Journal",
    "OpenJob",
    "PageTableControl",
    "RecordFormat",
    "SuspendLimits",
    "Swapped",
    "TelemetryBatch",
    "TelemetrySource",
    "TypeArray",
    "UnfinishedJob",
    "VcpuFrames",
    "Words",
    "nothing",
]
