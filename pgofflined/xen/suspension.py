"""Asking a PV or PVH guest to suspend itself, and letting it run on.

The protocol is that of ``docs/misc/xenstore-paths`` in the Xen source: the toolstack writes
``suspend`` to ``control/shutdown``, the guest empties the node to acknowledge, quiesces itself and
calls SCHEDOP_shutdown with reason suspend.  A guest that is resumed in its own domain must find 1
in rax as that call's result ("the suspend was cancelled"); with 0 it would believe that it had been
restored elsewhere, and break.  A guest of the HVM class that has no PV drivers made no such call;
its registers are its own.  One with a device model cannot be resumed by us at all: libxl stops the
model, and only libxl starts it again.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from typing import Final, assert_never

from pgofflined.core.domains import GuestKind, ShutdownReason, guest_kind, shutdown_reason
from pgofflined.core.errors import (
    DomainGone,
    GuestDidNotSuspend,
    GuestEnded,
    PortError,
    SuspendNotAsked,
    SuspendShared,
    XenError,
)
from pgofflined.core.frames import Domid
from pgofflined.core.suspending import FEATURE, SuspendSupport, is_anothers_end, read_announcement
from pgofflined.ports import SuspendLimits, nothing
from pgofflined.xen.abi.domctl import (
    GetDomainInfo,
    GetDomainInfoBefore416,
    VcpuContext,
    XEN_DOMCTL_getvcpucontext,
    XEN_DOMCTL_resumedomain,
    XEN_DOMCTL_setvcpucontext,
)
from pgofflined.xen.abi.hvm import HVM_PARAM_CALLBACK_IRQ, HVMOP_get_param, HvmParam
from pgofflined.xen.abi.vcpu import VcpuGuestContext
from pgofflined.xen.abi.xen import HYPERVISOR_hvm_op
from pgofflined.xen.control import Control
from pgofflined.xen.domains import Domains
from pgofflined.xen.libs import XenCall
from pgofflined.xen.monitors import Monitors
from pgofflined.xen.store import StoreOpener, StorePort, open_store

_LOG = logging.getLogger(__name__)

_Info = GetDomainInfo | GetDomainInfoBefore416

_SUSPEND: Final = b"suspend"
_CANCELLED: Final = 1
_TRIES: Final = 3
# xenstored fires @releaseDomain once per shutdown and only if it knows that the domain ran; after
# another toolstack's resume it may not.  Looking by ourselves once a second covers that.
_LOOK: Final = 1.0


class _EndedForOthers(Exception):
    """The guest was shut down by somebody else, or by itself, and has not taken our request."""


class Suspension:
    """Suspending and resuming."""

    def __init__(
        self,
        *,
        call: XenCall,
        control: Control,
        domains: Domains,
        stores: StoreOpener = open_store,
        monitors: Monitors | None = None,
        newcomer: Callable[[Domid], str | None] = lambda _: None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._call = call
        self._control = control
        self._domains = domains
        self._stores = stores
        self._monitors = monitors
        self._newcomer = newcomer
        self._monotonic = monotonic
        # What keeps xl's monitors still, for each guest that we have suspended.
        self._holds: dict[Domid, AbstractContextManager[None]] = {}
        # Domains that we have suspended: their kind need not be asked for while they stand still.
        self._fit: set[Domid] = set()

    def support(self, domid: Domid) -> SuspendSupport:
        """Whether a guest has announced that it suspends itself when asked.

        Raises XenError, DomainGone.
        """
        info = self._domains.state(domid)
        kind = guest_kind(info.flags, info.arch_config.emulation_flags)
        # libxl asks a guest of the HVM class only if it has PV drivers (libxl_dom_suspend.c,
        # domain_suspend_callback_common); any other is shut down from outside.
        if kind is not GuestKind.PV and not self._has_pv_drivers(domid):
            return SuspendSupport.NOT_ASKED
        with self._stores() as store:
            return read_announcement(store.read(f"/local/domain/{domid}/{FEATURE}"))

    def suspend(self, domid: Domid, limits: SuspendLimits) -> None:
        """Ask the guest to suspend itself and wait until it has.

        Raises GuestDidNotSuspend when it did not in time.  At stage ``acknowledge`` the request has
        been withdrawn before the guest read it, and nothing will come of it.  At stage ``suspend``
        the guest has read it and there is nothing to withdraw: should it get there later, it stays
        suspended until somebody resumes it, so the caller must look at it again from time to time
        and call ``resume``, which does nothing as long as it runs.

        Raises SuspendNotAsked: EBUSY when another shutdown, suspend or migration of the domain is
        under way or has used the same request, EOPNOTSUPP for 32-bit PV and for HVM guests;
        DomainGone when it has ended before it was asked, or was powered off or rebooted
        without having taken the request; GuestEnded when it ends otherwise afterwards.
        """
        self._hold_monitors(domid)
        try:
            self._suspend(domid, limits)
        except BaseException:
            self._release_monitors(domid)
            raise
        self._fit.add(domid)

    def _suspend(self, domid: Domid, limits: SuspendLimits) -> None:
        path = _shutdown_node(domid)
        with self._stores() as store:
            self._ask(store, domid, path)
            try:
                self._await(store, domid, path, limits)
            except GuestEnded:
                raise
            except _EndedForOthers as error:
                raise DomainGone(domid) from error
            except DomainGone as error:
                raise GuestEnded(domid, None) from error

    def _await(self, store: StorePort, domid: Domid, path: str, limits: SuspendLimits) -> None:
        """Wait until the guest that was asked has suspended itself.  Raises as ``suspend``."""
        try:
            acknowledged = self._await_acknowledgement(store, domid, path, limits.acknowledge)
        except GuestEnded as error:
            unread = False
            with suppress(PortError):
                unread = _withdraw(store, path)
            if unread and is_anothers_end(error.reason, None):
                raise _EndedForOthers from error
            raise
        except XenError as error:
            # Unread, it has led to nothing: should the guest suspend, it is for somebody else.
            if not isinstance(error, SuspendNotAsked) and _withdraw(store, path):
                raise SuspendNotAsked(error.errno, op=error.op, domid=domid) from error
            raise
        except BaseException:
            # Also when we are told to stop: leave no request behind.
            _withdraw(store, path)
            raise
        if acknowledged is None and _withdraw(store, path):
            raise GuestDidNotSuspend(domid, stage="acknowledge", seconds=limits.acknowledge)
        # While the guest is busy with it, for it does not wait for us yet.
        self._refuse_shared(store, domid, path)
        try:
            is_suspended = self._await_suspended(store, domid, limits.suspend)
        except GuestEnded as error:
            if is_anothers_end(error.reason, acknowledged or b""):
                raise _EndedForOthers from error
            raise
        if not is_suspended:
            raise GuestDidNotSuspend(domid, stage="suspend", seconds=limits.suspend)

    def _hold_monitors(self, domid: Domid) -> None:
        if self._monitors is not None and domid not in self._holds:
            hold = self._monitors.held()
            hold.__enter__()
            self._holds[domid] = hold

    def _release_monitors(self, domid: Domid) -> None:
        hold = self._holds.pop(domid, None)
        if hold is not None:
            hold.__exit__(None, None, None)

    def _ask(self, store: StorePort, domid: Domid, path: str) -> None:
        """Write the request, unless the guest is unfit or somebody else's."""
        try:
            self._refuse_unfit(domid)
            store.watch("@releaseDomain")
            store.watch(path)
        except XenError as error:
            raise SuspendNotAsked(error.errno, op=error.op, domid=domid) from error
        before = store.replace(path, expected=frozenset({b""}), value=_SUSPEND)
        if before:
            raise SuspendNotAsked(errno.EBUSY, op="write control/shutdown", domid=domid)

    def _refuse_unfit(self, domid: Domid) -> None:
        info = self._domains.state(domid)
        self._refuse_kind(info, "suspend")
        match shutdown_reason(info.flags):
            case None:
                return
            case ShutdownReason.SUSPEND:
                raise XenError(errno.EBUSY, op="suspend (already suspended)", domid=domid)
            case _:
                raise DomainGone(domid)

    def _refuse_kind(self, info: _Info, op: str) -> GuestKind:
        """The kind of a domain that can be suspended and resumed; it is asked for once."""
        domid = Domid(info.domain)
        kind = guest_kind(info.flags, info.arch_config.emulation_flags)
        match kind:
            case GuestKind.HVM:
                raise XenError(errno.EOPNOTSUPP, op=f"{op} (HVM)", domid=domid)
            case GuestKind.PVH:
                pass
            case GuestKind.PV:
                if domid not in self._fit and self._domains.address_size(domid) != 64:
                    raise XenError(errno.EOPNOTSUPP, op=f"{op} (32-bit PV)", domid=domid)
            case _:
                assert_never(kind)
        return kind

    def _await_acknowledgement(
        self, store: StorePort, domid: Domid, path: str, seconds: float
    ) -> bytes | None:
        """What stands in its place when the guest has taken it, None if it has not in time.

        Empty as a rule.  Anything else is somebody's order, written over our request or after it
        was taken.
        """
        deadline = self._monotonic() + seconds
        while True:
            found = store.read(path)
            if found != _SUSPEND:
                return found or b""
            self._refuse_strangers_suspend(store, domid, path)
            left = deadline - self._monotonic()
            if left <= 0:
                return None
            store.wait(min(left, _LOOK))

    def _refuse_shared(self, store: StorePort, domid: Domid, path: str) -> None:
        """libxl writes its request over any other: what the guest has read may have been for both.

        Who came before the guest read it takes the suspend for his, and must find it so.  A request
        that is there again was written later: the guest reads it when it runs on.
        """
        somebody = self._newcomer(domid)
        if somebody is None or store.read(path) == _SUSPEND:
            return
        _LOG.warning("d%d was asked to suspend by us and by %s at once: it is his", domid, somebody)
        raise SuspendShared(errno.EBUSY, op="suspend (for somebody else as well)", domid=domid)

    def withdraw(self, domid: Domid) -> bool:
        """Take back a request that nobody has read; whether there was one."""
        with self._stores() as store:
            return _withdraw(store, _shutdown_node(domid))

    def _refuse_strangers_suspend(self, store: StorePort, domid: Domid, path: str) -> None:
        """A guest takes a request before it follows it: with ours unread, it suspends for another.

        Its toolstack saves or migrates it then, and it must not be resumed by us.
        """
        if not self._is_suspended(domid):
            return
        if _withdraw(store, path):
            raise SuspendNotAsked(errno.EBUSY, op="suspend (for somebody else)", domid=domid)

    def _await_suspended(self, store: StorePort, domid: Domid, seconds: float) -> bool:
        """Whether it got there within the time; looks once more after the time is over."""
        deadline = self._monotonic() + seconds
        while not self._is_suspended(domid):
            left = deadline - self._monotonic()
            if left <= 0:
                return self._is_suspended(domid)
            store.wait(min(left, _LOOK))
        return True

    def _is_suspended(self, domid: Domid) -> bool:
        match shutdown_reason(self._domains.state(domid).flags):
            case None:
                return False
            case ShutdownReason.SUSPEND:
                return True
            case reason:
                raise GuestEnded(domid, reason)

    def resume(self, domid: Domid, before: Callable[[], None] = nothing) -> None:
        """Let a suspended guest run on in its own domain; does nothing for one that runs.

        ``before`` is called just before the call after which it runs.

        Raises XenError when the guest's context cannot be written or the domain not be resumed,
        after three tries.  It is then left suspended on purpose: resumed without the 1 in rax, a
        guest takes itself for restored elsewhere and is lost, whereas a suspended one is intact and
        can be resumed later, by another call or by ``xl resume`` (Xen 4.20).
        """
        try:
            self._resume(domid, before)
        finally:
            # Also where it fails: the monitors of all other guests must not wait for this one.
            self._release_monitors(domid)

    def _resume(self, domid: Domid, before: Callable[[], None]) -> None:
        info = self._domains.state(domid)
        if shutdown_reason(info.flags) is not ShutdownReason.SUSPEND:
            return
        kind = self._refuse_kind(info, "resume")
        if kind is GuestKind.PV or self._has_pv_drivers(domid):
            _insist(lambda: self._set_suspend_result(domid))
        before()
        _insist(lambda: self._control.domctl(XEN_DOMCTL_resumedomain, domid, op="resumedomain"))
        self._fit.discard(domid)

    def tell_resumed(self, domid: Domid) -> None:
        """Tell xenstored that a domain is not suspended any more, unless it is.

        It is the end of our suspend also where somebody else is to resume the guest.  Who resumed
        the domain does not matter, and to be told twice does no harm (do_resume in
        tools/xenstored/domain.c takes back its note that the domain has shut down).
        """
        self._release_monitors(domid)
        try:
            info = self._domains.state(domid)
            if shutdown_reason(info.flags) is ShutdownReason.SUSPEND:
                return
        except DomainGone:
            return
        except PortError as error:
            _LOG.debug("whether d%d runs cannot be seen: %s", domid, error)
        self._tell_xenstored(domid)

    def _has_pv_drivers(self, domid: Domid) -> bool:
        """Whether a guest of the HVM class has asked for event channels, and hence made the call.

        libxl takes this for the sign as well, and Linux sets it for that where it needs no callback
        (``xen_set_upcall_vector``, arch/x86/xen/enlighten_hvm.c).
        """
        with self._call.struct(HvmParam) as parameter:
            parameter.domid = domid
            parameter.index = HVM_PARAM_CALLBACK_IRQ
            self._call.hypercall(
                HYPERVISOR_hvm_op,
                HVMOP_get_param,
                ctypes.addressof(parameter),
                op="hvm_op(get_param)",
                domid=domid,
            )
            return parameter.value != 0

    def _set_suspend_result(self, domid: Domid) -> None:
        """Put 1 into rax of vCPU 0, the one that made the call."""
        with self._call.struct(VcpuGuestContext) as context:
            argument = VcpuContext(vcpu=0, ctxt=ctypes.addressof(context))
            self._control.domctl(XEN_DOMCTL_getvcpucontext, domid, argument, op="getvcpucontext")
            context.user_regs.rax = _CANCELLED
            self._control.domctl(XEN_DOMCTL_setvcpucontext, domid, argument, op="setvcpucontext")

    def _tell_xenstored(self, domid: Domid) -> None:
        try:
            _insist(lambda: self._resume_in_store(domid))
        except DomainGone:
            pass
        except PortError as error:
            _LOG.error(
                "d%d runs on, but xenstored could not be told (%s): its next shutdown may go "
                "unnoticed by the toolstack",
                domid,
                error,
            )

    def _resume_in_store(self, domid: Domid) -> None:
        with self._stores() as store:
            store.resume_domain(domid)


def _withdraw(store: StorePort, path: str) -> bool:
    """Withdraw the request; False when the guest took it at the last moment after all."""
    return store.replace(path, expected=frozenset({_SUSPEND}), value=b"") == _SUSPEND


def _shutdown_node(domid: Domid) -> str:
    return f"/local/domain/{domid}/control/shutdown"


def _insist(step: Callable[[], None]) -> None:
    """Do a repeatable step, at most three times, unless the domain is gone."""
    for attempt in range(1, _TRIES + 1):
        try:
            step()
        except XenError:
            if attempt == _TRIES:
                raise
        else:
            return
