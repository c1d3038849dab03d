"""Holding a guest suspended and paused, and letting it go on every way out."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pgofflined.core.errors import (
    DomainGone,
    GuestDidNotSuspend,
    GuestEnded,
    PortError,
    SuspendNotAsked,
    SuspendShared,
)
from pgofflined.core.frames import Domid
from pgofflined.exchanger.moving import NotKept
from pgofflined.letgo import Kept, let_go, resume_only, told, unpause_only
from pgofflined.ports import Clock, Hypervisor, OpenJob, SuspendLimits

# libxl withdraws a request that was not followed for 60 s, and goes on where the guest is
# suspended, for whomever (libxl_dom_suspend.c, domain_suspend_common_pvcontrol_suspending).
_LONG = 45.0
# A vCPU's processor time grows as long as it is on a pCPU, which the last one of a guest that has
# just shut down is for some microseconds more.
_LOOKS = 6


class Holding:
    """When the guest was asked, held and let go, and whether it could be.

    ``owes_nothing`` is true as long as the guest cannot stand still because of us.  ``was_asked``:
    the guest may have read our request, and nobody else has asked it as well.  ``cpu_time`` is what
    it had used when it was held, in ns.
    """

    def __init__(
        self, xen: Hypervisor, domid: Domid, *, clock: Clock, limits: SuspendLimits
    ) -> None:
        self.owes_nothing = True
        self.was_asked = False
        self.asked = 0.0
        self.held = 0.0
        self.released = 0.0
        self.stuck: Kept | None = None
        self.may_suspend_late = False
        self.cpu_time: int | None = None
        self._xen = xen
        self._domid = domid
        self._clock = clock
        self._limits = limits

    @contextmanager
    def suspended(self, job: OpenJob, is_whole: Callable[[], bool]) -> Iterator[None]:
        """Hold the guest suspended and paused; let it go on every way out.

        Not one that is not whole and that somebody else would resume: it stays paused.
        """
        domid = self._domid
        self.asked = self._clock.monotonic()
        self.owes_nothing = False
        try:
            self._xen.suspend(domid, self._limits)
        except GuestDidNotSuspend as error:
            self.may_suspend_late = self.was_asked = error.stage == "suspend"
            self.owes_nothing = not self.may_suspend_late
            raise
        except SuspendShared:
            self.may_suspend_late = True
            raise
        except GuestEnded:
            self.owes_nothing = self.was_asked = True
            raise
        except (DomainGone, SuspendNotAsked):
            # One that somebody else has suspended is his to resume.
            self.owes_nothing = True
            raise
        except Exception:
            # We cannot tell how far the request got.  Unless nobody has read it, the guest may
            # stand still for us now, or a little later.
            self.may_suspend_late = self.was_asked = not self._was_unread()
            if self.may_suspend_late:
                self._resume_unless_used()
            self.owes_nothing = not self.may_suspend_late
            raise
        self.held = self._clock.monotonic()
        self.was_asked = True
        self.cpu_time = self._used()
        try:
            with kept():
                job.hold(self.cpu_time)
        except NotKept:
            self._release()
            self.stuck = resume_only(self._xen, domid, self._release)
            self.owes_nothing = self.stuck is None
            told(self._xen, domid)
            raise
        paused = False
        try:
            # The guest has stopped itself, but its vCPUs' state may still be loaded on a pCPU:
            # only a pause waits for that, and only then are changes to its page tables safe.
            self._xen.pause(domid)
            paused = True
            yield
        finally:
            self._release()
            if self._is_somebodys_by_now():
                # Should it end, it is because he has saved or migrated it.
                self.was_asked = False
                if paused and is_whole():
                    self.stuck = unpause_only(self._xen, domid)
                self.may_suspend_late = True
            else:
                self.stuck = let_go(self._xen, domid, paused=paused, before=self._release)
                self.owes_nothing = self.stuck is None
            told(self._xen, domid)

    def _used(self) -> int | None:
        """The guest's processor time, when two looks agree; by it we know later that it has run.

        Before our pause, which is not made unless this is noted: whoever finds the guest paused in
        the end must know whether it has stood still since.
        """
        with contextlib.suppress(PortError):
            last = self._xen.condition(self._domid).cpu_time
            for _ in range(_LOOKS):
                used = self._xen.condition(self._domid).cpu_time
                if used == last:
                    return used
                last = used
        return None

    def _is_somebodys_by_now(self) -> bool:
        """Whether somebody has taken the suspend for his, which takes him a minute of waiting."""
        if self._clock.monotonic() - self.held < _LONG:
            return False
        try:
            return self._xen.somebody_at(self._domid) is not None
        except PortError:
            return True  # it is asked again, a little later

    def _release(self) -> None:
        """The guest's wait is over when it may run, not when we run again: it is first, then."""
        self.released = self._clock.monotonic()

    def _was_unread(self) -> bool:
        """Take our request back; if the guest stands still all the same, it is for another."""
        try:
            return self._xen.withdraw_suspend(self._domid)
        except PortError:
            return False

    def _resume_unless_used(self) -> None:
        """At once, if it is sure that nobody else has it suspended; a guest that runs goes on."""
        domid = self._domid
        with contextlib.suppress(PortError):
            if self._xen.somebody_at(domid) is None:
                self.stuck = resume_only(self._xen, domid)
                told(self._xen, domid)


class _Uncollected:
    """Keeps Python from looking for garbage while a guest stands still.

    That may take as long as all the rest.  Jobs may overlap: the last one turns it on again.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._was_enabled = False

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._was_enabled = gc.isenabled()
                gc.disable()
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside and self._was_enabled:
                gc.enable()


UNCOLLECTED = _Uncollected()


@contextmanager
def kept() -> Iterator[None]:
    """A record that cannot be written is a reason of its own."""
    try:
        yield
    except PortError as error:
        raise NotKept(str(error)) from error
