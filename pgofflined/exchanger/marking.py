"""Marks the pages of a group while its guest is held; see ``marks`` for why not before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from pgofflined.core.errors import OfflineCallUnsafe, PortError
from pgofflined.core.frames import Domid
from pgofflined.core.offline import OfflineFlag, OfflineState
from pgofflined.core.outcomes import RefusalReason
from pgofflined.core.progress import Progress
from pgofflined.marks import may_join, take_marks_back
from pgofflined.ports import Hypervisor

_MARKED: Final = OfflineFlag.OWNED | OfflineFlag.PENDING

NEIGHBOUR: Final = (
    "its neighbour is free, and the two would be joined, which damages this Xen's allocator"
)


class GroupMarks:
    """The marks of one group's pages, from just before its exchange until it is settled.

    ``wedged`` says whether Xen itself has broken a page of the domain by now: then no page of it
    may be marked any more (docs/xen-bugs.md, "Offline calls from pCPU 0").
    """

    def __init__(
        self, xen: Hypervisor, domid: Domid, progress: Progress, wedged: Callable[[], bool]
    ) -> None:
        self._xen = xen
        self._domid = domid
        self._progress = progress
        self._wedged = wedged

    def set(self) -> None:
        """Mark the pages.  Those that cannot be are refused."""
        try:
            with self._xen.placed():
                for row in range(len(self._progress.group)):
                    self._try(row, self._mark)
        except OfflineCallUnsafe as error:
            self._refuse_open(RefusalReason.CANNOT_MARK, str(error))
        except PortError as error:
            self._refuse_open(RefusalReason.XEN_REFUSED, str(error))

    def _refuse_open(self, reason: RefusalReason, detail: str) -> None:
        for row in np.flatnonzero(self._progress.open()).tolist():
            self._progress.refuse(row, reason, detail)

    def _try(self, row: int, act: Callable[[int], None]) -> None:
        try:
            act(row)
        except OfflineCallUnsafe as error:
            self._progress.refuse(row, RefusalReason.CANNOT_MARK, str(error))
        except PortError as error:
            self._progress.refuse(row, RefusalReason.XEN_REFUSED, str(error))

    def _mark(self, row: int) -> None:
        mfn = self._progress.group.page(row)[0]
        if self._wedged():
            self._progress.refuse(row, RefusalReason.CANNOT_MARK, wedged_detail(self._domid))
            return
        state = self._xen.query(mfn)
        if state & OfflineState.BROKEN:
            # The offline call would have Xen crash the guest.
            detail = "it has had an uncorrected error; its contents must not be read"
            self._progress.refuse(row, RefusalReason.BROKEN, detail)
            return
        if state not in (OfflineState.ONLINE, OfflineState.OFFLINE_PENDING):
            detail = f"Xen calls it {state.name} while the guest stands still"
            self._progress.refuse(row, RefusalReason.OUT_OF_DATE, detail)
            return
        reply = self._xen.offline(mfn)
        if reply.flags != _MARKED or reply.owner != self._domid:
            detail = f"Xen answered the mark with {reply.flags.name} of d{reply.owner}"
            self._progress.refuse(row, RefusalReason.CANNOT_MARK, detail)

    def look_at_neighbours(self) -> None:
        """Refuse the pages that may be joined with a free one; to be called right before they go.

        Those of the group that go together do not matter to each other: a marked page that is
        freed is not free, but out of use.
        """
        for row in np.flatnonzero(self._progress.open()).tolist():
            self._try(row, self._look)

    def _look(self, row: int) -> None:
        if may_join(self._xen, self._progress.group.page(row)[0]):
            self._progress.refuse(row, RefusalReason.NEIGHBOUR_FREE, NEIGHBOUR)

    def take_back(self) -> list[str]:
        """Take back what pages have that were not exchanged; what could not be, in words.

        Of all of them: Xen knows better than we which were, should the guest's M2P have lied.
        """
        return take_marks_back(self._xen, self._progress.group.frames())


def wedged_detail(domid: Domid) -> str:
    """Why no page of a domain is marked of which Xen has broken one."""
    return (
        f"Xen has broken a page of d{domid} by itself: to mark another one could hang the host; "
        "reboot it"
    )
