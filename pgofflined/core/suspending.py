"""Whether a guest may be asked to suspend itself, and what is said of one that ended instead.

A guest announces that it follows such a request in ``control/feature-suspend``
(docs/misc/xenstore-paths.pandoc in the Xen source: ``""``, ``"0"`` or ``"1"``, empty until the
guest writes it).  A kernel that does not know the request may crash when it reads it: Mini-OS does.
Linux announces it since about 4.10 (drivers/xen/manage.c), and has followed it for far longer.  It
writes it once, when it boots: after a migration or a restore it is in another domain, for which the
toolstack makes the node anew, empty (libxl_create.c), and says nothing there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final, assert_never

from pgofflined.core.domains import DomainInfo, ShutdownReason
from pgofflined.core.frames import Domid
from pgofflined.core.patterns import any_names

FEATURE: Final = "control/feature-suspend"
"""The node of a guest's own directory in xenstore."""


class SuspendSupport(Enum):
    """What is known of a guest's support for the request to suspend itself."""

    ANNOUNCED = "announced"
    """The guest says that it suspends itself when asked."""
    DENIED = "denied"
    """The guest says that it does not."""
    SILENT = "silent"
    """It says neither, or something that has no meaning; perhaps it is still starting."""
    NOT_ASKED = "not_asked"
    """Of the HVM class and without PV drivers: the toolstack stops it without asking."""


def read_announcement(untrusted_value: bytes | None) -> SuspendSupport:
    """What the value of ``FEATURE`` says, which the guest has written; None: no such node."""
    match untrusted_value:
        case b"1":
            return SuspendSupport.ANNOUNCED
        case b"0":
            return SuspendSupport.DENIED
        case _:
            return SuspendSupport.SILENT


@dataclass(frozen=True, slots=True, kw_only=True)
class Objection:
    """Why a guest must not be asked to suspend itself; ``may_pass`` without anybody's doing."""

    may_pass: bool
    detail: str


def objection(
    domain: DomainInfo,
    support: SuspendSupport,
    ask_unannounced: Sequence[str],
    *,
    was_restored: bool = False,
) -> Objection | None:
    """Why a guest must not be asked to suspend itself, None where it may be.

    ``ask_unannounced`` are patterns of ``exchange.ask_unannounced``: the guests that the operator
    vouches for.  ``was_restored``: the domain is what came of a guest that followed the request,
    by a migration or a save.
    """
    domid = domain.domid
    match support:
        case SuspendSupport.ANNOUNCED | SuspendSupport.NOT_ASKED:
            return None
        case SuspendSupport.DENIED:
            detail = (
                f"d{domid} says that it cannot suspend itself ({FEATURE} is 0 in xenstore), so it "
                "is not asked to; its page stays in use until it ends"
            )
            return Objection(may_pass=False, detail=detail)
        case SuspendSupport.SILENT:
            if was_restored or any_names(ask_unannounced, domain.name, domain.uuid):
                return None
            detail = (
                f"d{domid} has not announced that it can suspend itself ({FEATURE} in xenstore is "
                "not 1), and a guest that cannot may crash when it is asked, as Mini-OS does. "
                "Linux suspends all the same, and announces nothing, if it is older than 4.10 or "
                "was migrated or restored since it booted: name such a guest in "
                "exchange.ask_unannounced and reload. Any other keeps its page until it ends"
            )
            return Objection(may_pass=True, detail=detail)
        case _:
            assert_never(support)


# What libxl writes to control/shutdown for `xl shutdown` and `xl reboot`, over whatever it finds
# there (libxl_domain.c), and what Linux takes besides (drivers/xen/manage.c), with its end.
_ORDERS: Final = {
    b"poweroff": ShutdownReason.POWEROFF,
    b"halt": ShutdownReason.POWEROFF,
    b"reboot": ShutdownReason.REBOOT,
}


def is_anothers_end(reason: ShutdownReason | None, order: bytes | None) -> bool:
    """Whether it is certain that a guest has not ended by our request to suspend.

    ``order`` is what stood in ``control/shutdown`` in place of our request; None where that was
    still there.  A guest takes a request before it follows it, but may crash of reading it before
    that: so with ours not taken only an orderly end is another's, or the guest's own.
    """
    if order is None:
        return reason in (ShutdownReason.POWEROFF, ShutdownReason.REBOOT)
    return reason is not None and reason is _ORDERS.get(order)


_ENDED: Final = {
    ShutdownReason.POWEROFF: "powered itself off",
    ShutdownReason.REBOOT: "shut down to reboot",
    ShutdownReason.CRASH: "crashed",
    ShutdownReason.WATCHDOG: "was stopped by its watchdog",
    ShutdownReason.SOFT_RESET: "asked for a soft reset",
    ShutdownReason.UNKNOWN: "shut down for an unknown reason",
    # A second suspend would be somebody else's; it is no end.
    ShutdownReason.SUSPEND: "suspended itself",
}


MayNotBeAsked = Callable[[DomainInfo, SuspendSupport], Objection | None]
"""Why a domain with such support must not be asked to suspend itself, None where it may be."""


def unless_announced(domain: DomainInfo, support: SuspendSupport) -> Objection | None:
    """As ``objection`` where nobody is vouched for."""
    return objection(domain, support, ())


def ended_before(domid: Domid) -> Objection:
    """Against asking a guest again that ended when it was asked."""
    detail = (
        f"the guest that is d{domid} now has ended before when it was asked to suspend itself, and "
        "is not asked again before this daemon is restarted; its page stays in use until it ends"
    )
    return Objection(may_pass=False, detail=detail)


def how_it_ended(domid: Domid, reason: ShutdownReason | None) -> str:
    """What became of a guest after our request to suspend, and what to do; None: it is gone."""
    if reason is None:
        what = f"d{domid} ended: it is gone, and whether it crashed or was destroyed cannot be told"
    else:
        what = f"d{domid} {_ENDED[reason]}"
    return (
        f"{what}; we had just asked it to suspend itself, which is the likely cause. Look at its "
        "console and at `xl dmesg`; this daemon does not ask that guest again, and with "
        "domains.deny none does"
    )
