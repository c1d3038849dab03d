"""Which conditions the daemon's state shows, and which incidents are kept."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import replace

import pytest

from pgofflined.aftercare import StuckGuest
from pgofflined.attention import (
    Attention,
    Circumstances,
    config_rejected,
    policy_digest,
    states,
)
from pgofflined.core.book import NOT_RAM, Cause, Phase
from pgofflined.core.conditions import Condition, ConditionCode
from pgofflined.core.frames import Mfn, Pfn
from pgofflined.core.machine import CpuVendor
from pgofflined.core.outcomes import Damaged, Exchanged, ExchangeReport
from pgofflined.core.policy import Policy
from pgofflined.core.recovery import Recovered, RecoveryReport
from pgofflined.core.status import JobStatus, PutOff, ReloadStatus, Snapshot, SourceStatus
from pgofflined.core.xenversion import XenVersion
from pgofflined.sim.clock import ManualClock
from tests.unit.rim_samples import LEFT_PAGE, NOW, OFFLINED_PAGE, SNAPSHOT, WAITING_PAGE, WEB

CALM = replace(SNAPSHOT, attention=(), pages=(OFFLINED_PAGE,), lost={}, idle_scrub=0)
FIXED = XenVersion(major=4, minor=22, patch=0)
ABOUT = Circumstances(now=NOW, policy=Policy(), version=FIXED)


class Meta:
    """The store's table of facts."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}

    def get_meta(self, key: str) -> str | None:
        return self.values.get(key)

    def set_meta(self, key: str, value: str) -> None:
        self.values[key] = value


def test_a_calm_daemon_has_nothing_to_say() -> None:
    assert states(CALM, ABOUT) == ()


def retiring(**changes: object) -> Policy:
    policy = Policy()
    return replace(policy, retire=replace(policy.retire, **changes))  # type: ignore[arg-type]


ONE_STATE: dict[ConditionCode, tuple[Snapshot, Circumstances, str]] = {
    ConditionCode.GUEST_STUCK: (
        CALM,
        replace(ABOUT, stuck={WEB: StuckGuest(since=NOW, text="it does not resume")}),
        "d7 does not run because of pgofflined: it does not resume",
    ),
    ConditionCode.GUEST_HELD: (
        CALM,
        replace(
            ABOUT,
            stuck={WEB: StuckGuest(since=NOW, text="it is held", code=ConditionCode.GUEST_HELD)},
        ),
        "it is held",
    ),
    ConditionCode.GUEST_IN_DOUBT: (
        CALM,
        replace(
            ABOUT,
            stuck={
                WEB: StuckGuest(
                    since=NOW, text="d7 may run at b", code=ConditionCode.GUEST_IN_DOUBT
                )
            },
        ),
        "d7 may run at b",
    ),
    ConditionCode.WORKER_STUCK: (CALM, replace(ABOUT, worker="for 200 s"), "for 200 s"),
    ConditionCode.SAVE_OVERDUE: (CALM, replace(ABOUT, overdue={WEB: "for 40 min"}), "for 40 min"),
    ConditionCode.NO_SOURCE: (
        replace(CALM, source=SourceStatus(name=None, note="mcelog reads it")),
        ABOUT,
        "mcelog reads it",
    ),
    ConditionCode.PAGE_UNRESOLVED: (
        replace(CALM, pages=(LEFT_PAGE,)),
        ABOUT,
        "mfn 0x1a2b3 stays in use although it is failing: it belongs to dom0",
    ),
    ConditionCode.PAGE_PUT_OFF: (
        replace(CALM, pages=(WAITING_PAGE,)),
        ABOUT,
        "mfn 0x2000 waits for a later try: the page is granted to d0",
    ),
    ConditionCode.CAP_REACHED: (
        replace(CALM, retired_frames=4096),
        ABOUT,
        "4096 pages are retired",
    ),
    ConditionCode.STATE_NOT_STORED: (CALM, replace(ABOUT, trouble="disk full"), "disk full"),
    ConditionCode.EXCHANGES_OFF: (CALM, replace(ABOUT, exchanges_off="no ramfs"), "no ramfs"),
    ConditionCode.IDLE_SCRUB: (replace(CALM, idle_scrub=2), ABOUT, "2 retired pages keep an idle"),
    ConditionCode.NO_POLLING: (
        CALM,
        replace(ABOUT, version=XenVersion(major=4, minor=17, patch=5)),
        "Xen 4.17.5 polls no machine-check bank: errors in banks without CMCI",
    ),
    ConditionCode.FREE_FRAMES_UNSAFE: (
        CALM,
        replace(ABOUT, version=XenVersion(major=4, minor=20, patch=3)),
        "Xen 4.20.3 cannot take free pages out safely",
    ),
    ConditionCode.DRY_RUN: (CALM, replace(ABOUT, policy=retiring(dry_run=True)), "dry run"),
    ConditionCode.RETIRING_OFF: (
        CALM,
        replace(ABOUT, policy=retiring(enabled=False, dry_run=True)),
        "retiring is switched off",
    ),
}


@pytest.mark.parametrize("code", ONE_STATE)
def test_a_state_is_shown_while_it_is_true(code: ConditionCode) -> None:
    snapshot, about, said = ONE_STATE[code]
    found = {state.code: state for state in states(snapshot, about)}
    # An old Xen has both of its faults.
    assert found.keys() - {code} <= {ConditionCode.FREE_FRAMES_UNSAFE}
    assert found[code].text.startswith(said)


def test_states_name_their_page_and_guest() -> None:
    [put_off] = states(replace(CALM, pages=(WAITING_PAGE,)), ABOUT)
    assert (put_off.mfn, put_off.domid, put_off.since) == (0x2000, 7, WAITING_PAGE.since)
    [left] = states(replace(CALM, pages=(replace(LEFT_PAGE, domain=WEB),)), ABOUT)
    assert (left.mfn, left.domid, left.since) == (0x1A2B3, 7, LEFT_PAGE.since)
    [stuck] = states(CALM, replace(ABOUT, stuck={WEB: StuckGuest(since=NOW - 9, text="so")}))
    assert (stuck.mfn, stuck.domid, stuck.since) == (None, 7, NOW - 9)
    [late] = states(CALM, replace(ABOUT, overdue={WEB: "so"}))
    assert late.domid == 7


@pytest.mark.parametrize("needs_person", [True, False])
def test_a_page_whose_migration_waits_is_shown_with_what_it_waits_for(
    *, needs_person: bool
) -> None:
    page = replace(WAITING_PAGE, phase=Phase.RELOCATION, domain=WEB, detail="marked")
    job = JobStatus(
        job="relocation-1",
        kind="relocation",
        domid=7,
        domain_name="web",
        pages=1,
        state="deferred",
        since=NOW,
        put_off=PutOff(reason="so", detail="no room", needs_person=needs_person),
    )
    [state] = states(replace(CALM, pages=(page,), jobs=(job,)), ABOUT)
    assert state.code is (
        ConditionCode.PAGE_UNRESOLVED if needs_person else ConditionCode.PAGE_PUT_OFF
    )
    assert (state.mfn, state.domid, state.since) == (0x2000, 7, page.since)
    assert state.text.endswith(": no room")
    # An uncorrected error of it is an incident already.
    poisoned = replace(page, cause=Cause.UNCORRECTED)
    [state] = states(replace(CALM, pages=(poisoned,), jobs=(job,)), ABOUT)
    assert state.code is ConditionCode.PAGE_PUT_OFF
    others = (replace(job, domid=8), replace(job, kind="exchange"), replace(job, put_off=None))
    assert states(replace(CALM, pages=(page,), jobs=others), ABOUT) == ()


def test_an_operators_page_is_unresolved_like_any_other() -> None:
    page = replace(LEFT_PAGE, cause=Cause.OPERATOR)
    [state] = states(replace(CALM, pages=(page,)), ABOUT)
    assert state.code is ConditionCode.PAGE_UNRESOLVED
    assert "although an operator wants it retired" in state.text


@pytest.mark.parametrize(
    "page",
    [
        replace(LEFT_PAGE, cause=Cause.UNCORRECTED),  # an incident, until it is out of use
        replace(LEFT_PAGE, reason="damaged"),  # exchanged, and so not in use any more
        replace(LEFT_PAGE, phase=Phase.EXCHANGE, reason=""),  # its first try
        replace(LEFT_PAGE, phase=Phase.TRIAGE),
        OFFLINED_PAGE,
    ],
)
def test_other_pages_are_no_state(page: object) -> None:
    assert states(replace(CALM, pages=(page,)), ABOUT) == ()  # type: ignore[arg-type]


def test_no_ramfs_is_needed_where_nothing_is_to_be_exchanged() -> None:
    policy = Policy()
    off = replace(policy, exchange=replace(policy.exchange, enabled=False))
    assert states(CALM, replace(ABOUT, policy=off, exchanges_off="no ramfs")) == ()


def test_saves_of_earlier_daemons_are_passed_on() -> None:
    save = Condition(code=ConditionCode.SAVE_UNFINISHED, text="xl restore", since=3.0)
    assert states(CALM, replace(ABOUT, saves=(save,))) == (save,)


def test_a_rejected_reload_tells_its_problems_and_the_way_out() -> None:
    rejected = config_rejected(("retire.window: found 24", "no such key"), 4.0)
    assert rejected.code is ConditionCode.CONFIG_REJECTED
    assert rejected.since == 4.0
    assert "retire.window: found 24; no such key; correct it" in rejected.text
    assert "systemctl reload pgofflined" in rejected.text


@pytest.fixture
def meta() -> Meta:
    return Meta()


@pytest.fixture
def kept(meta: Meta) -> Callable[[Snapshot], tuple[Condition, ...]]:
    """All conditions as the next process would see them."""

    def conditions(snapshot: Snapshot) -> tuple[Condition, ...]:
        return Attention(meta, ManualClock()).conditions(snapshot, ABOUT)

    return conditions


def test_a_damaged_guest_stays_shown_until_it_is_acknowledged(
    meta: Meta, kept: Callable[[Snapshot], tuple[Condition, ...]]
) -> None:
    attention = Attention(meta, ManualClock())
    attention.note_exchange(
        ExchangeReport(
            domain=WEB,
            results=(
                Exchanged(old=Mfn(1), new=Mfn(2), pfn=Pfn(3), references=1, offlined=True),
                Damaged(old=Mfn(4), new=Mfn(5), pfn=Pfn(6), detail="no frame"),
            ),
            blackout=None,
        )
    )
    [condition] = kept(CALM)
    assert condition.key == (ConditionCode.PAGE_DAMAGED, 4, None)
    assert condition.domid == 7
    assert condition.text.startswith("d7 lost mfn 0x4 (no frame): restart it at once")
    attention.incidents.acknowledge(ConditionCode.PAGE_DAMAGED)
    assert kept(CALM) == ()


def test_records_are_noted_as_lost_when_more_are(
    meta: Meta, kept: Callable[[Snapshot], tuple[Condition, ...]]
) -> None:
    attention = Attention(meta, ManualClock())
    assert attention.conditions(CALM, ABOUT) == ()
    lost = replace(CALM, lost={"native": 2, "undecodable": 1, "incomplete": 0})
    [condition] = attention.conditions(lost, ABOUT)
    assert condition.text.startswith("3 machine-check records were lost or made no sense")
    assert "(2 native, 1 undecodable)" in condition.text
    attention.incidents.acknowledge()
    assert attention.conditions(lost, ABOUT) == ()
    assert kept(CALM) == ()
    more = replace(lost, lost={"native": 3, "undecodable": 1})
    assert len(attention.conditions(more, ABOUT)) == 1
    # A daemon that has lost none yet still shows what the one before has lost.
    assert len(kept(CALM)) == 1


def test_incidents_that_cannot_be_read_are_done_without(
    meta: Meta, caplog: pytest.LogCaptureFixture
) -> None:
    meta.set_meta("incidents", "{")
    with caplog.at_level(logging.ERROR):
        attention = Attention(meta, ManualClock())
    [told] = caplog.messages
    assert told.startswith("cannot read stored incidents; continuing without them: ")
    assert "truncated" in told
    assert attention.conditions(CALM, ABOUT) == ()


def test_an_acknowledged_page_is_known_until_it_is_out_of_use(meta: Meta) -> None:
    attention = Attention(meta, ManualClock())
    left = replace(CALM, pages=(LEFT_PAGE,))
    attention.conditions(left, ABOUT)
    attention.incidents.acknowledge(mfn=LEFT_PAGE.mfn)
    # A new try, which is in vain as well.
    assert (
        attention.conditions(replace(CALM, pages=(replace(LEFT_PAGE, phase=Phase.TRIAGE),)), ABOUT)
        == ()
    )
    [known] = attention.conditions(left, ABOUT)
    assert known.acknowledged
    attention.conditions(replace(CALM, pages=(replace(LEFT_PAGE, phase=Phase.OFFLINED),)), ABOUT)
    [anew] = attention.conditions(left, ABOUT)
    assert not anew.acknowledged


def test_a_guest_that_ended_when_it_was_asked_is_shown_with_what_is_known(
    meta: Meta, kept: Callable[[Snapshot], tuple[Condition, ...]]
) -> None:
    clock = ManualClock()
    Attention(meta, clock).note_exchange(
        ExchangeReport(domain=WEB, results=(), blackout=None, ended="d7 crashed")
    )
    [condition] = kept(CALM)
    assert (condition.code, condition.domid) == (ConditionCode.GUEST_ENDED, 7)
    assert (condition.text, condition.since) == ("d7 crashed", clock.now())


def test_a_job_that_was_not_recovered_is_shown_with_its_guest(
    meta: Meta, kept: Callable[[Snapshot], tuple[Condition, ...]]
) -> None:
    report = RecoveryReport(domain=WEB, outcome=Recovered.STANDS_STILL, detail="d7 is not whole")
    Attention(meta, ManualClock()).note_recovered([report])
    [condition] = kept(CALM)
    assert (condition.code, condition.domid) == (ConditionCode.JOB_NOT_RECOVERED, 7)
    assert condition.text == "d7 is not whole"


def test_a_page_that_xen_has_broken_is_shown_from_when_it_was_seen(
    meta: Meta, kept: Callable[[Snapshot], tuple[Condition, ...]]
) -> None:
    clock = ManualClock()
    Attention(meta, clock).note_broken(Mfn(0x77), "restart d4")
    [condition] = kept(CALM)
    assert (condition.code, condition.mfn) == (ConditionCode.UNCORRECTED_ERROR, 0x77)
    assert condition.since == clock.now()
    assert "restart d4" in condition.text


def test_what_nobody_noted_the_beginning_of_began_now() -> None:
    snapshot, about, _ = ONE_STATE[ConditionCode.DRY_RUN]
    [dry] = states(snapshot, about)
    assert dry.since == NOW
    [late] = states(CALM, replace(ABOUT, overdue={WEB: "so"}))
    assert late.since == NOW


def test_an_amd_host_is_told_that_it_is_blind() -> None:
    version = XenVersion(major=4, minor=17, patch=5)
    about = replace(ABOUT, version=version, vendor=CpuVendor.AMD)
    found = {state.code: state.text for state in states(CALM, about)}
    assert "nothing else looks at those of AMD" in found[ConditionCode.NO_POLLING]


@pytest.mark.parametrize(
    ("cap", "codes"), [(4, [ConditionCode.CAP_REACHED]), (5, []), (3, [ConditionCode.CAP_REACHED])]
)
def test_the_cap_is_reached_with_its_last_page(cap: int, codes: list[ConditionCode]) -> None:
    found = states(replace(CALM, retired_frames=4, cap_frames=cap), ABOUT)
    assert [state.code for state in found] == codes


def test_a_rejected_configuration_is_shown_with_its_time() -> None:
    reload = ReloadStatus(
        successful=False, when=4.0, last_success=1.0, problems=("retire.window: found 24",)
    )
    [rejected] = states(replace(CALM, reload=reload), ABOUT)
    assert (rejected.code, rejected.since) == (ConditionCode.CONFIG_REJECTED, 4.0)
    assert "retire.window: found 24" in rejected.text


def test_a_page_is_told_with_its_reason_where_nothing_more_is_known() -> None:
    for page, told in (
        (LEFT_PAGE, f"although it is failing: {LEFT_PAGE.reason}"),
        (WAITING_PAGE, f"waits for a later try: {WAITING_PAGE.reason}"),
    ):
        [state] = states(replace(CALM, pages=(replace(page, detail=""),)), ABOUT)
        assert state.text.endswith(told)


def test_what_is_no_memory_is_not_called_unresolved() -> None:
    assert states(replace(CALM, pages=(replace(LEFT_PAGE, reason=NOT_RAM),)), ABOUT) == ()


def test_a_policy_is_known_by_twelve_digits_that_change_with_it() -> None:
    digest = policy_digest(Policy())
    assert re.fullmatch(r"[0-9a-f]{12}", digest)
    assert policy_digest(Policy()) == digest
    assert policy_digest(retiring(dry_run=True)) != digest
    # Several settings at once are told apart by every one of them.
    assert policy_digest(retiring(dry_run=True, enabled=False)) != policy_digest(
        retiring(enabled=False)
    )
