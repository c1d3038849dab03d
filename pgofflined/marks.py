"""Marks where the allocator is damaged if a marked page is freed among free ones.

On such a Xen (``XenVersion.offlines_free_frames_safely``, docs/xen-bugs.md) a page may have its
mark only while its guest is held by us, and is freed only by our exchange, next to a page in use.
"""

from __future__ import annotations

from collections.abc import Iterable
from errno import EINVAL
from typing import Final

from pgofflined.core.errors import PortError, XenError
from pgofflined.core.frames import Mfn
from pgofflined.core.offline import OfflineState
from pgofflined.ports import FrameControl

_TRIES: Final = 5


def may_join(xen: FrameControl, mfn: Mfn) -> bool:
    """Whether a page, freed now, may join its neighbour to a larger free block.

    A freed page joins the one whose number differs in the lowest bit first, or none at all
    (free_heap_pages, xen/common/page_alloc.c), and only where that one is free.  A page in use has
    an M2P entry that Xen takes away as it is freed (mark_page_free).  A guest can take it away from
    pages of its own, which costs a refusal; it cannot set one for a page that is not its own.
    Raises PortError.
    """
    neighbour = Mfn(mfn ^ 1)
    if xen.m2p(neighbour) is not None:
        return False
    try:
        return not xen.query(neighbour) & OfflineState.OFFLINED
    except XenError as error:
        if error.errno != EINVAL:
            raise
        return True


def take_marks_back(xen: FrameControl, mfns: Iterable[Mfn]) -> list[str]:
    """Take the marks of pages back that somebody owns; a sentence for each that stays marked.

    A page that has left its owner meanwhile is out of use, and stays so.
    """
    problems = []
    for mfn in mfns:
        problem = take_mark_back(xen, mfn)
        if problem is not None:
            problems.append(
                f"the mark of mfn {mfn:#x} could not be taken back ({problem}); if its owner ends "
                "now, this Xen's allocator may be damaged: before that, take it back with "
                f"`xen-hptool mem-online {mfn:x}`"
            )
    return problems


def take_mark_back(xen: FrameControl, mfn: Mfn) -> PortError | None:
    """Take the mark of one page back, if it is still owned; what kept it from that, if anything."""
    problem: PortError | None = None
    for _ in range(_TRIES):
        try:
            # One that has gone offline would be given back to the allocator.
            if xen.query(mfn) is OfflineState.OFFLINE_PENDING:
                xen.online(mfn)
        except PortError as error:
            problem = error
        else:
            return None
    return problem
