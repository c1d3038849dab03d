"""Which layouts a hypervisor's domctl and sysctl interface versions mean.

Source: XEN_DOMCTL_INTERFACE_VERSION and XEN_SYSCTL_INTERFACE_VERSION in ``domctl.h`` and
``sysctl.h`` of the tags RELEASE-4.14.0 to RELEASE-4.22.0, and the structures there, compared tag
by tag: of those used here only getdomaininfo (4.16) and physinfo (4.17) changed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from pgofflined.xen.abi.domctl import GetDomainInfo, GetDomainInfoBefore416
from pgofflined.xen.abi.sysctl import Physinfo, PhysinfoBefore417

# (major, minor) of Xen: (domctl version, sysctl version).
INTERFACE_VERSIONS: Final = {
    (4, 14): (0x12, 0x13),
    (4, 15): (0x13, 0x13),
    (4, 16): (0x14, 0x14),
    (4, 17): (0x15, 0x15),
    (4, 18): (0x16, 0x15),
    (4, 19): (0x17, 0x15),
    (4, 20): (0x17, 0x15),
    (4, 21): (0x17, 0x16),
    (4, 22): (0x18, 0x16),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Interface:
    """A pair of interface versions that the running hypervisor has accepted."""

    domctl: int
    sysctl: int

    @property
    def domain_info(self) -> type[GetDomainInfo | GetDomainInfoBefore416]:
        """Layout of getdomaininfo and of getdomaininfolist's elements."""
        return GetDomainInfo if self.domctl >= 0x14 else GetDomainInfoBefore416

    @property
    def physinfo(self) -> type[Physinfo | PhysinfoBefore417]:
        """Layout of physinfo."""
        return Physinfo if self.sysctl >= 0x15 else PhysinfoBefore417
