"""The queue of migrations, with plain values for every time."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from uuid import UUID

import pytest

from pgofflined.core.domains import DomainIdentity
from pgofflined.core.frames import Domid, Mfn
from pgofflined.core.policy import RelocationPolicy
from pgofflined.core.premigration import Hindrance
from pgofflined.core.relocating import Instant, RelocationQueue
from pgofflined.core.schedule import parse_window

NOON = datetime(2025, 3, 5, 12, 0, tzinfo=UTC).timestamp()  # a Wednesday
HOUR = 3600.0
DAY = 24 * HOUR
BOOT = 5000.0  # what the steady clock says at noon
LOOK = BOOT + 300  # when what waits is looked at, at the latest
POLICY = RelocationPolicy(target="localhost", retry_first=60.0, retry_last=600.0, attempts=3)


def domain(domid: int) -> DomainIdentity:
    return DomainIdentity(Domid(domid), UUID(int=domid))


def mfns(*numbers: int) -> list[Mfn]:
    return [Mfn(number) for number in numbers]


def taken_at(queue: RelocationQueue, now: Instant) -> int:
    job = queue.take(now)
    assert job is not None
    return job.domain.domid


def queue_of(*domids: int, policy: RelocationPolicy = POLICY) -> RelocationQueue:
    queue = RelocationQueue(policy, UTC)
    for domid in domids:
        assert queue.submit(domain(domid), f"guest{domid}", mfns(domid), at()) is not None
    return queue


def at(seconds: float = 0.0, *, set_by: float = 0.0) -> Instant:
    """So long after noon; the wall clock has been set by so much since."""
    return Instant(wall=NOON + seconds + set_by, steady=BOOT + seconds)


def taken(queue: RelocationQueue, seconds: float = 0.0) -> int:
    job = queue.take(at(seconds))
    assert job is not None
    return job.domain.domid


def test_all_pages_of_a_domain_are_one_job() -> None:
    queue = queue_of(1)
    job = queue.submit(domain(1), "guest1", mfns(8, 9), at())
    assert job is not None
    assert job.mfns == frozenset({1, 8, 9})
    assert len(queue) == 1


def test_pages_found_during_the_migration_belong_to_it() -> None:
    queue = queue_of(1)
    taken(queue)
    queue.submit(domain(1), "guest1", mfns(8), at())
    assert queue.finish(domain(1)).mfns == frozenset({1, 8})
    assert queue.take(at()) is None


def test_a_later_domain_with_the_same_domid_is_another_job() -> None:
    queue = queue_of(1)
    queue.submit(DomainIdentity(Domid(1), UUID(int=99)), "other", mfns(5), at())
    assert len(queue) == 2


def test_one_at_a_time_in_the_order_of_arrival() -> None:
    queue = queue_of(7, 3)
    assert taken(queue) == 7
    assert queue.take(at()) is None
    assert queue.next_event(at()) == LOOK
    queue.finish(domain(7))
    assert taken(queue) == 3


def test_as_many_at_once_as_the_policy_says() -> None:
    queue = queue_of(1, 2, 3, policy=RelocationPolicy(target="localhost", parallel=2))
    assert [taken(queue), taken(queue)] == [1, 2]
    assert queue.take(at()) is None


def test_a_full_queue_takes_no_new_domain_but_more_pages() -> None:
    queue = queue_of(1, policy=RelocationPolicy(target="localhost", max_queued=1))
    assert queue.submit(domain(2), "guest2", mfns(2), at()) is None
    assert queue.submit(domain(1), "guest1", mfns(3), at()) is not None


def test_failures_double_the_wait_up_to_the_last_and_then_end() -> None:
    queue = queue_of(1, policy=RelocationPolicy(retry_first=60, retry_last=100, attempts=4))
    now = 0.0
    waits = []
    for _ in range(3):
        taken(queue, now)
        queue.started(domain(1))
        job = queue.failed(domain(1), "no", at(now))
        assert job is not None
        wait = job.due - at(now).steady
        assert queue.take(at(now + wait - 0.5)) is None
        waits.append(wait)
        now += wait
    assert waits == [60, 100, 100]
    taken(queue, now)
    queue.started(domain(1))
    assert queue.failed(domain(1), "no", at(now)) is None
    assert queue.finish(domain(1)).attempts == 4
    assert len(queue) == 0


def test_being_hindered_costs_no_attempt() -> None:
    queue = queue_of(1)
    now = 0.0
    waits = []
    for _ in range(6):
        taken(queue, now)
        job = queue.defer(domain(1), Hindrance.NO_FREE_MEMORY, "full", at(now))
        waits.append(job.due - at(now).steady)
        now += waits[-1]
    assert waits == [60, 120, 240, 480, 600, 600]
    assert taken(queue, now) == 1
    assert queue.started(domain(1)).attempts == 1


def test_a_hindered_job_lets_the_next_one_go_first() -> None:
    queue = queue_of(1, 2)
    taken(queue)
    queue.defer(domain(1), Hindrance.DOMAIN_BUSY, "paused", at())
    assert taken(queue) == 2


@pytest.mark.parametrize("hindrance", [Hindrance.LINK_DOWN, Hindrance.NO_ROUTE])
def test_a_link_that_comes_back_wakes_what_waits_for_it(hindrance: Hindrance) -> None:
    queue = queue_of(1)
    taken(queue)
    job = queue.defer(domain(1), hindrance, "eth0 has no carrier", at())
    assert queue.waits_for_link()
    assert job.due == at(POLICY.retry_last).steady
    queue.link_changed(at(5))
    due = queue.next_event(at(5))
    assert due is not None
    assert due <= at(7).steady
    queue.link_changed(at(5.5))  # a flapping link does not put it off
    assert queue.next_event(at(5.5)) == due


def test_a_link_event_does_not_touch_what_waits_for_memory() -> None:
    queue = queue_of(1)
    taken(queue)
    due = queue.defer(domain(1), Hindrance.NO_FREE_MEMORY, "full", at()).due
    queue.link_changed(at(1))
    assert not queue.waits_for_link()
    assert queue.next_event(at(1)) == due


def windows(text: str) -> RelocationPolicy:
    return RelocationPolicy(target="localhost", maintenance_windows=(parse_window(text),))


def test_outside_the_window_a_job_waits_for_its_opening() -> None:
    queue = queue_of(1, policy=windows("22:00-06:00"))
    assert queue.take(at()) is None
    assert queue.closed_for(at()) == 10 * HOUR
    [status] = queue.statuses(at())
    assert (status.state, status.next_try) == ("deferred", NOON + 10 * HOUR)
    assert "maintenance window" in status.detail
    assert taken(queue, 10 * HOUR) == 1


def test_a_window_is_open_after_midnight_too() -> None:
    assert taken(queue_of(1, policy=windows("22:00-06:00")), 17 * HOUR) == 1
    assert queue_of(1, policy=windows("22:00-06:00")).take(at(18 * HOUR)) is None


def test_a_window_of_saturdays_opens_on_saturday() -> None:
    queue = queue_of(1, policy=windows("Sat 01:00-02:00"))
    assert queue.take(at()) is None
    assert queue.closed_for(at()) == (12 + 2 * 24 + 1) * HOUR


def test_windows_are_in_local_time() -> None:
    queue = RelocationQueue(windows("22:00-06:00"), timezone(timedelta(hours=2)))
    queue.submit(domain(1), "guest1", mfns(1), at())
    assert queue.take(at()) is None
    assert queue.closed_for(at()) == 8 * HOUR


def test_an_odd_moment_within_a_window_is_within_it() -> None:
    assert taken(queue_of(1, policy=windows("10:00-14:00")), 0.123456789) == 1


def test_a_retry_that_falls_out_of_the_window_waits_for_the_next() -> None:
    queue = queue_of(1, policy=windows("12:00-12:01"))
    assert taken(queue) == 1
    queue.started(domain(1))
    job = queue.failed(domain(1), "no", at())
    assert job is not None
    due = at(job.due - BOOT)
    assert queue.take(due) is None
    [status] = queue.statuses(due)
    assert status.next_try == NOON + DAY


def test_another_policy_takes_effect_at_once() -> None:
    queue = queue_of(1, policy=windows("22:00-06:00"))
    assert queue.take(at()) is None
    queue.set_policy(POLICY, at())
    assert queue.next_event(at()) == BOOT
    assert taken(queue) == 1


def test_another_policy_does_not_shorten_the_wait_after_a_failure() -> None:
    queue = queue_of(1)
    taken(queue)
    queue.started(domain(1))
    job = queue.failed(domain(1), "no", at())
    assert job is not None
    queue.set_policy(RelocationPolicy(target="elsewhere"), at())
    assert queue.job(domain(1)).due == job.due


def test_statuses_say_what_each_job_is_at() -> None:
    queue = queue_of(1, 2, 3)
    taken(queue)
    queue.defer(domain(1), Hindrance.DOMAIN_BUSY, "d1 is paused", at())
    taken(queue)
    queue.started(domain(2))
    states = {status.domid: status for status in queue.statuses(at())}
    assert [states[domid].state for domid in (1, 2, 3)] == ["deferred", "running", "due"]
    assert states[1].detail == "d1 is paused"
    assert states[1].next_try == NOON + 60
    assert states[2].attempts == 1
    assert all(status.kind == "relocation" for status in states.values())


def test_nothing_to_do_means_no_event() -> None:
    assert queue_of().next_event(at()) is None


@pytest.mark.parametrize("set_by", [-DAY, DAY])
def test_a_clock_that_is_set_changes_no_wait_after_a_failure(set_by: float) -> None:
    queue = queue_of(1)
    taken(queue)
    queue.started(domain(1))
    assert queue.failed(domain(1), "no", at()) is not None
    assert queue.take(at(59, set_by=set_by)) is None
    assert queue.next_event(at(59, set_by=set_by)) == at(60).steady
    # People are shown when that is by the clock as it is now.
    [status] = queue.statuses(at(59, set_by=set_by))
    assert (status.state, status.next_try) == ("waiting", at(60, set_by=set_by).wall)
    assert queue.take(at(60, set_by=set_by)) is not None


@pytest.mark.parametrize("set_by", [-DAY, DAY])
def test_a_clock_that_is_set_changes_no_wait_for_what_passes(set_by: float) -> None:
    queue = queue_of(1)
    taken(queue)
    queue.defer(domain(1), Hindrance.DOMAIN_BUSY, "paused", at())
    assert queue.take(at(59, set_by=set_by)) is None
    assert queue.take(at(60, set_by=set_by)) is not None


def test_a_clock_set_into_a_window_opens_it_within_minutes() -> None:
    queue = queue_of(1, policy=windows("22:00-06:00"))
    assert queue.take(at()) is None
    due = queue.next_event(at())
    assert due is not None
    assert due <= at(300).steady
    assert taken_at(queue, at(300, set_by=10 * HOUR)) == 1


def test_a_clock_set_out_of_a_window_closes_it_at_once() -> None:
    queue = queue_of(1, policy=windows("11:00-13:00"))
    later = at(1, set_by=2 * HOUR)
    assert queue.take(later) is None
    [status] = queue.statuses(later)
    assert (status.state, status.next_try) == ("deferred", later.wall + 21 * HOUR - 1)


def test_a_clock_set_back_does_not_have_a_window_waited_for_twice() -> None:
    queue = queue_of(1, policy=windows("22:00-06:00"))
    assert queue.take(at()) is None
    # Set back by an hour, it says ten an hour later.
    assert queue.take(at(10 * HOUR, set_by=-HOUR)) is None
    assert queue.to_look_at(at(11 * HOUR - 60))
    assert queue.next_event(at(11 * HOUR - 60, set_by=-HOUR)) == at(11 * HOUR).steady
    assert taken_at(queue, at(11 * HOUR, set_by=-HOUR)) == 1


def test_what_waits_is_looked_at_every_few_minutes_also_while_another_runs() -> None:
    queue = queue_of(1, 2)
    taken(queue)
    assert queue.to_look_at(at(299)) == []
    assert queue.next_event(at(299)) == LOOK
    assert [job.domain.domid for job in queue.to_look_at(at(300))] == [2]
    assert queue.to_look_at(at(300)) == []
    assert queue.next_event(at(300)) == LOOK + 300
    queue.look_again(at(310))
    assert [job.domain.domid for job in queue.to_look_at(at(310))] == [2]


def test_another_policy_has_everything_looked_at() -> None:
    queue = queue_of(1)
    taken(queue)
    queue.started(domain(1))
    assert queue.failed(domain(1), "no", at()) is not None
    queue.set_policy(POLICY, at(1))
    assert [job.domain.domid for job in queue.to_look_at(at(1))] == [1]


def test_a_job_with_nothing_to_wait_for_gets_a_slot_outside_the_windows() -> None:
    queue = queue_of(1, 2, policy=windows("22:00-06:00"))
    assert queue.take(at()) is None
    queue.hurry(domain(2), at())
    queue.hurry(domain(9), at())  # has ended meanwhile
    assert queue.next_event(at()) == BOOT
    assert taken(queue) == 2
    # It had, after all.
    queue.defer(domain(2), Hindrance.CANNOT_ASK_XEN, "no", at())
    assert queue.take(at(60)) is None


def test_a_job_with_nothing_to_wait_for_waits_for_no_other_try() -> None:
    queue = queue_of(1)
    taken(queue)
    queue.started(domain(1))
    assert queue.failed(domain(1), "no", at()) is not None
    queue.hurry(domain(1), at(1))
    assert taken(queue, 1) == 1
    queue.hurry(domain(1), at(2))  # it has begun: nothing to hurry
    assert not queue.job(domain(1)).is_over


def test_what_hindered_a_job_before_a_window_closed_does_not_count_in_the_next() -> None:
    queue = queue_of(1, policy=replace(POLICY, maintenance_windows=(parse_window("11:00-13:00"),)))
    for now in (0.0, 60.0, 180.0):
        taken(queue, now)
        queue.defer(domain(1), Hindrance.DOMAIN_BUSY, "paused", at(now))
    assert queue.take(at(HOUR)) is None
    taken(queue, 23 * HOUR)
    job = queue.defer(domain(1), Hindrance.DOMAIN_BUSY, "paused", at(23 * HOUR))
    assert job.due == at(23 * HOUR + 60).steady


def test_jobs_are_numbered_in_the_order_in_which_they_came() -> None:
    queue = queue_of(5, 6)
    queue.finish(domain(5))
    assert queue.submit(domain(7), "guest7", mfns(7), at()) is not None
    assert [status.job for status in queue.statuses(at())] == ["relocation-2", "relocation-3"]


def test_another_policy_lets_what_was_hindered_begin_anew() -> None:
    queue = queue_of(1)
    for now in (0.0, 60.0):
        taken(queue, now)
        queue.defer(domain(1), Hindrance.NO_FREE_MEMORY, "full", at(now))
    queue.set_policy(POLICY, at(70))
    job = queue.job(domain(1))
    assert (job.state(at(70)), job.due, job.deferrals) == ("due", at(70).steady, 0)
    assert job.hindrance is None
    [status] = queue.statuses(at(70))
    assert status.next_try is None


def test_another_policy_lets_a_save_fail_as_often_as_at_first() -> None:
    queue = queue_of(1)
    for _ in range(2):
        taken(queue, 1000)
        queue.failed(domain(1), "no", at(), stood_still=True)
    assert queue.may_not_be_saved(domain(1))
    queue.set_policy(POLICY, at())
    assert not queue.may_not_be_saved(domain(1))


def test_a_guest_that_stood_still_for_nothing_twice_is_not_saved_again() -> None:
    queue = queue_of(1, 2)
    assert not queue.may_not_be_saved(domain(1))
    taken(queue)
    queue.started(domain(1))
    assert queue.failed(domain(1), "no", at(), stood_still=True) is not None
    assert not queue.may_not_be_saved(domain(1))
    queue.hurry(domain(1), at())
    taken(queue)
    queue.started(domain(1))
    assert queue.failed(domain(1), "no", at(), stood_still=True) is None
    assert queue.may_not_be_saved(domain(1))
    assert not queue.may_not_be_saved(domain(2))
    # Also not for pages that it gets later.
    queue.finish(domain(1))
    assert queue.may_not_be_saved(domain(1))


def test_a_try_that_failed_says_why_until_the_next_begins() -> None:
    queue = queue_of(1)
    taken(queue)
    queue.started(domain(1))
    assert queue.failed(domain(1), "xl said no", at()) is not None
    [status] = queue.statuses(at())
    assert status.detail == "xl said no"
    taken(queue, 60)
    [status] = queue.statuses(at(60))
    assert (status.state, status.detail) == ("running", "")
    queue.note(domain(1), "20 % are there")
    [status] = queue.statuses(at(61))
    assert (status.state, status.detail, status.next_try) == ("running", "20 % are there", None)


def test_a_job_that_runs_is_hindered_no_more() -> None:
    queue = queue_of(1)
    taken(queue)
    queue.defer(domain(1), Hindrance.LINK_DOWN, "eth0 is down", at())
    queue.link_changed(at(5))
    taken(queue, 6)
    queue.started(domain(1))
    assert queue.failed(domain(1), "no", at(6)) is not None
    [status] = queue.statuses(at(6))
    assert status.state == "waiting"
    assert not queue.waits_for_link()


def test_a_migration_that_starts_ends_the_count_of_what_hindered_it() -> None:
    queue = queue_of(1)
    for now in (0.0, 60.0):
        taken(queue, now)
        queue.defer(domain(1), Hindrance.DOMAIN_BUSY, "paused", at(now))
    taken(queue, 180)
    queue.started(domain(1))
    assert queue.failed(domain(1), "no", at(180)) is not None
    taken(queue, 240)
    assert queue.defer(domain(1), Hindrance.DOMAIN_BUSY, "paused", at(240)).due == at(300).steady


def test_a_window_that_closes_while_a_job_is_looked_at_lets_it_wait_for_the_next() -> None:
    queue = queue_of(1, policy=windows("11:00-13:00"))
    for _ in range(2):
        taken(queue)
        queue.defer(domain(1), Hindrance.DOMAIN_BUSY, "paused", at(-60))
    taken(queue, 3000)
    queue.defer(domain(1), Hindrance.OUTSIDE_WINDOW, "", at(HOUR))
    [status] = queue.statuses(at(HOUR))
    assert (status.state, status.next_try) == ("deferred", NOON + 23 * HOUR)
    assert "maintenance window" in status.detail
    assert queue.job(domain(1)).due == at(HOUR).steady


def test_a_window_that_opens_in_less_than_a_second_is_not_put_off() -> None:
    queue = queue_of(1, policy=windows("22:00-06:00"))
    assert queue.take(at(10 * HOUR - 0.5)) is None
    assert queue.closed_for(at(10 * HOUR - 0.5)) == pytest.approx(0.5)
    assert taken(queue, 10 * HOUR) == 1


def test_a_try_in_less_than_a_second_is_shown_as_that() -> None:
    queue = queue_of(1)
    taken(queue)
    queue.started(domain(1))
    assert queue.failed(domain(1), "no", at()) is not None
    [status] = queue.statuses(at(59.5))
    assert status.next_try == NOON + 60


def test_what_is_looked_at_for_its_end_is_not_said_to_wait_for_a_window() -> None:
    queue = queue_of(1, 2, 3, policy=windows("22:00-06:00"))
    queue.hurry(domain(2), at())
    queue.hurry(domain(3), at())
    assert taken(queue) == 2
    assert [status.state for status in queue.statuses(at())] == ["deferred", "running", "due"]


def saving_queue() -> RelocationQueue:
    """A migration, a save and a migration, for two at a time."""
    queue = RelocationQueue(replace(POLICY, parallel=2), UTC)
    for domid in (1, 2, 3):
        queue.submit(domain(domid), f"guest{domid}", mfns(domid), at(), by_saving=domid == 2)
    return queue


def test_a_save_waits_until_it_is_alone_and_nothing_overtakes_it() -> None:
    queue = saving_queue()
    assert taken(queue) == 1
    assert queue.take(at()) is None
    assert queue.next_event(at()) == LOOK
    queue.finish(domain(1))
    assert queue.next_event(at()) == BOOT
    assert taken(queue) == 2
    assert queue.take(at()) is None
    queue.finish(domain(2))
    assert taken(queue) == 3


def test_a_job_that_is_due_outside_the_windows_keeps_nobody_busy() -> None:
    queue = queue_of(1, policy=windows("22:00-06:00"))
    assert queue.next_event(at()) == LOOK
    assert queue.take(at()) is None
    assert queue.next_event(at()) == LOOK
    # At the latest look before it opens, the opening itself is waited for.
    late = at(10 * HOUR - 60)
    assert queue.to_look_at(late)
    assert queue.next_event(late) == at(10 * HOUR).steady
