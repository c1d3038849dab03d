"""Looks once more, when the guest stands still, at what was found while it ran.

Few frames have to be read for that, however large the guest is: the page tables that hold the
entries, the p2m slots and the pages themselves.
"""

from __future__ import annotations

from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np

from pgofflined.core.errors import PortError
from pgofflined.core.frames import Domid, Mfn
from pgofflined.core.moves import Group, among, same_mapping
from pgofflined.core.outcomes import Refusal, RefusalReason
from pgofflined.core.pages import (
    PFINFO_BROKEN,
    PFINFO_PINNED,
    PFINFO_TYPE_MASK,
    PFINFO_TYPE_SHIFT,
    PFINFO_XALLOC,
    PFINFO_XTAB,
    PageKind,
    decode_page_type,
)
from pgofflined.core.pagetable import table_levels
from pgofflined.exchanger.plan import (
    refuse_by_kind,
    refuse_granted,
    refuse_mapping_others,
    refuse_root,
)
from pgofflined.exchanger.poison import NO_POISON, Poison
from pgofflined.exchanger.survey import frames_below, has_frames_of_others
from pgofflined.ports import Hypervisor

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pgofflined.core.moves import Chosen
    from pgofflined.ports import FrameArray, TypeArray, Words


_NOT_READABLE: Final = np.uint32(min(PFINFO_BROKEN, PFINFO_XALLOC, PFINFO_XTAB))


class Look:
    """The frames of a group, and those that name them, as long as they stay mapped.

    Each method that reads raises XenError for a frame with an uncorrected error, also one that was
    reported since it was mapped.
    """

    def __init__(
        self, xen: Hypervisor, domid: Domid, group: Group, others: FrameArray, poison: Poison
    ) -> None:
        """Map the group's frames and ``others``.  Raises PortError where one cannot be read."""
        self.group = group
        self.others = others
        # A copy of the group's contents, made while nobody waited: new memory takes its time.
        self.spare: Words | None = None
        # The group's own follow one another, and can be compared where they are.
        frames = np.concatenate([group.mfns, np.setdiff1d(others, group.mfns)])
        self._order = np.argsort(frames)
        self._sorted = frames[self._order]
        self._domid, self._poison = domid, poison
        poison.refuse(domid, frames)
        self._mapping = ExitStack()
        self._window = self._mapping.enter_context(xen.window(domid, frames))

    def covers(self, mfns: FrameArray) -> bool:
        """Whether all of some frames are among those that are mapped."""
        return bool(among(mfns, self._sorted).all())

    def at(self, mfns: FrameArray) -> Words:
        """What some of the frames hold now."""
        return self._window.read(self._rows(mfns))

    def words(self, mfns: FrameArray, indexes: FrameArray) -> Words:
        """Single words of frames."""
        return self._window.words(self._rows(mfns), indexes)

    def differing(self, mfns: FrameArray, contents: Words) -> Chosen:
        """Which of some frames do not hold these contents now."""
        return self._window.differing(self._rows(mfns), contents)

    def refreshed(self, mfns: FrameArray, contents: Words) -> Words:
        """What frames hold now that held ``contents``: the same array where nothing differs."""
        changed = self.differing(mfns, contents)
        if not changed.any():
            return contents
        if self.spare is not None and contents is self.group.contents:
            fresh, self.spare = self.spare, None
        else:
            fresh = contents.copy()
        fresh[changed] = self.at(mfns[changed])
        return fresh

    def close(self) -> None:
        """Let go of all of them, for Xen exchanges no frame that is mapped.  Raises PortError."""
        self._mapping.close()

    def _rows(self, mfns: FrameArray) -> NDArray[np.intp]:
        self._poison.refuse(self._domid, mfns)
        rows: NDArray[np.intp] = self._order[np.searchsorted(self._sorted, mfns)]
        return rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A group with the contents that its pages had while the guest ran; ``look`` is open."""

    group: Group
    look: Look


def look_at(xen: Hypervisor, domid: Domid, group: Group, poison: Poison = NO_POISON) -> Seen | None:
    """Map and read beforehand what ``check`` will look at; None where it cannot all be read.

    Xen's types come first: what it knows to be broken is not read.  Raises PortError.
    """
    others = _involved(group)
    types = xen.page_types(domid, np.concatenate([group.mfns, others]))
    if not _readable(types).all():
        return None
    look = Look(xen, domid, group, others, poison)
    try:
        look.group = replace(group, contents=look.at(group.mfns))
        look.spare = look.group.contents.copy()
        return Seen(group=look.group, look=look)
    except BaseException:
        with suppress(PortError):
            look.close()
        raise


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """The pages that can be moved now, with their entries and contents as they are; and the rest.

    ``look`` is open where any page is left, and may be where none is.  What is refused as
    OUT_OF_DATE may be found again by another survey.
    """

    group: Group
    refusals: tuple[Refusal, ...]
    look: Look | None


def check(
    xen: Hypervisor,
    domid: Domid,
    group: Group,
    looks: ExitStack,
    look: Look | None = None,
    *,
    poison: Poison = NO_POISON,
) -> Checked:
    """Compare a group with the memory of its guest, which is suspended and paused.

    ``look`` is one that was opened before, and is used where it has all that is needed.  It, or
    what is mapped in its place, is let go with ``looks``, if not before.  Raises PortError where a
    frame cannot be read any more.
    """
    if look is not None:
        looks.callback(look.close)
    refusals: dict[int, Refusal] = {}
    is_known = look is not None and look.group is group
    involved = look.others if look is not None and is_known else _involved(group)
    types = xen.page_types(domid, np.concatenate([group.mfns, involved]))
    _check_types(group, types[: len(group)], refusals)
    _check_grants(poison.granted_frames(xen, domid), group, refusals)
    places = _check_places(group, involved, types[len(group) :], refusals)
    group = _left(group, refusals)
    more: dict[int, Refusal] = {}
    if len(group):
        if look is None or not is_known:
            look = _look(xen, domid, group, involved[places], look, looks, poison)
        group, more = _check_contents(group, look)
    if len(group) and group.kind.is_table:
        refusal = _refuse_table(xen, domid, group)
        if refusal is not None:
            more[0] = refusal
            group = group.only(np.zeros(1, dtype=np.bool_))
        elif group.kind is not PageKind.L1:
            group = replace(group, props=_unpinned_below(xen, domid, group))
    return Checked(group=group, refusals=(*refusals.values(), *more.values()), look=look)


def _involved(group: Group) -> FrameArray:
    """The frames that name the pages of a group: page tables, and those of the p2m."""
    return np.unique(np.concatenate([group.references.tables, group.slot_frames]))


def _readable(types: TypeArray) -> Chosen:
    # Those that are not the domain's, or broken, are the highest numbers.
    readable: Chosen = (types & np.uint32(PFINFO_TYPE_MASK)) < _NOT_READABLE
    return readable


def _look(
    xen: Hypervisor,
    domid: Domid,
    group: Group,
    others: FrameArray,
    look: Look | None,
    looks: ExitStack,
    poison: Poison,
) -> Look:
    """The look there is, or one in its place that has all that is needed."""
    if look is not None:
        if look.covers(group.mfns) and look.covers(others):
            return look
        look.close()
    fresh = Look(xen, domid, group, others, poison)
    looks.callback(fresh.close)
    return fresh


def _left(group: Group, refusals: dict[int, Refusal]) -> Group:
    """The group without the pages that are refused."""
    if not refusals:
        return group
    left = np.ones(len(group), dtype=np.bool_)
    left[list(refusals)] = False
    return group.only(left)


def _check_types(group: Group, types: TypeArray, refusals: dict[int, Refusal]) -> None:
    """The pages are still the domain's and used as they were; none of them is broken."""
    level = group.kind.value if group.kind.is_table else 0
    wanted = level << PFINFO_TYPE_SHIFT | (PFINFO_PINNED if group.pinned else 0)
    for row in np.flatnonzero((types & np.uint32(PFINFO_TYPE_MASK)) != wanted).tolist():
        mfn = group.page(row)[0]
        kind = decode_page_type(int(types[row])).kind
        refusals[row] = refuse_by_kind(mfn, kind) or _out_of_date(mfn, "Xen uses it otherwise")


def _check_grants(grants: FrameArray, group: Group, refusals: dict[int, Refusal]) -> None:
    granted = among(group.mfns, grants)
    for row in np.flatnonzero(granted).tolist():
        refusals.setdefault(row, refuse_granted(group.page(row)[0]))


def _check_places(
    group: Group, involved: FrameArray, types: TypeArray, refusals: dict[int, Refusal]
) -> Chosen:
    """Tables are still tables of their level and the slots' frames the domain's: these are read."""
    levels = table_levels(types)
    references = group.references
    found = levels[np.searchsorted(involved, references.tables)]
    wrong = set(references.pages[found != references.levels].tolist())
    # A p2m slot lies in plain memory, or we could not write it: the group's own pages are checked.
    plain = (types & np.uint32(PFINFO_TYPE_MASK)) == 0
    slots = np.searchsorted(involved, group.slot_frames)
    wrong |= set(np.flatnonzero(~plain[slots]).tolist())
    for row in sorted(wrong):
        what = "a page table that maps it is none any more"
        refusals.setdefault(row, _out_of_date(group.page(row)[0], what))
    return _readable(types)


def _check_contents(group: Group, look: Look) -> tuple[Group, dict[int, Refusal]]:
    """Entries and slots are still what they were; takes the pages' contents with them."""
    refusals: dict[int, Refusal] = {}
    references = group.references
    values = look.words(references.tables, references.indexes)
    for row in set(references.pages[~same_mapping(values, references.values)].tolist()):
        refusals[row] = _out_of_date(group.page(row)[0], "an entry that maps it has changed")
    slots = look.words(group.slot_frames, group.slot_indexes)
    for row in np.flatnonzero(slots != group.mfns).tolist():
        what = "the guest's p2m leads elsewhere"
        refusals.setdefault(row, _out_of_date(group.page(row)[0], what))
    fresh = replace(
        group,
        references=replace(references, values=values),
        contents=look.refreshed(group.mfns, group.contents),
    )
    return _left(fresh, refusals), refusals


def _refuse_table(xen: Hypervisor, domid: Domid, group: Group) -> Refusal | None:
    """Whether a page table cannot be taken away now, or could not be validated again."""
    mfn = Mfn(int(group.mfns[0]))
    if group.kind is PageKind.L4 and mfn in xen.vcpu_frames(domid).roots:
        return refuse_root(mfn)
    if group.kind is PageKind.L1:
        shared = xen.shared_frames(domid)
        if has_frames_of_others(xen, domid, group.contents[0], shared):
            return refuse_mapping_others(mfn)
    return None


def _unpinned_below(xen: Hypervisor, domid: Domid, group: Group) -> FrameArray:
    """The tables that a table refers to, without those that are pinned as it is."""
    below = frames_below(group.kind, group.contents[0])
    types = xen.page_types(domid, below)
    loose: FrameArray = below[(types & np.uint32(PFINFO_PINNED)) == 0]
    return loose


def _out_of_date(mfn: Mfn, what: str) -> Refusal:
    return Refusal(
        mfn=mfn, reason=RefusalReason.OUT_OF_DATE, detail=f"{what} since it was looked at"
    )
