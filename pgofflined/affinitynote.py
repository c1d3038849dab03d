"""The note of dom0's vCPUs whose affinity is narrowed: a small file that outlives the daemon.

Written whole under another name and renamed: a process that is killed leaves the note before or the
one after.  It need not outlive the host, for Xen forgets affinities with it.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pgofflined.ports.affinity import Narrowed

if TYPE_CHECKING:
    from pgofflined.ports.affinity import AffinityNote

log = logging.getLogger(__name__)

_MOST_BYTES: Final = 1 << 20


class AffinityFile:
    """``ports.affinity.AffinityNote`` in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()

    def read(self) -> Mapping[int, Narrowed]:
        """All notes; what makes no sense is told, and taken for none."""
        try:
            with self._path.open("rb") as file:
                untrusted = json.loads(file.read(_MOST_BYTES))
            return {int(vcpu): _narrowed(note) for vcpu, note in untrusted.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            log.error(
                "%s cannot be read (%s): should a vCPU of dom0 be kept off pCPU 0 that was not "
                "(`xl vcpu-list 0`), `xl vcpu-pin 0 VCPU all` ends that",
                self._path,
                error,
            )
            return {}

    def put(self, vcpu: int, narrowed: Narrowed) -> None:
        """Add or replace a note.  Raises OSError."""
        with self._lock:
            self._write({**self.read(), vcpu: narrowed})

    def clear(self, vcpu: int) -> None:
        """Remove a note.  Raises OSError."""
        with self._lock:
            left = {other: note for other, note in self.read().items() if other != vcpu}
            if left:
                self._write(left)
            else:
                with suppress(FileNotFoundError):
                    self._path.unlink()

    def _write(self, notes: Mapping[int, Narrowed]) -> None:
        value = {
            str(vcpu): {"before": sorted(note.before), "narrowed": sorted(note.narrowed)}
            for vcpu, note in notes.items()
        }
        new = self._path.with_name(self._path.name + ".new")
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with open(descriptor, "wb") as file:
            file.write(json.dumps(value).encode())
        new.replace(self._path)


def _narrowed(untrusted: Mapping[str, list[int]]) -> Narrowed:
    before, narrowed = untrusted["before"], untrusted["narrowed"]
    pcpus = [*before, *narrowed]
    if any(type(pcpu) is not int or pcpu < 0 for pcpu in pcpus) or not before or not narrowed:
        raise ValueError(f"{pcpus} are no pCPUs")
    return Narrowed(before=frozenset(before), narrowed=frozenset(narrowed))


if TYPE_CHECKING:

    def _fulfils(file: AffinityFile) -> AffinityNote:
        return file
