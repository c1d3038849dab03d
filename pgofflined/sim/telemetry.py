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
_EXTENDED: Final = struct.Struct("<HHI")
_EXTENDED_SIZE: Final = 520
_EXTENDED_MSR: Final = struct.Struct("<QQ")
_TYPE_GLOBAL, _TYPE_BANK, _TYPE_EXTENDED, _TYPE_RECOVERY = 0, 1, 2, 3
# Xen notes what ran when it looked: as a rule nothing, which is this domain (DOMID_IDLE).
_DOMID_IDLE: Final = 0x7FFF
_FLAG_CORRECTABLE: Final = 1 << 0
_FLAG_UNCORRECTABLE: Final = 1 << 1
_FLAG_RECOVERABLE: Final = 1 << 2
_FLAG_POLLED: Final = 1 << 3
_FLAG_CMCI: Final = 1 << 5
_FLAG_MCE: Final = 1 << 6
_ACTION_PAGE_OFFLINE: Final = 1 << 0

# IA32_MCi_STATUS: VAL, MISCV, ADDRV; a memory read error of channel 0 (MCACOD 0x0090).
_CORRECTED: Final = 0x8C00_0000_0000_0090
_UC: Final = 1 << 61
_PCC: Final = 1 << 57
_OVER: Final = 1 << 62
_ADDRV: Final = 1 << 58
_MISCV: Final = 1 << 59
_COUNT_SHIFT: Final = 38
# VAL, UC, EN, MISCV, ADDRV, S; MCACOD 0x017A: an explicit write-back of poisoned data.
_SRAO: Final = 0xBD00_0000_0000_017A
# The same with AR; MCACOD 0x0134: poisoned data was loaded.
_SRAR: Final = 0xBD80_0000_0010_0134
# VAL, UC, EN, MISCV, ADDRV; MCACOD 0x009F: poison that a memory controller gave out, not consumed.
_UCNA: Final = 0xBC00_0000_0101_009F
# VAL, MISCV, ADDRV, and MSCOD 0x0010: what the patrol scrubber could not correct (MCACOD 0x00C0).
_UNCORRECTED_SCRUB: Final = 0x8C00_0000_0010_00C0
# AMD: VAL, EN, ADDRV, CECC; the northbridge's DRAM ECC (bits 20:16: 8), a bus code about memory.
_AMD_CORRECTED: Final = 0x9400_4000_0008_0A13
# The same with DEFERRED in place of CECC, and with UC and UECC.
_AMD_DEFERRED: Final = 0x9400_1000_0008_0A13
_AMD_UNCORRECTED: Final = 0xB400_2000_0008_0A13
_AMD_NORTHBRIDGE: Final = 4
_AMD_MISC_MSRS: Final = (0xC000_0408, 0xC000_0409, 0xC000_040A)  # MSR_F10_MC4_MISC1 to 3
# MISC: a physical address, valid down to bit 12.
_MISC_PHYSICAL_PAGE: Final = 0x8C
# IA32_MCi_CTL2: CMCI_EN and Xen's default threshold, read with what an interrupt announced.
_CTL2_CMCI: Final = 1 << 30 | 2
# IA32_MCG_STATUS: RIPV and MCIP.
_GSTATUS_IN_HANDLER: Final = 0x5

# PG_OFFLINE_BROKEN | PG_OFFLINE_OWNED | PG_OFFLINE_PENDING, and of a free frame.
_STATUS_OWNED: Final = 0x3004
_STATUS_FREE: Final = 0x2002
_OWNER_SHIFT: Final = 16

# mctelem_reserve() in mctelem.c: of records that nobody has fetched 30 are kept, 20 of them where
# they are not urgent.  More are dropped, which is counted in a variable that nobody can read.
_POOL: Final = 20
_URGENT_ONLY: Final = 10


class SimulatedTelemetry:
    """``ports.TelemetrySource`` that tests and the demo feed.

    ``mcg_cap`` is IA32_MCG_CAP of the processors; without bit 24 (MCG_SER_P) they are those of
    before software error recovery.  ``pool`` is how many records that are not urgent wait for a
    reader; of more nothing is ever heard, as with the native source.
    """

    def __init__(self, *, pool: int = _POOL, mcg_cap: int | None = None) -> None:
        self._pool = pool
        self._mcg_cap = mcg_cap
        self._lock = threading.Lock()
        self._urgent: deque[bytes] = deque()
        self._others: deque[bytes] = deque()
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
        """Every record that is there, urgent ones first."""
        with self._lock:
            if self._failure is not None:
                raise PortError(self._failure)
            with suppress(BlockingIOError):  # nothing announced since the last read
                os.read(self._reader, 4096)
            records, lost = (*self._urgent, *self._others), self._lost
            self._urgent.clear()
            self._others.clear()
            self._lost = 0
            return TelemetryBatch(
                format=RecordFormat.MC_INFO, records=records, lost=lost, mcg_cap=self._mcg_cap
            )

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
        overwritten: bool = False,
        misc: int = _MISC_PHYSICAL_PAGE,
    ) -> bytes:
        """A corrected memory error as the poll reports it; ``domid`` owns the frame.

        ``count`` is what the bank has counted, ``overwritten`` its OVER.  Gives the record as well,
        for tests that feed decoders.
        """
        status = _CORRECTED | count << _COUNT_SHIFT | (_OVER if overwritten else 0)
        return self.push_polled(status, maddr, misc, cpu=cpu, bank=bank, domid=domid)

    def push_polled(
        self,
        status: int,
        maddr: int,
        misc: int = _MISC_PHYSICAL_PAGE,
        *,
        cpu: int = 0,
        bank: int = 9,
        domid: Domid | None = None,
    ) -> bytes:
        """Whatever a bank holds, as the poll reports it."""
        return self.push(
            _global(cpu, _FLAG_POLLED | _severity(status)), _bank(bank, domid, status, maddr, misc)
        )

    def push_interrupt(
        self,
        status: int,
        maddr: int,
        misc: int = _MISC_PHYSICAL_PAGE,
        *,
        cpu: int = 0,
        bank: int = 9,
        domid: Domid | None = None,
    ) -> bytes:
        """Whatever a bank holds, as the interrupt for it (CMCI) reports it."""
        entry = _bank(bank, domid, status, maddr, misc, ctl2=_CTL2_CMCI, tsc=1)
        return self.push(_global(cpu, _FLAG_CMCI | _severity(status)), entry)

    def push_ucna(self, maddr: Maddr, *, domid: Domid | None = None) -> bytes:
        """An uncorrected error that nothing has consumed: Xen does nothing about it."""
        return self.push_interrupt(_UCNA, maddr, domid=domid)

    def push_uncorrected_scrub(self, maddr: Maddr, *, domid: Domid | None = None) -> bytes:
        """What the patrol scrubber could not correct, in the guise of a corrected error."""
        return self.push_interrupt(_UNCORRECTED_SCRUB, maddr, bank=13, domid=domid)

    def push_leftover(self, maddr: int, *, status: int = _SRAR, bank: int = 1) -> bytes:
        """What a bank held when Xen started (intel_mce_post_reset): Xen names no owner then."""
        return self.push_polled(status, maddr, bank=bank)

    def push_amd_corrected(self, maddr: Maddr) -> bytes:
        """A corrected DRAM error of AMD's families 10h to 16h."""
        return self.push_northbridge(_AMD_CORRECTED, maddr)

    def push_amd_deferred(self, maddr: Maddr) -> bytes:
        """DRAM data that AMD's northbridge found to be uncorrectable, and gave to nobody yet."""
        return self.push_northbridge(_AMD_DEFERRED, maddr)

    def push_amd_uncorrected(self, maddr: Maddr) -> bytes:
        """DRAM data that AMD's northbridge could not correct, found by the poll."""
        return self.push_northbridge(_AMD_UNCORRECTED, maddr)

    def push_northbridge(self, status: int, maddr: int, misc: int = 0) -> bytes:
        """Whatever AMD's northbridge holds, as the poll reports it.

        With a valid MISC Xen adds the bank's further MISC registers (amd_f10_handler).
        """
        entries = [
            _global(0, _FLAG_POLLED | _severity(status)),
            _bank(_AMD_NORTHBRIDGE, None, status, maddr, misc),
        ]
        if status & _MISCV:
            registers = b"".join(_EXTENDED_MSR.pack(number, 0) for number in _AMD_MISC_MSRS)
            head = _EXTENDED.pack(_TYPE_EXTENDED, _EXTENDED_SIZE, len(_AMD_MISC_MSRS))
            entries.append((head + registers).ljust(_EXTENDED_SIZE, b"\0"))
        return self.push(*entries)

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
            _global(cpu, _FLAG_MCE | _severity(_SRAO), _GSTATUS_IN_HANDLER),
            _bank(7, domid, _SRAO, address),
            _RECOVERY.pack(_TYPE_RECOVERY, _RECOVERY.size, 7, 0, _ACTION_PAGE_OFFLINE, mfn, status),
            urgent=True,
        )

    def push(self, *entries: bytes, urgent: bool = False) -> bytes:
        """A record with these entries; ``urgent``: made by the handler of machine checks."""
        record = (_INFO.pack(len(entries), 0) + b"".join(entries)).ljust(_INFO_SIZE, b"\0")
        self.push_garbage(record, urgent=urgent)
        return record

    def push_garbage(self, record: bytes, *, urgent: bool = False) -> None:
        """Any bytes."""
        with self._lock:
            # Urgent ones have some room for themselves, and take of the rest when that is full.
            of_the_rest = max(0, len(self._urgent) - _URGENT_ONLY) + len(self._others)
            has_own = urgent and len(self._urgent) < _URGENT_ONLY
            if not has_own and of_the_rest >= self._pool:
                return
            (self._urgent if urgent else self._others).append(record)
            self._announce()

    def lose(self, number: int = 1) -> None:
        """Let records be lost, and have it told, as dom0's kernel does of its log."""
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


def _severity(status: int) -> int:
    """The flag that mcheck_mca_logout() sets for the worst of a record's banks."""
    if status & _PCC:
        return _FLAG_UNCORRECTABLE
    return _FLAG_RECOVERABLE if status & _UC else _FLAG_CORRECTABLE


def _global(cpu: int, flags: int, gstatus: int = 0) -> bytes:
    return _GLOBAL.pack(
        _TYPE_GLOBAL,
        _GLOBAL.size,
        _DOMID_IDLE,
        cpu,
        0,
        cpu,
        0,
        cpu,
        flags,
        gstatus,
    )


def _bank(
    bank: int,
    domid: Domid | None,
    status: int,
    address: int,
    misc: int = _MISC_PHYSICAL_PAGE,
    *,
    ctl2: int = 0,
    tsc: int = 0,
) -> bytes:
    """A bank as mca_init_bank() reads it: address and MISC only where STATUS has them valid."""
    owner = DOMID_INVALID if domid is None else domid
    return _BANK.pack(
        _TYPE_BANK,
        _BANK.size,
        bank,
        owner,
        status,
        address if status & _ADDRV else 0,
        misc if status & _MISCV else 0,
        ctl2,
        tsc,
    )


assert (_GLOBAL.size, _BANK.size, _RECOVERY.size) == (32, 48, 24)  # noqa: S101 - ABI sizes
