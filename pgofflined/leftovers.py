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

from pgofflined.aftercare import Aftercare
from pgofflined.core.frames import Mfn
from pgofflined.core.policy import ExchangePolicy
from pgofflined.core.recovery import RecoveryReport
from pgofflined.exchanging import Exchanging
from pgofflined.ports import Clock, Hypervisor, Journal

log = logging.getLogger(__name__)

_INTERVAL: Final = 5.0
_STOPS: Final = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})


@contextmanager
def only_daemon(path: Path) -> Iterator[bool]:
    """Be the one daemon of this host, as long as the process lives; False where another is.

    Where no lock can be had it is told, and this is taken for the only one: no record that another
    process has open is touched all the same.
    """
    descriptor: int | None = None
    is_only = True
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(path, flags, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        is_only = False
    except OSError as error:
        log.error("%s cannot be locked (%s): see that no other pgofflined runs", path, error)
    try:
        yield is_only
    finally:
        if descriptor is not None:
            os.close(descriptor)


class Leftovers:
    """The jobs that an earlier process left, until the service takes them over or they are ended.

    ``poisoned`` gives the frames whose contents must never be read; it is asked only where there is
    a job.
    """

    def __init__(
        self,
        xen: Hypervisor,
        journal: Journal,
        clock: Clock,
        poisoned: Callable[[], frozenset[Mfn]],
    ) -> None:
        self._exchanging = Exchanging(
            xen=xen, journal=journal, clock=clock, policy=ExchangePolicy, poisoned=poisoned
        )
        self._aftercare = Aftercare(
            xen, clock, interval=_INTERVAL, ended=self._exchanging.done_with
        )
        self._reports: list[RecoveryReport] = []

    def recover(self) -> None:
        """Try each once.  A signal to stop waits until that is done."""
        with _undisturbed():
            self._reports += self._exchanging.recover()

    def hand_over(self, exchanging: Exchanging, aftercare: Aftercare) -> None:
        """Let the service go on with what is not ended, and with guests to be looked after."""
        exchanging.take_over(self._exchanging)
        aftercare.note_recovered(self._reports)
        self._exchanging, self._aftercare, self._reports = exchanging, aftercare, []

    def see_out(self, sleep: Callable[[float], None] = time.sleep) -> None:
        """There will be no service: go on until every guest that is left runs.

        After ``hand_over`` too, for a service that has ended without being told to.  How long it
        takes is systemd's to limit (TimeoutStartSec, later its watchdog); what is not ended then
        keeps its record for the next process.
        """
        self._aftercare.note_recovered(self._reports)
        if self._waits():
            log.error("guests that exchanges have left are looked after first, then this ends")
        while self._waits():
            sleep(_INTERVAL)
            with _undisturbed():
                self._aftercare.note_recovered(self._exchanging.recover_rest())
                self._aftercare.look()

    def _waits(self) -> bool:
        return self._exchanging.has_rest or bool(self._aftercare)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Half-way, a guest would stand still until the next process."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
