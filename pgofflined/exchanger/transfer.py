"""Moves one group of pages of a suspended and paused guest: prepare, commit, settle.

Up to the commit of a page (XENMEM_exchange) everything can be taken back: its entries are
written as they were and the old frame never left the guest.  From the commit on only forward is
possible: contents first, then the p2m, then the entries.  In this order a failure in the middle
leaves the page unmapped, so that the guest stops there rather than reading bytes that are not
its own.

A page table is held by its pin and by the entries of higher tables; when all are gone, Xen lets go
of what it maps and it is an ordinary page.  The first entry of a higher table that names the new
frame has Xen validate it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from errno import EINVAL, ENOMEM
from typing import TYPE_CHECKING

import numpy as np

from pgofflined.core.errors import DomainGone, PortError, XenError
from pgofflined.core.frames import Domid, Mfn
from pgofflined.core.moves import Group, PteWrites, same_mapping
from pgofflined.core.outcomes import Damaged, Exchanged, PageResult, Refusal, RefusalReason
from pgofflined.core.pages import (
    L4_XEN_SLOTS,
    PFINFO_BROKEN,
    PFINFO_PINNED,
    PFINFO_TYPE_MASK,
    PageKind,
    decode_page_type,
)
from pgofflined.exchanger.locate import Ambiguous, may_have_gone, still_owned, where_they_went
from pgofflined.ports import Hypervisor, Swapped

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pgofflined.core.moves import Chosen, Frames

# A step after the commit is tried so often before the page counts as damaged.  The calls are
# idempotent, and what makes them fail for a moment (dom0 short of memory) passes.
SETTLE_TRIES = 5


class Transfer:
    """One group on its way.

    ``intend`` the group (see ``ports.OpenJob``) before ``prepare``.  ``settle`` has to follow
    whatever happens, also where ``prepare`` or ``commit`` did not come to their end.
    """

    def __init__(self, xen: Hypervisor, domid: Domid, group: Group) -> None:
        self._xen = xen
        self._domid = domid
        self._group = group
        self._homes = group.mfns.copy()
        self._committed = np.zeros(len(group), dtype=np.bool_)
        self._refusals: dict[int, Refusal] = {}
        self._damage: dict[int, str] = {}

    def run(self) -> None:
        """Prepare, commit and settle; raises nothing for what happens to a page."""
        try:
            self.prepare()
            self.commit()
        finally:
            self.settle()

    # Before the commit.

    def prepare(self) -> None:
        """Take the pin and every entry away, and see that nobody has changed the pages since.

        A page table's own tables are pinned before.
        """
        group = self._group
        try:
            self._xen.pin_tables(self._domid, group.props, group.kind.value - 1)
            if group.pinned:
                self._xen.unpin_tables(self._domid, group.mfns)
        except PortError as error:
            self._refuse_all(RefusalReason.XEN_REFUSED, error)
            return
        self._clear()
        self._compare()

    def _clear(self) -> None:
        references = self._group.references.upwards()
        while len(references):
            try:
                self._xen.update_ptes(self._domid, references.cleared())
            except PortError as error:
                done = error.done if isinstance(error, XenError) else 0
                row = int(references.pages[min(done, len(references) - 1)])
                self._refuse(row, RefusalReason.XEN_REFUSED, str(error))
                references = references.chosen(references.pages != row)
            else:
                return

    def _compare(self) -> None:
        rows = np.flatnonzero(self._open())
        if not len(rows):
            return
        try:
            # A backend or dom0 itself may hold a mapping that no grant table shows.  If a page
            # changed since it was copied, one is writing to it.
            contents = self._xen.read_frames(self._domid, self._group.mfns[rows])
        except PortError as error:
            self._refuse_all(RefusalReason.XEN_REFUSED, error)
            return
        if self._group.kind is PageKind.L4:
            contents[:, L4_XEN_SLOTS.start : L4_XEN_SLOTS.stop] = 0
        changed = (contents != self._group.bare_contents()[rows]).any(axis=1)
        for row in rows[changed].tolist():
            what = "something wrote to it while the guest stood still"
            self._refuse(row, RefusalReason.CONTENTS_CHANGED, what)

    # The commit.

    def commit(self) -> None:
        """Have Xen exchange the pages that are prepared, one after the other."""
        rows = np.flatnonzero(self._open())
        while len(rows):
            mfns, pfns = self._group.mfns[rows], self._group.pfns[rows]
            try:
                answer = self._xen.exchange(self._domid, mfns, pfns)
            except PortError as error:
                answer = Swapped(new=mfns[:0], error=error)
            done = len(answer.new)
            self._note_committed(rows[:done], answer.new)
            if answer.error is None:
                return
            rows = self._after_refusal(rows[done:], answer.error)

    def _after_refusal(self, rows: NDArray[np.intp], error: PortError) -> NDArray[np.intp]:
        """Settle the first of the rows, which was not exchanged; the rows that are to be tried.

        EINVAL and ENOMEM are Xen's refusals.  After anything else the domain may have lost frames
        for others that we were not told.
        """
        code = error.errno if isinstance(error, XenError) else None
        first = int(rows[0])
        if isinstance(error, DomainGone):
            self._refuse_all(RefusalReason.DOMAIN_GONE, error)
            return rows[:0]
        if code == EINVAL:
            what = (
                "Xen counts references besides the guest's page tables (a mapping elsewhere, a "
                "vCPU's registered area, a descriptor table)"
            )
            self._refuse(first, RefusalReason.OTHER_REFERENCES, what)
            return rows[1:]
        if code == ENOMEM:
            for row in rows.tolist():
                self._refuse(row, RefusalReason.NO_FREE_MEMORY, "the host has no free frame")
            return rows[:0]
        self.resolve(rows)
        left = rows[self._open()[rows]]
        if len(left):
            self._refuse(int(left[0]), RefusalReason.XEN_REFUSED, str(error))
        return left[1:]

    def resolve(self, rows: NDArray[np.intp]) -> None:
        """Find out from Xen which of the pages were exchanged, where no answer says it."""
        group = self._group

        def ask(some: list[int]) -> None:
            asked = np.array(some, dtype=np.intp)
            mfns, pfns = group.mfns[asked], group.pfns[asked]
            gone = asked[may_have_gone(self._xen, self._domid, mfns, pfns)]
            owned = still_owned(self._xen, self._domid, group.mfns[gone])
            homes = where_they_went(self._xen, self._domid, group.pfns[gone], group.mfns[gone])
            for row, home, own in zip(gone.tolist(), homes, owned.tolist(), strict=True):
                if isinstance(home, Ambiguous):
                    if own:
                        # It is where it was, whatever the guest had the M2P note for it.
                        continue
                    self._damage[row] = f"it has left the guest, and {home.why}"
                else:
                    self._note_committed(np.array([row]), np.array([home], dtype=np.uint64))

        self._insist(rows.tolist(), "find out whether it was exchanged", ask)

    def _note_committed(self, rows: NDArray[np.intp], new: NDArray[np.uint64]) -> None:
        self._committed[rows] = True
        self._homes[rows] = new

    # For what another process left.

    def take_over(self) -> None:
        """Find out how far another process came with this group; ``settle`` is to follow."""
        self.resolve(np.arange(len(self._group)))

    def changed_by_others(self, never_read: frozenset[Mfn]) -> str | None:
        """What tells that not only we have changed the guest since; None where nothing does.

        Every entry must be cleared, or be what it was, leading to where its page is now.  Raises
        PortError.
        """
        references = self._group.references
        outside = ~np.isin(references.tables, self._group.mfns)
        wanted = references.chosen(outside)
        tables, rows = np.unique(wanted.tables, return_inverse=True)
        types = self._xen.page_types(self._domid, tables)
        broken = (types & np.uint32(PFINFO_TYPE_MASK)) == np.uint32(PFINFO_BROKEN)
        broken |= np.isin(tables, np.array(sorted(never_read), dtype=np.uint64))
        if broken.any():
            return f"its page table mfn {int(tables[broken][0]):#x} has had an uncorrected error"
        contents = self._xen.read_frames(self._domid, tables)
        found = contents[rows, wanted.indexes]
        good = (found == 0) | same_mapping(found, wanted.leading_to(self._homes).values)
        if good.all():
            return None
        first = int(np.flatnonzero(~good)[0])
        table, index = int(wanted.tables[first]), int(wanted.indexes[first])
        return f"entry {index} of its page table mfn {table:#x} is {int(found[first]):#x}"

    # After the commit.

    def settle(self) -> None:
        """Make every page's home whole again: the new frame after a commit, else the old one."""
        group = self._group
        moved = group.renamed(group.mfns[self._committed], self._homes[self._committed])
        self._settle_contents(moved)
        self._settle_entries(moved)
        if 0 in self._damage:
            # What could not be put back is better held as it is than let go of.
            return
        if group.pinned:
            self._insist([0], "pin it again", lambda _rows: self._pin_again())
        if len(group.props):
            self._insist([0], "unpin what it refers to", lambda _rows: self._unpin_props())

    def _settle_contents(self, moved: Group) -> None:
        written = self._group.bare_contents()
        rows = self._fresh_rows()
        self._insist(
            rows,
            "write the contents",
            lambda some: self._xen.write_frames(self._domid, self._homes[some], written[some]),
        )
        self._insist(
            [row for row in self._rows(self._committed) if row not in self._damage],
            "write the p2m entry",
            lambda some: self._xen.write_entries(
                self._domid,
                moved.slot_frames[some],
                moved.slot_indexes[some],
                self._homes[some],
            ),
        )

    def _fresh_rows(self) -> list[int]:
        """Committed pages whose new frame has still to get its contents."""
        rows = self._rows(self._committed & self._undamaged())
        if not self._group.kind.is_table or not rows:
            return rows
        try:
            kind = self._kind_of(Mfn(int(self._homes[0])))
        except PortError:
            return rows
        return [] if kind is self._group.kind else rows

    def _settle_entries(self, moved: Group) -> None:
        rows = [row for row in range(len(moved)) if row not in self._damage]
        references = moved.references.downwards()

        def restore(some: list[int]) -> None:
            wanted = references.chosen(np.isin(references.pages, some))
            writes = wanted.leading_to(self._homes)
            if len(writes):
                self._update(writes)

        self._insist(rows, "restore the page-table entries", restore)

    def _update(self, writes: PteWrites) -> None:
        self._xen.update_ptes(self._domid, writes)

    def _pin_again(self) -> None:
        loose = self._homes[~self._pinned(self._homes)]
        self._xen.pin_tables(self._domid, loose, self._group.kind.value)

    def _unpin_props(self) -> None:
        props = self._group.props
        self._xen.unpin_tables(self._domid, props[self._pinned(props)])

    def _pinned(self, tables: Frames) -> Chosen:
        types = self._xen.page_types(self._domid, tables)
        pinned: Chosen = (types & np.uint32(PFINFO_PINNED)) != 0
        return pinned

    def _insist(self, rows: list[int], what: str, act: Callable[[list[int]], None]) -> None:
        """Do a step that has to succeed: for all rows at once or, if that fails, for each.

        Notes the damage of those for which it never does.
        """
        if not rows or self._try(rows, act) is None:
            return
        for row in rows:
            problem = self._try([row], act)
            if problem is not None:
                self._damage[row] = f"could not {what}: {problem}"

    def _try(self, rows: list[int], act: Callable[[list[int]], None]) -> PortError | None:
        problem: PortError | None = None
        for _ in range(SETTLE_TRIES):
            try:
                act(rows)
            except DomainGone as error:
                self._note_gone(error)
                return None
            except PortError as error:
                problem = error
            else:
                return None
        try:
            gone = self._xen.condition(self._domid).dying
        except DomainGone:
            gone = True
        except PortError:
            gone = False
        if not gone:
            return problem
        self._note_gone(DomainGone(self._domid))
        return None

    def _note_gone(self, error: DomainGone) -> None:
        """The domain has ended, and with it all that could be put right."""
        self._refuse_all(RefusalReason.DOMAIN_GONE, error, everything=True)

    # What became of it.

    def results(self) -> Iterable[PageResult]:
        """One for each page of the group."""
        counts = np.bincount(self._group.references.pages, minlength=len(self._group))
        for row in range(len(self._group)):
            yield self._result(row, int(counts[row]))

    def _result(self, row: int, references: int) -> PageResult:
        mfn, pfn = self._group.page(row)
        refusal = self._refusals.get(row)
        if refusal is not None and refusal.reason is RefusalReason.DOMAIN_GONE:
            return refusal
        home = Mfn(int(self._homes[row]))
        if row in self._damage:
            return Damaged(old=mfn, new=home, pfn=pfn, detail=self._damage[row])
        if self._committed[row]:
            return Exchanged(old=mfn, new=home, pfn=pfn, references=references, offlined=False)
        return refusal or Refusal(
            mfn=mfn,
            reason=RefusalReason.XEN_REFUSED,
            detail="the exchange was not reached; nothing was changed",
        )

    @property
    def refusals(self) -> Iterable[Refusal]:
        """Those of the pages that were refused."""
        return self._refusals.values()

    @property
    def is_damaged(self) -> bool:
        """Whether a page could not be put right."""
        return bool(self._damage)

    def moved(self) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        """Old and new frames of the pages that have moved."""
        return self._group.mfns[self._committed], self._homes[self._committed]

    # Inner workings.

    def _kind_of(self, mfn: Mfn) -> PageKind:
        word = int(self._xen.page_types(self._domid, np.array([mfn], dtype=np.uint64))[0])
        return decode_page_type(word).kind

    def _undamaged(self) -> Chosen:
        rows = np.ones(len(self._group), dtype=np.bool_)
        rows[list(self._damage)] = False
        return rows

    def _open(self) -> Chosen:
        """Pages that are neither refused nor exchanged nor damaged."""
        rows = self._undamaged() & ~self._committed
        rows[list(self._refusals)] = False
        return rows

    def _rows(self, chosen: Chosen) -> list[int]:
        rows: list[int] = np.flatnonzero(chosen).tolist()
        return rows

    def _refuse(self, row: int, reason: RefusalReason, detail: str) -> None:
        mfn = self._group.page(row)[0]
        self._refusals.setdefault(row, Refusal(mfn=mfn, reason=reason, detail=detail))

    def _refuse_all(
        self, reason: RefusalReason, error: PortError, *, everything: bool = False
    ) -> None:
        for row in range(len(self._group)):
            if everything:
                self._refusals.pop(row, None)
            self._refuse(row, reason, str(error))
