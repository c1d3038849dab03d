from __future__ import annotations

import ctypes
import errno

import pytest

from pgofflined.core.errors import DomainGone, PortError, XenError
from pgofflined.core.frames import Domid
from pgofflined.core.xenversion import XenVersion
from pgofflined.xen.abi.domctl import GetDomainInfo, GetDomainInfoBefore416, XEN_DOMCTL_pausedomain
from pgofflined.xen.abi.interface import INTERFACE_VERSIONS
from pgofflined.xen.abi.sysctl import Physinfo, PhysinfoBefore417
from pgofflined.xen.abi.version import XENVER_version
from pgofflined.xen.abi.xen import HYPERVISOR_domctl, HYPERVISOR_sysctl, HYPERVISOR_xen_version
from pgofflined.xen.control import probe_interface, read_version

from .recorder import Answer, calling, control, domctl_at, failing, sysctl_at


def speaks(domctl: int, sysctl: int) -> Answer:
    """A hypervisor with these interface versions."""

    def answer(number: int, arguments: tuple[int, ...]) -> int:
        if number == HYPERVISOR_domctl:
            given, ours = domctl_at(arguments[0])[0].interface_version, domctl
        else:
            assert number == HYPERVISOR_sysctl
            given, ours = sysctl_at(arguments[0])[0].interface_version, sysctl
        if given != ours:
            raise failing(errno.EACCES)
        return 0

    return answer


@pytest.mark.parametrize("release", INTERFACE_VERSIONS)
def test_interface_of_every_known_release_is_found_at_once(release: tuple[int, int]) -> None:
    call, fake = calling(speaks(*INTERFACE_VERSIONS[release]))
    interface = probe_interface(call, XenVersion(*release, 0))
    assert (interface.domctl, interface.sysctl) == INTERFACE_VERSIONS[release]
    assert len(fake.calls) == 2


def test_interface_of_a_vendors_odd_release_is_found() -> None:
    call, _ = calling(speaks(0x15, 0x16))
    interface = probe_interface(call, XenVersion(4, 99, 0))
    assert (interface.domctl, interface.sysctl) == (0x15, 0x16)


def test_unknown_interface_is_refused_with_what_is_known() -> None:
    call, _ = calling(speaks(0x99, 0x16))
    with pytest.raises(PortError, match=r"Xen 4\.30\.0 .* 4\.14 to 4\.22"):
        probe_interface(call, XenVersion(4, 30, 0))


def test_refusal_for_another_reason_ends_the_probe() -> None:
    def answer(_number: int, _arguments: tuple[int, ...]) -> int:
        raise failing(errno.EPERM)

    with pytest.raises(XenError):
        probe_interface(calling(answer)[0], XenVersion(4, 20, 0))


@pytest.mark.parametrize(
    ("release", "info", "physinfo"),
    [
        ((4, 15), GetDomainInfoBefore416, PhysinfoBefore417),
        ((4, 16), GetDomainInfo, PhysinfoBefore417),
        ((4, 17), GetDomainInfo, Physinfo),
    ],
)
def test_layouts_follow_the_interface(release: tuple[int, int], info: type, physinfo: type) -> None:
    call, _ = calling(speaks(*INTERFACE_VERSIONS[release]))
    interface = probe_interface(call, XenVersion(*release, 0))
    assert (interface.domain_info, interface.physinfo) == (info, physinfo)


def test_domain_that_does_not_exist_is_gone() -> None:
    def answer(_number: int, _arguments: tuple[int, ...]) -> int:
        raise failing(errno.ESRCH)

    with pytest.raises(DomainGone):
        control(answer).domctl(XEN_DOMCTL_pausedomain, Domid(3), op="pausedomain")


@pytest.mark.parametrize("domid", [-1, 0x7FF0, 0x7FF2, 70000])
def test_reserved_and_impossible_domids_are_not_asked_for(domid: int) -> None:
    def answer(_number: int, _arguments: tuple[int, ...]) -> int:
        raise AssertionError("asked")

    with pytest.raises(DomainGone):
        control(answer).domctl(XEN_DOMCTL_pausedomain, Domid(domid), op="pausedomain")


def version_answer(number: int, extra: bytes) -> Answer:
    def answer(hypercall: int, arguments: tuple[int, ...]) -> int:
        assert hypercall == HYPERVISOR_xen_version
        if arguments[0] == XENVER_version:
            return number
        ctypes.memmove(arguments[1], extra, len(extra))
        return 0

    return answer


def test_version_is_read() -> None:
    call, _ = calling(version_answer(4 << 16 | 20, b".5-pre\0junk"))
    assert read_version(call) == XenVersion(4, 20, 4)


def test_version_that_is_not_understood_is_refused() -> None:
    with pytest.raises(PortError, match="cannot tell which Xen"):
        read_version(calling(version_answer(4 << 16 | 20, b"\xff\xfe mine\0"))[0])
