"""Machine-check records of a simulated host, byte for byte as Xen's do_mca() gives them."""

from __future__ import annotations

import os
import struct
import threading
from collections import deque
from contextlib import suppress
from typing import Final

from pgofflined.core.errors import PortError
from pgofflined.core.frames import DOMID_INVALID, Domid, Maddr, Mfn, maddr_of
from pgofflined.ports import RecordFormat, TelemetryBatch

# struct mc_info and its entries, xen/include/public/arch-x86/xen-mca.h.
_INFO_SIZE: Final = 768
_INFO: Final = struct.Struct("<II")
_GLOBAL: Final = struct.Struct("<HHHHIHHIIQ")
_BANK: Final = struct.Struct("<HHHHQQQQQ")
_RECOVERY: Final = struct.Struct("<HHHBBQQ")
_TYPE_GLOBAL, _TYPE_BANK, _TYPE_RECOVERY = 0, 1, 3
_VCPUID_INVALID: Final = 0xFFFF
_FLAG_CORRECTABLE: Final = 1 << 0
_FLAG_UNCORRECTABLE: Final = 1 << 1
_FLAG_RECOVERABLE: Final = 1 << 2
_FLAG_POLLED: Final = 1 << 3
_FLAG_MCE: Final = 1 << 6
_ACTION_PAGE_OFFLINE: Final = 1 << 0

# IA32_MCi_STATUS: VAL, MISCV, ADDRV; a memory read error of channel 0 (MCACOD 0x0090).
_CORRECTED: Final = 0x8C00_0000_0000_0090
_COUNT_SHIFT: Final = 38
# VAL, UC, EN, MISCV, ADDRV, S; MCACOD 0x017A: an explicit write-back of poisoned data.
_SRAO: Final = 0xBD00_0000_0000_017A
# MISC: a physical address, valid down to bit 12.
_MISC_PHYSICAL_PAGE: Final = 0x8C
# IA32_MCG_STATUS: RIPV and MCIP.
_GSTATUS_IN_HANDLER: Final = 0x5

# PG_OFFLINE_BROKEN | PG_OFFLINE_OWNED | PG_OFFLINE_PENDING, and of a free frame.
_STATUS_OWNED: Final = 0x3004
_STATUS_FREE: Final = 0x2002
_OWNER_SHIFT: Final = 16

# mctelem.c keeps 10 urgent and 20 other records that nobody has fetched; more are lost.
_POOL: Final = 30


class SimulatedTelemetry:
    """``ports.TelemetrySource`` that tests and the demo feed."""

    def __init__(self, *, pool: int = _POOL) -> None:
        self._pool = pool
        self._lock = threading.Lock()
        self._records: deque[bytes] = deque()
        self._lost = 0
        self._failure: str | None = None
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)

    @property
    def name(self) -> str:
        """``simulated``."""
        return "simulated"

    def fileno(self) -> int:
        """Readable while there are records."""
        return self._reader

    def read(self) -> TelemetryBatch:
        """Every record that is there."""
        with self._lock:
            if self._failure is not None:
                raise PortError(self._failure)
            with suppress(BlockingIOError):  # nothing announced since the last read
                os.read(self._reader, 4096)
            records, lost = tuple(self._records), self._lost
            self._records.clear()
            self._lost = 0
            return TelemetryBatch(format=RecordFormat.MC_INFO, records=records, lost=lost)

    def close(self) -> None:
        """Close both ends."""
        for descriptor in (self._reader, self._writer):
            os.close(descriptor)

    def push_corrected(
        self,
        maddr: Maddr,
        *,
        cpu: int = 0,
        bank: int = 9,
        domid: Domid | None = None,
        count: int = 1,
    ) -> bytes:
        """A corrected memory error as the poll reports it; ``domid`` owns the frame.

        Gives the record as well, for tests that feed decoders.
        """
        status = _CORRECTED | count << _COUNT_SHIFT
        return self.push(
            _global(cpu, _FLAG_POLLED | _FLAG_CORRECTABLE),
            _bank(bank, domid, status, maddr),
        )

    def push_srao(
        self, mfn: Mfn, domid: Domid | None, *, cpu: int = 0, guest_address: int | None = None
    ) -> bytes:
        """An uncorrected error for which Xen has taken the frame out already.

        ``guest_address`` is what mc_memerr_dhandler() overwrites the bank's address with where
        the owner lives on (dom0, PVH, HVM).
        """
        address = maddr_of(mfn) if guest_address is None else guest_address
        status = _STATUS_FREE if domid is None else _STATUS_OWNED | domid << _OWNER_SHIFT
        return self.push(
            _global(cpu, _FLAG_MCE | _FLAG_UNCORRECTABLE | _FLAG_RECOVERABLE, _GSTATUS_IN_HANDLER),
            _bank(7, domid, _SRAO, address),
            _RECOVERY.pack(_TYPE_RECOVERY, _RECOVERY.size, 7, 0, _ACTION_PAGE_OFFLINE, mfn, status),
        )

    def push(self, *entries: bytes) -> bytes:
        """A record with these entries."""
        record = (_INFO.pack(len(entries), 0) + b"".join(entries)).ljust(_INFO_SIZE, b"\0")
        self.push_garbage(record)
        return record

    def push_garbage(self, record: bytes) -> None:
        """Any bytes."""
        with self._lock:
            if len(self._records) >= self._pool:
                self._lost += 1
                return
            self._records.append(record)
            self._announce()

    def lose(self, number: int = 1) -> None:
        """Let records be lost before they reach the pool."""
        with self._lock:
            self._lost += number
            self._announce()

    def fail(self, reason: str) -> None:
        """Break the source for good."""
        with self._lock:
            self._failure = reason
            self._announce()

    def _announce(self) -> None:
        with suppress(BlockingIOError):  # the pipe is full of announcements
            os.write(self._writer, b"!")


def _global(cpu: int, flags: int, gstatus: int = 0) -> bytes:
    return _GLOBAL.pack(
        _TYPE_GLOBAL,
        _GLOBAL.size,
        DOMID_INVALID,
        _VCPUID_INVALID,
        0,
        cpu,
        0,
        cpu,
        flags,
        gstatus,
    )


def _bank(bank: int, domid: Domid | None, status: int, address: int) -> bytes:
    owner = DOMID_INVALID if domid is None else domid
    return _BANK.pack(
        _TYPE_BANK, _BANK.size, bank, owner, status, address, _MISC_PHYSICAL_PAGE, 0, 0
    )


assert (_GLOBAL.size, _BANK.size, _RECOVERY.size) == (32, 48, 24)  # noqa: S101 - ABI sizes
