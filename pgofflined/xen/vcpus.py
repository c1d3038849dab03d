"""dom0's vCPUs and their places, as ``placement.VcpuControl``."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from pgofflined.core.domains import DOMINF_HVM
from pgofflined.core.errors import OfflineCallUnsafe
from pgofflined.core.frames import DOM0
from pgofflined.xen.abi.domctl import (
    XEN_VCPUAFFINITY_HARD,
    GetVcpuInfo,
    VcpuAffinity,
    XEN_DOMCTL_getdomaininfo,
    XEN_DOMCTL_getvcpuaffinity,
    XEN_DOMCTL_getvcpuinfo,
    XEN_DOMCTL_setvcpuaffinity,
)
from pgofflined.xen.abi.sysctl import XEN_SYSCTL_physinfo
from pgofflined.xen.control import Control
from pgofflined.xen.libs import XenCall
from pgofflined.xen.placement import Vcpu, Whereabouts


class Dom0Vcpus:
    """``placement.VcpuControl`` through domctl and sysctl."""

    def __init__(self, call: XenCall, control: Control) -> None:
        self._call = call
        self._control = control

    def online_pcpus(self) -> int:
        """Number of pCPUs that are online."""
        return self._pcpus()[0]

    def _pcpus(self) -> tuple[int, int]:
        """How many pCPUs are online, and how many bits a mask of pCPUs needs."""
        info = self._control.interface.physinfo()
        self._control.sysctl(XEN_SYSCTL_physinfo, info, op="physinfo")
        return info.nr_cpus, info.max_cpu_id + 1

    def vcpus(self) -> Sequence[Vcpu]:
        """All of dom0's vCPUs.  Raises OfflineCallUnsafe when dom0 is not PV."""
        info = self._control.interface.domain_info()
        self._control.domctl(XEN_DOMCTL_getdomaininfo, DOM0, info, op="getdomaininfo")
        if info.flags & DOMINF_HVM:
            raise OfflineCallUnsafe(
                "dom0 is PVH, and only a PV dom0 tells which of its CPUs is which vCPU; "
                "boot Xen without dom0=pvh"
            )
        return [self._vcpu(number) for number in range(info.max_vcpu_id + 1)]

    def _vcpu(self, number: int) -> Vcpu:
        return Vcpu(
            number=number,
            online=bool(self._info(number).online),
            hard=self.hard_affinity(number),
        )

    def _info(self, vcpu: int) -> GetVcpuInfo:
        info = GetVcpuInfo(vcpu=vcpu)
        self._control.domctl(XEN_DOMCTL_getvcpuinfo, DOM0, info, op="getvcpuinfo")
        return info

    def whereabouts(self, vcpu: int) -> Whereabouts:
        """Where the vCPU is."""
        info = self._info(vcpu)
        return Whereabouts(pcpu=info.cpu, running=bool(info.running))

    def hard_affinity(self, vcpu: int) -> frozenset[int]:
        """The hard affinity as it was last set."""
        return self._affinity(XEN_DOMCTL_getvcpuaffinity, vcpu, frozenset(), "getvcpuaffinity")

    def set_hard_affinity(self, vcpu: int, pcpus: frozenset[int]) -> frozenset[int]:
        """Set it and give what is effective.  Raises XenError, EINVAL when none is online."""
        return self._affinity(XEN_DOMCTL_setvcpuaffinity, vcpu, pcpus, "setvcpuaffinity")

    def _affinity(self, command: int, vcpu: int, pcpus: frozenset[int], op: str) -> frozenset[int]:
        bits = self._pcpus()[1]
        size = (bits + 7) // 8
        with self._call.buffer(size) as address:
            mask = sum(1 << pcpu for pcpu in pcpus if pcpu < bits)
            ctypes.memmove(address, mask.to_bytes(size, "little"), size)
            argument = VcpuAffinity(vcpu=vcpu, flags=XEN_VCPUAFFINITY_HARD)
            argument.cpumap_hard.bitmap = address
            argument.cpumap_hard.nr_bits = bits
            self._control.domctl(command, DOM0, argument, op=op)
            answer = int.from_bytes(ctypes.string_at(address, size), "little")
        return frozenset(bit for bit in range(bits) if answer >> bit & 1)
