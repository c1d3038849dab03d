"""Looks once more at pages that rest in use: has Xen, their owner or the policy changed?

Cheap: one query for each page, and one list of domains.  Nothing is marked or moved here; a page of
which something has changed goes back to triage.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from pgofflined.core.book import Cause, PageEntry, Phase
from pgofflined.core.domains import DomainIdentity
from pgofflined.core.errors import PortError
from pgofflined.core.frames import Mfn
from pgofflined.core.offline import OfflineState
from pgofflined.ports import Hypervisor
from pgofflined.triage import LeftReason


class Occasion(IntEnum):
    """Why pages are looked at; a later one includes those before it."""

    SLOWLY = 0
    """Nothing is known to have changed."""
    DOMAIN_ENDED = 1
    POLICY_CHANGED = 2
    """By somebody who has perhaps seen to what was in the way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """``offlined`` are out of use; ``to_triage`` are to be looked at from the start."""

    offlined: tuple[Mfn, ...]
    to_triage: tuple[Mfn, ...]


# Nothing but a reboot, or the end of their owner, changes anything about these.
_FINAL: Final = frozenset(
    {
        LeftReason.NOT_RAM.value,
        LeftReason.IO.value,
        LeftReason.XEN.value,
        "damaged",
    }
)
_HELD_BACK: Final = OfflineState.OFFLINE_PENDING | OfflineState.BROKEN


def look_once_more(
    entries: Iterable[PageEntry], xen: Hypervisor, occasion: Occasion
) -> Found | None:
    """What has become of pages that were left, or that wait.  Makes hypercalls, for a thread.

    None where it cannot be told which domains there are.  A page of which Xen cannot be asked now
    is left as it is.
    """
    try:
        living = frozenset(domain.identity for domain in xen.conditions() if not domain.dying)
    except PortError:
        return None
    offlined: list[Mfn] = []
    to_triage: list[Mfn] = []
    for entry in entries:
        try:
            state = xen.query(entry.mfn)
        except PortError:
            continue
        if state & OfflineState.OFFLINED:
            offlined.append(entry.mfn)
        elif _has_changed(entry, state, living, occasion):
            to_triage.append(entry.mfn)
    return Found(offlined=tuple(offlined), to_triage=tuple(to_triage))


def _has_changed(
    entry: PageEntry,
    state: OfflineState,
    living: frozenset[DomainIdentity],
    occasion: Occasion,
) -> bool:
    if entry.phase is Phase.WAITING:
        # Its next try is due some time, but not for an owner that has gone.
        return entry.domain is not None and entry.domain not in living
    if entry.cause is Cause.UNCORRECTED:
        # Held back, it goes when its owner ends, and there is nothing more to do.
        return not state & _HELD_BACK
    if entry.domain is not None and entry.domain not in living:
        return True
    if entry.reason in _FINAL:
        return False
    if entry.marked and not state & _HELD_BACK:
        return True  # somebody has taken the mark back
    if occasion is Occasion.POLICY_CHANGED:
        return True
    # Whose it is could not be told, or the call could not be made safely.
    return entry.domain is None and not entry.marked and occasion is Occasion.SLOWLY
