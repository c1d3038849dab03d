"""Prints frames of a running PV domain as JSON: python3 -m tests.e2e.dom0.pages DOMID KIND COUNT.

KIND is ``data`` (plain memory that no grant offers and no p2m lies in), ``granted``, or ``table``
(page tables).  Frames are drawn at random from all of the domain's.
"""

from __future__ import annotations

import json
import random
import sys

import numpy as np

from pgofflined.core.frames import Domid
from pgofflined.core.pagetable import guest_frames, table_levels
from pgofflined.exchanger.survey import read_p2m
from pgofflined.xen.hypervisor import XenHypervisor


def main(domid: Domid, kind: str, count: int) -> None:
    """Print a list of [pfn, mfn]."""
    xen = XenHypervisor()
    p2m = read_p2m(xen, xen.domain(domid))
    pfns = np.flatnonzero(guest_frames(p2m.entries))
    mfns = p2m.entries[pfns]
    types = xen.page_types(domid, mfns)
    granted = np.isin(mfns, xen.granted_frames(domid))
    match kind:
        case "data":
            wanted = (types == 0) & ~granted & ~np.isin(mfns, p2m.leaf_mfns)
        case "granted":
            wanted = granted
        case "table":
            wanted = table_levels(types) > 0
        case _:
            raise SystemExit(f"unknown kind {kind}")
    chosen = np.flatnonzero(wanted).tolist()
    chosen = random.sample(chosen, min(count, len(chosen)))
    print(json.dumps([[int(pfns[index]), int(mfns[index])] for index in chosen]))


if __name__ == "__main__":
    main(Domid(int(sys.argv[1])), sys.argv[2], int(sys.argv[3]))
