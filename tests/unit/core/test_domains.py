from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgofflined.core.domains import (
    DomainIdentity,
    GuestKind,
    ShutdownReason,
    guest_kind,
    identities_from_text,
    identities_to_text,
    shutdown_reason,
)
from pgofflined.core.frames import Domid


def test_a_running_domain_has_no_shutdown_reason() -> None:
    assert shutdown_reason(0xFF0020) is None


@pytest.mark.parametrize(
    ("code", "reason"),
    [(2, ShutdownReason.SUSPEND), (3, ShutdownReason.CRASH), (77, ShutdownReason.UNKNOWN)],
)
def test_the_reason_is_read_from_the_flags(code: int, reason: ShutdownReason) -> None:
    assert shutdown_reason(code << 16 | 1 << 2) is reason


@given(st.sets(st.builds(DomainIdentity, st.integers(0, 0x7FEF).map(Domid), st.uuids())))
def test_identities_are_stored_and_read_again(domains: set[DomainIdentity]) -> None:
    assert identities_from_text(identities_to_text(domains)) == domains


def test_stored_identities_that_cannot_be_read_are_left_out() -> None:
    known = DomainIdentity(Domid(3), UUID(int=3))
    assert identities_from_text(f"x 7: :{UUID(int=1)} 3:{UUID(int=3)} 4:no") == {known}


def test_guest_kinds_are_told_apart_by_flags_and_emulation() -> None:
    assert guest_kind(0, 0) is GuestKind.PV
    assert guest_kind(1 << 1, 0) is GuestKind.PVH
    assert guest_kind(1 << 1, 1) is GuestKind.PVH
    assert guest_kind(1 << 1, 0x3FF) is GuestKind.HVM
