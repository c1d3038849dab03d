"""Failures, losses, kills and interference at any call of a ``ports.Hypervisor``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import Enum
from errno import EIO
from typing import TYPE_CHECKING, TypeVar

from pgofflined.core.domains import DomainInfo
from pgofflined.core.errors import PortError, XenError
from pgofflined.core.frames import Domid, Mfn, Pfn
from pgofflined.core.offline import OfflineReply, OfflineState, OnlineFlag
from pgofflined.core.suspending import SuspendSupport
from pgofflined.core.xenversion import XenVersion
from pgofflined.ports import Hypervisor, SuspendLimits, Swapped, VcpuFrames, nothing

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pgofflined.core.moves import Chosen, PteWrites
    from pgofflined.ports import FrameArray, FrameWindow, TypeArray, Words

_T = TypeVar("_T")


class Killed(BaseException):
    """The process was killed here.  Every later call through the same wrapper raises it again:
    a dead process cleans nothing up."""


class Moment(Enum):
    """Where in a call a fault strikes."""

    BEFORE = "nothing has happened"
    HALFWAY = "half of the batch has happened; as BEFORE for calls without a batch"
    AFTER = "everything has happened, the reply is lost"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What is to go wrong at which call.

    ``nth`` counts the calls of ``method``, or all calls where that is None, from 1 on; the fault
    strikes at that call and the ``times - 1`` ones after it.  It kills, or acts (something else
    happens on the host just then, the call itself goes on), or fails with ``error`` or ``errno``.
    """

    method: str | None = None
    nth: int = 1
    times: int = 1
    moment: Moment = Moment.BEFORE
    kills: bool = False
    act: Callable[[], object] | None = None
    error: PortError | None = None
    errno: int = EIO

    def strikes(self, method: str, of_method: int, of_all: int) -> bool:
        """Whether this call is meant, the so manyeth of its method and of all."""
        if self.method is None:
            return self.nth <= of_all < self.nth + self.times
        return method == self.method and self.nth <= of_method < self.nth + self.times


@dataclass(slots=True, kw_only=True)
class Call:
    """One call that was made; ``outcome`` is what it gave or raised, None until it came back."""

    method: str
    args: tuple[object, ...]
    outcome: object = None


@dataclass(slots=True)
class Trace:
    """All calls in their order."""

    calls: list[Call] = field(default_factory=list)

    @property
    def methods(self) -> list[str]:
        """Their names."""
        return [call.method for call in self.calls]

    def of(self, method: str) -> list[Call]:
        """The calls of one method."""
        return [call for call in self.calls if call.method == method]


@dataclass(frozen=True, slots=True)
class _FaultyWindow:
    xen: FaultyHypervisor
    window: FrameWindow

    def read(self, rows: NDArray[np.intp]) -> Words:
        """See ``ports.FrameWindow``."""
        return self.xen.look((rows.copy(),), lambda: self.window.read(rows))

    def words(self, rows: NDArray[np.intp], indexes: FrameArray) -> Words:
        """See ``ports.FrameWindow``."""
        args = (rows.copy(), indexes.copy())
        return self.xen.look(args, lambda: self.window.words(rows, indexes))

    def differing(self, rows: NDArray[np.intp], contents: Words) -> Chosen:
        """See ``ports.FrameWindow``."""
        args = (rows.copy(), contents.copy())
        return self.xen.look(args, lambda: self.window.differing(rows, contents))


class FaultyHypervisor:
    """A hypervisor that passes calls on and lets them go wrong as planned."""

    def __init__(self, inner: Hypervisor, *plan: Fault) -> None:
        self.inner = inner
        self.plan = list(plan)
        self.trace = Trace()
        self.killed = False

    # FrameControl

    def version(self) -> XenVersion:
        """See ``ports.FrameControl``."""
        return self._call("version", (), self.inner.version)

    def max_mfn(self) -> Mfn:
        """See ``ports.FrameControl``."""
        return self._call("max_mfn", (), self.inner.max_mfn)

    def total_frames(self) -> int:
        """See ``ports.FrameControl``."""
        return self._call("total_frames", (), self.inner.total_frames)

    def free_frames(self) -> int:
        """See ``ports.FrameControl``."""
        return self._call("free_frames", (), self.inner.free_frames)

    def query(self, mfn: Mfn) -> OfflineState:
        """See ``ports.FrameControl``."""
        return self._call("query", (mfn,), lambda: self.inner.query(mfn))

    def held_back(self) -> Mapping[Mfn, OfflineState]:
        """See ``ports.FrameControl``."""
        return self._call("held_back", (), self.inner.held_back)

    def offline(self, mfn: Mfn) -> OfflineReply:
        """See ``ports.FrameControl``."""
        return self._call("offline", (mfn,), lambda: self.inner.offline(mfn))

    @contextmanager
    def placed(self) -> Iterator[None]:
        """See ``ports.FrameControl``; a process that died leaves no place to undo."""
        with ExitStack() as places:
            self._call("placed", (), lambda: places.enter_context(self.inner.placed()))
            yield

    def online(self, mfn: Mfn) -> OnlineFlag:
        """See ``ports.FrameControl``."""
        return self._call("online", (mfn,), lambda: self.inner.online(mfn))

    def m2p(self, mfn: Mfn) -> Pfn | None:
        """See ``ports.FrameControl``."""
        return self._call("m2p", (mfn,), lambda: self.inner.m2p(mfn))

    def m2p_search(self, pfns: FrameArray) -> FrameArray:
        """See ``ports.FrameControl``."""
        return self._call("m2p_search", (pfns.copy(),), lambda: self.inner.m2p_search(pfns))

    # DomainControl

    def domains(self) -> Sequence[DomainInfo]:
        """See ``ports.DomainControl``."""
        return self._call("domains", (), self.inner.domains)

    def domain(self, domid: Domid) -> DomainInfo:
        """See ``ports.DomainControl``."""
        return self._call("domain", (domid,), lambda: self.inner.domain(domid))

    def conditions(self) -> Sequence[DomainInfo]:
        """See ``ports.DomainControl``."""
        return self._call("conditions", (), self.inner.conditions)

    def condition(self, domid: Domid) -> DomainInfo:
        """See ``ports.DomainControl``."""
        return self._call("condition", (domid,), lambda: self.inner.condition(domid))

    def suspend_support(self, domid: Domid) -> SuspendSupport:
        """See ``ports.DomainControl``."""
        return self._call("suspend_support", (domid,), lambda: self.inner.suspend_support(domid))

    def suspend(self, domid: Domid, limits: SuspendLimits) -> None:
        """See ``ports.DomainControl``."""
        self._call("suspend", (domid, limits), lambda: self.inner.suspend(domid, limits))

    def resume(self, domid: Domid, before: Callable[[], None] = nothing) -> None:
        """See ``ports.DomainControl``."""
        self._call("resume", (domid,), lambda: self.inner.resume(domid, before))

    def tell_resumed(self, domid: Domid) -> None:
        """See ``ports.DomainControl``."""
        self._call("tell_resumed", (domid,), lambda: self.inner.tell_resumed(domid))

    def pause(self, domid: Domid) -> None:
        """See ``ports.DomainControl``."""
        self._call("pause", (domid,), lambda: self.inner.pause(domid))

    def unpause(self, domid: Domid) -> None:
        """See ``ports.DomainControl``."""
        self._call("unpause", (domid,), lambda: self.inner.unpause(domid))

    def withdraw_suspend(self, domid: Domid) -> bool:
        """See ``ports.DomainControl``."""
        return self._call("withdraw_suspend", (domid,), lambda: self.inner.withdraw_suspend(domid))

    def serves(self, domid: Domid) -> str | None:
        """What it is needed for."""
        return self._call("serves", (domid,), lambda: self.inner.serves(domid))

    def somebody_at(self, domid: Domid) -> str | None:
        """See ``ports.DomainControl``."""
        return self._call("somebody_at", (domid,), lambda: self.inner.somebody_at(domid))

    def vcpu_frames(self, domid: Domid) -> VcpuFrames:
        """See ``ports.DomainControl``."""
        return self._call("vcpu_frames", (domid,), lambda: self.inner.vcpu_frames(domid))

    def has_devices(self, domid: Domid) -> bool:
        """See ``ports.DomainControl``."""
        return self._call("has_devices", (domid,), lambda: self.inner.has_devices(domid))

    # ForeignMemory

    def read_frames(self, domid: Domid, mfns: FrameArray) -> Words:
        """See ``ports.ForeignMemory``."""
        return self._call(
            "read_frames", (domid, mfns.copy()), lambda: self.inner.read_frames(domid, mfns)
        )

    def write_frames(
        self, domid: Domid, mfns: FrameArray, contents: Words, slots: PteWrites
    ) -> None:
        """See ``ports.ForeignMemory``; half of it are half of the frames, or of a single one, and
        no slot; where there are no frames, the first slots."""
        half = len(mfns) // 2
        torn = contents[:1].copy()
        torn[:, 256:] = 0

        def first_half() -> None:
            if half:
                self.inner.write_frames(domid, mfns[:half], contents[:half], slots[:0])
            elif len(mfns):
                self.inner.write_frames(domid, mfns, torn, slots[:0])
            else:
                self.inner.write_frames(domid, mfns, contents, slots[: len(slots) // 2])

        self._call(
            "write_frames",
            (domid, mfns.copy(), contents.copy(), slots),
            lambda: self.inner.write_frames(domid, mfns, contents, slots),
            first_half,
        )

    @contextmanager
    def window(self, domid: Domid, mfns: FrameArray) -> Iterator[FrameWindow]:
        """See ``ports.ForeignMemory``; opening it, each look and closing it are calls."""
        # However it goes, the mapping is gone in the end: a process that died has none.
        with ExitStack() as mapped:
            window = self._call(
                "window",
                (domid, mfns.copy()),
                lambda: mapped.enter_context(self.inner.window(domid, mfns)),
            )
            try:
                yield _FaultyWindow(self, window)
            finally:
                self._call("close_window", (domid,), lambda: None)

    def look(self, args: tuple[object, ...], look: Callable[[], _T]) -> _T:
        """A look through a window, of whichever kind."""
        return self._call("look", args, look)

    def page_types(self, domid: Domid, mfns: FrameArray) -> TypeArray:
        """See ``ports.ForeignMemory``."""
        return self._call(
            "page_types", (domid, mfns.copy()), lambda: self.inner.page_types(domid, mfns)
        )

    def granted_frames(self, domid: Domid) -> FrameArray:
        """See ``ports.ForeignMemory``."""
        return self._call("granted_frames", (domid,), lambda: self.inner.granted_frames(domid))

    def shared_frames(self, domid: Domid) -> FrameArray:
        """See ``ports.ForeignMemory``."""
        return self._call("shared_frames", (domid,), lambda: self.inner.shared_frames(domid))

    # PageTableControl and FrameExchange

    def update_ptes(self, domid: Domid, writes: PteWrites) -> None:
        """See ``ports.PageTableControl``; half of it are the first writes, and ``done`` says so."""
        half = len(writes) // 2
        self._call(
            "update_ptes",
            (domid, writes),
            lambda: self.inner.update_ptes(domid, writes),
            lambda: self.inner.update_ptes(domid, writes[:half]),
            half=half,
            whole=len(writes),
        )

    def pin_tables(self, domid: Domid, mfns: FrameArray, level: int) -> None:
        """See ``ports.PageTableControl``; half of it are the first tables."""
        half = len(mfns) // 2
        self._call(
            "pin_tables",
            (domid, mfns.copy(), level),
            lambda: self.inner.pin_tables(domid, mfns, level),
            lambda: self.inner.pin_tables(domid, mfns[:half], level),
            half=half,
            whole=len(mfns),
        )

    def unpin_tables(self, domid: Domid, mfns: FrameArray) -> None:
        """See ``ports.PageTableControl``; half of it are the first tables."""
        half = len(mfns) // 2
        self._call(
            "unpin_tables",
            (domid, mfns.copy()),
            lambda: self.inner.unpin_tables(domid, mfns),
            lambda: self.inner.unpin_tables(domid, mfns[:half]),
            half=half,
            whole=len(mfns),
        )

    def exchange(self, domid: Domid, mfns: FrameArray, pfns: FrameArray) -> Swapped:
        """See ``ports.FrameExchange``; half of it are the first frames.

        What goes wrong is in the answer, as with the real call, unless it is lost altogether.
        """
        half = len(mfns) // 2
        done: list[Swapped] = []
        try:
            return self._call(
                "exchange",
                (domid, mfns.copy(), pfns.copy()),
                lambda: self.inner.exchange(domid, mfns, pfns),
                lambda: done.append(self.inner.exchange(domid, mfns[:half], pfns[:half])),
            )
        except PortError as error:
            new = done[0].new if done else mfns[:0]
            return Swapped(new=new, error=error)

    def _call(
        self,
        method: str,
        args: tuple[object, ...],
        whole_call: Callable[[], _T],
        half_call: Callable[[], object] | None = None,
        *,
        half: int = 0,
        whole: int = 0,
    ) -> _T:
        if self.killed:
            raise Killed
        call = Call(method=method, args=args)
        self.trace.calls.append(call)
        try:
            fault = self._strike(method)
            if fault is not None and fault.moment is Moment.BEFORE:
                self._hit(fault, method, 0)
            if fault is not None and fault.moment is Moment.HALFWAY:
                if half_call is not None:
                    half_call()
                self._hit(fault, method, half)
            result = whole_call()
            call.outcome = result
            if fault is not None and fault.moment is Moment.AFTER:
                self._hit(fault, method, whole)
        except BaseException as error:
            call.outcome = error
            raise
        return result

    def _strike(self, method: str) -> Fault | None:
        of_method, of_all = len(self.trace.of(method)), len(self.trace.calls)
        return next((f for f in self.plan if f.strikes(method, of_method, of_all)), None)

    def _hit(self, fault: Fault, method: str, done: int) -> None:
        if fault.act is not None:
            fault.act()
        elif fault.kills:
            self.killed = True
            raise Killed
        elif fault.error is not None:
            raise fault.error
        else:
            raise XenError(fault.errno, op=f"{method} (injected)", done=done)
