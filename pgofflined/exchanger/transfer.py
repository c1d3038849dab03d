"""Moves one group of pages of a suspended and paused guest: prepare, commit, settle.

Up to the commit of a page (XENMEM_exchange) everything can be taken back: its entries are
written as they were and the old frame never left the guest.  From the commit on only forward is
possible: contents first, then the p2m, then the entries.  In this order a failure in the middle
leaves the page unmapped, so that nobody in the guest reads bytes that are not its own (decision 5).

A page table is held by its pin and by the entries of higher tables; when all are gone, Xen lets go
of what it maps and it is an ordinary page.  The first entry of a higher table that names the new
frame has Xen validate it.
"""

from __future__ import annotations

from collections.abc import Callable
from errno import EINVAL, ENOMEM
from typing import TYPE_CHECKING

import numpy as np

from pgofflined.core.errors import DomainGone, PortError, XenError
from pgofflined.core.frames import Domid
from pgofflined.core.moves import Group, chosen_rows, same_mapping
from pgofflined.core.offline import WhenMarked
from pgofflined.core.outcomes import RefusalReason
from pgofflined.core.pages import (
    L4_XEN_SLOTS,
    PFINFO_BROKEN,
    PFINFO_TYPE_MASK,
    PageKind,
)
from pgofflined.core.progress import Progress
from pgofflined.exchanger.check import Look
from pgofflined.exchanger.locate import Ambiguous, may_have_gone, still_owned, where_they_went
from pgofflined.exchanger.marking import GroupMarks
from pgofflined.exchanger.poison import NO_POISON, REPORTED, Poison
from pgofflined.exchanger.settling import Settling
from pgofflined.ports import Hypervisor, Swapped

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Transfer:
    """One group on its way.

    ``keep`` the group and ``begin`` (see ``ports.OpenJob``) before ``prepare``.  ``settle`` has to
    follow whatever happens, also where ``prepare`` or ``commit`` did not come to their end.  Pages
    that are to be marked ``WHEN_HELD`` are so after ``begin``, and have no mark any more when
    ``settle`` has ended, unless they were exchanged.
    """

    def __init__(
        self,
        xen: Hypervisor,
        domid: Domid,
        group: Group,
        *,
        when: WhenMarked = WhenMarked.BEFORE,
        wedged: Callable[[], bool] = lambda: False,
        poison: Poison = NO_POISON,
    ) -> None:
        self.progress = Progress(group)
        self._is_settled = False
        self._xen = xen
        self._domid = domid
        self._group = group
        self._poison = poison
        self._settling = Settling(xen, domid, self.progress)
        self._marks = (
            GroupMarks(xen, domid, self.progress, wedged) if when is WhenMarked.WHEN_HELD else None
        )

    def run(self, look: Look) -> None:
        """Prepare, commit and settle; raises nothing for what happens to a page."""
        try:
            try:
                if self._marks is not None:
                    self._marks.set()
                self.prepare(look)
            finally:
                look.close()
            if self._marks is not None:
                self._marks.look_at_neighbours()
            self.commit()
        finally:
            self.settle()

    # Before the commit.

    def prepare(self, look: Look) -> None:
        """Take the pin and every entry away, and see that nobody has changed the pages since.

        A page table's own tables are pinned before.
        """
        group = self._group
        # Xen reads a page table when its last use ends.
        self._refuse_poisoned()
        if not self.progress.open().any():
            return
        try:
            self._xen.pin_tables(self._domid, group.props, group.kind.value - 1)
            if group.pinned:
                self._xen.unpin_tables(self._domid, group.mfns)
        except PortError as error:
            self.progress.refuse_all(RefusalReason.XEN_REFUSED, str(error))
            return
        self._clear()
        self._compare(look)

    def _refuse_poisoned(self) -> None:
        for row in np.flatnonzero(self.progress.open() & self._poison.touching(self._group)):
            self.progress.refuse(int(row), RefusalReason.BROKEN, REPORTED)

    def _clear(self) -> None:
        references = self._group.references
        references = references.chosen(self.progress.open()[references.pages]).upwards()
        while len(references):
            try:
                self._xen.update_ptes(self._domid, references.cleared())
            except PortError as error:
                done = error.done if isinstance(error, XenError) else 0
                row = int(references.pages[min(done, len(references) - 1)])
                self.progress.refuse(row, RefusalReason.XEN_REFUSED, str(error))
                references = references.chosen(references.pages != row)
            else:
                return

    def _compare(self, look: Look) -> None:
        """A backend or dom0 itself may hold a mapping that no grant table shows.

        If a page changed since it was copied, one is writing to it.
        """
        self._refuse_poisoned()
        rows = np.flatnonzero(self.progress.open())
        mfns, wanted = self._group.mfns[rows], chosen_rows(self._group.bare_contents(), rows)
        if self._group.kind is PageKind.L4:
            contents = look.at(mfns)
            contents[:, L4_XEN_SLOTS.start : L4_XEN_SLOTS.stop] = 0
            changed = (contents != wanted).any(axis=1)
        else:
            changed = look.differing(mfns, wanted)
        for row in rows[changed].tolist():
            what = "something wrote to it while the guest stood still"
            self.progress.refuse(row, RefusalReason.CONTENTS_CHANGED, what)

    # The commit.

    def commit(self) -> None:
        """Have Xen exchange the pages that are prepared, one after the other."""
        rows = np.flatnonzero(self.progress.open())
        while len(rows):
            mfns, pfns = self._group.mfns[rows], self._group.pfns[rows]
            try:
                answer = self._xen.exchange(self._domid, mfns, pfns)
            except PortError as error:
                answer = Swapped(new=mfns[:0], error=error)
            done = len(answer.new)
            self.progress.commit(rows[:done], answer.new)
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
            self.progress.refuse_all(RefusalReason.DOMAIN_GONE, str(error))
            return rows[:0]
        if code == EINVAL:
            what = (
                "Xen counts references besides the guest's page tables (a mapping elsewhere, a "
                "vCPU's registered area, a descriptor table)"
            )
            self.progress.refuse(first, RefusalReason.OTHER_REFERENCES, what)
            return rows[1:]
        if code == ENOMEM:
            for row in rows.tolist():
                self.progress.refuse(
                    row, RefusalReason.NO_FREE_MEMORY, "the host has no free frame"
                )
            return rows[:0]
        self.resolve(rows)
        left = rows[self.progress.open()[rows]]
        if len(left):
            self.progress.refuse(int(left[0]), RefusalReason.XEN_REFUSED, str(error))
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
                    self.progress.damage(row, f"it has left the guest, and {home.why}")
                else:
                    self.progress.commit(np.array([row]), np.array([home], dtype=np.uint64))

        self._settling.insist(rows.tolist(), "find out whether it was exchanged", ask)

    # For what another process left.

    def take_over(self) -> None:
        """Find out how far another process came with this group; ``settle`` is to follow."""
        self.resolve(np.arange(len(self._group)))

    def changed_by_others(self) -> str | None:
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
        broken |= self._poison.among(tables)
        if broken.any():
            return f"its page table mfn {int(tables[broken][0]):#x} has had an uncorrected error"
        contents = self._xen.read_frames(self._domid, tables)
        found = contents[rows, wanted.indexes]
        good = (found == 0) | same_mapping(found, wanted.leading_to(self.progress.homes).values)
        if good.all():
            return None
        first = int(np.flatnonzero(~good)[0])
        table, index = int(wanted.tables[first]), int(wanted.indexes[first])
        return f"entry {index} of its page table mfn {table:#x} is {int(found[first]):#x}"

    # After the commit.

    def settle(self) -> None:
        """Make every page's home whole again: the new frame after a commit, else the old one."""
        self._settling.run()
        problems = [] if self._marks is None else self._marks.take_back()
        self._is_settled = not problems

    @property
    def is_whole(self) -> bool:
        """Whether ``settle`` has left nothing that differs from what the guest can expect."""
        return self._is_settled and not self.progress.is_damaged
