"""What comes next for a page of a PV guest that was not exchanged.

The ladder: try again later; save the guest and restore it, which moves every page; leave it to the
operator.  Suspending and resuming the guest with its devices connected anew is no step of it: only
the toolstack can do that (docs/decisions/0013-save-and-restore.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from pgofflined.core.outcomes import RefusalReason
from pgofflined.core.policy import Policy

# Refusals after which the page has to be looked at afresh: its owner or its mark has changed.
_LOOK_AGAIN: Final = frozenset(
    {RefusalReason.DOMAIN_GONE, RefusalReason.NOT_PENDING, RefusalReason.NOT_THE_DOMAINS}
)
# A save would fail as the exchange did, ask a guest that may crash when asked, read what must not
# be read, or disturb somebody.  After BLACKOUT_LIMIT it would keep the guest for far longer than
# the exchange might have; after NOT_KEPT it is the host that has to be put right: the ramfs of the
# exchanges' records is not there.
_SAVE_IN_VAIN: Final = frozenset(
    {
        RefusalReason.BROKEN,
        RefusalReason.NOT_PV,
        RefusalReason.HAS_DEVICES,
        RefusalReason.DOMAIN_BUSY,
        RefusalReason.NO_SUSPEND,
        RefusalReason.NO_SUSPEND_SUPPORT,
        RefusalReason.SUSPEND_UNANNOUNCED,
        RefusalReason.NO_FREE_MEMORY,
        RefusalReason.NOT_KEPT,
        RefusalReason.BLACKOUT_LIMIT,
        RefusalReason.INTERNAL,
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LookAgain:
    """Soon: whose the page is has changed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TryAgain:
    """Exchange it again, with the policy's waits, of which the last leaves it to the operator."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveRestore:
    """Save its guest and restore it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HandOver:
    """Nothing more is done by itself: the operator is told."""


Rung = LookAgain | TryAgain | SaveRestore | HandOver


def next_rung(reason: RefusalReason, tries: int, policy: Policy, *, marked: bool) -> Rung:
    """What follows from a refusal, the ``tries``-th one of the page with its owner.

    A page that is not ``marked`` would not leave the host with its guest.
    """
    if reason in _LOOK_AGAIN:
        return LookAgain()
    if reason.may_pass and policy.exchange.retry.delay(tries) is not None:
        return TryAgain()
    allowed = policy.relocation.enabled and policy.relocation.save_restore
    if allowed and marked and reason not in _SAVE_IN_VAIN:
        return SaveRestore()
    return HandOver() if not reason.may_pass else TryAgain()
