"""Whose a page is, and what that domain is called."""

from __future__ import annotations

from pgofflined.core.domains import DomainInfo, GuestKind
from pgofflined.core.errors import DomainGone, PortError
from pgofflined.core.frames import Mfn
from pgofflined.core.pages import PageKind, decode_page_type
from pgofflined.ports import Hypervisor


def find_pv_owner(mfn: Mfn, xen: Hypervisor) -> DomainInfo | None:
    """The PV domain that owns a page, dom0 included; None for free, Xen's and HVM owners' pages.

    Without its name, for it has to be found while xenstored is down as well.  Asks Xen for the
    frame's type as each PV domain's: for all but the owner that is XTAB.
    """
    import numpy as np

    frame = np.array([mfn], dtype=np.uint64)
    for domain in xen.conditions():
        if domain.kind is not GuestKind.PV:
            continue
        try:
            word = int(xen.page_types(domain.domid, frame)[0])
        except DomainGone:
            continue
        if decode_page_type(word).kind is not PageKind.NOT_THE_DOMAINS:
            return domain
    return None


def named(owner: DomainInfo, xen: Hypervisor) -> DomainInfo | None:
    """A domain with its name, which the policy goes by; None where it has gone.

    Raises PortError.
    """
    try:
        domain = xen.domain(owner.domid)
    except DomainGone:
        return None
    return domain if domain.identity == owner.identity else None


def named_if_possible(owner: DomainInfo, xen: Hypervisor) -> DomainInfo:
    """The same, without its name where nobody can tell it, as while xenstored is down."""
    try:
        return named(owner, xen) or owner
    except PortError:
        return owner
