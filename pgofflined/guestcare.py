"""Guests that we owe something: what was cut off is ended, and who stands still is let go.

It goes on until nothing is owed, also when the daemon is told to stop.  What is left after all
keeps its record, and is told with what a person can do.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterable, Mapping, Sequence

from pgofflined.aftercare import Aftercare, CareTimes, LeftGuest, StuckGuest
from pgofflined.core.domains import DomainIdentity
from pgofflined.core.events import Event
from pgofflined.exchanging import Exchanging
from pgofflined.indoubt import GuestsInDoubt
from pgofflined.journal_log import event
from pgofflined.letgo import by_hand

log = logging.getLogger(__name__)


class GuestCare:
    """Interrupted jobs to be ended, guests to be looked after, and those in doubt, as one.

    Any thread may call any method.
    """

    def __init__(
        self,
        exchanging: Exchanging,
        aftercare: Aftercare,
        in_doubt: GuestsInDoubt | None = None,
    ) -> None:
        self.exchanging = exchanging
        self.aftercare = aftercare
        self.in_doubt = in_doubt
        self._lock = threading.Lock()

    def __bool__(self) -> bool:
        """Whether there is anything to look at again."""
        return bool(self.aftercare or self.in_doubt) or self.exchanging.has_rest

    @property
    def times(self) -> CareTimes:
        """How often, and for how long."""
        return self.aftercare.times

    @property
    def stuck(self) -> Mapping[DomainIdentity, StuckGuest]:
        """Guests that do not run because of us, as they were at the last look."""
        in_doubt = {} if self.in_doubt is None else self.in_doubt.stuck
        return {**in_doubt, **self.aftercare.stuck}

    @property
    def holds_up_a_stop(self) -> bool:
        """Whether the daemon must not end yet; not for what only a person can end."""
        return self.exchanging.holds_up_a_stop or self.aftercare.holds_up_a_stop

    def take_over(self, earlier: GuestCare) -> None:
        """Go on with what another of this process has begun; it must not be used any more."""
        self.exchanging.take_over(earlier.exchanging)
        self.aftercare.take_over(earlier.aftercare)

    def recover(self) -> None:
        """End what an earlier process left.  Makes hypercalls; for a thread."""
        with self._lock:
            self.aftercare.note_recovered(self.exchanging.recover())

    def look(self) -> None:
        """Try again what is not ended, and look at every guest.  Makes hypercalls; for a thread."""
        with self._lock:
            if self.exchanging.has_rest:
                self.aftercare.note_recovered(self.exchanging.recover_rest())
            self.aftercare.look()
            if self.in_doubt is not None:
                self.in_doubt.look()

    def left(self) -> Sequence[LeftGuest]:
        """What is left to a person, should nobody go on."""
        by_care = [*self.aftercare.left()]
        if self.in_doubt is not None:
            by_care += [
                LeftGuest(domain=domain, text=case.text, is_kept=False, is_ours=False)
                for domain, case in self.in_doubt.stuck.items()
            ]
        seen = {guest.domain for guest in by_care}
        return [
            *by_care,
            *(
                LeftGuest(
                    domain=domain,
                    text=f"{detail}; if it stays so, {by_hand(domain.domid)}",
                    is_kept=True,
                )
                for domain, detail in self.exchanging.left()
                if domain not in seen
            ),
        ]

    def tell_left(self) -> bool:
        """Tell of each guest that is left, if any; whether there are."""
        left = self.left()
        for guest in left:
            domid = guest.domain.domid
            message = f"pgofflined ends and leaves a guest: {guest.text}"
            if guest.is_kept:
                message += ". Its record is kept, and the next start goes on with it"
            elif guest.is_ours:
                message += ". No record of it could be kept: no later start knows of it"
            event(log, logging.CRITICAL, Event.GUEST_LEFT, message, domid=domid)
        return bool(left)


async def see_out(care: GuestCare, work: Iterable[asyncio.Future[None]]) -> None:
    """Wait for the work under way to end, and until no guest is owed anything.

    Not longer than ``times.stop`` for the guests; then those that are left are told.  Work that
    lasts longer is waited for all the same: no thread can be taken from under a guest.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + care.times.stop
    pending = set(work)
    told = False
    while True:
        if care:
            await asyncio.to_thread(care.look)
        pending = {one for one in pending if not one.done()}
        is_over = loop.time() >= deadline
        if not pending and (is_over or not care.holds_up_a_stop):
            break
        if is_over and not told:
            # systemd may end us before the work has ended.
            told = care.tell_left()
        seconds = care.times.interval if care or is_over else care.times.stop
        if not is_over:
            seconds = min(seconds, deadline - loop.time())
        if pending:
            await asyncio.wait(pending, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        else:
            await asyncio.sleep(seconds)
    care.tell_left()
