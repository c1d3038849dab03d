"""Makes the homes of a group's pages whole again: the new frame after a commit, else the old one.

What is done here has to succeed, and can be done again: by the same process at once, or by another
one from the record.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from pgofflined.core.errors import DomainGone, PortError
from pgofflined.core.frames import Domid
from pgofflined.core.moves import chosen_rows
from pgofflined.core.pages import PFINFO_PINNED, decode_page_type
from pgofflined.core.progress import Progress
from pgofflined.ports import Hypervisor

if TYPE_CHECKING:
    from pgofflined.core.moves import Chosen, Frames, Group

# A step after the commit is tried so often before the page counts as damaged.  The calls are
# idempotent, and what makes them fail for a moment (dom0 short of memory) passes.
SETTLE_TRIES = 5


class Settling:
    """The last part of a transfer."""

    def __init__(self, xen: Hypervisor, domid: Domid, progress: Progress) -> None:
        self._xen = xen
        self._domid = domid
        self._progress = progress
        self._group = progress.group

    def run(self) -> None:
        """Contents first, then the p2m, then the entries, then the pins."""
        group, progress = self._group, self._progress
        moved = group.renamed(*progress.moved())
        self._settle_contents(moved)
        self._settle_entries(moved)
        if not progress.undamaged()[0]:
            # What could not be put back is better held as it is than let go of.
            return
        if group.pinned:
            self.insist([0], "pin it again", lambda _rows: self._pin_again())
        if len(group.props):
            self.insist([0], "unpin what it refers to", lambda _rows: self._unpin_props())

    def _settle_contents(self, moved: Group) -> None:
        """Both in one step, for which the frames are mapped once."""
        homes = self._progress.homes
        written = self._group.bare_contents()
        fresh = self._fresh_rows()
        done = np.zeros(len(moved), dtype=np.bool_)

        def write(some: list[int]) -> None:
            rows = [row for row in some if row in fresh]
            slots = np.zeros(len(moved), dtype=np.bool_)
            slots[some] = True
            # A page of the p2m has its old words again now, also where another page's slot in it
            # was written before.
            if done.any():
                slots |= done & np.isin(moved.slot_frames, homes[rows])
            self._xen.write_frames(
                self._domid,
                homes[rows],
                chosen_rows(written, rows),
                moved.slots_leading_to(homes)[slots],
            )
            done[some] = True

        committed = _rows(self._progress.committed & self._progress.undamaged())
        self.insist(committed, "write the contents and the p2m entry", write)

    def _fresh_rows(self) -> frozenset[int]:
        """Committed pages whose new frame has still to get its contents."""
        rows = frozenset(_rows(self._progress.committed & self._progress.undamaged()))
        if not self._group.kind.is_table or not rows:
            return rows
        try:
            word = int(self._xen.page_types(self._domid, self._progress.homes[:1])[0])
        except PortError:
            return rows
        return frozenset() if decode_page_type(word).kind is self._group.kind else rows

    def _settle_entries(self, moved: Group) -> None:
        references = moved.references.downwards()

        def restore(some: list[int]) -> None:
            rows = np.zeros(len(moved), dtype=np.bool_)
            rows[some] = True
            wanted = references.chosen(rows[references.pages])
            writes = wanted.leading_to(self._progress.homes)
            if len(writes):
                self._xen.update_ptes(self._domid, writes)

        self.insist(_rows(self._progress.undamaged()), "restore the page-table entries", restore)

    def _pin_again(self) -> None:
        homes = self._progress.homes
        self._xen.pin_tables(self._domid, homes[~self._pinned(homes)], self._group.kind.value)

    def _unpin_props(self) -> None:
        props = self._group.props
        self._xen.unpin_tables(self._domid, props[self._pinned(props)])

    def _pinned(self, tables: Frames) -> Chosen:
        types = self._xen.page_types(self._domid, tables)
        pinned: Chosen = (types & np.uint32(PFINFO_PINNED)) != 0
        return pinned

    # Insistence.

    def insist(self, rows: list[int], what: str, act: Callable[[list[int]], None]) -> None:
        """Do a step that has to succeed: for all rows at once or, if that fails, for each.

        Notes the damage of those for which it never does.
        """
        if not rows or self._try(rows, act) is None:
            return
        for row in rows:
            problem = self._try([row], act)
            if problem is not None:
                self._progress.damage(row, f"could not {what}: {problem}")

    def _try(self, rows: list[int], act: Callable[[list[int]], None]) -> PortError | None:
        problem: PortError | None = None
        for _ in range(SETTLE_TRIES):
            try:
                act(rows)
            except DomainGone as error:
                self._progress.end(str(error))
                return None
            except PortError as error:
                problem = error
            else:
                return None
        if not self._is_gone():
            return problem
        self._progress.end(str(DomainGone(self._domid)))
        return None

    def _is_gone(self) -> bool:
        try:
            return self._xen.condition(self._domid).dying
        except DomainGone:
            return True
        except PortError:
            return False


def _rows(chosen: Chosen) -> list[int]:
    rows: list[int] = np.flatnonzero(chosen).tolist()
    return rows
