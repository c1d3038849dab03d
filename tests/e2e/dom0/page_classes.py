"""Counts the classes of a running PV domain's pages: python3 -m tests.e2e.dom0.page_classes DOMID.

Prints one JSON object: pages by what the exchanger does with them.  What has only Xen's own count
to tell (areas that vCPUs have registered, mappings of dom0 without a grant) is among ``data``.
"""

from __future__ import annotations

import json
import sys
from collections import Counter

import numpy as np

from pgofflined.core.frames import Domid
from pgofflined.core.pages import PageKind
from pgofflined.core.pagetable import guest_frames, table_levels
from pgofflined.exchanger.survey import has_frames_of_others, read_p2m
from pgofflined.xen.hypervisor import XenHypervisor

_BATCH = 256


def classes(xen: XenHypervisor, domid: Domid) -> Counter[str]:
    """How many pages of the guest are of which class; a page is counted once."""
    p2m = read_p2m(xen, xen.domain(domid))
    mfns = np.unique(p2m.entries[guest_frames(p2m.entries)])
    levels = table_levels(xen.page_types(domid, mfns))
    granted = np.isin(mfns, xen.granted_frames(domid))
    loaded = xen.vcpu_frames(domid)
    gdt = np.isin(mfns, np.array(sorted(loaded.tables), dtype=np.uint64)) & ~granted
    roots = (levels == PageKind.L4.value) & np.isin(
        mfns, np.array(sorted(loaded.roots), dtype=np.uint64)
    )
    shared = xen.shared_frames(domid)
    others = 0
    lowest = mfns[levels == PageKind.L1.value]
    for start in range(0, len(lowest), _BATCH):
        for table in xen.read_frames(domid, lowest[start : start + _BATCH]):
            others += has_frames_of_others(xen, domid, table, shared)
    counts = Counter(
        granted=int(granted.sum()),
        descriptor_table=int(gdt.sum()),
        root_in_use=int(roots.sum()),
        maps_others=others,
        l1=len(lowest) - others,
        l2=int((levels == PageKind.L2.value).sum()),
        l3=int((levels == PageKind.L3.value).sum()),
        l4=int((levels == PageKind.L4.value).sum() - roots.sum()),
    )
    counts["data"] = len(mfns) - counts.total()
    return counts


if __name__ == "__main__":
    print(json.dumps(classes(XenHypervisor(), Domid(int(sys.argv[1])))))
