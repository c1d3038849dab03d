"""The domains of the host: what they are, and pausing them."""

from __future__ import annotations

import ctypes
import errno
import logging
from collections.abc import Iterator, Sequence
from typing import Final
from uuid import UUID

from pgofflined.core.domains import (
    DOMINF_DYING,
    DOMINF_PAUSED,
    DomainInfo,
    guest_kind,
    shutdown_reason,
)
from pgofflined.core.errors import DomainGone, PortError, XenError
from pgofflined.core.frames import PAGE_SHIFT, Domid, Mfn
from pgofflined.core.patterns import NAME_LIMIT
from pgofflined.ports import VcpuFrames
from pgofflined.xen.abi.domctl import (
    XEN_INVALID_MAX_VCPU_ID,
    AddressSize,
    GetDomainInfo,
    GetDomainInfoBefore416,
    VcpuContext,
    XEN_DOMCTL_get_address_size,
    XEN_DOMCTL_getdomaininfo,
    XEN_DOMCTL_getvcpucontext,
    XEN_DOMCTL_pausedomain,
    XEN_DOMCTL_unpausedomain,
)
from pgofflined.xen.abi.sysctl import GetDomainInfoList, XEN_SYSCTL_getdomaininfolist
from pgofflined.xen.abi.vcpu import VcpuGuestContext
from pgofflined.xen.abi.xen import DOMID_FIRST_RESERVED
from pgofflined.xen.control import Control
from pgofflined.xen.libs import XenCall
from pgofflined.xen.store import StoreOpener, open_store

_LOG = logging.getLogger(__name__)

_BATCH: Final = 128
# Descriptors of 8 bytes.
_GDT_ENTRIES_PER_FRAME: Final = 512


class Domains:
    """Reading and pausing domains, through domctl, sysctl and xenstore."""

    def __init__(
        self, call: XenCall, control: Control, *, stores: StoreOpener = open_store
    ) -> None:
        self._call = call
        self._control = control
        self._stores = stores

    def domains(self) -> Sequence[DomainInfo]:
        """All domains in the order of their domids, hence dom0 first."""
        with self._stores() as store:
            return [
                _decode(info, _name(store.read(_name_path(info.domain)))) for info in self._all()
            ]

    def conditions(self) -> Sequence[DomainInfo]:
        """All domains without their names, which take xenstore."""
        return [_decode(info, "") for info in self._all()]

    def _all(self) -> Iterator[GetDomainInfo | GetDomainInfoBefore416]:
        first = 0
        while first < DOMID_FIRST_RESERVED:
            batch = self._list(first)
            yield from batch
            if len(batch) < _BATCH:
                break
            first = batch[-1].domain + 1

    def domain(self, domid: Domid) -> DomainInfo:
        """One domain.  Raises DomainGone."""
        info = self.state(domid)
        with self._stores() as store:
            return _decode(info, _name(store.read(_name_path(domid))))

    def name_in_store(self, domid: Domid) -> bytes:
        """The domain's name as it stands in xenstore, for comparison only.

        Empty for none, and where xenstore cannot be read: a guest that stands still must not wait
        for that.
        """
        try:
            with self._stores() as store:
                return store.read(_name_path(domid)) or b""
        except PortError as error:
            _LOG.warning(
                "the name of d%d cannot be read (%s): whoever saves it is looked for by its number",
                domid,
                error,
            )
            return b""

    def serves(self, domid: Domid) -> str | None:
        """What other domains need the domain for; None for nothing known.

        By docs/misc/xenstore-paths.pandoc: backends are below ``backend``, ``target`` is the domain
        whose devices a stub domain emulates, and xenstored's own domain is in ``/tool/xenstored``.
        """
        with self._stores() as store:
            if store.read(f"/local/domain/{domid}/backend") is not None:
                return "serves devices to other domains"
            target = store.read(f"/local/domain/{domid}/target")
            if target is not None:
                return "emulates the devices of another domain"
            if store.read("/tool/xenstored/domid") == str(int(domid)).encode():
                return "runs xenstored"
        return None

    def condition(self, domid: Domid) -> DomainInfo:
        """One domain without its name, which takes xenstore.  Raises DomainGone."""
        return _decode(self.state(domid), "")

    def state(self, domid: Domid) -> GetDomainInfo | GetDomainInfoBefore416:
        """One domain as the hypervisor describes it, without asking xenstore.

        Raises DomainGone.
        """
        info = self._control.interface.domain_info()
        self._control.domctl(XEN_DOMCTL_getdomaininfo, domid, info, op="getdomaininfo")
        # Up to 4.17 or so Xen answers with the next domain when this one does not exist.
        if info.domain != domid:
            raise DomainGone(domid)
        return info

    def address_size(self, domid: Domid) -> int:
        """64 or 32: the width of a PV domain's words.  Raises DomainGone, XenError."""
        size = AddressSize()
        self._control.domctl(XEN_DOMCTL_get_address_size, domid, size, op="get_address_size")
        return size.size

    def pause(self, domid: Domid) -> None:
        """Pause every vCPU and wait until none runs; counted.  Raises DomainGone, XenError."""
        self._control.domctl(XEN_DOMCTL_pausedomain, domid, op="pausedomain")

    def unpause(self, domid: Domid) -> None:
        """Take one pause back.  Raises DomainGone, XenError (EINVAL: it was not paused)."""
        self._control.domctl(XEN_DOMCTL_unpausedomain, domid, op="unpausedomain")

    def vcpu_frames(self, domid: Domid) -> VcpuFrames:
        """Roots and GDT frames of a PV domain's vCPUs.  Raises DomainGone, XenError.

        Xen stops each vCPU for the moment of asking.
        """
        roots: set[Mfn] = set()
        tables: set[Mfn] = set()
        for vcpu in range(self.state(domid).max_vcpu_id + 1):
            with self._call.struct(VcpuGuestContext) as context:
                argument = VcpuContext(vcpu=vcpu, ctxt=ctypes.addressof(context))
                try:
                    self._control.domctl(
                        XEN_DOMCTL_getvcpucontext, domid, argument, op="getvcpucontext"
                    )
                except XenError as error:
                    if error.errno == errno.ENODATA:
                        continue  # never brought up
                    raise
                # The kernel's root is in CR3, the user's in a place of its own, CR1
                # (arch-x86/xen-x86_64.h); both in the register's form, the frame from bit 12 on.
                registers = (context.ctrlreg[3], context.ctrlreg[1])
                roots |= {Mfn(register >> PAGE_SHIFT) for register in registers if register}
                entries = -(-int(context.gdt_ents) // _GDT_ENTRIES_PER_FRAME)
                tables |= {Mfn(int(frame)) for frame in context.gdt_frames[:entries]}
        return VcpuFrames(roots=frozenset(roots), tables=frozenset(tables))

    def has_devices(self, domid: Domid) -> bool:
        """Whether the toolstack has assigned PCI devices to the domain."""
        with self._stores() as store:
            return store.read(f"/local/domain/0/backend/pci/{domid}/0/num_devs") is not None

    def _list(self, first: int) -> list[GetDomainInfo | GetDomainInfoBefore416]:
        kind = self._control.interface.domain_info
        size = ctypes.sizeof(kind)
        with self._call.buffer(_BATCH * size) as address:
            request = GetDomainInfoList(first_domain=first, max_domains=_BATCH, buffer=address)
            self._control.sysctl(XEN_SYSCTL_getdomaininfolist, request, op="getdomaininfolist")
            count = request.num_domains
            if count > _BATCH:
                raise PortError(f"Xen listed {count} domains where {_BATCH} were asked for")
            return [
                kind.from_buffer_copy(ctypes.string_at(address + index * size, size))
                for index in range(count)
            ]


def _decode(info: GetDomainInfo | GetDomainInfoBefore416, name: str) -> DomainInfo:
    vcpu = info.max_vcpu_id
    return DomainInfo(
        domid=Domid(info.domain),
        uuid=UUID(bytes=bytes(info.handle)),
        name=name,
        kind=guest_kind(info.flags, info.arch_config.emulation_flags),
        dying=bool(info.flags & DOMINF_DYING),
        paused=bool(info.flags & DOMINF_PAUSED),
        shutdown=shutdown_reason(info.flags),
        tot_pages=info.tot_pages,
        max_pages=info.max_pages,
        # A domain that is still being built has no vCPU: no number is the highest.
        max_vcpu_id=-1 if vcpu == XEN_INVALID_MAX_VCPU_ID else vcpu,
        shared_info=Mfn(info.shared_info_frame),
        cpu_time=info.cpu_time,
    )


def _name_path(domid: int) -> str:
    return f"/local/domain/{domid}/name"


def _name(untrusted: bytes | None) -> str:
    """A name fit for logs: printable and not too long; a toolstack wrote it, or anyone."""
    text = (untrusted or b"")[: NAME_LIMIT * 4].decode("utf-8", "replace")[:NAME_LIMIT]
    return "".join(character if character.isprintable() else "?" for character in text)
