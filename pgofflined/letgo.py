"""Lets a guest go that was held, with some insistence."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from pgofflined.core.errors import DomainGone, PortError
from pgofflined.core.frames import Domid
from pgofflined.ports import DomainControl, nothing

_TRIES = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What keeps a guest from running; ``paused``: our pause may not have been taken back."""

    text: str
    paused: bool


def let_go(
    xen: DomainControl,
    domid: Domid,
    *,
    paused: bool = False,
    before: Callable[[], None] = nothing,
) -> Kept | None:
    """Resume the guest and take our pause back; what is wrong if that cannot be done.

    In this order: a guest that was not run since is then paused by us as long as it is suspended,
    so that any other pause is known for somebody else's, wherever we are killed.

    Without ``paused`` it is not certain that we have paused it, and Xen is asked first.  ``told``
    is to follow, when it runs and there is time.  ``before`` is called just before it runs, or may.
    """
    resuming = resume_only(xen, domid, before)
    certain = iter([paused])

    def unpause() -> None:
        # The reply to the first try may be lost: whether it is still paused is asked then.
        if next(certain, False) or xen.condition(domid).paused:
            before()
            xen.unpause(domid)

    return _both(_insist(unpause, "unpause"), resuming)


def unpause_only(xen: DomainControl, domid: Domid) -> Kept | None:
    """Take our pause back from a guest that is somebody else's to resume."""
    return _both(_insist(lambda: xen.unpause(domid), "unpause"), None)


def resume_only(
    xen: DomainControl, domid: Domid, before: Callable[[], None] = nothing
) -> Kept | None:
    """Resume a guest that was not paused; a guest that runs is left as it is."""
    problem = _insist(lambda: xen.resume(domid, before), "resume")
    return None if problem is None else Kept(text=problem, paused=False)


def told(xen: DomainControl, domid: Domid) -> None:
    """Tell xenstored that a guest was resumed; what fails there is tried with the next resume."""
    with contextlib.suppress(PortError):
        xen.tell_resumed(domid)


def by_hand(domid: Domid, *, paused: bool = True) -> str:
    """The commands by which an operator lets a guest run that we have stopped.

    ``xl resume`` came with Xen 4.20 (dc8e1b33a5, tools/xl/xl_cmdtable.c); before, nothing that xl
    offers resumes a suspended guest.
    """
    unpause = f"`xl unpause {domid}` if `xl list` shows it paused (p), and " if paused else ""
    return (
        f"{unpause}`xl resume {domid}` if it is suspended (s); before Xen 4.20 there is no `xl "
        f"resume`: `xl destroy {domid}` then, and start the guest anew"
    )


def _both(unpausing: str | None, resuming: Kept | None) -> Kept | None:
    if unpausing is None:
        return resuming
    texts = [unpausing, resuming.text] if resuming is not None else [unpausing]
    return Kept(text="; ".join(texts), paused=True)


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
