"""What is noted of a change of dom0's vCPUs, so that another process can take it back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Narrowed:
    """The pCPUs that a vCPU's hard affinity allowed before, and those that we have left of them."""

    before: frozenset[int]
    narrowed: frozenset[int]


class AffinityNote(Protocol):
    """Notes by vCPU of dom0; they outlive the process, not the host."""

    def read(self) -> Mapping[int, Narrowed]:
        """All of them; none where there are none, or they cannot be read."""
        ...

    def put(self, vcpu: int, narrowed: Narrowed) -> None:
        """Note that a vCPU is about to be narrowed.  Raises OSError."""
        ...

    def clear(self, vcpu: int) -> None:
        """Forget it: it has its affinity back.  Raises OSError."""
        ...
