"""Where a guest is after a migration that did not end well."""

from __future__ import annotations

from dataclasses import replace
from uuid import UUID

import pytest

from pgofflined.core.aftermath import (
    Aftermath,
    Ended,
    Moved,
    Resume,
    RunsOn,
    Stuck,
    after_failure,
    after_success,
)
from pgofflined.core.domains import DomainInfo, GuestKind, ShutdownReason
from pgofflined.core.frames import Domid, Mfn

RUNS = DomainInfo(
    domid=Domid(7),
    uuid=UUID(int=7),
    name="web",
    kind=GuestKind.PVH,
    dying=False,
    paused=False,
    shutdown=None,
    tot_pages=1000,
    max_pages=1000,
    max_vcpu_id=0,
    shared_info=Mfn(1),
    cpu_time=0,
)
SUSPENDED = replace(RUNS, shutdown=ShutdownReason.SUSPEND)
TWIN = replace(RUNS, domid=Domid(8))
COPY = replace(TWIN, paused=True)


def after(
    domain: DomainInfo | None,
    *twins: DomainInfo,
    in_doubt: bool = False,
    target: str = "localhost",
) -> Aftermath:
    return after_failure(RUNS.identity, domain, twins, target=target, in_doubt=in_doubt)


def test_a_guest_that_runs_as_before_is_left_alone() -> None:
    assert after(RUNS) == RunsOn()
    assert after(RUNS, in_doubt=True, target="spare") == RunsOn()


def test_a_copy_that_is_left_is_named() -> None:
    aftermath = after(RUNS, COPY)
    assert isinstance(aftermath, RunsOn)
    assert "xl destroy 8" in aftermath.note


@pytest.mark.parametrize("target", ["localhost", "spare"])
def test_a_suspended_guest_is_resumed_only_where_nobody_else_can_run_it(target: str) -> None:
    assert after(SUSPENDED, target=target) == Resume()
    for stuck in (
        after(SUSPENDED, target=target, in_doubt=True),
        after(SUSPENDED, TWIN, target=target),
        after(SUSPENDED, COPY, target=target),
        after(SUSPENDED, COPY, target=target, in_doubt=True),
    ):
        assert isinstance(stuck, Stuck)


def test_a_guest_with_a_device_model_is_not_resumed_without_it() -> None:
    assert isinstance(after(replace(SUSPENDED, kind=GuestKind.HVM)), Stuck)


def test_the_left_over_of_a_guest_that_moved_is_to_be_destroyed() -> None:
    aftermath = after(SUSPENDED, TWIN, in_doubt=True)
    assert isinstance(aftermath, Stuck)
    assert "xl destroy 7" in aftermath.what


def test_a_paused_guest_is_not_let_go() -> None:
    assert isinstance(after(replace(RUNS, paused=True)), Stuck)


def test_two_that_run_are_an_alarm() -> None:
    aftermath = after(RUNS, TWIN)
    assert isinstance(aftermath, Stuck)
    assert "disks" in aftermath.what


@pytest.mark.parametrize(
    "gone", [None, replace(RUNS, dying=True), replace(RUNS, uuid=UUID(int=99))]
)
def test_a_guest_that_is_gone(gone: DomainInfo | None) -> None:
    assert after(gone) == Ended()
    assert after(gone, in_doubt=True) == Ended()
    assert after(gone, TWIN) == Moved()
    assert after(gone, in_doubt=True, target="spare") == Moved()
    assert isinstance(after(gone, COPY), Stuck)


def test_a_guest_that_shut_itself_down_has_ended() -> None:
    assert after(replace(RUNS, shutdown=ShutdownReason.POWEROFF)) == Ended()


def test_after_a_success_the_guest_is_found_by_its_uuid() -> None:
    other = replace(RUNS, domid=Domid(9), uuid=UUID(int=9))
    assert after_success(RUNS.identity, [other, TWIN]) == (8, None)
    assert after_success(RUNS.identity, [other]) == (None, None)
    domid, stuck = after_success(RUNS.identity, [COPY])
    assert domid == 8
    assert stuck is not None


@pytest.mark.parametrize(
    ("twins", "where"),
    [
        ((), "may run at spare: look there"),
        ((COPY,), "may run at spare as d8: look there"),
        ((COPY, replace(COPY, domid=Domid(9))), "may run at spare as d8, d9: look there"),
    ],
)
def test_who_is_sent_to_look_is_told_where_and_for_whom(
    twins: tuple[DomainInfo, ...], where: str
) -> None:
    aftermath = after(SUSPENDED, *twins, in_doubt=True, target="spare")
    assert isinstance(aftermath, Stuck)
    assert aftermath.what.startswith(f"d7 is suspended and {where}, then either `xl destroy 7`")
