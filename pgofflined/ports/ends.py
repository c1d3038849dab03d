"""Word of domains that have ended."""

from __future__ import annotations

from typing import Protocol


class DomainEnds(Protocol):
    """Tells that some domain has ended, or was migrated away; not which."""

    def fileno(self) -> int:
        """File descriptor that is readable when there is word."""
        ...

    def drain(self) -> None:
        """Take all word that is there; does not wait.  Raises PortError when none will come."""
        ...

    def close(self) -> None:
        """Let go of the descriptor."""
        ...
