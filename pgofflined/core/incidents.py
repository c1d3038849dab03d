"""What has happened and stays until it is resolved, and what a person has acknowledged."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from itertools import repeat
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
    kinds: list[str] = []


class _Stored(msgspec.Struct, frozen=True, kw_only=True):
    incidents: list[_StoredCondition]
    acknowledged: list[tuple[str, int | None, int | None]]
    acknowledged_kinds: list[str] = []


class Incidents:
    """Incidents by key, and the keys of states that were acknowledged.  For one thread.

    ``changed`` is called after each change that is to outlive the process.  Beyond
    ``MAX_INCIDENTS`` those are forgotten that were acknowledged, then the least urgent, the oldest
    first.
    """

    def __init__(self, changed: Callable[[], None] = lambda: None) -> None:
        self._changed = changed
        self._incidents: dict[Key, Condition] = {}
        # The kinds of each that were told since it was first noted.
        self._kinds: dict[Key, frozenset[str]] = {}
        self._states: tuple[Condition, ...] = ()
        # Of which kind a state was when it was acknowledged; None where that is not known.
        self._known: dict[Key, str | None] = {}

    def note(self, condition: Condition) -> None:
        """Something has happened.

        The same again keeps the time of the first, and stays acknowledged unless it is of a kind
        that was not told before; what has no kind says something new with another text.
        """
        key = condition.key
        kinds = self._kinds.get(key, frozenset())
        earlier = self._incidents.get(key)
        if earlier is not None:
            is_same = earlier.text == condition.text
            is_known = condition.kind in kinds if kinds and condition.kind else is_same
            if is_known and (is_same or earlier.acknowledged):
                return
            if not earlier.acknowledged:
                condition = replace(condition, since=earlier.since)
        self._incidents[key] = condition
        if condition.kind:
            self._kinds[key] = kinds | {condition.kind}
        while len(self._incidents) > MAX_INCIDENTS:
            self._forget(self._least().key)
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
            self._forget(condition.key)
        if gone:
            self._changed()
        return gone

    def with_states(
        self, states: Iterable[Condition], *, open_pages: Collection[Mfn] = ()
    ) -> tuple[Condition, ...]:
        """All conditions, the most urgent first; ``states`` are those that are true now.

        A state keeps the earliest time that was given for it.  Once it has ended, or is of another
        kind, it is no longer acknowledged.  That of a page among ``open_pages`` has not ended: a
        later try may bring it back.
        """
        earlier = {state.key: state.since for state in self._states}
        self._states = tuple(
            replace(
                state,
                since=min(state.since, earlier.get(state.key, state.since)),
                acknowledged=self._known.get(state.key, _NOT_KNOWN) in (None, state.kind),
            )
            for state in states
        )
        present = {state.key: state for state in self._states}
        known = {
            key: kind if key not in present else present[key].kind
            for key, kind in self._known.items()
            if (present[key].acknowledged if key in present else key[1] in open_pages)
        }
        if known != self._known:
            self._known = known
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
        known = dict(sorted(self._known.items(), key=repr))
        return msgspec.json.encode(
            _Stored(
                incidents=[
                    _stored(condition, self._kinds.get(key, frozenset()))
                    for key, condition in self._incidents.items()
                ],
                acknowledged=[*known],
                acknowledged_kinds=[kind or "" for kind in known.values()],
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
        for one in stored.incidents:
            if one.code in _CODES:
                condition = _restored(one)
                self._incidents[condition.key] = condition
                if one.kinds:
                    self._kinds[condition.key] = frozenset(one.kinds)
        # An earlier version has not stored the kinds.
        kinds = stored.acknowledged_kinds
        told = kinds if len(kinds) == len(stored.acknowledged) else repeat(None)
        self._known |= {
            (ConditionCode(code), _mfn(mfn), _domid(domid)): kind
            for (code, mfn, domid), kind in zip(stored.acknowledged, told, strict=False)
            if code in _CODES
        }

    def _acknowledge_one(self, condition: Condition) -> None:
        key = condition.key
        if key not in self._incidents:
            self._known[key] = condition.kind
        elif condition.ends_by_itself:
            self._incidents[key] = replace(condition, acknowledged=True)
        else:
            self._forget(key)

    def _forget(self, key: Key) -> None:
        del self._incidents[key]
        self._kinds.pop(key, None)

    def _least(self) -> Condition:
        def importance(condition: Condition) -> tuple[bool, int, float]:
            _, rank, *_ = by_urgency(condition)
            return not condition.acknowledged, -rank, condition.since

        return min(self._incidents.values(), key=importance)


# What no state has for its kind.
_NOT_KNOWN: Final = "\n"
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


def _stored(condition: Condition, kinds: Iterable[str]) -> _StoredCondition:
    return _StoredCondition(
        code=condition.code.value,
        # Names that were no UTF-8 carry lone surrogates, which JSON cannot hold.
        text=condition.text.encode("utf-8", "backslashreplace").decode(),
        since=condition.since,
        mfn=condition.mfn,
        domid=condition.domid,
        acknowledged=condition.acknowledged,
        kinds=sorted(kinds),
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
