"""The mover as a process of its own, with a host that is a file and the first xl in PATH."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from uuid import UUID

from pgofflined.core.domains import DomainIdentity, DomainInfo, GuestKind
from pgofflined.core.frames import Domid
from pgofflined.mover import carry_out, heed_stops, run_xl
from pgofflined.savesteps import Mover
from tests.unit.relocation.doubles import guest

IDENTITY = DomainIdentity(Domid(7), UUID(int=7))


class FileHost:
    """Its guests are the domids in ``domains.json``, all of one uuid; a negative one is paused."""

    def __init__(self, root: Path) -> None:
        self._file = root / "domains.json"

    def domains(self) -> Sequence[DomainInfo]:
        domids = json.loads(self._file.read_text())
        return [
            replace(guest(abs(domid), uuid=7, kind=GuestKind.PV), paused=domid < 0)
            for domid in domids
        ]

    def somebody_at(self, domid: Domid) -> str | None:
        del domid
        return None

    def serves(self, domid: Domid) -> str | None:
        del domid
        return None


if __name__ == "__main__":
    root = Path(sys.argv[1])
    told_to_stop = heed_stops()
    print("ready", flush=True)
    sys.exit(
        carry_out(
            Mover(
                xen=FileHost(root),
                domain=IDENTITY,
                directory=root / "saves",
                run_xl=run_xl,
                boot="boot",
                notes=root / "notes",
                jobs=root / "jobs",
                mounts=Path(os.devnull),
                told_to_stop=told_to_stop,
            )
        )
    )
