"""Layouts that no header at hand shows, against numbers read from the source they name."""

from __future__ import annotations

import ctypes

import pytest

from pgofflined.xen.abi import mcelog
from pgofflined.xen.abi.domctl import ArchDomainConfig, GetDomainInfoBefore416
from pgofflined.xen.abi.interface import INTERFACE_VERSIONS
from pgofflined.xen.abi.sysctl import PhysinfoBefore417


def test_getdomaininfo_of_xen_4_14_and_4_15() -> None:
    """xen/include/public/domctl.h at RELEASE-4.14.0 and RELEASE-4.15.0, compiled."""
    kind = GetDomainInfoBefore416
    assert ctypes.sizeof(kind) == 104
    offsets = {
        "domain": 0,
        "flags": 4,
        "tot_pages": 8,
        "max_pages": 16,
        "shared_info_frame": 48,
        "max_vcpu_id": 68,
        "handle": 76,
        "cpupool": 92,
        "arch_config": 96,
    }
    assert {name: getattr(kind, name).offset for name in offsets} == offsets
    assert ArchDomainConfig._fields_[0][0] == "emulation_flags"


def test_physinfo_of_xen_4_14_to_4_16() -> None:
    """xen/include/public/sysctl.h at RELEASE-4.14.0 to RELEASE-4.16.0, compiled."""
    kind = PhysinfoBefore417
    assert ctypes.sizeof(kind) == 104
    offsets = {"nr_cpus": 8, "max_cpu_id": 12, "free_pages": 40, "outstanding_pages": 56}
    assert {name: getattr(kind, name).offset for name in offsets} == offsets


@pytest.mark.parametrize(
    ("release", "domctl", "sysctl"),
    [
        ((4, 14), 0x12, 0x13),
        ((4, 15), 0x13, 0x13),
        ((4, 16), 0x14, 0x14),
        ((4, 17), 0x15, 0x15),
        ((4, 18), 0x16, 0x15),
        ((4, 19), 0x17, 0x15),
        ((4, 20), 0x17, 0x15),
        ((4, 21), 0x17, 0x16),
        ((4, 22), 0x18, 0x16),
    ],
)
def test_interface_versions(release: tuple[int, int], domctl: int, sysctl: int) -> None:
    """domctl.h and sysctl.h at the RELEASE tags."""
    assert INTERFACE_VERSIONS[release] == (domctl, sysctl)


def test_every_known_release_has_a_stated_version() -> None:
    assert list(INTERFACE_VERSIONS) == [(4, minor) for minor in range(14, 23)]


@pytest.mark.parametrize(
    ("number", "request_"),
    [
        (1, mcelog.MCE_GET_RECORD_LEN),
        (2, mcelog.MCE_GET_LOG_LEN),
        (3, mcelog.MCE_GETCLEAR_FLAGS),
    ],
)
def test_mcelog_ioctls(number: int, request_: int) -> None:
    """_IOR('M', number, int) of Linux's include/uapi/asm-generic/ioctl.h."""
    read = 2
    assert request_ == read << 30 | ctypes.sizeof(ctypes.c_int) << 16 | ord("M") << 8 | number
