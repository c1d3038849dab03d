"""The plan of a simulated Linux PV guest's memory: which pfn is what, and where it is mapped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from pgofflined.core.frames import WORDS_PER_PAGE

# Virtual addresses as in arch/x86/include/asm/page_64_types.h of Linux (no KASLR, 4 levels).
DIRECT_MAP: Final = 0xFFFF_8880_0000_0000
VMALLOC: Final = 0xFFFF_C900_0000_0000
KERNEL_TEXT: Final = 0xFFFF_FFFF_8000_0000
FIXMAP: Final = 0xFFFF_FFFF_8FE0_0000
USER: Final = 0x40_0000

P2M_MISSING: Final = (1 << 64) - 1
P2M_IDENTITY: Final = 1 << 62
P2M_FOREIGN: Final = 1 << 63


@dataclass(frozen=True, slots=True, kw_only=True)
class PvSpec:
    """What a PV guest is to have; pages are 4 KiB.

    ``missing``, ``identity`` and ``foreign`` p2m entries come on top of ``pages``.  The last of
    several processes is not pinned until the guest suspends, if ``late_process``.
    """

    name: str = "pv"
    pages: int = 512
    vcpus: int = 2
    processes: int = 3
    process_pages: int = 16
    text_pages: int = 16
    missing: int = 4
    identity: int = 8
    foreign: int = 1
    late_process: bool = True
    headroom: int = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """An address space: kernel and user root, tables by level, pages at ``USER`` onwards."""

    kernel_root: int
    user_root: int
    upper: tuple[int, int, int]  # L3, L2, L1
    pages: tuple[int, ...]

    @property
    def tables(self) -> dict[int, int]:
        """Level by pfn."""
        third, second, first = self.upper
        return {self.kernel_root: 4, self.user_root: 4, third: 3, second: 2, first: 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class PvLayout:
    """Pfns of a guest by their role; ``tables`` are the kernel's own, level by pfn."""

    spec: PvSpec
    max_pfn: int
    populated: tuple[int, ...]
    missing: tuple[int, ...]
    identity: tuple[int, ...]
    foreign: tuple[int, ...]
    start_info: int
    xenstore: int
    console: int
    gdt: tuple[int, ...]
    vcpu_info: tuple[int, ...]
    text: tuple[int, ...]
    p2m_list: tuple[int, ...]  # one for each 512 pfns; the last two are shared
    p2m_top: int
    p2m_mid: tuple[int, ...]
    root: int
    tables: dict[int, int]
    direct_l3: int
    direct_l2: tuple[int, ...]
    direct_l1: tuple[int, ...]
    list_upper: tuple[int, int]
    list_l1: tuple[int, ...]
    text_upper: tuple[int, int, int]
    fixmap_l1: int
    processes: tuple[Process, ...]
    plain: tuple[int, ...]  # ordinary kernel data, mapped by the direct map alone

    @property
    def user_pages(self) -> tuple[int, ...]:
        """Pfns that processes map besides the direct map."""
        return tuple(sorted({pfn for process in self.processes for pfn in process.pages}))

    @property
    def all_tables(self) -> dict[int, int]:
        """Every page table by pfn with its level, pinned or not."""
        tables = dict(self.tables)
        for process in self.processes:
            tables.update(process.tables)
        return tables


class _Cursor:
    """Hands out pfns in order."""

    def __init__(self, pfns: list[int]) -> None:
        self._pfns = iter(pfns)

    def one(self) -> int:
        return next(self._pfns)

    def some(self, number: int) -> tuple[int, ...]:
        return tuple(next(self._pfns) for _ in range(number))

    def rest(self) -> tuple[int, ...]:
        return tuple(self._pfns)


def _chunks(number: int) -> int:
    return -(-number // WORDS_PER_PAGE)


def plan_layout(spec: PvSpec) -> PvLayout:
    """Decide what each pfn of a guest is."""
    low = spec.pages + spec.missing
    # Ballooned-out pages: spread over the last quarter.
    step = max(1, spec.pages // 4 // max(1, spec.missing))
    missing = tuple(low - 1 - step * k for k in range(spec.missing))
    populated = tuple(sorted(set(range(low)) - set(missing)))
    identity = tuple(range(low, low + spec.identity))
    foreign = tuple(range(low + spec.identity, low + spec.identity + spec.foreign))
    own_chunks = _chunks(low + spec.identity + spec.foreign)
    # Two chunks more: one all missing, one all identity, on the pages that Linux shares for them.
    chunks = own_chunks + 2
    direct_chunks = own_chunks

    take = _Cursor([pfn for pfn in populated if pfn > 0])
    start_info, xenstore, console = take.one(), take.one(), take.one()
    gdt, vcpu_info = take.some(spec.vcpus), take.some(spec.vcpus)
    text = take.some(spec.text_pages)
    own_list = take.some(own_chunks)
    p2m_list = (*own_list, *take.some(2))
    p2m_top, p2m_mid = take.one(), take.some(_chunks(chunks))
    root, direct_l3 = take.one(), take.one()
    direct_l2, direct_l1 = take.some(_chunks(direct_chunks)), take.some(direct_chunks)
    list_l3, list_l2 = take.one(), take.one()
    list_l1 = take.some(_chunks(chunks))
    text_l3, text_l2, text_l1, fixmap_l1 = take.some(4)
    tables = {root: 4, direct_l3: 3, list_l3: 3, text_l3: 3, list_l2: 2, text_l2: 2}
    tables |= dict.fromkeys(direct_l2, 2)
    tables |= dict.fromkeys((*direct_l1, *list_l1, text_l1, fixmap_l1), 1)

    shared = take.some(min(4, spec.process_pages)) if spec.processes else ()
    processes = []
    for _ in range(spec.processes):
        kernel_root, user_root, third, second, first = take.some(5)
        own = take.some(spec.process_pages - len(shared))
        processes.append(
            Process(
                kernel_root=kernel_root,
                user_root=user_root,
                upper=(third, second, first),
                pages=(*shared, *own),
            )
        )
    return PvLayout(
        spec=spec,
        max_pfn=chunks * WORDS_PER_PAGE,
        populated=populated,
        missing=missing,
        identity=identity,
        foreign=foreign,
        start_info=start_info,
        xenstore=xenstore,
        console=console,
        gdt=gdt,
        vcpu_info=vcpu_info,
        text=text,
        p2m_list=p2m_list,
        p2m_top=p2m_top,
        p2m_mid=p2m_mid,
        root=root,
        tables=tables,
        direct_l3=direct_l3,
        direct_l2=direct_l2,
        direct_l1=direct_l1,
        list_upper=(list_l3, list_l2),
        list_l1=list_l1,
        text_upper=(text_l3, text_l2, text_l1),
        fixmap_l1=fixmap_l1,
        processes=tuple(processes),
        plain=take.rest(),
    )
