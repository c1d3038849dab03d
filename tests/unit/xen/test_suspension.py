"""The suspend protocol against a guest and a store that behave as the test says."""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

from pgofflined.core.domains import ShutdownReason
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
from pgofflined.core.suspending import SuspendSupport
from pgofflined.ports import SuspendLimits
from pgofflined.xen.abi.domctl import (
    AddressSize,
    VcpuContext,
    XEN_DOMCTL_get_address_size,
    XEN_DOMCTL_getdomaininfo,
    XEN_DOMCTL_getvcpucontext,
    XEN_DOMCTL_resumedomain,
    XEN_DOMCTL_setvcpucontext,
)
from pgofflined.xen.abi.hvm import HVM_PARAM_CALLBACK_IRQ, HVMOP_get_param, HvmParam
from pgofflined.xen.abi.vcpu import VcpuGuestContext
from pgofflined.xen.abi.xen import HYPERVISOR_hvm_op
from pgofflined.xen.control import Control
from pgofflined.xen.domains import Domains
from pgofflined.xen.monitors import Monitors
from pgofflined.xen.store import StorePort
from pgofflined.xen.suspension import Suspension

from .recorder import INTERFACE, calling, domain_info, domctl_at, failing, put

GUEST = Domid(3)
NODE = "/local/domain/3/control/shutdown"
FEATURE_NODE = "/local/domain/3/control/feature-suspend"
SUSPENDED = 1 << 2 | 2 << 16
CRASHED = 1 << 2 | 3 << 16
HVM = 1 << 1
DEVICE_MODEL = 0x1FF
LIMITS = SuspendLimits(acknowledge=10, suspend=30)


@dataclass
class Guest:
    """A domain, its control node and the time; ``script`` says what happens when."""

    script: dict[float, Callable[[Guest], None]] = field(default_factory=dict)
    flags: int = 0
    node: bytes | None = b""
    feature: bytes | None = b"1"
    rax: int = 0
    width: int = 64
    now: float = 0.0
    log: list[str] = field(default_factory=list)
    emulation: int = 0
    callback_irq: int = 0
    fail: dict[int, list[int]] = field(default_factory=dict)
    store_fails: int = 0
    watched: set[str] = field(default_factory=set)

    # xenstore

    def read(self, path: str) -> bytes | None:
        if path == FEATURE_NODE:
            return self.feature
        assert path == NODE
        return self.node

    def replace(self, path: str, *, expected: frozenset[bytes], value: bytes) -> bytes:
        assert path == NODE
        before = self.node or b""
        if before in expected:
            self.log.append(f"write {value.decode()!r}")
            self.node = value
        return before

    def watch(self, path: str) -> None:
        self.watched.add(path)

    def wait(self, seconds: float) -> None:
        assert seconds > 0
        assert self.watched == {NODE, "@releaseDomain"}
        until = self.now + seconds
        due = [time for time in sorted(self.script) if time <= until]
        if due:
            self.now = max(self.now, due[0])
            self.script.pop(due[0])(self)
        else:
            self.now = until

    def resume_domain(self, domid: Domid) -> None:
        assert domid == GUEST
        if self.store_fails:
            self.store_fails -= 1
            raise XenError(errno.EIO, op="xs_resume_domain")
        self.log.append("told xenstored")

    # Xen

    def answer(self, number: int, arguments: tuple[int, ...]) -> int:
        if number == HYPERVISOR_hvm_op:
            return self.answer_hvm(*arguments)
        request, place = domctl_at(arguments[0])
        if self.fail.get(request.cmd):
            raise failing(self.fail[request.cmd].pop(0))
        if request.cmd == XEN_DOMCTL_getdomaininfo:
            info = domain_info(GUEST, flags=self.flags)
            info.arch_config.emulation_flags = self.emulation
            put(place, info)
        elif request.cmd == XEN_DOMCTL_get_address_size:
            put(place, AddressSize(size=self.width))
        elif request.cmd == XEN_DOMCTL_resumedomain:
            self.log.append("resumed")
            self.flags = 0
        else:
            argument = VcpuContext.from_address(place)
            context = VcpuGuestContext.from_address(argument.ctxt)
            assert argument.vcpu == 0
            if request.cmd == XEN_DOMCTL_getvcpucontext:
                ctypes.memset(argument.ctxt, 0x5A, ctypes.sizeof(VcpuGuestContext))
                context.user_regs.rax = self.rax
            else:
                assert request.cmd == XEN_DOMCTL_setvcpucontext
                # The rest of the context goes back as it came.
                assert bytes(context)[:512] == b"\x5a" * 512
                self.rax = context.user_regs.rax
                self.log.append(f"rax {self.rax}")
        return 0

    def answer_hvm(self, operation: int, place: int) -> int:
        parameter = HvmParam.from_address(place)
        assert operation == HVMOP_get_param
        assert (parameter.domid, parameter.index) == (GUEST, HVM_PARAM_CALLBACK_IRQ)
        if self.fail.get(HYPERVISOR_hvm_op):
            raise failing(self.fail[HYPERVISOR_hvm_op].pop(0))
        parameter.value = self.callback_irq
        return 0


class CountingMonitors(Monitors):
    """How often they are held now, in place of real processes."""

    def __init__(self) -> None:
        super().__init__()
        self.holders = 0

    @contextmanager
    def held(self) -> Iterator[None]:
        self.holders += 1
        try:
            yield
        finally:
            self.holders -= 1


def suspension(
    guest: Guest,
    monitors: Monitors | None = None,
    newcomer: Callable[[Domid], str | None] = lambda _: None,
) -> Suspension:
    @contextmanager
    def stores() -> Iterator[StorePort]:
        yield guest

    call, _ = calling(guest.answer)
    control = Control(call, INTERFACE)
    return Suspension(
        call=call,
        control=control,
        domains=Domains(call, control),
        stores=stores,
        monitors=monitors,
        newcomer=newcomer,
        monotonic=lambda: guest.now,
    )


def acknowledges(guest: Guest) -> None:
    guest.node = b""


def suspends(guest: Guest) -> None:
    guest.node = b""
    guest.flags = SUSPENDED


def crashes(guest: Guest) -> None:
    guest.flags = CRASHED


def test_guest_acknowledges_and_suspends() -> None:
    guest = Guest({0.5: acknowledges, 2.0: suspends})
    suspension(guest).suspend(GUEST, LIMITS)
    assert guest.now == 2.0
    assert guest.log == ["write 'suspend'"]


def test_guest_that_removes_the_node_has_acknowledged() -> None:
    def removes(guest: Guest) -> None:
        guest.node = None

    guest = Guest({0.5: removes, 2.0: suspends})
    suspension(guest).suspend(GUEST, LIMITS)


def test_request_is_withdrawn_from_a_guest_that_does_not_answer() -> None:
    guest = Guest()
    with pytest.raises(GuestDidNotSuspend) as caught:
        suspension(guest).suspend(GUEST, LIMITS)
    assert (caught.value.stage, guest.now) == ("acknowledge", 10)
    assert guest.node == b""


def test_guest_that_takes_the_request_at_the_last_moment_is_waited_for() -> None:
    class Late(Guest):
        def replace(self, path: str, *, expected: frozenset[bytes], value: bytes) -> bytes:
            if value == b"":
                self.node = b""  # it was quicker than our transaction
            return super().replace(path, expected=expected, value=value)

    guest = Late({12.0: suspends})
    suspension(guest).suspend(GUEST, LIMITS)
    assert guest.now == 12.0


def test_guest_that_acknowledged_and_then_hangs() -> None:
    guest = Guest({0.5: acknowledges})
    with pytest.raises(GuestDidNotSuspend) as caught:
        suspension(guest).suspend(GUEST, LIMITS)
    assert caught.value.stage == "suspend"


def test_suspend_that_no_watch_reports_is_seen_all_the_same() -> None:
    """As after another toolstack's resume that xenstored was not told of."""

    class Silent(Guest):
        def wait(self, seconds: float) -> None:
            self.now += seconds
            if self.now > 2.5:
                suspends(self)

    guest = Silent()
    suspension(guest).suspend(GUEST, LIMITS)
    assert guest.now < 5


@pytest.mark.parametrize("when", ["before the acknowledgement", "after it"])
def test_guest_that_ends_meanwhile_is_gone(when: str) -> None:
    script: dict[float, Callable[[Guest], None]]
    script = {1.0: crashes} if when.startswith("before") else {0.5: acknowledges, 1.0: crashes}
    guest = Guest(script)
    with pytest.raises(GuestEnded) as caught:
        suspension(guest).suspend(GUEST, LIMITS)
    assert caught.value.reason is ShutdownReason.CRASH
    assert guest.node == b""


@pytest.mark.parametrize("when", [0.5, 1.5])
def test_guest_that_is_destroyed_meanwhile_has_ended_for_no_known_reason(when: float) -> None:
    def is_destroyed(guest: Guest) -> None:
        guest.fail = {XEN_DOMCTL_getdomaininfo: [errno.ESRCH] * 9}

    with pytest.raises(GuestEnded) as caught:
        suspension(Guest({1.0: acknowledges, when: is_destroyed})).suspend(GUEST, LIMITS)
    assert caught.value.reason is None


def orders(order: bytes) -> Callable[[Guest], None]:
    def write(guest: Guest) -> None:
        guest.node = order  # libxl writes over whatever is there

    return write


def ends(reason: int, *, takes: bool) -> Callable[[Guest], None]:
    def end(guest: Guest) -> None:
        if takes:
            guest.node = b""
        guest.flags = 1 << 2 | reason << 16

    return end


@pytest.mark.parametrize("reason", [0, 1])
def test_guest_that_shuts_down_with_our_request_unread_does_not_end_by_it(reason: int) -> None:
    guest = Guest({1.0: ends(reason, takes=False)})
    with pytest.raises(DomainGone) as caught:
        suspension(guest).suspend(GUEST, LIMITS)
    assert not isinstance(caught.value, GuestEnded)
    assert guest.node == b""


@pytest.mark.parametrize(("order", "reason"), [(b"poweroff", 0), (b"halt", 0), (b"reboot", 1)])
def test_guest_that_follows_an_operators_order_does_not_end_by_our_request(
    order: bytes, reason: int
) -> None:
    guest = Guest({1.0: orders(order), 2.0: ends(reason, takes=True)})
    with pytest.raises(DomainGone) as caught:
        suspension(guest).suspend(GUEST, LIMITS)
    assert not isinstance(caught.value, GuestEnded)


@pytest.mark.parametrize(
    "script",
    [
        # It may have read it, and crashed of that, before it took it.
        {1.0: ends(3, takes=False)},
        {1.0: ends(4, takes=False)},
        {1.0: ends(5, takes=False)},
        # Taken, whatever it did then.
        {1.0: ends(0, takes=True)},
        {0.5: acknowledges, 1.0: ends(0, takes=False)},
        # Not what was ordered, or nobody's order.
        {1.0: orders(b"poweroff"), 2.0: ends(3, takes=True)},
        {1.0: orders(b"reboot"), 2.0: ends(0, takes=True)},
        {1.0: orders(b"crash"), 2.0: ends(0, takes=True)},
    ],
)
def test_guest_that_may_have_ended_by_our_request_has(
    script: dict[float, Callable[[Guest], None]],
) -> None:
    with pytest.raises(GuestEnded):
        suspension(Guest(dict(script))).suspend(GUEST, LIMITS)


def test_guest_that_crashed_before_it_was_asked_has_not_ended_by_our_request() -> None:
    guest = Guest(flags=CRASHED)
    with pytest.raises(DomainGone) as caught:
        suspension(guest).suspend(GUEST, LIMITS)
    assert not isinstance(caught.value, GuestEnded)
    assert guest.log == []


@pytest.mark.parametrize(
    ("untrusted", "expected"),
    [
        (b"1", SuspendSupport.ANNOUNCED),
        (b"0", SuspendSupport.DENIED),
        (b"", SuspendSupport.SILENT),
        (None, SuspendSupport.SILENT),
        (b"1\0", SuspendSupport.SILENT),
        (b"\xff" * 4096, SuspendSupport.SILENT),
        (b"yes", SuspendSupport.SILENT),
    ],
)
def test_what_a_guest_announces_is_believed_only_as_it_is_defined(
    untrusted: bytes | None, expected: SuspendSupport
) -> None:
    assert suspension(Guest(feature=untrusted)).support(GUEST) is expected
    pvh = Guest(feature=untrusted, flags=HVM, callback_irq=1)
    assert suspension(pvh).support(GUEST) is expected


def test_a_guest_of_the_hvm_class_without_pv_drivers_is_not_asked_by_anybody() -> None:
    guest = Guest(feature=b"", flags=HVM, emulation=DEVICE_MODEL)
    assert suspension(guest).support(GUEST) is SuspendSupport.NOT_ASKED


@pytest.mark.parametrize("node", [b"poweroff", b"suspend", b"reboot"])
def test_request_of_somebody_else_is_not_overwritten(node: bytes) -> None:
    guest = Guest(node=node)
    with pytest.raises(XenError) as caught:
        suspension(guest).suspend(GUEST, LIMITS)
    assert (caught.value.errno, guest.node, guest.log) == (errno.EBUSY, node, [])


@pytest.mark.parametrize(
    ("guest", "code"),
    [
        (Guest(flags=SUSPENDED), errno.EBUSY),
        (Guest(flags=HVM, emulation=DEVICE_MODEL), errno.EOPNOTSUPP),
        (Guest(width=32), errno.EOPNOTSUPP),
    ],
)
def test_unfit_domains_are_not_asked(guest: Guest, code: int) -> None:
    with pytest.raises(XenError) as caught:
        suspension(guest).suspend(GUEST, LIMITS)
    assert (caught.value.errno, guest.log) == (code, [])


def test_guest_that_suspends_without_having_read_our_request_does_so_for_somebody_else() -> None:
    def saved(guest: Guest) -> None:
        guest.flags = SUSPENDED

    guest = Guest({0.5: saved})
    with pytest.raises(SuspendNotAsked) as caught:
        suspension(guest).suspend(GUEST, LIMITS)
    assert (caught.value.errno, guest.node, guest.flags) == (errno.EBUSY, b"", SUSPENDED)


def test_a_request_that_somebody_wrote_over_ours_makes_the_suspend_his() -> None:
    guest = Guest({0.5: acknowledges, 2.0: suspends})
    with pytest.raises(SuspendShared) as caught:
        suspension(guest, newcomer=lambda domid: f"process 5 (xl save {domid})").suspend(
            GUEST, LIMITS
        )
    # It is not waited for: for whom it does so is known by now.
    assert (caught.value.errno, guest.now) == (errno.EBUSY, 0.5)


def test_who_writes_his_request_after_ours_was_read_waits_for_his_turn() -> None:
    def looks(domid: Domid) -> str:
        guest.node = b"suspend"
        return f"process 5 (xl save {domid})"

    def suspends_for_us(guest: Guest) -> None:
        guest.flags = SUSPENDED

    guest = Guest({0.5: acknowledges, 2.0: suspends_for_us})
    suspension(guest, newcomer=looks).suspend(GUEST, LIMITS)
    assert (guest.flags, guest.node) == (SUSPENDED, b"suspend")


def test_failure_while_waiting_leaves_no_request_behind() -> None:
    class Broken(Guest):
        def wait(self, seconds: float) -> None:
            self.now += seconds
            raise XenError(errno.EIO, op="xs_check_watch")

    guest = Broken()
    with pytest.raises(XenError, match="xs_check_watch"):
        suspension(guest).suspend(GUEST, LIMITS)
    assert guest.node == b""


def test_failure_with_the_request_unread_is_no_suspend_of_ours() -> None:
    class Broken(Guest):
        def wait(self, seconds: float) -> None:
            self.now += seconds
            self.flags = SUSPENDED  # for somebody else
            raise XenError(errno.EIO, op="xs_check_watch")

    guest = Broken()
    with pytest.raises(SuspendNotAsked) as caught:
        suspension(guest).suspend(GUEST, LIMITS)
    assert (caught.value.errno, guest.node) == (errno.EIO, b"")


@pytest.mark.parametrize("node", [b"suspend", b"", b"poweroff", None])
def test_withdrawing_tells_whether_the_request_was_unread(node: bytes | None) -> None:
    guest = Guest(node=node)
    assert suspension(guest).withdraw(GUEST) is (node == b"suspend")
    assert guest.node == (b"" if node == b"suspend" else node)


def test_resume_tells_guest_then_xen_then_xenstored() -> None:
    guest = Guest(flags=SUSPENDED)
    resuming = suspension(guest)
    resuming.resume(GUEST)
    # The guest runs before there is time for xenstored.
    assert guest.log == ["rax 1", "resumed"]
    resuming.tell_resumed(GUEST)
    assert guest.log == ["rax 1", "resumed", "told xenstored"]


@pytest.mark.parametrize("flags", [0, CRASHED])
def test_xenstored_is_told_of_a_domain_that_a_process_has_resumed_which_has_died(
    flags: int,
) -> None:
    guest = Guest(flags=flags)
    suspension(guest).tell_resumed(GUEST)
    assert guest.log == ["told xenstored"]


def test_xenstored_is_not_told_of_a_domain_that_stands_still() -> None:
    guest = Guest(flags=SUSPENDED)
    suspension(guest).tell_resumed(GUEST)
    assert guest.log == []


@pytest.mark.parametrize("flags", [0, CRASHED, 1 << 2])
def test_domain_that_is_not_suspended_is_left_alone(flags: int) -> None:
    guest = Guest(flags=flags)
    suspension(guest).resume(GUEST)
    assert guest.log == []


@pytest.mark.parametrize("command", [XEN_DOMCTL_getvcpucontext, XEN_DOMCTL_setvcpucontext])
def test_guest_whose_context_cannot_be_written_stays_suspended(command: int) -> None:
    """Resumed without the 1 in rax it would be lost; suspended it can be resumed later."""
    guest = Guest(flags=SUSPENDED, fail={command: [errno.ENOMEM] * 3})
    with pytest.raises(XenError):
        suspension(guest).resume(GUEST)
    assert guest.flags == SUSPENDED
    assert "resumed" not in guest.log


@pytest.mark.parametrize("command", [XEN_DOMCTL_setvcpucontext, XEN_DOMCTL_resumedomain])
def test_passing_failures_of_a_resume_are_overcome(command: int) -> None:
    guest = Guest(flags=SUSPENDED, fail={command: [errno.ENOMEM, errno.EAGAIN]})
    suspension(guest).resume(GUEST)
    assert guest.log == ["rax 1", "resumed"]


def test_xenstored_is_told_the_next_time_if_it_could_not_be(
    caplog: pytest.LogCaptureFixture,
) -> None:
    guest = Guest(flags=SUSPENDED, store_fails=3)
    resuming = suspension(guest)
    resuming.resume(GUEST)
    resuming.tell_resumed(GUEST)
    assert guest.log == ["rax 1", "resumed"]
    assert "could not be told" in caplog.text
    resuming.tell_resumed(GUEST)
    assert guest.log == ["rax 1", "resumed", "told xenstored"]


def test_pvh_guest_with_pv_drivers_is_suspended_and_finds_its_call_cancelled() -> None:
    guest = Guest({0.5: suspends}, flags=HVM, callback_irq=1)
    suspending = suspension(guest)
    suspending.suspend(GUEST, LIMITS)
    guest.flags |= HVM
    suspending.resume(GUEST)
    assert guest.log == ["write 'suspend'", "rax 1", "resumed"]


def test_registers_of_a_guest_without_pv_drivers_are_left_alone() -> None:
    guest = Guest(flags=SUSPENDED | HVM, rax=0xDEAD)
    suspension(guest).resume(GUEST)
    assert (guest.log, guest.rax) == (["resumed"], 0xDEAD)


@pytest.mark.parametrize(
    "guest",
    [
        Guest(flags=SUSPENDED | HVM, emulation=DEVICE_MODEL, callback_irq=1),
        Guest(flags=SUSPENDED | HVM, fail={HYPERVISOR_hvm_op: [errno.EIO]}),
    ],
)
def test_guest_of_the_hvm_class_that_cannot_be_resumed_rightly_stays_suspended(
    guest: Guest,
) -> None:
    before = guest.flags
    with pytest.raises(XenError):
        suspension(guest).resume(GUEST)
    assert (guest.flags, guest.log) == (before, [])


def test_monitors_stand_still_from_the_request_until_the_guest_runs() -> None:
    monitors = CountingMonitors()

    def looks(guest: Guest) -> None:
        assert monitors.holders == 1
        suspends(guest)

    suspending = suspension(Guest({0.5: looks}), monitors)
    suspending.suspend(GUEST, LIMITS)
    assert monitors.holders == 1
    suspending.resume(GUEST)
    assert monitors.holders == 0


@pytest.mark.parametrize("guest", [Guest(), Guest({0.5: crashes}), Guest(width=32)])
def test_monitors_go_on_when_the_guest_does_not_suspend(guest: Guest) -> None:
    monitors = CountingMonitors()
    with pytest.raises(PortError):
        suspension(guest, monitors).suspend(GUEST, LIMITS)
    assert monitors.holders == 0


def test_monitors_go_on_when_the_suspended_guest_is_gone() -> None:
    monitors = CountingMonitors()
    guest = Guest({0.5: suspends}, fail={})
    suspending = suspension(guest, monitors)
    suspending.suspend(GUEST, LIMITS)
    guest.fail[XEN_DOMCTL_getdomaininfo] = [errno.ESRCH]
    with pytest.raises(DomainGone):
        suspending.resume(GUEST)
    assert monitors.holders == 0


def test_monitors_do_not_wait_for_a_guest_that_cannot_be_resumed() -> None:
    monitors = CountingMonitors()
    guest = Guest({0.5: suspends}, fail={XEN_DOMCTL_resumedomain: [errno.ENOMEM] * 3})
    suspending = suspension(guest, monitors)
    suspending.suspend(GUEST, LIMITS)
    with pytest.raises(XenError):
        suspending.resume(GUEST)
    assert monitors.holders == 0
    suspending.resume(GUEST)
    assert (monitors.holders, guest.flags) == (0, 0)
