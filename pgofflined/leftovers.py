"""What an earlier process left of exchanges is ended before the daemon needs anything else.

A guest may stand still since that process was killed.  To let it go takes Xen and the job's record;
a configuration with mistakes, a store that cannot be opened or an address that is taken keep the
daemon from its work, but not the guest from running.
"""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from pgofflined.aftercare import Aftercare, CareTimes
from pgofflined.core.frames import Mfn
from pgofflined.core.policy import ExchangePolicy
from pgofflined.core.recovery import RecoveryReport
from pgofflined.exchanging import Exchanging
from pgofflined.guestcare import GuestCare
from pgofflined.ports import Clock, Hypervisor, Journal, nothing

log = logging.getLogger(__name__)

_STOPS: Final = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})


# Between two tries to get the lock.
_AGAIN: Final = 0.1


@contextmanager
def only_daemon(path: Path, *, wait: float = 0.0) -> Iterator[bool]:
    """Be the one daemon of this host, as long as the process lives; False where another is.

    For ``wait`` seconds it is tried again: what recovers guests after a stop has the lock, too.
    Where no lock can be had it is told, and this is taken for the only one: no record that another
    process has open is touched all the same.
    """
    descriptor: int | None = None
    is_only = True
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(path, flags, 0o600)
        is_only = _lock(descriptor, wait)
    except OSError as error:
        log.error("%s cannot be locked (%s): see that no other pgofflined runs", path, error)
    try:
        yield is_only
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _lock(descriptor: int, wait: float) -> bool:
    """Raises OSError where there is no locking at all."""
    until = time.monotonic() + wait
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                return False
            time.sleep(_AGAIN)
        else:
            return True


class Leftovers:
    """The jobs that an earlier process left, until the service takes them over or they are ended.

    ``poisoned`` gives the frames whose contents must never be read; it is asked only where there is
    a job.  ``noted`` keeps for the next daemon what a person has to see to.
    """

    def __init__(
        self,
        xen: Hypervisor,
        journal: Journal,
        clock: Clock,
        poisoned: Callable[[], frozenset[Mfn]],
        times: CareTimes = CareTimes(),  # noqa: B008 - it does not change
        noted: Callable[[RecoveryReport], None] = lambda _: None,
    ) -> None:
        self._clock = clock
        self._noted = noted
        exchanging = Exchanging(
            xen=xen,
            journal=journal,
            clock=clock,
            policy=ExchangePolicy,
            poisoned=poisoned,
            noted=noted,
        )
        self._care = GuestCare(
            exchanging,
            Aftercare(
                xen,
                clock,
                times=times,
                ended=exchanging.done_with,
                crashed=exchanging.has_crashed,
            ),
        )

    def recover(self) -> None:
        """Try each once.  A signal to stop waits until that is done."""
        with _undisturbed():
            self._care.recover()

    def hand_over(self, care: GuestCare) -> None:
        """Let the service go on with what is not ended, and with guests to be looked after."""
        care.take_over(self._care)
        self._care = care

    @property
    def is_owed(self) -> bool:
        """Whether a guest may still stand still because of us, and time may help it."""
        return self._care.holds_up_a_stop

    def see_out(
        self,
        sleep: Callable[[float], None] = time.sleep,
        alive: Callable[[], None] = nothing,
    ) -> bool:
        """There will be no service: go on until every guest that is left runs.

        After ``hand_over`` too, for a service that has ended without being told to.  Not longer
        than ``times.stop``: then what is left is told, keeps its record for the next process, and
        the answer is False.  ``alive`` is called before each look, for whoever would end us.
        """
        until = self._clock.monotonic() + self._care.times.stop
        if self.is_owed:
            log.error("guests that exchanges have left are looked after first, then this ends")
        while self.is_owed and self._clock.monotonic() < until:
            alive()
            sleep(self._care.times.interval)
            with _undisturbed():
                self._care.look()
        self.tell_left()
        # A service that has taken them over would have.
        for report in self._care.exchanging.take_not_recovered():
            self._noted(report)
        return not self.is_owed

    def tell_left(self) -> None:
        """Tell of every guest that this process leaves as it is."""
        self._care.tell_left()


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Half-way, a guest would stand still until the next process."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
