"""The queue of migrations, with plain values for every time."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from uuid import UUID

import pytest

from pgofflined.core.domains import DomainIdentity
from pgofflined.core.frames import Domid, Mfn
from pgofflined.core.policy import RelocationPolicy
from pgofflined.core.premigration import Hindrance
from pgofflined.core.relocating import RelocationQueue
from pgofflined.core.schedule import parse_window

NOON = datetime(2025, 3, 5, 12, 0, tzinfo=UTC).timestamp()  # a Wednesday
HOUR = 3600.0
POLICY = RelocationPolicy(target="localhost", retry_first=60.0, retry_last=600.0, attempts=3)


def domain(domid: int) -> DomainIdentity:
    return DomainIdentity(Domid(domid), UUID(int=domid))


def mfns(*numbers: int) -> list[Mfn]:
    return [Mfn(number) for number in numbers]


def queue_of(*domids: int, policy: RelocationPolicy = POLICY) -> RelocationQueue:
    queue = RelocationQueue(policy, UTC)
    for domid in domids:
        assert queue.submit(domain(domid), f"guest{domid}", mfns(domid), NOON) is not None
    return queue


def taken(queue: RelocationQueue, now: float = NOON) -> int:
    job = queue.take(now)
    assert job is not None
    return job.domain.domid


def test_all_pages_of_a_domain_are_one_job() -> None:
    queue = queue_of(1)
    job = queue.submit(domain(1), "guest1", mfns(8, 9), NOON)
    assert job is not None
    assert job.mfns == frozenset({1, 8, 9})
    assert len(queue) == 1


def test_pages_found_during_the_migration_belong_to_it() -> None:
    queue = queue_of(1)
    taken(queue)
    queue.submit(domain(1), "guest1", mfns(8), NOON)
    assert queue.finish(domain(1)).mfns == frozenset({1, 8})
    assert queue.take(NOON) is None


def test_a_later_domain_with_the_same_domid_is_another_job() -> None:
    queue = queue_of(1)
    queue.submit(DomainIdentity(Domid(1), UUID(int=99)), "other", mfns(5), NOON)
    assert len(queue) == 2


def test_one_at_a_time_in_the_order_of_arrival() -> None:
    queue = queue_of(7, 3)
    assert taken(queue) == 7
    assert queue.take(NOON) is None
    assert queue.next_event(NOON) is None
    queue.finish(domain(7))
    assert taken(queue) == 3


def test_as_many_at_once_as_the_policy_says() -> None:
    queue = queue_of(1, 2, 3, policy=RelocationPolicy(target="localhost", parallel=2))
    assert [taken(queue), taken(queue)] == [1, 2]
    assert queue.take(NOON) is None


def test_a_full_queue_takes_no_new_domain_but_more_pages() -> None:
    queue = queue_of(1, policy=RelocationPolicy(target="localhost", max_queued=1))
    assert queue.submit(domain(2), "guest2", mfns(2), NOON) is None
    assert queue.submit(domain(1), "guest1", mfns(3), NOON) is not None


def test_failures_double_the_wait_up_to_the_last_and_then_end() -> None:
    queue = queue_of(1, policy=RelocationPolicy(retry_first=60, retry_last=100, attempts=4))
    now = NOON
    waits = []
    for _ in range(3):
        taken(queue, now)
        queue.started(domain(1))
        job = queue.failed(domain(1), "no", now)
        assert job is not None
        assert queue.take(job.due - 0.5) is None
        waits.append(job.due - now)
        now = job.due
    assert waits == [60, 100, 100]
    taken(queue, now)
    queue.started(domain(1))
    assert queue.failed(domain(1), "no", now) is None
    assert queue.finish(domain(1)).attempts == 4
    assert len(queue) == 0


def test_being_hindered_costs_no_attempt() -> None:
    queue = queue_of(1)
    now = NOON
    waits = []
    for _ in range(6):
        taken(queue, now)
        job = queue.defer(domain(1), Hindrance.NO_FREE_MEMORY, "full", now)
        waits.append(job.due - now)
        now = job.due
    assert waits == [60, 120, 240, 480, 600, 600]
    assert taken(queue, now) == 1
    assert queue.started(domain(1)).attempts == 1


def test_a_hindered_job_lets_the_next_one_go_first() -> None:
    queue = queue_of(1, 2)
    taken(queue)
    queue.defer(domain(1), Hindrance.DOMAIN_BUSY, "paused", NOON)
    assert taken(queue) == 2


@pytest.mark.parametrize("hindrance", [Hindrance.LINK_DOWN, Hindrance.NO_ROUTE])
def test_a_link_that_comes_back_wakes_what_waits_for_it(hindrance: Hindrance) -> None:
    queue = queue_of(1)
    taken(queue)
    queue.defer(domain(1), hindrance, "eth0 has no carrier", NOON)
    assert queue.waits_for_link()
    assert queue.next_event(NOON) == NOON + POLICY.retry_last
    queue.link_changed(NOON + 5)
    due = queue.next_event(NOON + 5)
    assert due is not None
    assert due <= NOON + 7
    queue.link_changed(NOON + 5.5)  # a flapping link does not put it off
    assert queue.next_event(NOON + 5.5) == due


def test_a_link_event_does_not_touch_what_waits_for_memory() -> None:
    queue = queue_of(1)
    taken(queue)
    due = queue.defer(domain(1), Hindrance.NO_FREE_MEMORY, "full", NOON).due
    queue.link_changed(NOON + 1)
    assert not queue.waits_for_link()
    assert queue.next_event(NOON + 1) == due


def windows(text: str) -> RelocationPolicy:
    return RelocationPolicy(target="localhost", maintenance_windows=(parse_window(text),))


def test_outside_the_window_a_job_waits_for_its_opening() -> None:
    queue = queue_of(1, policy=windows("22:00-06:00"))
    assert queue.take(NOON) is None
    assert queue.next_event(NOON) == NOON + 10 * HOUR
    [status] = queue.statuses(NOON)
    assert (status.state, status.next_try) == ("deferred", NOON + 10 * HOUR)
    assert "maintenance window" in status.detail
    assert taken(queue, NOON + 10 * HOUR) == 1


def test_a_window_is_open_after_midnight_too() -> None:
    assert taken(queue_of(1, policy=windows("22:00-06:00")), NOON + 17 * HOUR) == 1
    assert queue_of(1, policy=windows("22:00-06:00")).take(NOON + 18 * HOUR) is None


def test_a_window_of_saturdays_opens_on_saturday() -> None:
    queue = queue_of(1, policy=windows("Sat 01:00-02:00"))
    assert queue.take(NOON) is None
    assert queue.next_event(NOON) == NOON + (12 + 2 * 24 + 1) * HOUR


def test_windows_are_in_local_time() -> None:
    queue = RelocationQueue(windows("22:00-06:00"), timezone(timedelta(hours=2)))
    queue.submit(domain(1), "guest1", mfns(1), NOON)
    assert queue.take(NOON) is None
    assert queue.next_event(NOON) == NOON + 8 * HOUR


def test_an_odd_moment_within_a_window_is_within_it() -> None:
    assert taken(queue_of(1, policy=windows("10:00-14:00")), NOON + 0.123456789) == 1


def test_a_retry_that_falls_out_of_the_window_waits_for_the_next() -> None:
    queue = queue_of(1, policy=windows("12:00-12:01"))
    assert taken(queue) == 1
    queue.started(domain(1))
    job = queue.failed(domain(1), "no", NOON)
    assert job is not None
    assert queue.take(job.due) is None
    assert queue.next_event(job.due) == NOON + 24 * HOUR


def test_another_policy_takes_effect_at_once() -> None:
    queue = queue_of(1, policy=windows("22:00-06:00"))
    assert queue.take(NOON) is None
    queue.set_policy(POLICY, NOON)
    assert queue.next_event(NOON) == NOON
    assert taken(queue) == 1


def test_another_policy_does_not_shorten_the_wait_after_a_failure() -> None:
    queue = queue_of(1)
    taken(queue)
    queue.started(domain(1))
    job = queue.failed(domain(1), "no", NOON)
    assert job is not None
    queue.set_policy(RelocationPolicy(target="elsewhere"), NOON)
    assert queue.next_event(NOON) == job.due


def test_statuses_say_what_each_job_is_at() -> None:
    queue = queue_of(1, 2, 3)
    taken(queue)
    queue.defer(domain(1), Hindrance.DOMAIN_BUSY, "d1 is paused", NOON)
    taken(queue)
    queue.started(domain(2))
    states = {status.domid: status for status in queue.statuses(NOON)}
    assert [states[domid].state for domid in (1, 2, 3)] == ["deferred", "running", "due"]
    assert states[1].detail == "d1 is paused"
    assert states[1].next_try == NOON + 60
    assert states[2].attempts == 1
    assert all(status.kind == "relocation" for status in states.values())


def test_nothing_to_do_means_no_event() -> None:
    assert queue_of().next_event(NOON) is None
