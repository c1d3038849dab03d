"""Whose a page is, and what that domain is called."""

from __future__ import annotations

from collections.abc import Callable

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


def find_special_owner(
    mfn: Mfn, xen: Hypervisor, suspected: Callable[[DomainInfo], bool]
) -> DomainInfo | None:
    """Which of the ``suspected`` PV domains has a page that Xen has lent it from its own heap.

    Xen names no type of its shared_info and grant table (XTAB), but an offline call for one takes
    that domain's lock.  One whose frames Xen does not tell counts as the owner.  Of dom0 only the
    shared_info is known: Xen tells a domain's frames to another domain only (acquire_resource).
    """
    for domain in xen.conditions():
        if domain.kind is not GuestKind.PV or not suspected(domain):
            continue
        if domain.shared_info == mfn:
            return domain
        try:
            if not domain.is_dom0 and mfn in xen.shared_frames(domain.domid):
                return domain
        except DomainGone:
            continue
        except PortError:
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


def what_of_broken(owner: DomainInfo | None, xen: Hypervisor) -> str:
    """What is to be done about a page that Xen has broken, by its PV owner (docs/xen-bugs.md)."""
    reboot = "move the other guests away and reboot the host"
    if owner is not None and owner.is_dom0:
        return f"it is dom0's: {reboot}"
    if owner is not None:
        return (
            f"it is d{owner.domid}'s, and to destroy a PV guest of which Xen has broken a page may "
            f"hang the host: leave it as it is, {reboot}"
        )
    if not xen.version().offlines_free_frames_safely:
        return f"when its owner ends, this Xen's allocator may be damaged: before that, {reboot}"
    return "it goes out of use when its owner ends: restart that guest"
