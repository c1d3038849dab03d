"""Prints frames as JSON, a list of [pfn, mfn]: python3 -m tests.e2e.dom0.pages DOMID KIND COUNT.

KIND is, of a running PV domain: ``data`` (plain memory that no grant offers and no p2m lies in),
``granted``, ``table`` (page tables), ``any`` of its p2m, ``paired`` (any whose neighbour is its own
too, so that it joins no free block: see docs/xen-bugs.md), ``paired-data`` (both at once) or
``anonymous`` (one that Xen has allocated to nobody, for the domain); of a PVH domain that is the
only one: ``hvm``; of dom0: ``dom0``; of nobody: ``free`` (nearly always: a few of Xen's own look
the same).  Frames are drawn at random.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import numpy as np

from pgofflined.core.domains import GuestKind
from pgofflined.core.frames import DOM0, Domid, Mfn
from pgofflined.core.pagetable import guest_frames, table_levels
from pgofflined.exchanger.survey import read_p2m
from pgofflined.owners import find_pv_owner
from pgofflined.xen.hypervisor import XenHypervisor

_TRIES = 20_000

# Where a PV domain's L4 tables have Xen's own mappings for the domain, whose tables are allocated
# without an owner (xen/arch/x86/include/asm/config.h, PERDOMAIN_VIRT_START; mm.c, MEMF_no_owner).
_PERDOMAIN_SLOT = 260
# Bits 51:12 of an entry (Intel SDM volume 3, chapter "Paging").
_ADDRESS = (1 << 52) - (1 << 12)
_PAGE_SHIFT = 12
RNG = np.random.default_rng()


def of_pv_guest(xen: XenHypervisor, domid: Domid, kind: str) -> list[tuple[int, int]]:
    """All frames of a kind."""
    p2m = read_p2m(xen, xen.domain(domid))
    pfns = np.flatnonzero(guest_frames(p2m.entries))
    mfns = p2m.entries[pfns]
    types = xen.page_types(domid, mfns)
    granted = np.isin(mfns, xen.granted_frames(domid))
    data = (types == 0) & ~granted & ~np.isin(mfns, p2m.leaf_mfns)
    paired = np.isin(mfns ^ np.uint64(1), mfns)
    wanted = {
        "data": data,
        "granted": granted,
        "table": table_levels(types) > 0,
        "any": np.ones(len(mfns), dtype=np.bool_),
        "paired": paired,
        "paired-data": data & paired,
    }[kind]
    return [(int(pfns[index]), int(mfns[index])) for index in np.flatnonzero(wanted)]


def of_xen_for(xen: XenHypervisor, domid: Domid) -> tuple[int, int]:
    """The table of Xen's own mappings for a PV domain; the domain has no pfn for it."""
    roots = np.array(sorted(xen.vcpu_frames(domid).roots)[:1], dtype=np.uint64)
    entry = int(xen.read_frames(domid, roots)[0][_PERDOMAIN_SLOT])
    return -1, (entry & _ADDRESS) >> _PAGE_SHIFT


def at_random(xen: XenHypervisor, kind: str) -> Iterator[tuple[int, int]]:
    """Frames of a kind that only trying finds.

    Xen logs a line for each PV domain that is asked for a frame not its own, so few are tried.
    """
    pv = [domain.domid for domain in xen.domains() if domain.kind is GuestKind.PV]
    for number in RNG.integers(0x1000, xen.max_mfn(), _TRIES).tolist():
        mfn = Mfn(number)
        pfn = xen.m2p(mfn)
        match kind:
            case "free" if pfn is None:
                yield -1, mfn
            case "dom0" if pfn is not None:
                owner = find_pv_owner(mfn, xen) if len(pv) == 1 else None
                if owner is not None and owner.domid == DOM0:
                    yield pfn, mfn
            case "hvm" if pfn is not None and find_pv_owner(mfn, xen) is None:
                yield pfn, mfn


def main(domid: Domid, kind: str, count: int) -> None:
    """Print the list."""
    xen = XenHypervisor()
    if kind in ("data", "granted", "table", "any", "paired", "paired-data"):
        found = of_pv_guest(xen, domid, kind)
        picks = RNG.choice(len(found), min(count, len(found)), replace=False)
        chosen = [found[index] for index in picks]
    elif kind == "anonymous":
        chosen = [of_xen_for(xen, domid)]
    else:
        chosen = []
        for frame in at_random(xen, kind):
            chosen.append(frame)
            if len(chosen) == count:
                break
    print(json.dumps(chosen))


if __name__ == "__main__":
    main(Domid(int(sys.argv[1])), sys.argv[2], int(sys.argv[3]))
