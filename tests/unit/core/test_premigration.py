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
    forbidden,
    judge,
)
from pgofflined.core.relocation_outcomes import RelocationReason
from pgofflined.core.saves import SaveFacts
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


def detail(verdict: PreMigration) -> str:
    assert isinstance(verdict, NotNow | Never)
    return verdict.detail


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"twins": (replace(GUEST, domid=Domid(9)),)}, "d9 has the same uuid as d7: "),
        (
            {"twins": (replace(GUEST, domid=Domid(9)), replace(GUEST, domid=Domid(10)))},
            "d9, d10 have the same uuid as d7: ",
        ),
        (
            {"domain": replace(GUEST, shutdown=ShutdownReason.SUSPEND)},
            (
                "d7 is suspended: somebody saves or migrates it, or a migration has left it so and "
                "it may run elsewhere; it is tried again when it runs"
            ),
        ),
        ({"domain": replace(GUEST, shutdown=ShutdownReason.CRASH)}, "d7 is shut down (crash)"),
        (
            {"domain": replace(GUEST, paused=True)},
            "d7 is paused by somebody else; `xl unpause` lets it run",
        ),
        ({"somebody": "xl (4711)"}, "d7 is left alone until xl (4711) has ended"),
        (
            {"states": {BAD: OfflineState.ONLINE, Mfn(0x99): OfflineState.ONLINE}},
            "mfn 0x99 and 1 more is no longer marked",
        ),
        (
            {"states": {Mfn(number): OfflineState.BROKEN for number in (0x12, 0x11, 0x10)}},
            "mfn 0x10 and 2 more of d7 is broken",
        ),
        ({"states": {BAD: OfflineState.ONLINE}}, "mfn 0x1234 is no longer marked"),
    ],
)
def test_what_keeps_a_guest_is_told_with_its_remedy(changes: dict[str, object], told: str) -> None:
    assert detail(judged(HERE, **changes)).startswith(told)


@pytest.mark.parametrize(
    ("way", "state"),
    [
        (replace(WAY, up=False, carrier=False), "is down"),
        (replace(WAY, carrier=False), "has no carrier"),
    ],
)
def test_a_link_that_is_down_is_named_with_what_is_the_matter(way: Route, state: str) -> None:
    assert detail(judged(AWAY, way=way)) == f"the way to spare is eth0, which {state}"


def test_no_second_copy_is_made_in_memory_that_a_guest_in_a_file_needs() -> None:
    verdict = judged(saved_guest="d3 is in /saves/3")
    assert verdict == NotNow(
        hindrance=Hindrance.NO_FREE_MEMORY,
        detail="free memory is kept for a guest that may be in a file: d3 is in /saves/3",
    )


def test_too_little_memory_is_told_in_mebibytes() -> None:
    assert detail(judged(free_frames=700 * MIB)) == (
        "a second copy of d7 needs 513 MiB and 256 MiB are to stay free, but only 700 MiB are"
    )


PV_GUEST = replace(GUEST, kind=GuestKind.PV)
SAVING = RelocationPolicy(save_restore=True, free_memory_reserve=256 << 20)
# Its memory, and 64 MiB of what a save has besides.
SAVE_SIZE = (513 + 64) << 20
SAVABLE = SaveFacts(
    serves=None,
    manager=None,
    unfinished=None,
    has_config=True,
    trouble=None,
    free=SAVE_SIZE,
)


def saved(
    policy: RelocationPolicy = SAVING,
    *,
    save: SaveFacts = SAVABLE,
    domain: DomainInfo = PV_GUEST,
    **changes: object,
) -> PreMigration:
    """The verdict on a PV guest, which is saved and restored."""
    return judged(policy, save=save, domain=domain, **changes)


def test_a_pv_guest_that_can_be_restored_is_saved() -> None:
    assert saved() == Go()


@pytest.mark.parametrize(
    ("save", "told"),
    [
        (
            replace(SAVABLE, serves="drives a device of the host"),
            "d7 drives a device of the host, and others would fail while it is away",
        ),
        (
            replace(SAVABLE, has_config=False),
            (
                "xl does not know how d7 was configured, so that it could not restore it; whoever "
                "has created it can save and restore it"
            ),
        ),
        (
            replace(SAVABLE, manager="libvirt"),
            (
                "d7 is managed by libvirt, which would start it again or lose track of it; save "
                "and restore it with libvirt's own commands"
            ),
        ),
    ],
)
def test_a_pv_guest_that_nobody_could_restore_is_never_saved(save: SaveFacts, told: str) -> None:
    assert saved(save=save) == Never(reason=RelocationReason.NOT_SAVABLE, detail=told)


def test_a_guest_that_is_no_pv_guest_is_never_saved() -> None:
    assert reason(saved(domain=GUEST)) is RelocationReason.NOT_HVM


def test_a_guest_is_not_saved_twice() -> None:
    assert saved(save=replace(SAVABLE, unfinished="/state/saves/7.json")) == NotNow(
        hindrance=Hindrance.DOMAIN_BUSY,
        detail="an earlier save of d7 is not ended, see /state/saves/7.json",
    )


def test_no_guest_is_saved_while_memory_is_kept_for_another() -> None:
    assert saved(saved_guest="d3 is in /saves/3") == NotNow(
        hindrance=Hindrance.NO_FREE_MEMORY,
        detail="free memory is kept for a guest that may be in a file: d3 is in /saves/3",
    )


def test_a_directory_that_is_not_fit_keeps_a_guest_from_being_saved() -> None:
    assert saved(save=replace(SAVABLE, trouble="/saves is not there")) == NotNow(
        hindrance=Hindrance.NO_DISK_SPACE, detail="/saves is not there"
    )


def test_a_save_needs_room_for_all_of_the_guest_and_its_margin() -> None:
    assert saved(save=replace(SAVABLE, free=SAVE_SIZE)) == Go()
    assert saved(save=replace(SAVABLE, free=SAVE_SIZE - 1)) == NotNow(
        hindrance=Hindrance.NO_DISK_SPACE,
        detail="saving d7 takes 577 MiB, and /var/lib/pgofflined/saves "
        "(relocation.save_directory) has 576 MiB besides a reserve",
    )


def test_a_restore_needs_memory_that_the_guest_had_given_back_and_the_reserve() -> None:
    ballooned = replace(PV_GUEST, tot_pages=413 * MIB)  # of 513
    needed = 100 * MIB + 256 * MIB
    assert saved(domain=ballooned, free_frames=needed) == Go()
    assert saved(domain=ballooned, free_frames=needed - 1) == NotNow(
        hindrance=Hindrance.NO_FREE_MEMORY,
        detail="356 MiB are to be free for d7 to be restored with certainty, but only 355 MiB are",
    )


def test_a_guest_with_all_its_memory_needs_no_more_than_the_reserve_to_be_restored() -> None:
    for tot_pages in (PV_GUEST.max_pages, PV_GUEST.max_pages + MIB):
        whole = replace(PV_GUEST, tot_pages=tot_pages)
        assert saved(domain=whole, free_frames=256 * MIB) == Go()
        assert hindrance(saved(domain=whole, free_frames=256 * MIB - 1)) is Hindrance.NO_FREE_MEMORY


def test_a_reserve_is_rounded_up_to_whole_pages() -> None:
    policy = replace(SAVING, free_memory_reserve=4097)
    whole = replace(PV_GUEST, tot_pages=PV_GUEST.max_pages)
    assert saved(policy, domain=whole, free_frames=2) == Go()
    assert hindrance(saved(policy, domain=whole, free_frames=1)) is Hindrance.NO_FREE_MEMORY


def test_guests_are_saved_only_where_the_policy_says_so() -> None:
    verdict = saved(replace(SAVING, save_restore=False))
    assert verdict == Never(
        reason=RelocationReason.DISABLED,
        detail="saving and restoring PV guests is switched off (relocation.save_restore = false); "
        "its pages stay until d7 restarts",
    )
    # A target is for those that are migrated.
    assert forbidden(GUEST.identity, SAVING, by_saving=True) is None
    assert forbidden(GUEST.identity, AWAY, by_saving=False) is None
    no_target = forbidden(GUEST.identity, SAVING, by_saving=False)
    assert no_target is not None
    assert no_target.reason is RelocationReason.NO_TARGET
