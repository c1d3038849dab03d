"""Machine-check records of the host: from the hypervisor, or from dom0's kernel."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import os
import select
import struct
from typing import TYPE_CHECKING, Final

from pgofflined.core.errors import PortError, SourceUnavailable, XenError
from pgofflined.ports import RecordFormat, TelemetryBatch
from pgofflined.xen.abi.mca import (
    VIRQ_MCA,
    XEN_MC_ACK,
    XEN_MC_FETCHFAILED,
    XEN_MC_NODATA,
    XEN_MC_NONURGENT,
    XEN_MC_URGENT,
    XEN_MCA_INTERFACE_VERSION,
    Mc,
    McInfo,
    McLogicalCpu,
    XEN_MC_fetch,
    XEN_MC_physcpuinfo,
)
from pgofflined.xen.abi.mcelog import (
    MCE_GET_LOG_LEN,
    MCE_GET_RECORD_LEN,
    MCE_GETCLEAR_FLAGS,
    SHORTEST_RECORD,
    XEN_MCE_OVERFLOW_FLAG,
)
from pgofflined.xen.abi.xen import HYPERVISOR_arch_0
from pgofflined.xen.libs import EventChannels, XenCall

if TYPE_CHECKING:
    from pgofflined.ports import TelemetrySource

_LOG = logging.getLogger(__name__)

# Xen keeps at most 30 records (mctelem.c); a drain that finds more than this is not draining.
_MOST_RECORDS: Final = 1000
# IA32_MCG_CAP (Intel SDM volume 4); Xen gives it of every processor.
_MSR_MCG_CAP: Final = 0x179
# Processors for which there is room beyond those that Xen counts, should some come online
# meanwhile, and more than Xen can count (NR_CPUS in xen/arch/Kconfig).
_SPARE_CPUS: Final = 256
_MOST_CPUS: Final = 16_383
_LONGEST_RECORD: Final = 4096
_LONGEST_LOG: Final = 4096


class NativeSource:
    """VIRQ_MCA and XEN_MC_fetch: the hypervisor's whole telemetry, with owners and recovery.

    Only one in dom0 can have it: where the kernel's own driver is built in and started, it has it.
    ``port`` and ``fileno()`` are what a restart needs to keep: give a copy of the descriptor to
    the service manager and both to ``adopt`` in the next run.  Read once after opening or
    adopting: records may be there whose event is over.
    """

    def __init__(self, *, call: XenCall, channels: EventChannels, port: int) -> None:
        self._call = call
        self._channels = channels
        self._port = port
        self._unacknowledged: dict[int, int] = {}
        self._has_asked = False
        self._mcg_cap: int | None = None
        # The kernel's read would block after a spurious wake-up.
        os.set_blocking(channels.fileno(), False)

    @classmethod
    def open(cls) -> NativeSource:
        """Bind VIRQ_MCA.  Raises SourceUnavailable (EEXIST: the kernel's driver has it)."""
        call = _call()
        try:
            channels = EventChannels()
        except PortError as error:
            call.close()
            raise _unavailable(error) from error
        try:
            port = channels.bind_virq(VIRQ_MCA)
        except PortError as error:
            channels.close()
            call.close()
            raise _unavailable(error) from error
        return cls(call=call, channels=channels, port=port)

    @classmethod
    def adopt(cls, fd: int, port: int) -> NativeSource:
        """Go on with a descriptor of an earlier run, on which VIRQ_MCA is bound to ``port``.

        The descriptor is ours from then on.  The port is unmasked: the earlier run may have ended
        between taking an event and unmasking.  Raises SourceUnavailable (ENOSYS: Xen 4.14's library
        cannot adopt); the descriptor is then still the caller's.
        """
        call = _call()
        try:
            channels = EventChannels(fd=fd)
        except PortError as error:
            call.close()
            raise _unavailable(error) from error
        source = cls(call=call, channels=channels, port=port)
        source._channels.unmask(port)
        return source

    @property
    def name(self) -> str:
        """``native``."""
        return "native"

    @property
    def port(self) -> int:
        """The event channel that VIRQ_MCA is bound to."""
        return self._port

    def fileno(self) -> int:
        """Readable when the hypervisor has raised VIRQ_MCA."""
        return self._channels.fileno()

    def close(self) -> None:
        """Unbind and let go, unless a copy of the descriptor is kept elsewhere."""
        self._channels.close()
        self._call.close()

    def read(self) -> TelemetryBatch:
        """Fetch and acknowledge every record, urgent ones first.

        Raises XenError when the hypervisor refuses and nothing has been fetched.  What it drops
        for want of room it does not tell, so ``lost`` is always 0.
        """
        self._rearm()
        self._ask_mcg_cap()
        records: list[bytes] = []
        try:
            for queue in (XEN_MC_URGENT, XEN_MC_NONURGENT):
                self._drain(queue, records)
        except XenError as error:
            if not records:
                raise
            _LOG.error("machine-check records may be left in the hypervisor: %s", error)
        return TelemetryBatch(
            format=RecordFormat.MC_INFO, records=tuple(records), mcg_cap=self._mcg_cap
        )

    def _rearm(self) -> None:
        """Take the event, if there is one, and let the next one through.

        Before the records are fetched: one that comes during that raises a new event.
        """
        poller = select.poll()
        poller.register(self.fileno(), select.POLLIN)
        if poller.poll(0):
            self._channels.pending()
            self._channels.unmask(self._port)

    def _drain(self, queue: int, records: list[bytes]) -> None:
        """Append the queue's records until it is empty or stops moving."""
        last: tuple[int, bytes] | None = None
        while len(records) < _MOST_RECORDS:
            fetched = self._fetch(queue)
            if fetched is None:
                return
            number, record = fetched
            if fetched == last:
                _LOG.error("the hypervisor does not take acknowledgements; record dropped")
                return
            if self._unacknowledged.pop(queue, None) != number:
                records.append(record)
            self._unacknowledged[queue] = number
            self._acknowledge(queue, number)
            del self._unacknowledged[queue]
            last = fetched
        _LOG.error("stopped after %d machine-check records in one go", len(records))

    def _fetch(self, queue: int) -> tuple[int, bytes] | None:
        """The oldest record's id and bytes, None when there is none.  It stays in the queue."""
        with self._call.struct(McInfo) as info, self._call.struct(Mc) as request:
            fetch = request.u.mc_fetch
            fetch.flags = queue
            fetch.data = ctypes.addressof(info)
            self._mca(request, "mca_fetch")
            if fetch.flags & XEN_MC_NODATA:
                return None
            if fetch.flags & XEN_MC_FETCHFAILED:
                raise XenError(errno.EIO, op="mca_fetch")
            return fetch.fetch_id, bytes(info)

    def _acknowledge(self, queue: int, number: int) -> None:
        with self._call.struct(Mc) as request:
            request.u.mc_fetch.flags = queue | XEN_MC_ACK
            request.u.mc_fetch.fetch_id = number
            self._mca(request, "mca_acknowledge")

    def _ask_mcg_cap(self) -> None:
        """Learn IA32_MCG_CAP, once, for records do not hold it; they can be read without, too."""
        if self._has_asked:
            return
        self._has_asked = True
        try:
            self._mcg_cap = self._read_mcg_cap()
        except XenError as error:
            _LOG.warning("what this host's processors can report is not known: %s", error)

    def _read_mcg_cap(self) -> int | None:
        """That of the first processor, by which Xen goes as well; None where Xen has none."""
        with self._call.struct(Mc) as request:
            self._mca(request, "mca_count_cpus", command=XEN_MC_physcpuinfo)
            count = request.u.mc_physcpuinfo.ncpus
        if not 0 < count <= _MOST_CPUS:
            raise XenError(errno.EPROTO, op="mca_count_cpus")
        room = count + _SPARE_CPUS
        size = ctypes.sizeof(McLogicalCpu)
        with self._call.buffer(room * size) as address, self._call.struct(Mc) as request:
            request.u.mc_physcpuinfo.ncpus = room
            request.u.mc_physcpuinfo.info = address
            self._mca(request, "mca_physcpuinfo", command=XEN_MC_physcpuinfo)
            if request.u.mc_physcpuinfo.ncpus < 1:
                return None
            first = McLogicalCpu.from_buffer_copy(ctypes.string_at(address, size))
        registers = first.mc_msrvalues[: max(0, first.mc_nmsrvals)]
        return next((each.value for each in registers if each.reg == _MSR_MCG_CAP), None)

    def _mca(self, request: Mc, op: str, *, command: int = XEN_MC_fetch) -> None:
        request.cmd = command
        request.interface_version = XEN_MCA_INTERFACE_VERSION
        self._call.hypercall(HYPERVISOR_arch_0, ctypes.addressof(request), op=op)


def _call() -> XenCall:
    try:
        return XenCall()
    except PortError as error:
        raise _unavailable(error) from error


def _unavailable(error: PortError) -> SourceUnavailable:
    reasons = {
        errno.EEXIST: "another has bound VIRQ_MCA, as a rule dom0's kernel (CONFIG_XEN_MCE_LOG); "
        "start dom0 with initcall_blacklist=xen_late_init_mcelog for the whole telemetry",
        errno.ENOENT: "there is no Xen device node; is this dom0, and are the modules xen_evtchn "
        "and xen_privcmd loaded?",
        errno.EACCES: "it needs root",
        errno.EPERM: "it needs root in dom0",
    }
    # What is no XenError is a library that is missing, or too old for what is wanted of it.
    code = error.errno if isinstance(error, XenError) else errno.ENOSYS
    return SourceUnavailable(code, source="native", reason=reasons.get(code, str(error)))


class McelogSource:
    """``/dev/mcelog`` of dom0's kernel, opened exclusively.

    Its records lack the owner and Xen's own recovery actions, and its log holds 32.
    """

    def __init__(self, path: str = "/dev/mcelog") -> None:
        """Open it.  Raises SourceUnavailable (EBUSY: another reader, such as mcelog, has it)."""
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_EXCL | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise _mcelog_unavailable(error, path) from error
        try:
            record = self._ask(MCE_GET_RECORD_LEN)
            length = self._ask(MCE_GET_LOG_LEN)
        except OSError as error:
            os.close(self._fd)
            raise _mcelog_unavailable(error, path) from error
        if not SHORTEST_RECORD <= record <= _LONGEST_RECORD or not 1 <= length <= _LONGEST_LOG:
            os.close(self._fd)
            raise SourceUnavailable(
                errno.EPROTO,
                source="mcelog",
                reason=f"it claims {length} records of {record} bytes, which is not believable",
            )
        self._record = record
        self._size = record * length

    def _ask(self, request: int) -> int:
        answer = fcntl.ioctl(self._fd, request, struct.pack("i", 0))
        return int(struct.unpack("i", answer)[0])

    @property
    def name(self) -> str:
        """``mcelog``."""
        return "mcelog"

    def fileno(self) -> int:
        """Readable when there are records."""
        return self._fd

    def close(self) -> None:
        """Let others read it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read(self) -> TelemetryBatch:
        """The whole log, which the kernel clears thereby, in records of the length it told.

        The overflow flag says that records were dropped but not how many; it counts as one.
        Raises XenError when the device fails.
        """
        try:
            untrusted_log = os.read(self._fd, self._size)
            overflow = self._ask(MCE_GETCLEAR_FLAGS) & XEN_MCE_OVERFLOW_FLAG
        except OSError as error:
            raise XenError(error.errno or errno.EIO, op="read /dev/mcelog") from error
        records = tuple(
            untrusted_log[start : start + self._record]
            for start in range(0, len(untrusted_log), self._record)
        )
        return TelemetryBatch(
            format=RecordFormat.XEN_MCE, records=records, lost=1 if overflow else 0
        )


def _mcelog_unavailable(error: OSError, path: str) -> SourceUnavailable:
    code = error.errno or errno.EIO
    reasons = {
        errno.ENOENT: f"{path} does not exist: dom0's kernel has no CONFIG_XEN_MCE_LOG, or its "
        "driver was kept from starting",
        errno.EBUSY: f"another program reads {path}, as a rule the mcelog daemon; stop and disable "
        "it, for it takes the records away and misjudges their addresses under Xen",
        errno.EACCES: "it needs root",
        errno.EPERM: "it needs CAP_SYS_ADMIN",
    }
    reason = reasons.get(code, f"{path}: {error.strerror}")
    return SourceUnavailable(code, source="mcelog", reason=reason)


if TYPE_CHECKING:

    def _fulfil(native: NativeSource, mcelog: McelogSource) -> tuple[TelemetrySource, ...]:
        return native, mcelog
