"""What has happened and stays until it is resolved, and what a person has acknowledged."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from typing import Final

import msgspec

from pgofflined.core.conditions import Condition, ConditionCode, Key, by_urgency
from pgofflined.core.frames import Domid, Mfn

# A module that gives uncorrected errors by the thousand must not fill memory and the store.
MAX_INCIDENTS: Final = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Acknowledged:
    """``done`` are acknowledged now; ``kept`` were meant as well, but cannot be."""

    done: tuple[Condition, ...]
    kept: tuple[Condition, ...]


class _StoredCondition(msgspec.Struct, frozen=True, kw_only=True):
    code: str
    text: str
    since: float
    mfn: int | None = None
    domid: int | None = None
    acknowledged: bool = False


class _Stored(msgspec.Struct, frozen=True, kw_only=True):
    incidents: list[_StoredCondition]
    acknowledged: list[tuple[str, int | None, int | None]]


class Incidents:
    """Incidents by key, and the keys of states that were acknowledged.  For one thread.

    ``changed`` is called after each change that is to outlive the process.  Beyond
    ``MAX_INCIDENTS`` those are forgotten that were acknowledged, then the least urgent, the oldest
    first.
    """

    def __init__(self, changed: Callable[[], None] = lambda: None) -> None:
        self._changed = changed
        self._incidents: dict[Key, Condition] = {}
        self._states: tuple[Condition, ...] = ()
        self._known: set[Key] = set()

    def note(self, condition: Condition) -> None:
        """Something has happened.

        The same again keeps the time of the first, and stays acknowledged unless it says
        something new.
        """
        earlier = self._incidents.get(condition.key)
        if earlier is not None:
            if earlier.text == condition.text:
                return
            if not earlier.acknowledged:
                condition = replace(condition, since=earlier.since)
        self._incidents[condition.key] = condition
        while len(self._incidents) > MAX_INCIDENTS:
            del self._incidents[self._least().key]
        self._changed()

    def resolve(
        self,
        code: ConditionCode | None = None,
        *,
        mfn: Mfn | None = None,
        domid: Domid | None = None,
    ) -> tuple[Condition, ...]:
        """Forget the incidents of this code, page and guest: their cause is gone."""
        gone = tuple(_matching(self._incidents.values(), code, mfn, domid))
        for condition in gone:
            del self._incidents[condition.key]
        if gone:
            self._changed()
        return gone

    def with_states(
        self, states: Iterable[Condition], *, open_pages: Collection[Mfn] = ()
    ) -> tuple[Condition, ...]:
        """All conditions, the most urgent first; ``states`` are those that are true now.

        A state keeps the earliest time that was given for it.  Once it has ended it is no longer
        acknowledged, unless its page is among ``open_pages``: a later try may bring it back.
        """
        earlier = {state.key: state.since for state in self._states}
        self._states = tuple(
            replace(
                state,
                since=min(state.since, earlier.get(state.key, state.since)),
                acknowledged=state.key in self._known,
            )
            for state in states
        )
        present = {state.key for state in self._states}
        ended = {key for key in self._known - present if key[1] not in open_pages}
        if ended:
            self._known -= ended
            self._changed()
        return tuple(sorted((*self._states, *self._incidents.values()), key=by_urgency))

    def acknowledge(
        self,
        code: ConditionCode | None = None,
        *,
        mfn: Mfn | None = None,
        domid: Domid | None = None,
    ) -> Acknowledged:
        """Note that a person knows of the conditions of this code, page and guest.

        States are those of the last ``with_states``.
        """
        every = (*self._states, *self._incidents.values())
        meant = [one for one in _matching(every, code, mfn, domid) if not one.acknowledged]
        done = tuple(one for one in meant if one.code.can_be_acknowledged)
        for condition in done:
            self._acknowledge_one(condition)
        if done:
            self._changed()
        kept = tuple(one for one in meant if not one.code.can_be_acknowledged)
        return Acknowledged(done=done, kept=kept)

    def dump(self) -> str:
        """What is to outlive the process, as JSON."""
        return msgspec.json.encode(
            _Stored(
                incidents=[_stored(condition) for condition in self._incidents.values()],
                acknowledged=sorted(self._known, key=repr),
            )
        ).decode()

    def load(self, text: str) -> None:
        """Take over what another process has dumped.

        Codes that are not known here are left out.  Raises ValueError for anything else.
        """
        try:
            stored = msgspec.json.decode(text, type=_Stored)
        except msgspec.MsgspecError as error:
            raise ValueError(str(error)) from None
        found = (_restored(one) for one in stored.incidents if one.code in _CODES)
        self._incidents |= {condition.key: condition for condition in found}
        self._known |= {
            (ConditionCode(code), _mfn(mfn), _domid(domid))
            for code, mfn, domid in stored.acknowledged
            if code in _CODES
        }

    def _acknowledge_one(self, condition: Condition) -> None:
        key = condition.key
        if key not in self._incidents:
            self._known.add(key)
        elif condition.ends_by_itself:
            self._incidents[key] = replace(condition, acknowledged=True)
        else:
            del self._incidents[key]

    def _least(self) -> Condition:
        def importance(condition: Condition) -> tuple[bool, int, float]:
            _, rank, *_ = by_urgency(condition)
            return not condition.acknowledged, -rank, condition.since

        return min(self._incidents.values(), key=importance)


_CODES: Final = frozenset(code.value for code in ConditionCode)


def _matching(
    conditions: Iterable[Condition],
    code: ConditionCode | None,
    mfn: Mfn | None,
    domid: Domid | None,
) -> Iterable[Condition]:
    for condition in conditions:
        if (
            code in (None, condition.code)
            and mfn in (None, condition.mfn)
            and domid in (None, condition.domid)
        ):
            yield condition


def _stored(condition: Condition) -> _StoredCondition:
    return _StoredCondition(
        code=condition.code.value,
        # Names that were no UTF-8 carry lone surrogates, which JSON cannot hold.
        text=condition.text.encode("utf-8", "backslashreplace").decode(),
        since=condition.since,
        mfn=condition.mfn,
        domid=condition.domid,
        acknowledged=condition.acknowledged,
    )


def _restored(stored: _StoredCondition) -> Condition:
    return Condition(
        code=ConditionCode(stored.code),
        text=stored.text,
        since=stored.since,
        mfn=_mfn(stored.mfn),
        domid=_domid(stored.domid),
        acknowledged=stored.acknowledged,
    )


def _mfn(number: int | None) -> Mfn | None:
    return None if number is None else Mfn(number)


def _domid(number: int | None) -> Domid | None:
    return None if number is None else Domid(number)
