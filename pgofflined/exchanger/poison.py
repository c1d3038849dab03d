"""Which frames must not be read now: asked right before each batch that is read.

A read of a frame with an uncorrected error is a machine check in dom0.  Errors are reported while
frames are being read, so that nobody may keep an answer for longer than one batch.

What remains to be done after the commit of a page is done all the same: it writes single words (the
p2m's, page-table entries) and reads none, and without it the guest would be damaged for certain.
"""

from __future__ import annotations

from collections.abc import Callable
from errno import EIO
from typing import TYPE_CHECKING, Final

import numpy as np

from pgofflined.core.errors import XenError
from pgofflined.core.frames import Domid, Mfn
from pgofflined.core.moves import frames_of

if TYPE_CHECKING:
    from pgofflined.core.moves import Chosen, Group
    from pgofflined.ports import FrameArray, Hypervisor, Words

REPORTED: Final = (
    "an uncorrected error was reported meanwhile in it, or in a table that leads to it; what it "
    "holds must not be read"
)


class Poison:
    """Frames with uncorrected errors, as they are known at each call; ``known`` gives them."""

    def __init__(self, known: Callable[[], frozenset[Mfn]] = frozenset) -> None:
        self._known = known
        # An answer and the same as an array: replaced as one, for several threads.
        self._last: tuple[frozenset[Mfn], FrameArray] = (frozenset(), frames_of([]))

    def __contains__(self, mfn: Mfn) -> bool:
        return mfn in self._known()

    def among(self, mfns: FrameArray) -> Chosen:
        """Which of some frames must not be read."""
        bad = self._frames()
        if not len(bad):
            nothing: Chosen = np.zeros(len(mfns), dtype=np.bool_)
            return nothing
        return np.isin(mfns, bad)

    def touching(self, group: Group) -> Chosen:
        """Which pages of a group have an uncorrected error, or are led to by a frame with one."""
        touching = self.among(group.mfns) | self.among(group.slot_frames)
        references = group.references
        touching[references.pages[self.among(references.tables)]] = True
        return touching

    def refuse(self, domid: Domid, mfns: FrameArray) -> None:
        """Raises XenError where one of the frames must not be read: as a host that cannot."""
        bad = self.among(mfns)
        if bad.any():
            mfn = Mfn(int(mfns[bad][0]))
            raise XenError(EIO, op="read (uncorrected error)", domid=domid, mfn=mfn)

    def read(self, xen: Hypervisor, domid: Domid, mfns: FrameArray) -> Words:
        """Contents of one batch of frames, all of which may be read.  Raises XenError."""
        self.refuse(domid, mfns)
        return xen.read_frames(domid, mfns)

    def granted_frames(self, xen: Hypervisor, domid: Domid) -> FrameArray:
        """What a domain grants, by its grant table, which must not be read as any other frame."""
        if self._known():
            self.refuse(domid, xen.shared_frames(domid))
        return xen.granted_frames(domid)

    def _frames(self) -> FrameArray:
        known = self._known()
        last, frames = self._last
        if known is not last:
            frames = frames_of(sorted(known))
            self._last = (known, frames)
        return frames


NO_POISON: Final = Poison()
