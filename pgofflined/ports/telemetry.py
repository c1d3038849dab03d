"""Where machine-check records come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class TelemetrySource(Protocol):
    """Where machine-check records come from.

    ``read`` gives every record that is there, raw, and takes it from the source; it does not
    wait.  ``lost`` says how many further records the source knows to have been lost since the
    last call.
    """

    @property
    def name(self) -> str:
        """``native``, ``mcelog`` or ``simulated``."""
        ...

    def fileno(self) -> int:
        """File descriptor that is readable when there may be records."""
        ...

    def read(self) -> TelemetryBatch:
        """Everything that is there now.  Raises PortError when the source is broken for good."""
        ...

    def close(self) -> None:
        """Let go of the descriptor."""
        ...


class RecordFormat:
    """Names of the raw layouts that ``core.telemetry`` decodes."""

    MC_INFO = "mc_info"  # struct mc_info, xen/include/public/arch-x86/xen-mca.h
    XEN_MCE = "xen_mce"  # struct xen_mce of Linux's /dev/mcelog under Xen


@dataclass(frozen=True, slots=True, kw_only=True)
class TelemetryBatch:
    """Raw records in their order, all of one format, and the records lost before them.

    ``mcg_cap`` is IA32_MCG_CAP of the host's processors where the source knows it and the records
    do not hold it.
    """

    format: str
    records: tuple[bytes, ...]
    lost: int = 0
    mcg_cap: int | None = None
