"""Who takes pages for the retirer, each for one kind of guest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from pgofflined.core.domains import DomainIdentity
from pgofflined.core.frames import Mfn


class Exchanges(Protocol):
    """Takes pages of PV domains."""

    def submit(self, domain: DomainIdentity, name: str, mfn: Mfn) -> bool:
        """Queue a page; False when there is no room."""
        ...


class Relocations(Protocol):
    """Takes domains whose pages cannot be moved in place."""

    def submit(
        self, domain: DomainIdentity, name: str, mfns: Iterable[Mfn], *, by_saving: bool = False
    ) -> bool:
        """Queue a domain to be taken off pages; False when there is no room.

        ``by_saving`` is for PV domains, which are saved and restored; others are migrated.
        """
        ...


class Nobody:
    """Takes no page: what stands in until somebody is known."""

    def submit(self, domain: DomainIdentity, name: str, mfn: Mfn) -> bool:  # noqa: ARG002
        """Take nothing."""
        return False
