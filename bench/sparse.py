"""A guest whose frames are made up when they are read: as large as is wanted, without its memory.

Every pfn has a frame.  The tables are those of Linux's direct map, and those by which it keeps its
p2m list; mfns are the pfns in a scattered order, which can be computed both ways.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import process_time
from typing import TYPE_CHECKING, Final
from uuid import UUID

import numpy as np

from pgofflined.core.domains import DomainInfo, GuestKind
from pgofflined.core.frames import PAGE_SHIFT, WORDS_PER_PAGE, Domid, Mfn, Pfn
from pgofflined.core.offline import OfflineState
from pgofflined.core.pages import PFINFO_TYPE_SHIFT
from pgofflined.ports import VcpuFrames

if TYPE_CHECKING:
    from pgofflined.ports import FrameArray, TypeArray, Words

DOMID: Final = Domid(1)
_FIRST_MFN: Final = 1 << 20
_SHARED_INFO: Final = Mfn(_FIRST_MFN - 1)
_SCATTER: Final = 0x9E37_79B1
_FIRST_TABLE: Final = 1 << 10
_FLAGS: Final = 1 << 63 | 0x67
# Where Linux has its direct map and its vmalloc area: slots of the L4.
_DIRECT_MAP: Final = 273
_VMALLOC: Final = 402
_COLUMNS: Final = np.arange(WORDS_PER_PAGE, dtype=np.uint64)
# Words of struct arch_shared_info at byte 3088 of shared_info, xen/include/public/arch-x86/xen.h.
_MAX_PFN: Final = 3088 // 8
_P2M_CR3, _P2M_VADDR = _MAX_PFN + 3, _MAX_PFN + 4


@dataclass(frozen=True, slots=True, kw_only=True)
class _Frames:
    """Frames, one after the other by pfn, whose words name other frames, one after the other.

    ``level`` is that of page tables, and 0 for the p2m list, which holds bare frame numbers.  With
    ``same`` all of them name the first of those frames.
    """

    first: int
    count: int
    level: int
    first_named: int
    named: int
    same: bool = False


class SparseGuest:
    """As much of ``ports.Hypervisor`` as a survey asks, for one PV guest of ``gib`` GiB.

    The size is a power of two.  ``seconds`` is the time spent on making frames up, which is none
    of the survey's.  ``mappings`` are those of one page (``data_page``) besides the direct map's,
    as of the zero page by processes that have read far more memory than they have written.
    """

    def __init__(self, gib: int, mappings: int = 0) -> None:
        self.pages = gib << 18
        if self.pages & (self.pages - 1):
            raise ValueError(f"{gib} GiB is no power of two")
        self.seconds = 0.0
        self._unscatter = pow(_SCATTER, -1, self.pages)
        self._parts: list[_Frames] = []
        leaves = self._add(level=0, first_named=0, named=self.pages)
        direct = self._tree(0, self.pages)
        p2m = self._tree(leaves.first, leaves.count)
        self._roots = {_DIRECT_MAP: direct, _VMALLOC: p2m}
        if mappings:
            self._add(level=1, first_named=self.data_page(), named=mappings, same=True)
        self._root = self._end()
        starts = [*(part.first for part in self._parts), self._root, self._root + 1]
        self._starts = np.array(starts, dtype=np.uint64)
        levels = [0, *(part.level for part in self._parts), 4, 0]
        self._types = np.array(levels, dtype=np.uint32) << np.uint32(PFINFO_TYPE_SHIFT)
        self.tables = 1 + sum(part.count for part in self._parts if part.level)

    def _end(self) -> int:
        return self._parts[-1].first + self._parts[-1].count if self._parts else _FIRST_TABLE

    def _add(self, *, level: int, first_named: int, named: int, same: bool = False) -> _Frames:
        part = _Frames(
            first=self._end(),
            count=-(-named // WORDS_PER_PAGE),
            level=level,
            first_named=first_named,
            named=named,
            same=same,
        )
        self._parts.append(part)
        return part

    def _tree(self, first: int, count: int) -> _Frames:
        """Tables of levels 1 to 3 that map pages; those of the highest level."""
        part = self._add(level=1, first_named=first, named=count)
        for level in (2, 3):
            part = self._add(level=level, first_named=part.first, named=part.count)
        return part

    def domain(self, domid: Domid) -> DomainInfo:
        """The guest itself."""
        assert domid == DOMID
        return DomainInfo(
            domid=DOMID,
            uuid=UUID(int=1),
            name="sparse",
            kind=GuestKind.PV,
            dying=False,
            paused=False,
            shutdown=None,
            tot_pages=self.pages,
            max_pages=self.pages,
            max_vcpu_id=0,
            shared_info=_SHARED_INFO,
            cpu_time=0,
        )

    def data_page(self) -> Pfn:
        """A page that is no table and holds no list: the last one."""
        return Pfn(self.pages - 1)

    def _mfns(self, pfns: FrameArray) -> Words:
        """The frames of each pfn and of those after it, a page's words in a row."""
        mfns: Words = (pfns * np.uint64(_SCATTER))[:, None] + _COLUMNS * np.uint64(_SCATTER)
        mfns &= np.uint64(self.pages - 1)
        mfns += np.uint64(_FIRST_MFN)
        return mfns

    def mfn(self, pfn: Pfn) -> Mfn:
        """The frame of one pfn."""
        return Mfn((pfn * _SCATTER & (self.pages - 1)) + _FIRST_MFN)

    def m2p(self, mfn: Mfn) -> Pfn:
        """The pfn of a frame."""
        return Pfn((mfn - _FIRST_MFN) * self._unscatter & (self.pages - 1))

    def _pfns(self, mfns: FrameArray) -> FrameArray:
        gone = (mfns - np.uint64(_FIRST_MFN)) * np.uint64(self._unscatter)
        return gone & np.uint64(self.pages - 1)

    @contextmanager
    def _not_counted(self) -> Iterator[None]:
        began = process_time()
        yield
        self.seconds += process_time() - began

    # What a survey asks of a host.

    def read_frames(self, domid: Domid, mfns: FrameArray) -> Words:
        """Contents of frames."""
        assert domid == DOMID
        with self._not_counted():
            contents = np.zeros((len(mfns), WORDS_PER_PAGE), dtype=np.uint64)
            if mfns[0] == _SHARED_INFO:
                contents[0, [_MAX_PFN, _P2M_CR3, _P2M_VADDR]] = self._shared_words()
                return contents
            pfns = self._pfns(mfns)
            places = np.searchsorted(self._starts, pfns, side="right") - 1
            for place in np.unique(places).tolist():
                rows = np.flatnonzero(places == place)
                if 0 <= place < len(self._parts):
                    contents[rows] = self._words(self._parts[place], pfns[rows])
                elif place == len(self._parts):
                    contents[rows] = self._root_words()
            return contents

    def _shared_words(self) -> list[int]:
        vaddr = 0xFFFF << 48 | _VMALLOC << 39
        return [self.pages, self.mfn(Pfn(self._root)) << PAGE_SHIFT, vaddr]

    def _root_words(self) -> Words:
        words = np.zeros(WORDS_PER_PAGE, dtype=np.uint64)
        for slot, part in self._roots.items():
            for number in range(part.count):
                words[slot + number] = self.mfn(Pfn(part.first + number)) << PAGE_SHIFT | _FLAGS
        return words

    def _words(self, part: _Frames, pfns: FrameArray) -> Words:
        named = (pfns - np.uint64(part.first)) * np.uint64(WORDS_PER_PAGE)
        if part.same:
            mfn = self.mfn(Pfn(part.first_named))
            words = np.full((len(pfns), WORDS_PER_PAGE), mfn, dtype=np.uint64)
        else:
            words = self._mfns(named + np.uint64(part.first_named))
        if part.level:
            words <<= np.uint64(PAGE_SHIFT)
            words |= np.uint64(_FLAGS)
        if part.count * WORDS_PER_PAGE != part.named:
            words[named[:, None] + _COLUMNS >= part.named] = 0
        return words

    def page_types(self, domid: Domid, mfns: FrameArray) -> TypeArray:
        """Types of frames."""
        assert domid == DOMID
        with self._not_counted():
            pfns = self._pfns(mfns)
            types: TypeArray = np.zeros(len(pfns), dtype=np.uint32)
            # Nearly all are data.
            low = np.flatnonzero(pfns <= np.uint64(self._root))
            places = np.searchsorted(self._starts, pfns[low], side="right")
            types[low] = self._types[places]
        return types

    def granted_frames(self, domid: Domid) -> FrameArray:
        """None."""
        assert domid == DOMID
        return np.empty(0, dtype=np.uint64)

    def shared_frames(self, domid: Domid) -> FrameArray:
        """Its shared_info."""
        assert domid == DOMID
        return np.array([_SHARED_INFO], dtype=np.uint64)

    def vcpu_frames(self, domid: Domid) -> VcpuFrames:
        """Its only root."""
        assert domid == DOMID
        return VcpuFrames(roots=frozenset({self.mfn(Pfn(self._root))}), tables=frozenset())

    def query(self, mfn: Mfn) -> OfflineState:
        """Every frame is in order."""
        assert self.m2p(mfn) < self.pages
        return OfflineState.ONLINE
