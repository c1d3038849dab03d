"""May a domain be migrated now?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from uuid import UUID

import pytest

from pgofflined.core.domains import DomainInfo, GuestKind, ShutdownReason
from pgofflined.core.frames import Domid, Mfn
from pgofflined.core.offline import OfflineState
from pgofflined.core.policy import RelocationPolicy
from pgofflined.core.premigration import (
    Go,
    Hindrance,
    MigrationFacts,
    Never,
    NothingLeft,
    NotNow,
    NoWay,
    PreMigration,
    Route,
    judge,
)
from pgofflined.core.relocation_outcomes import RelocationReason
from pgofflined.core.suspending import Objection
from pgofflined.core.xenversion import XenVersion

MIB = 256  # frames
HERE = RelocationPolicy(target="localhost", free_memory_reserve=256 << 20)
AWAY = RelocationPolicy(target="spare")
PENDING = OfflineState.OFFLINE_PENDING
BAD = Mfn(0x1234)
GUEST = DomainInfo(
    domid=Domid(7),
    uuid=UUID(int=7),
    name="web",
    kind=GuestKind.PVH,
    dying=False,
    paused=False,
    shutdown=None,
    tot_pages=512 * MIB,
    max_pages=513 * MIB,
    max_vcpu_id=1,
    shared_info=Mfn(1),
    cpu_time=0,
)
WAY = Route(address="192.0.2.1", interface="eth0", up=True, carrier=True, local=False)
FACTS = MigrationFacts(
    domain=GUEST,
    twins=(),
    version=XenVersion(4, 20, 4),
    states={BAD: PENDING},
    free_frames=4096 * MIB,
    way=None,
)


def judged(policy: RelocationPolicy = HERE, **changes: object) -> PreMigration:
    return judge(GUEST.identity, replace(FACTS, **changes), policy)  # type: ignore[arg-type]


def hindrance(verdict: PreMigration) -> Hindrance:
    assert isinstance(verdict, NotNow)
    assert verdict.detail
    return verdict.hindrance


def reason(verdict: PreMigration) -> RelocationReason:
    assert isinstance(verdict, Never)
    assert verdict.detail
    return verdict.reason


@pytest.mark.parametrize("kind", [GuestKind.PVH, GuestKind.HVM])
def test_a_running_guest_goes(kind: GuestKind) -> None:
    assert judged(domain=replace(GUEST, kind=kind)) == Go()
    assert judged(AWAY, way=WAY) == Go()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"domain": None}, RelocationReason.DOMAIN_GONE),
        ({"domain": replace(GUEST, uuid=UUID(int=8))}, RelocationReason.DOMAIN_GONE),
        ({"domain": replace(GUEST, dying=True)}, RelocationReason.DOMAIN_GONE),
        ({"domain": replace(GUEST, kind=GuestKind.PV)}, RelocationReason.NOT_HVM),
        ({"version": XenVersion(4, 17, 7)}, RelocationReason.XEN_FREE_LISTS),
        ({"version": XenVersion(4, 21, 1)}, RelocationReason.XEN_FREE_LISTS),
        ({"states": {BAD: OfflineState.ONLINE}}, RelocationReason.NOT_PENDING),
        ({"states": {BAD: PENDING | OfflineState.BROKEN}}, RelocationReason.BROKEN),
        ({"denial": "domains.deny has it"}, RelocationReason.DENIED),
        ({"has_devices": True}, RelocationReason.HAS_DEVICES),
        ({"poisoned": frozenset({BAD})}, RelocationReason.UNCORRECTED),
        (
            {"objection": Objection(may_pass=False, detail="0")},
            RelocationReason.NO_SUSPEND_SUPPORT,
        ),
        (
            {"states": {BAD: PENDING, Mfn(9): PENDING | OfflineState.BROKEN}},
            RelocationReason.BROKEN,
        ),
    ],
)
def test_what_never_goes(changes: dict[str, object], expected: RelocationReason) -> None:
    assert reason(judged(HERE, **changes)) is expected


def test_another_page_with_an_uncorrected_error_is_waited_for_and_named_with_its_owner() -> None:
    verdict = judged(poison="mfn 0x77 of d7 has had an uncorrected error")
    assert hindrance(verdict) is Hindrance.UNCORRECTED
    assert isinstance(verdict, NotNow)
    assert "mfn 0x77 of d7" in verdict.detail
    assert "restart that guest" in verdict.detail


def test_a_page_of_the_job_with_an_uncorrected_error_that_is_out_of_use_keeps_nobody() -> None:
    other = Mfn(9)
    states = {BAD: PENDING, other: OfflineState.OFFLINED}
    assert judged(states=states, poisoned=frozenset({other})) == Go()
    # While it is in use its guest has to end, whatever else there is.
    verdict = judged(states={BAD: PENDING, other: PENDING}, poisoned=frozenset({other}), poison="x")
    assert reason(verdict) is RelocationReason.UNCORRECTED
    assert isinstance(verdict, Never)
    assert "mfn 0x9 of d7" in verdict.detail


def test_a_guest_that_has_not_announced_that_it_suspends_may_do_so_yet() -> None:
    verdict = judged(objection=Objection(may_pass=True, detail="it is silent"))
    assert verdict == NotNow(hindrance=Hindrance.SUSPEND_UNANNOUNCED, detail="it is silent")


def test_nothing_is_read_that_is_broken_and_its_number_is_named() -> None:
    verdict = judged(states={BAD: OfflineState.BROKEN})
    assert isinstance(verdict, Never)
    assert "0x1234" in verdict.detail


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (RelocationPolicy(enabled=False, target="localhost"), RelocationReason.DISABLED),
        (RelocationPolicy(target=""), RelocationReason.NO_TARGET),
    ],
)
def test_the_policy_may_forbid_it(policy: RelocationPolicy, expected: RelocationReason) -> None:
    assert reason(judged(policy)) is expected


@pytest.mark.parametrize(
    "changes",
    [
        {"domain": replace(GUEST, paused=True)},
        {"domain": replace(GUEST, shutdown=ShutdownReason.SUSPEND)},
        {"domain": replace(GUEST, shutdown=ShutdownReason.REBOOT)},
        {"twins": (replace(GUEST, domid=Domid(9), paused=True),)},
    ],
)
def test_a_guest_that_does_not_run_waits(changes: dict[str, object]) -> None:
    assert hindrance(judged(HERE, **changes)) is Hindrance.DOMAIN_BUSY


def test_a_page_offlined_meanwhile_does_not_keep_the_others() -> None:
    gone = OfflineState.OFFLINED
    assert judged(states={BAD: PENDING, Mfn(9): gone}) == Go()
    assert judged(states={BAD: PENDING, Mfn(9): gone | OfflineState.BROKEN}) == Go()


@pytest.mark.parametrize("domain", [GUEST, None])
def test_pages_that_are_all_offlined_need_no_migration(domain: DomainInfo | None) -> None:
    states: Mapping[Mfn, OfflineState] = {BAD: OfflineState.OFFLINED}
    assert judged(states=states, domain=domain) == NothingLeft()


def test_this_host_needs_room_for_a_second_copy_and_the_reserve() -> None:
    needed = GUEST.max_pages + 256 * MIB
    assert judged(free_frames=needed) == Go()
    verdict = judged(free_frames=needed - 1)
    assert hindrance(verdict) is Hindrance.NO_FREE_MEMORY
    assert isinstance(verdict, NotNow)
    assert "513 MiB" in verdict.detail


def test_another_host_needs_no_room_here() -> None:
    assert judged(AWAY, way=WAY, free_frames=0) == Go()


@pytest.mark.parametrize(
    ("way", "expected"),
    [
        (replace(WAY, up=False, carrier=False), Hindrance.LINK_DOWN),
        (replace(WAY, carrier=False), Hindrance.LINK_DOWN),
        (NoWay(hindrance=Hindrance.NO_ROUTE, detail="no route"), Hindrance.NO_ROUTE),
        (
            NoWay(hindrance=Hindrance.TARGET_UNRESOLVED, detail="unknown name"),
            Hindrance.TARGET_UNRESOLVED,
        ),
    ],
)
def test_another_host_must_be_reachable(way: Route | NoWay, expected: Hindrance) -> None:
    assert hindrance(judged(AWAY, way=way)) is expected


def test_another_name_of_this_host_is_refused() -> None:
    verdict = judged(AWAY, way=replace(WAY, interface="lo", local=True))
    assert reason(verdict) is RelocationReason.TARGET_IS_THIS_HOST
