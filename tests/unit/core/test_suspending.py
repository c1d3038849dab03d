from __future__ import annotations

from dataclasses import replace
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgofflined.core.domains import DomainInfo, GuestKind, ShutdownReason
from pgofflined.core.frames import Domid, Mfn
from pgofflined.core.suspending import (
    SuspendSupport,
    ended_before,
    how_it_ended,
    objection,
    read_announcement,
    unless_announced,
)

UUID_7 = UUID("0f8fad5b-d9cb-469f-a165-70867728950e")
GUEST = DomainInfo(
    domid=Domid(7),
    uuid=UUID_7,
    name="mini-7",
    kind=GuestKind.PV,
    dying=False,
    paused=False,
    shutdown=None,
    tot_pages=1,
    max_pages=1,
    max_vcpu_id=0,
    shared_info=Mfn(1),
    cpu_time=0,
)
ANYBODY = ("*",)


@given(st.binary())
def test_only_the_two_defined_values_say_anything(value: bytes) -> None:
    says_something = read_announcement(value) is not SuspendSupport.SILENT
    assert says_something is (value in (b"0", b"1"))


@pytest.mark.parametrize(
    ("value", "support"),
    [
        (b"1", SuspendSupport.ANNOUNCED),
        (b"0", SuspendSupport.DENIED),
        (b"", SuspendSupport.SILENT),
        (b"1\0", SuspendSupport.SILENT),
        (None, SuspendSupport.SILENT),
    ],
)
def test_an_announcement_is_read_as_xen_defines_it(
    value: bytes | None, support: SuspendSupport
) -> None:
    assert read_announcement(value) is support


@pytest.mark.parametrize("support", [SuspendSupport.ANNOUNCED, SuspendSupport.NOT_ASKED])
def test_a_guest_that_can_or_is_not_asked_is_no_matter_of_policy(support: SuspendSupport) -> None:
    assert objection(GUEST, support, ()) is None


def test_a_guest_that_says_no_is_not_asked_whoever_names_it() -> None:
    found = objection(GUEST, SuspendSupport.DENIED, ANYBODY)
    assert found is not None
    assert not found.may_pass
    assert "d7" in found.detail


@pytest.mark.parametrize(
    "patterns", [ANYBODY, ("mini-7",), ("web", "mini-?"), (str(UUID_7),), ("0f8fad5b-*",)]
)
def test_a_silent_guest_is_asked_where_it_is_named(patterns: tuple[str, ...]) -> None:
    assert objection(GUEST, SuspendSupport.SILENT, patterns) is None


@pytest.mark.parametrize("patterns", [(), ("web",), ("MINI-7",), ("0f8*",)])
def test_a_silent_guest_is_not_asked_elsewhere_but_may_speak_yet(patterns: tuple[str, ...]) -> None:
    found = objection(GUEST, SuspendSupport.SILENT, patterns)
    assert found is not None
    assert found.may_pass
    assert "exchange.ask_unannounced" in found.detail


def test_a_silent_guest_without_a_name_is_named_by_its_uuid_or_as_anybody() -> None:
    nameless = replace(GUEST, name="")
    assert objection(nameless, SuspendSupport.SILENT, ("mini-*", "?*")) is not None
    assert objection(nameless, SuspendSupport.SILENT, ("0f8fad5b-*",)) is None
    assert objection(nameless, SuspendSupport.SILENT, ANYBODY) is None


def test_a_guest_that_we_have_moved_followed_the_request_and_is_silent_since() -> None:
    assert objection(GUEST, SuspendSupport.SILENT, (), was_restored=True) is None
    assert objection(GUEST, SuspendSupport.DENIED, (), was_restored=True) is not None


def test_the_operator_is_told_which_linux_announces_nothing() -> None:
    found = unless_announced(GUEST, SuspendSupport.SILENT)
    assert found is not None
    assert "older than 4.10 or was migrated or restored" in found.detail


@pytest.mark.parametrize("reason", [*ShutdownReason, None])
def test_every_end_is_told_with_the_domain_and_what_to_do(reason: ShutdownReason | None) -> None:
    told = how_it_ended(Domid(7), reason)
    assert told.startswith("d7 ")
    assert "domains.deny" in told


@pytest.mark.parametrize(
    ("reason", "what"),
    [
        (None, "d7 ended: it is gone, and whether it crashed or was destroyed cannot be told"),
        (ShutdownReason.CRASH, "d7 crashed"),
        (ShutdownReason.POWEROFF, "d7 powered itself off"),
    ],
)
def test_an_end_is_told_as_what_it_was(reason: ShutdownReason | None, what: str) -> None:
    assert how_it_ended(Domid(7), reason).startswith(f"{what}; we had just asked it to suspend")


def test_a_guest_that_has_ended_when_it_was_asked_is_not_asked_again() -> None:
    found = ended_before(Domid(7))
    assert not found.may_pass
    assert found.detail.startswith("the guest that is d7 now has ended before")
