import pytest

from pgofflined.core.domains import GuestKind, ShutdownReason, guest_kind, shutdown_reason


def test_a_running_domain_has_no_shutdown_reason() -> None:
    assert shutdown_reason(0xFF0020) is None


@pytest.mark.parametrize(
    ("code", "reason"),
    [(2, ShutdownReason.SUSPEND), (3, ShutdownReason.CRASH), (77, ShutdownReason.UNKNOWN)],
)
def test_the_reason_is_read_from_the_flags(code: int, reason: ShutdownReason) -> None:
    assert shutdown_reason(code << 16 | 1 << 2) is reason


def test_guest_kinds_are_told_apart_by_flags_and_emulation() -> None:
    assert guest_kind(0, 0) is GuestKind.PV
    assert guest_kind(1 << 1, 0) is GuestKind.PVH
    assert guest_kind(1 << 1, 1) is GuestKind.PVH
    assert guest_kind(1 << 1, 0x3FF) is GuestKind.HVM
