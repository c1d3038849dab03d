"""What uncorrected errors have left on this host: frames that must not be read, and whose they are.

A frame with an uncorrected error is never copied or mapped, and no guest is saved or migrated that
owns it, until it is out of use.
"""

from __future__ import annotations

import logging
from errno import EINVAL
from typing import Protocol
from uuid import UUID

import msgspec

from pgofflined.core.book import Book
from pgofflined.core.domains import DomainIdentity, DomainInfo, GuestKind
from pgofflined.core.errors import XenError
from pgofflined.core.frames import Domid, Mfn
from pgofflined.core.offline import OfflineState
from pgofflined.owners import find_pv_owner
from pgofflined.ports import Hypervisor

log = logging.getLogger(__name__)

_POISONED = "poisoned"
_WEDGED = "wedged"
# Stands for whichever domain has a number.
_ANY = UUID(int=(1 << 128) - 1)


class FactStore(Protocol):
    """What is kept over a restart besides the pages."""

    def get_meta(self, key: str) -> str | None:
        """A value by its key."""
        ...

    def set_meta(self, key: str, value: str) -> None:
        """Keep a value."""
        ...


class UncorrectedErrors:
    """The frames that must not be read (``poisoned``), and the domains that Xen itself has hit
    (``wedged``): of those it has broken a page, and no further one may be marked.

    Changed in the loop's thread only; both sets are replaced as a whole, so that any thread may
    read them.
    """

    def __init__(self, store: FactStore) -> None:
        self._store = store
        self.poisoned = stored_poison(store)
        self.wedged = _stored_wedged(store)

    def add(self, mfn: Mfn) -> None:
        """A frame has had an uncorrected error."""
        self._put_poisoned(self.poisoned | {mfn})

    def remove(self, mfn: Mfn) -> None:
        """It was no memory, after all."""
        self._put_poisoned(self.poisoned - {mfn})

    def is_wedged(self, domain: DomainIdentity) -> bool:
        """Whether Xen has broken a page of a domain, or may have."""
        return domain in self.wedged or DomainIdentity(domain.domid, _ANY) in self.wedged

    def add_wedged_domid(self, domid: Domid) -> None:
        """Xen has broken a page of the domain that has this number, and perhaps another later."""
        self.add_wedged(DomainIdentity(domid, _ANY))

    def add_wedged(self, domain: DomainIdentity) -> None:
        """Xen has broken a page of a domain."""
        if domain in self.wedged:
            return
        self.wedged |= {domain}
        wedged = sorted(self.wedged, key=lambda domain: domain.domid)
        self._store.set_meta(_WEDGED, msgspec.json.encode(wedged).decode())

    def _put_poisoned(self, frames: frozenset[Mfn]) -> None:
        if frames != self.poisoned:
            self.poisoned = frames
            self._store.set_meta(_POISONED, msgspec.json.encode(sorted(frames)).decode())


def stored_poison(store: FactStore) -> frozenset[Mfn]:
    """The frames that were known to have an uncorrected error."""
    try:
        found = msgspec.json.decode(store.get_meta(_POISONED) or "[]", type=list[int])
    except msgspec.MsgspecError as error:
        log.error("what was stored of uncorrected errors cannot be read: %s", error)
        return frozenset()
    return frozenset(Mfn(mfn) for mfn in found)


def _stored_wedged(store: FactStore) -> frozenset[DomainIdentity]:
    try:
        found = msgspec.json.decode(store.get_meta(_WEDGED) or "[]", type=list[DomainIdentity])
    except msgspec.MsgspecError as error:
        log.error("what was stored of domains that Xen has hit cannot be read: %s", error)
        return frozenset()
    return frozenset(found)


def poison_of(
    domain: DomainInfo, poisoned: frozenset[Mfn], xen: Hypervisor, owners: dict[Mfn, DomainIdentity]
) -> str | None:
    """The page of a domain that must not be read, in a sentence; None where it owns none.

    ``owners`` names those of whom Xen has said so when it marked the page: a marked page is given
    to nobody else.  Makes hypercalls, for a thread.  Raises PortError where Xen cannot be asked.
    """
    for mfn in sorted(poisoned):
        whose = _whose(mfn, domain, xen, owners.get(mfn))
        if whose is not None:
            return f"mfn {mfn:#x} has had an uncorrected error and {whose}"
    return None


def _whose(
    mfn: Mfn, domain: DomainInfo, xen: Hypervisor, known: DomainIdentity | None
) -> str | None:
    domid = domain.domid
    try:
        state = xen.query(mfn)
    except XenError as error:
        if error.errno != EINVAL:
            raise
        return None  # no memory of this host
    if state & OfflineState.OFFLINED:
        return None
    if known is None or not state & (OfflineState.OFFLINE_PENDING | OfflineState.BROKEN):
        # Somebody has taken the mark back, and the page may have another owner since.
        owner = find_pv_owner(mfn, xen)
        known = None if owner is None else owner.identity
    if known is not None:
        return f"is d{domid}'s" if known == domain.identity else None
    # No domain has a free page; one that is nowhere in a guest's memory would not be read.
    if domain.kind is GuestKind.PV or xen.m2p(mfn) is None:
        return None
    return (
        f"may be d{domid}'s, as any HVM or PVH guest's: Xen names the owner only when it is marked"
    )


def known_owners(book: Book, poisoned: frozenset[Mfn]) -> dict[Mfn, DomainIdentity]:
    """The owners of marked pages, as far as Xen has named them."""
    entries = (book.get(mfn) for mfn in poisoned)
    return {
        entry.mfn: entry.domain
        for entry in entries
        if entry is not None and entry.marked and entry.domain is not None
    }
