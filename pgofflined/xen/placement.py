"""Keeps the offline call off pCPU 0.

Two page_offline calls for pages of one PV domain (dom0 included), both from a vCPU that runs on
pCPU 0, hang the host for good (seen on 4.17.7 and 4.20.5, in the source of every release up to
4.22).  ``offline_page()`` takes a lock that a PV domain never initialises; all zeroes reads as
"pCPU 0 holds it", so from there the lock is never really taken but really released, and the next
taker waits for ever.  From any other pCPU the first pass puts the lock right.

So the calling thread is pinned to one of dom0's vCPUs, and that vCPU must not be *able* to run on
pCPU 0: its hard affinity excludes it, by the administrator's choice or, for the time of the calls,
by ours.  Where it runs is checked once more right before each call.  What remains is
SCHEDOP_pin_override, by which dom0's kernel itself can put a vCPU onto pCPU 0 for the length of a
firmware call (Dell's dcdbas and i8k drivers do); the last check makes that window a few
microseconds wide, and nothing in user space can close it.

dom0 must be PV: there Linux's CPU number is the vCPU's number (arch/x86/xen/enlighten_pv.c).

An affinity that is narrowed by us is noted before: should the process be killed meanwhile, the next
one takes that back (``restore``), unless somebody has set another since.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

from pgofflined.core.errors import DomainGone, OfflineCallUnsafe, PortError, XenError
from pgofflined.ports.affinity import AffinityNote, Narrowed

_LOG = logging.getLogger(__name__)
_Result = TypeVar("_Result")

# A vCPU that has to leave pCPU 0 does so at its next pass through the scheduler.
_MOVE_TRIES: Final = 200
_MOVE_PAUSE: Final = 0.005

_ADVICE: Final = "pin one of dom0's vCPUs away from pCPU 0, for example with: xl vcpu-pin 0 1 1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Vcpu:
    """One of dom0's vCPUs: is it plugged in, and the pCPUs that its hard affinity allows."""

    number: int
    online: bool
    hard: frozenset[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Whereabouts:
    """The pCPU that a vCPU runs or last ran on, and whether it runs now."""

    pcpu: int
    running: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A vCPU to call from; with ``narrow``, after its hard affinity has been set to that."""

    vcpu: Vcpu
    narrow: frozenset[int] | None = None


class VcpuControl(Protocol):
    """What placing needs to know of and do to dom0's vCPUs."""

    def online_pcpus(self) -> int:
        """Number of pCPUs that are online."""
        ...

    def vcpus(self) -> Sequence[Vcpu]:
        """dom0's vCPUs.  Raises OfflineCallUnsafe where their numbers are not Linux's."""
        ...

    def hard_affinity(self, vcpu: int) -> frozenset[int]:
        """The hard affinity as it was last set."""
        ...

    def set_hard_affinity(self, vcpu: int, pcpus: frozenset[int]) -> frozenset[int]:
        """Set it and give what the scheduler makes of it (those of them that are online)."""
        ...

    def whereabouts(self, vcpu: int) -> Whereabouts:
        """Where the vCPU is."""
        ...


class ThreadControl(Protocol):
    """The calling thread's place among Linux's CPUs."""

    def affinity(self) -> frozenset[int]:
        """CPUs that the thread may run on."""
        ...

    def pin(self, cpus: frozenset[int]) -> None:
        """Allow these only, moving the thread at once.  Raises OSError."""
        ...

    def cpu(self) -> int:
        """CPU that the thread runs on."""
        ...


def candidates(vcpus: Sequence[Vcpu], online_pcpus: int) -> Sequence[Candidate]:
    """The vCPUs that can be kept off pCPU 0, best first.

    First those that need no change, then those whose affinity has to be narrowed; the highest
    number first in each, since vCPU 0 handles most of dom0's interrupts.  Raises
    OfflineCallUnsafe when there is none.
    """
    if online_pcpus < 2:
        raise OfflineCallUnsafe(
            "the offline call must stay off pCPU 0, and this host has no other pCPU online; "
            "exclude the frame from the next boot instead (Xen's command line: badpage=)"
        )
    online = sorted((v for v in vcpus if v.online), key=lambda v: v.number, reverse=True)
    ready = [Candidate(vcpu=v) for v in online if v.hard and 0 not in v.hard]
    narrowed = [Candidate(vcpu=v, narrow=v.hard - {0}) for v in online if 0 in v.hard]
    found = ready + [c for c in narrowed if c.narrow]
    if not found:
        raise OfflineCallUnsafe(
            "the offline call must stay off pCPU 0, and every vCPU of dom0 is pinned to it; "
            + _ADVICE
        )
    return found


class Placement:
    """Runs calls on a vCPU that cannot be on pCPU 0, one thread at a time."""

    def __init__(
        self,
        vcpus: VcpuControl,
        threads: ThreadControl,
        *,
        note: AffinityNote | None = None,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._vcpus = vcpus
        self._threads = threads
        self._note = note
        self._pause = pause
        self._lock = threading.RLock()
        self._current: int | None = None

    def run(self, call: Callable[[], _Result]) -> _Result:
        """Make one call in a place of its own, or in that of the ``placed`` block around it.

        Raises OfflineCallUnsafe when there is no such place; the call has then not been made.
        """
        with self.placed():
            vcpu = self._current
            if vcpu is None or not self._is_off_pcpu0(vcpu):
                raise OfflineCallUnsafe(
                    "dom0's vCPU came onto pCPU 0 in spite of its affinity; nothing was done, "
                    "try again"
                )
            return call()

    @contextmanager
    def placed(self) -> Iterator[None]:
        """Keep the calling thread in such a place for several calls of ``run``.

        The thread's and the vCPU's affinity are restored at the end, whatever happened.
        """
        with self._lock:
            if self._current is not None:
                yield
                return
            with self._somewhere() as vcpu:
                self._current = vcpu
                try:
                    yield
                finally:
                    self._current = None

    @contextmanager
    def _somewhere(self) -> Iterator[int]:
        reasons: list[str] = []
        for candidate in candidates(self._vcpus.vcpus(), self._vcpus.online_pcpus()):
            undo = _Undo()
            try:
                reason = self._settle(candidate, undo)
                if reason is None:
                    yield candidate.vcpu.number
                    return
            finally:
                undo.run()
            reasons.append(f"vCPU {candidate.vcpu.number}: {reason}")
        raise OfflineCallUnsafe(
            f"no thread can be kept off pCPU 0 ({'; '.join(reasons)}); nothing was done; {_ADVICE}"
        )

    def _settle(self, candidate: Candidate, undo: _Undo) -> str | None:
        """Bring thread and vCPU into place, noting how to undo it; give the reason if it fails."""
        vcpu = candidate.vcpu
        if candidate.narrow is not None:
            self._noted(vcpu, candidate.narrow)
            undo.add(lambda: self._widen(vcpu, candidate.narrow))
            try:
                effective = self._vcpus.set_hard_affinity(vcpu.number, candidate.narrow)
            except (XenError, DomainGone) as error:
                return str(error)
            if not effective or 0 in effective:
                return "its affinity cannot exclude pCPU 0"
        before = self._threads.affinity()
        undo.add(lambda: self._threads.pin(before))
        try:
            self._threads.pin(frozenset({vcpu.number}))
        except OSError as error:
            return f"the thread cannot be bound to it ({error.strerror})"
        for _ in range(_MOVE_TRIES):
            if self._is_off_pcpu0(vcpu.number):
                return None
            self._pause(_MOVE_PAUSE)
        return "it does not leave pCPU 0"

    def _is_off_pcpu0(self, vcpu: int) -> bool:
        """Whether the thread is on the vCPU, and that on another pCPU which it cannot leave for 0.

        The vCPU must be running when we ask, as it is we who ask: if it is not, then Linux's
        numbers are not Xen's here and nothing said of it would be true of us.
        """
        if self._threads.affinity() != {vcpu} or self._threads.cpu() != vcpu:
            return False
        if 0 in self._vcpus.hard_affinity(vcpu):
            return False
        place = self._vcpus.whereabouts(vcpu)
        return place.running and place.pcpu != 0

    def _widen(self, vcpu: Vcpu, ours: frozenset[int] | None) -> None:
        """Give the vCPU its former affinity back, unless somebody else has set another since."""
        if self._vcpus.hard_affinity(vcpu.number) == ours:
            self._vcpus.set_hard_affinity(vcpu.number, vcpu.hard)
        if self._note is not None:
            self._note.clear(vcpu.number)

    def _noted(self, vcpu: Vcpu, narrowed: frozenset[int]) -> None:
        """Without a note the call is made all the same: it takes a kill as well to do any harm."""
        if self._note is None:
            return
        try:
            self._note.put(vcpu.number, Narrowed(before=vcpu.hard, narrowed=narrowed))
        except OSError as error:
            _LOG.error("that vCPU %d of dom0 is narrowed cannot be noted: %s", vcpu.number, error)


def restore(vcpus: VcpuControl, note: AffinityNote) -> None:
    """Give vCPUs their affinity back that a killed process has left narrowed.

    Not where somebody has set another since.  What Xen refuses is told, and kept for the next time.
    """
    for vcpu, narrowed in note.read().items():
        try:
            if vcpus.hard_affinity(vcpu) == narrowed.narrowed:
                vcpus.set_hard_affinity(vcpu, narrowed.before)
                _LOG.warning("vCPU %d of dom0 was still kept off pCPU 0 and is not now", vcpu)
            note.clear(vcpu)
        except (PortError, OSError) as error:
            _LOG.error(
                "vCPU %d of dom0 is kept off pCPU 0 by us, and that could not be taken back: %s; "
                "see xl vcpu-list 0 and set it with xl vcpu-pin 0 %d all",
                vcpu,
                error,
                vcpu,
            )


class _Undo:
    """Steps back, last first; one that fails is logged and does not keep the others from it."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], object]] = []

    def add(self, step: Callable[[], object]) -> None:
        self._steps.append(step)

    def run(self) -> None:
        for step in reversed(self._steps):
            try:
                step()
            except (PortError, OSError) as error:
                _LOG.error(
                    "an affinity could not be restored after an offline call: %s; "
                    "see xl vcpu-list 0 and set it with xl vcpu-pin",
                    error,
                )


class LinuxThread:
    """``ThreadControl`` for the calling thread."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.sched_getcpu.restype = ctypes.c_int
        self._libc.sched_getcpu.argtypes = []

    def affinity(self) -> frozenset[int]:
        """CPUs that the thread may run on (thread id 0 means the caller's)."""
        return frozenset(os.sched_getaffinity(0))

    def pin(self, cpus: frozenset[int]) -> None:
        """Allow these only.  Raises OSError, EINVAL when none of them is online or allowed."""
        os.sched_setaffinity(0, cpus)

    def cpu(self) -> int:
        """CPU that the thread runs on."""
        return int(self._libc.sched_getcpu())
