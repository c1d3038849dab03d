"""Domctl and sysctl: the two calls whose layouts depend on the hypervisor's release."""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Callable

from pgofflined.core.errors import DomainGone, PortError, XenError
from pgofflined.core.frames import DOM0, Domid, Mfn
from pgofflined.core.xenversion import XenVersion, parse_version
from pgofflined.xen.abi.domctl import Domctl, XEN_DOMCTL_getdomaininfo
from pgofflined.xen.abi.interface import INTERFACE_VERSIONS, Interface
from pgofflined.xen.abi.sysctl import Sysctl, XEN_SYSCTL_physinfo
from pgofflined.xen.abi.version import (
    EXTRAVERSION_SIZE,
    XENVER_extraversion,
    XENVER_version,
)
from pgofflined.xen.abi.xen import (
    DOMID_FIRST_RESERVED,
    HYPERVISOR_domctl,
    HYPERVISOR_sysctl,
    HYPERVISOR_xen_version,
)
from pgofflined.xen.libs import XenCall


def read_version(call: XenCall) -> XenVersion:
    """Version of the running hypervisor.

    Raises PortError when its extra version cannot be understood: which faults the hypervisor has
    would then be unknown, and guessing could bring the host down.
    """
    version = call.hypercall(HYPERVISOR_xen_version, XENVER_version, 0, op="xen_version")
    with call.buffer(EXTRAVERSION_SIZE) as address:
        call.hypercall(HYPERVISOR_xen_version, XENVER_extraversion, address, op="xen_extraversion")
        untrusted_extra = ctypes.string_at(address, EXTRAVERSION_SIZE)
    try:
        return parse_version(version, untrusted_extra.split(b"\0")[0].decode("ascii", "replace"))
    except ValueError as error:
        raise PortError(f"cannot tell which Xen this is: {error}") from error


class Control:
    """Domctl and sysctl with the interface versions that this hypervisor takes."""

    def __init__(self, call: XenCall, interface: Interface) -> None:
        self._call = call
        self.interface = interface

    def domctl(
        self,
        command: int,
        domid: Domid,
        argument: ctypes.Structure | None = None,
        *,
        op: str,
    ) -> None:
        """Make a domctl; ``argument`` is handed in and holds the answer afterwards.

        Raises DomainGone for ESRCH, XenError for the rest.
        """
        if not 0 <= domid < DOMID_FIRST_RESERVED:
            raise DomainGone(domid)
        with self._call.struct(Domctl) as request:
            request.cmd = command
            request.interface_version = self.interface.domctl
            request.domain = domid
            place = ctypes.addressof(request) + Domctl.u.offset
            self._run(HYPERVISOR_domctl, request, place, argument, op=op, domid=domid)

    def sysctl(
        self, command: int, argument: ctypes.Structure, *, op: str, mfn: Mfn | None = None
    ) -> None:
        """Make a sysctl; ``argument`` is handed in and holds the answer afterwards.

        Raises XenError.
        """
        with self._call.struct(Sysctl) as request:
            request.cmd = command
            request.interface_version = self.interface.sysctl
            place = ctypes.addressof(request) + Sysctl.u.offset
            self._run(HYPERVISOR_sysctl, request, place, argument, op=op, mfn=mfn)

    def _run(
        self,
        number: int,
        request: ctypes.Structure,
        place: int,
        argument: ctypes.Structure | None,
        *,
        op: str,
        domid: Domid | None = None,
        mfn: Mfn | None = None,
    ) -> None:
        if argument is not None:
            ctypes.memmove(place, ctypes.addressof(argument), ctypes.sizeof(argument))
        try:
            self._call.hypercall(number, ctypes.addressof(request), op=op, domid=domid, mfn=mfn)
        except XenError as error:
            if error.errno == errno.ESRCH and domid is not None:
                raise DomainGone(domid) from error
            raise
        if argument is not None:
            ctypes.memmove(ctypes.addressof(argument), place, ctypes.sizeof(argument))


def probe_interface(call: XenCall, version: XenVersion) -> Interface:
    """Find the interface versions by two harmless questions.

    Xen compares the version before it does anything and answers EACCES to a wrong one; what it
    accepts also fixes the layouts.  Raises PortError when it accepts none that is known here.
    """
    domctl_versions = sorted({pair[0] for pair in INTERFACE_VERSIONS.values()}, reverse=True)
    sysctl_versions = sorted({pair[1] for pair in INTERFACE_VERSIONS.values()}, reverse=True)
    expected = INTERFACE_VERSIONS.get((version.major, version.minor))
    if expected:
        domctl_versions.insert(0, expected[0])
        sysctl_versions.insert(0, expected[1])
    domctl = next((v for v in domctl_versions if _accepts_domctl(call, v)), None)
    sysctl = next((v for v in sysctl_versions if _accepts_sysctl(call, v)), None)
    if domctl is None or sysctl is None:
        raise PortError(
            f"Xen {version} speaks a control interface that is not known here "
            f"(known: Xen 4.14 to 4.22); a newer pgofflined is needed"
        )
    return Interface(domctl=domctl, sysctl=sysctl)


def _accepts_domctl(call: XenCall, version: int) -> bool:
    interface = Interface(domctl=version, sysctl=0)
    argument = interface.domain_info()
    return _accepts(
        lambda: Control(call, interface).domctl(
            XEN_DOMCTL_getdomaininfo, DOM0, argument, op="getdomaininfo"
        )
    )


def _accepts_sysctl(call: XenCall, version: int) -> bool:
    interface = Interface(domctl=0, sysctl=version)
    argument = interface.physinfo()
    return _accepts(
        lambda: Control(call, interface).sysctl(XEN_SYSCTL_physinfo, argument, op="physinfo")
    )


def _accepts(ask: Callable[[], None]) -> bool:
    try:
        ask()
    except XenError as error:
        if error.errno == errno.EACCES:
            return False
        raise
    return True
