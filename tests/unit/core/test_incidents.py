"""Incidents stay until they are resolved or acknowledged; states end by themselves."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pgofflined.core.conditions import Condition, ConditionCode, Severity
from pgofflined.core.frames import Domid, Mfn
from pgofflined.core.incidents import MAX_INCIDENTS, Incidents

ERROR = ConditionCode.UNCORRECTED_ERROR


class Kept(Incidents):
    """Counts what would be stored."""

    def __init__(self) -> None:
        self.stored = 0
        super().__init__(self._count)

    def _count(self) -> None:
        self.stored += 1

    def all(self) -> tuple[Condition, ...]:
        return self.with_states(())


def condition(
    code: ConditionCode,
    mfn: int | None = None,
    *,
    domid: int | None = None,
    since: float = 1.0,
    text: str = "so",
) -> Condition:
    return Condition(
        code=code,
        text=text,
        since=since,
        mfn=None if mfn is None else Mfn(mfn),
        domid=None if domid is None else Domid(domid),
    )


@pytest.fixture
def incidents() -> Kept:
    return Kept()


def test_what_has_happened_stays_until_its_cause_is_gone(incidents: Kept) -> None:
    first, second = condition(ERROR, 1), condition(ERROR, 2)
    incidents.note(first)
    incidents.note(second)
    assert incidents.all() == (first, second)
    assert incidents.resolve(ERROR, mfn=Mfn(1)) == (first,)
    assert incidents.stored == 3
    assert incidents.resolve(ERROR, mfn=Mfn(1)) == ()
    assert incidents.all() == (second,)
    assert incidents.stored == 3


def test_only_what_is_meant_is_resolved(incidents: Kept) -> None:
    stuck = condition(ConditionCode.JOB_NOT_RECOVERED, domid=7)
    ended = condition(ConditionCode.GUEST_ENDED, domid=7)
    page = condition(ERROR, 1, domid=8)
    for one in (stuck, ended, page):
        incidents.note(one)
    assert incidents.resolve(ERROR, mfn=Mfn(2)) == ()
    assert incidents.resolve(ConditionCode.GUEST_ENDED, domid=Domid(8)) == ()
    assert incidents.resolve(domid=Domid(7)) == (stuck, ended)
    assert incidents.all() == (page,)


def test_the_same_again_keeps_its_time_and_tells_the_latest(incidents: Kept) -> None:
    incidents.note(condition(ERROR, 1, since=1.0, text="first"))
    incidents.note(condition(ERROR, 1, since=9.0, text="second"))
    [one] = incidents.all()
    assert (one.since, one.text) == (1.0, "second")
    before = incidents.stored
    incidents.note(condition(ERROR, 1, since=10.0, text="second"))
    assert incidents.stored == before


def test_an_acknowledged_page_stays_known_while_nothing_new_is_said(incidents: Kept) -> None:
    incidents.note(condition(ERROR, 1, text="scrubbed over it"))
    [done] = incidents.acknowledge(ERROR).done
    assert done.mfn == 1
    [known] = incidents.all()
    assert known.acknowledged
    assert not known.counts
    incidents.note(condition(ERROR, 1, since=8.0, text="scrubbed over it"))
    assert incidents.all() == (known,)
    incidents.note(condition(ERROR, 1, since=9.0, text="it was consumed"))
    [anew] = incidents.all()
    assert anew.counts
    assert anew.since == 9.0


def error_of(kind: str, text: str = "", *, since: float = 1.0) -> Condition:
    return replace(condition(ERROR, 1, since=since, text=text or kind), kind=kind)


def test_what_was_acknowledged_is_each_kind_that_was_told_whatever_its_text(
    incidents: Kept,
) -> None:
    for one in (error_of("found"), error_of("scrubbed")):
        incidents.note(one)
    incidents.acknowledge()
    stored = incidents.stored
    for _ in range(2):
        for one in (error_of("found", "elsewhere in the page"), error_of("scrubbed")):
            incidents.note(one)
            assert [known.acknowledged for known in incidents.all()] == [True]
    assert incidents.stored == stored
    incidents.note(error_of("acted", since=5.0))
    [anew] = incidents.all()
    assert (anew.counts, anew.since) == (True, 5.0)
    # The next acknowledgement is of all three.
    incidents.acknowledge()
    again = Incidents()
    again.load(incidents.dump())
    for kind in ("found", "scrubbed", "acted"):
        again.note(error_of(kind, "once more"))
        assert [known.acknowledged for known in again.with_states(())] == [True]


def test_what_has_come_to_its_end_and_comes_back_is_told_whatever_its_kind(
    incidents: Kept,
) -> None:
    incidents.note(error_of("found"))
    incidents.acknowledge()
    incidents.resolve(mfn=Mfn(1))
    incidents.note(error_of("found"))
    assert [one.counts for one in incidents.all()] == [True]


def test_a_state_of_another_kind_is_not_acknowledged(incidents: Kept) -> None:
    def page(kind: str) -> Condition:
        return replace(condition(ConditionCode.PAGE_UNRESOLVED, 1), kind=kind)

    incidents.with_states([page("denied")])
    incidents.acknowledge()
    again = Incidents()
    again.load(incidents.dump())
    for kept in (incidents, again):
        kept.with_states([], open_pages={Mfn(1)})
        assert [one.acknowledged for one in kept.with_states([page("denied")])] == [True]
        assert [one.acknowledged for one in kept.with_states([page("granted")])] == [False]
        assert [one.acknowledged for one in kept.with_states([page("denied")])] == [False]


def test_what_an_earlier_version_has_acknowledged_stays_so(incidents: Kept) -> None:
    incidents.load(
        '{"incidents": [{"code": "uncorrected_error", "text": "so", "since": 1.0, "mfn": 1, '
        '"acknowledged": true}], "acknowledged": [["page_unresolved", 2, null]]}'
    )
    incidents.note(error_of("found", "so"))
    page = replace(condition(ConditionCode.PAGE_UNRESOLVED, 2), kind="denied")
    assert [one.acknowledged for one in incidents.with_states([page])] == [True, True]
    other = replace(page, kind="granted")
    assert [one.acknowledged for one in incidents.with_states([other])] == [False, True]


@pytest.mark.parametrize(
    "code",
    [
        ConditionCode.RECORDS_LOST,
        ConditionCode.GUEST_ENDED,
        ConditionCode.PAGE_DAMAGED,
        ConditionCode.JOB_NOT_RECOVERED,
        ERROR,  # of a page that is not known
    ],
)
def test_what_nothing_else_ends_goes_when_it_is_acknowledged(
    incidents: Kept, code: ConditionCode
) -> None:
    incidents.note(condition(code))
    assert incidents.acknowledge().done == (condition(code),)
    assert incidents.all() == ()
    assert incidents.acknowledge().done == ()


def test_a_state_is_shown_while_it_is_true_and_keeps_its_time(incidents: Kept) -> None:
    cap = condition(ConditionCode.CAP_REACHED, since=5.0)
    assert incidents.with_states([cap]) == (cap,)
    later = condition(ConditionCode.CAP_REACHED, since=8.0)
    assert incidents.with_states([later]) == (cap,)
    assert incidents.with_states([]) == ()
    assert incidents.with_states([later]) == (later,)


def test_an_acknowledged_state_is_forgotten_when_it_ends(incidents: Kept) -> None:
    cap = condition(ConditionCode.CAP_REACHED)
    incidents.with_states([cap])
    assert incidents.acknowledge(ConditionCode.CAP_REACHED).done == (cap,)
    [known] = incidents.with_states([cap])
    assert known.acknowledged
    assert incidents.acknowledge().done == ()
    incidents.with_states([])
    assert incidents.with_states([cap]) == (cap,)


def test_a_page_that_is_tried_again_in_vain_stays_acknowledged(incidents: Kept) -> None:
    page = condition(ConditionCode.PAGE_UNRESOLVED, 1)
    incidents.with_states([page])
    incidents.acknowledge(mfn=Mfn(1))
    incidents.with_states([], open_pages={Mfn(1)})
    [known] = incidents.with_states([page])
    assert known.acknowledged
    incidents.with_states([], open_pages={Mfn(2)})
    assert incidents.with_states([page]) == (page,)


def test_what_cannot_be_acknowledged_is_given_back(incidents: Kept) -> None:
    stuck = condition(ConditionCode.GUEST_STUCK, domid=7)
    cap = condition(ConditionCode.CAP_REACHED)
    incidents.with_states([stuck, cap])
    answer = incidents.acknowledge()
    assert (answer.done, answer.kept) == ((cap,), (stuck,))
    assert [one.acknowledged for one in incidents.with_states([stuck, cap])] == [False, True]


def test_two_of_one_guests_number_are_both_shown(incidents: Kept) -> None:
    one, two = (condition(ConditionCode.SAVE_UNFINISHED, domid=7, text=text) for text in "ab")
    assert incidents.with_states([one, two]) == (one, two)


def test_there_is_a_bound_and_the_least_important_go_first(incidents: Kept) -> None:
    known = condition(ERROR, 0, since=99.0)
    incidents.note(known)
    incidents.acknowledge(mfn=Mfn(0))
    note = condition(ConditionCode.PAGE_PUT_OFF, 1, since=98.0)
    warnings = [condition(ConditionCode.PAGE_UNRESOLVED, mfn, since=97.0) for mfn in (2, 3)]
    oldest = condition(ConditionCode.RECORDS_LOST, since=96.0)
    for one in (note, *warnings, oldest):
        incidents.note(one)
    assert note.severity is Severity.INFO

    def with_more(number: int) -> set[Condition]:
        incidents.note(condition(ERROR, 1000 + number, since=float(number)))
        return set(incidents.all())

    for number in range(MAX_INCIDENTS - 5):
        with_more(number)
    assert len(incidents.all()) == MAX_INCIDENTS
    assert not any(one.mfn == 0 for one in with_more(1000))
    assert note not in with_more(1001)
    left = with_more(1002)
    assert oldest not in left
    assert left >= set(warnings)
    assert not with_more(1003) & {warnings[0]}
    assert not with_more(1004) & {warnings[1]}
    assert not any(one.mfn == 1000 for one in with_more(1005))


def test_what_is_kept_is_read_by_the_next_process(incidents: Kept) -> None:
    incidents.note(condition(ERROR, 1, domid=3, text="caf\udce9"))
    incidents.note(condition(ERROR, 2))
    cap = condition(ConditionCode.CAP_REACHED)
    incidents.with_states([cap])
    incidents.acknowledge(ConditionCode.CAP_REACHED)
    incidents.acknowledge(mfn=Mfn(2))
    again = Incidents()
    again.load(incidents.dump())
    found = {(one.code, one.mfn): one for one in again.with_states([cap])}
    assert found[ERROR, Mfn(1)] == condition(ERROR, 1, domid=3, text="caf\\udce9")
    assert found[ERROR, Mfn(2)].acknowledged
    assert found[ConditionCode.CAP_REACHED, None].acknowledged


def test_what_is_read_is_added_to_what_is_known(incidents: Kept) -> None:
    damaged, ended = (
        condition(ConditionCode.PAGE_DAMAGED, 1, domid=3),
        condition(ConditionCode.GUEST_ENDED, domid=4),
    )
    state = condition(ConditionCode.EXCHANGES_OFF)
    late, cap = (
        condition(ConditionCode.PAGE_UNRESOLVED, 2),
        condition(ConditionCode.CAP_REACHED, domid=5),
    )
    incidents.with_states([late, cap])
    for one in (late, cap):
        incidents.acknowledge(one.code)
    incidents.note(damaged)
    again = Incidents()
    again.note(ended)
    again.with_states([state])
    again.acknowledge(state.code)
    again.load(incidents.dump())
    found = {one.code: one.acknowledged for one in again.with_states([state, late, cap])}
    assert found == {
        ConditionCode.PAGE_DAMAGED: False,
        ConditionCode.GUEST_ENDED: False,
        ConditionCode.EXCHANGES_OFF: True,
        ConditionCode.PAGE_UNRESOLVED: True,
        ConditionCode.CAP_REACHED: True,
    }


def test_what_is_acknowledged_of_a_page_and_of_a_guest_is_kept_together(incidents: Kept) -> None:
    code = ConditionCode.PAGE_UNRESOLVED
    both = condition(code, 2), condition(code, domid=5)
    incidents.with_states(both)
    assert incidents.acknowledge(code).done == both
    again = Incidents()
    again.load(incidents.dump())
    assert [one.acknowledged for one in again.with_states(both)] == [True, True]


def test_only_what_is_of_the_guest_is_acknowledged(incidents: Kept) -> None:
    for domid in (7, 8):
        incidents.note(condition(ConditionCode.GUEST_ENDED, domid=domid))
    [done] = incidents.acknowledge(domid=Domid(8)).done
    assert done.domid == 8
    assert [one.domid for one in incidents.all()] == [7]


def test_codes_of_another_version_are_left_out(incidents: Kept) -> None:
    incidents.load(
        '{"incidents": [{"code": "sunspots", "text": "", "since": 1.0}, '
        '{"code": "records_lost", "text": "so", "since": 1.0}], '
        '"acknowledged": [["sunspots", null, null]]}'
    )
    assert incidents.all() == (condition(ConditionCode.RECORDS_LOST),)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "truncated"),
        ("[]", "Expected `object`"),
        ('{"incidents": 3}', r"Expected `array`.*\$\.incidents"),
        ("\udce9", r"surrogates|UTF-8|utf-8"),
    ],
)
def test_what_makes_no_sense_is_told(incidents: Kept, text: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        incidents.load(text)
    assert incidents.all() == ()
