"""A full scan of a guest's page tables on real Xen: the survey's way beside the one of 2009.

See ``bench.dom0.full_scan`` for what is compared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from bench.dom0.full_scan import Scans
from bench.figures import AtLeast, Figure, ratio
from bench.rig import LARGE_MIB

if TYPE_CHECKING:
    from bench.rig import Rig

ROUNDS: Final = 10
TARGET: Final = AtLeast(5)


def measure(rounds: int, rig: Rig) -> list[Figure]:
    """Times for all tables of the large guest, and their ratios."""
    guest = rig.guest(LARGE_MIB)
    (line,) = rig.in_dom0(f"bench.dom0.full_scan {guest.domid} {rounds}")
    scans = msgspec.json.decode(line, type=Scans)
    one, python, batched = scans["one_by_one"], scans["of_it_python"], scans["batched"]
    lean = [whole - own for whole, own in zip(one, python, strict=True)]
    return [
        Figure(name="page tables of the guest", unit="", samples=(float(scans["tables"]),)),
        Figure(name="each mapped alone", unit="ms", samples=_ms(one)),
        Figure(name="each mapped alone, of it Python", unit="ms", samples=_ms(python)),
        Figure(name="mapped as by a survey", unit="ms", samples=_ms(batched)),
        ratio("each alone / as by a survey", one, batched, target=TARGET),
        ratio("each alone, without Python / as by a survey", lean, batched, target=TARGET),
        Figure(name="a whole survey: p2m, types, tables", unit="ms", samples=_ms(scans["survey"])),
    ]


def _ms(seconds: list[float]) -> tuple[float, ...]:
    return tuple(1000 * value for value in seconds)
