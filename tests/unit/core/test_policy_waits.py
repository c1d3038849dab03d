"""Waits and batches that follow from several keys of the policy together."""

from __future__ import annotations

from pgofflined.core.policy import (
    ExchangePolicy,
    Marking,
    Policy,
    RelocationPolicy,
    SourcesPolicy,
    effective,
)


def test_waits_between_tries_are_those_of_their_own_section() -> None:
    exchange = ExchangePolicy(retry_first=1.0, retry_last=3.0, attempts=4).retry
    assert [exchange.delay(failures) for failures in range(1, 5)] == [1.0, 2.0, 3.0, None]
    relocation = RelocationPolicy(retry_first=10.0, retry_last=15.0, attempts=3).retry
    assert [relocation.delay(failures) for failures in range(1, 4)] == [10.0, 15.0, None]


def test_a_source_is_tried_for_ever() -> None:
    sources = SourcesPolicy(retry_first=5.0, retry_last=7.0).retry
    assert [sources.delay(failures) for failures in (1, 2, 10**6)] == [5.0, 7.0, 7.0]


def test_pages_that_are_marked_when_they_are_scrubbed_go_one_by_one() -> None:
    # The first that is left would be given for the second.
    together = ExchangePolicy(max_pages_per_suspend=7)
    assert together.pages_in_one_suspend == 7
    one_by_one = ExchangePolicy(max_pages_per_suspend=7, mark=Marking.AFTER_SCRUB)
    assert one_by_one.pages_in_one_suspend == 1


def test_what_is_not_set_is_shown_as_none() -> None:
    lines = effective(Policy())
    assert "relocation.target = none" in lines
    assert "domains.allow = none" in lines
