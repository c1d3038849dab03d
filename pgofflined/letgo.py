"""Lets a guest go that was held, with some insistence."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from pgofflined.core.errors import DomainGone, PortError
from pgofflined.core.frames import Domid
from pgofflined.ports import DomainControl, nothing

_TRIES = 10


def let_go(
    xen: DomainControl,
    domid: Domid,
    *,
    paused: bool = False,
    before: Callable[[], None] = nothing,
) -> str | None:
    """Take our pause back and resume the guest; what is wrong if that cannot be done.

    Without ``paused`` it is not certain that we have paused it, and Xen is asked first.  ``told``
    is to follow, when it runs and there is time.  ``before`` is called just before it runs.
    """
    certain = iter([paused])

    def unpause() -> None:
        # The reply to the first try may be lost: whether it is still paused is asked then.
        if next(certain, False) or xen.condition(domid).paused:
            xen.unpause(domid)

    problems = (_insist(unpause, "unpause"), resume_only(xen, domid, before))
    return "; ".join(problem for problem in problems if problem) or None


def unpause_only(xen: DomainControl, domid: Domid) -> str | None:
    """Take our pause back from a guest that is somebody else's to resume."""
    return _insist(lambda: xen.unpause(domid), "unpause")


def resume_only(
    xen: DomainControl, domid: Domid, before: Callable[[], None] = nothing
) -> str | None:
    """Resume a guest that was not paused; a guest that runs is left as it is."""
    return _insist(lambda: xen.resume(domid, before), "resume")


def told(xen: DomainControl, domid: Domid) -> None:
    """Tell xenstored that a guest was resumed; what fails there is tried with the next resume."""
    with contextlib.suppress(PortError):
        xen.tell_resumed(domid)


def _insist(act: Callable[[], None], what: str) -> str | None:
    """Do what frees the guest, again and again if need be; what is wrong if it cannot be."""
    problem = ""
    for _ in range(_TRIES):
        try:
            act()
        except DomainGone:
            return None
        except PortError as error:
            problem = str(error)
        else:
            return None
    return f"could not {what} it: {problem}"
