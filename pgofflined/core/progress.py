"""How far a group of pages has come: where each page is, and what became of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from pgofflined.core.frames import Mfn
from pgofflined.core.moves import Group
from pgofflined.core.outcomes import Damaged, Exchanged, PageResult, Refusal, RefusalReason

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pgofflined.core.moves import Chosen, Frames


class Progress:
    """The pages of a group on their way.

    ``homes`` are the frames that hold the pages' contents, or are to hold them: the new one from
    the commit of a page on (``committed``).
    """

    def __init__(self, group: Group) -> None:
        self.group = group
        self.homes: Frames = group.mfns.copy()
        self.committed: Chosen = np.zeros(len(group), dtype=np.bool_)
        self._refusals: dict[int, Refusal] = {}
        self._damage: dict[int, str] = {}

    # What happens to the pages, by their rows.

    def commit(self, rows: NDArray[np.intp], new: Frames) -> None:
        """These were exchanged for new frames."""
        self.committed[rows] = True
        self.homes[rows] = new

    def refuse(self, row: int, reason: RefusalReason, detail: str) -> None:
        """This one stays where it is.  The first reason is kept."""
        mfn = self.group.page(row)[0]
        self._refusals.setdefault(row, Refusal(mfn=mfn, reason=reason, detail=detail))

    def refuse_all(self, reason: RefusalReason, detail: str) -> None:
        """So do all of them."""
        for row in range(len(self.group)):
            self.refuse(row, reason, detail)

    def damage(self, row: int, detail: str) -> None:
        """This one could not be put right."""
        self._damage[row] = detail

    def end(self, detail: str) -> None:
        """The domain is gone, and with it all that could be put right."""
        self._refusals.clear()
        self.refuse_all(RefusalReason.DOMAIN_GONE, detail)

    # Where they are.

    def open(self) -> Chosen:
        """Pages that are neither refused nor exchanged nor damaged."""
        rows = self.undamaged() & ~self.committed
        rows[list(self._refusals)] = False
        return rows

    def undamaged(self) -> Chosen:
        """Pages that nothing has gone wrong with."""
        rows = np.ones(len(self.group), dtype=np.bool_)
        rows[list(self._damage)] = False
        return rows

    def moved(self) -> tuple[Frames, Frames]:
        """Old and new frames of the pages that have moved."""
        return self.group.mfns[self.committed], self.homes[self.committed]

    # What became of them.

    @property
    def is_damaged(self) -> bool:
        """Whether a page could not be put right."""
        return bool(self._damage)

    @property
    def refusals(self) -> Iterable[Refusal]:
        """Those of the pages that were refused."""
        return self._refusals.values()

    def results(self) -> Iterable[PageResult]:
        """One for each page of the group."""
        counts = np.bincount(self.group.references.pages, minlength=len(self.group))
        for row in range(len(self.group)):
            yield self._result(row, int(counts[row]))

    def _result(self, row: int, references: int) -> PageResult:
        mfn, pfn = self.group.page(row)
        refusal = self._refusals.get(row)
        if refusal is not None and refusal.reason is RefusalReason.DOMAIN_GONE:
            return refusal
        home = Mfn(int(self.homes[row]))
        if row in self._damage:
            return Damaged(old=mfn, new=home, pfn=pfn, detail=self._damage[row])
        if self.committed[row]:
            return Exchanged(old=mfn, new=home, pfn=pfn, references=references, offlined=False)
        return refusal or Refusal(
            mfn=mfn,
            reason=RefusalReason.XEN_REFUSED,
            detail="the exchange was not reached; nothing was changed",
        )
