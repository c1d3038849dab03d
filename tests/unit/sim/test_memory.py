from __future__ import annotations

from errno import EBUSY, EINVAL, ENOMEM, ERESTART

import numpy as np
import pytest

from pgofflined.core.domains import ShutdownReason
from pgofflined.core.errors import XenError
from pgofflined.core.frames import PAGE_SHIFT, Domid, Mfn, Pfn
from pgofflined.core.moves import PteWrite
from pgofflined.core.offline import OfflineState
from pgofflined.core.pages import PTE_PRESENT, PTE_RW, PageKind, decode_page_type
from pgofflined.ports import SuspendLimits
from pgofflined.sim.errors import PoisonRead, UnsafeUpdate
from pgofflined.sim.frames import FrameState
from pgofflined.sim.host import HostSpec
from pgofflined.sim.layout import DIRECT_MAP
from pgofflined.sim.pagetables import walk
from pgofflined.sim.scenarios import SmallHost, small_host
from tests.single import set_ptes, swap, write_words


def still(spec: HostSpec | None = None) -> SmallHost:
    """A host whose PV guest is suspended and paused."""
    small = small_host(spec)
    small.host.suspend(small.pv, SuspendLimits())
    small.host.pause(small.pv)
    return small


def direct_entry(small: SmallHost, pfn: int) -> PteWrite:
    """The direct map's entry of a pfn."""
    guest = small.host.pv(small.pv)
    slot = walk(small.host.frames.contents, guest.root, DIRECT_MAP + (pfn << PAGE_SHIFT))
    return PteWrite(table=Mfn(slot.table), index=slot.index, value=slot.entry)


def set_entry(small: SmallHost, entry: PteWrite, value: int) -> None:
    write = PteWrite(table=entry.table, index=entry.index, value=value)
    set_ptes(small.host, small.pv, [write])


def unmapped_page(small: SmallHost) -> tuple[Mfn, Pfn]:
    """An ordinary page whose only entry has been cleared."""
    pfn = small.host.pv(small.pv).plain_pfns()[5]
    mfn = small.host.frame_of(small.pv, pfn)
    set_entry(small, direct_entry(small, pfn), 0)
    return mfn, pfn


def kind_of(small: SmallHost, pfn: int) -> PageKind:
    mfn = np.array([small.host.frame_of(small.pv, pfn)], dtype=np.uint64)
    return decode_page_type(int(small.host.page_types(small.pv, mfn)[0])).kind


def test_poisoned_page_must_not_be_read() -> None:
    small = small_host()
    mfn = small.host.frame_of(small.pv, 9)
    small.host.poison(mfn)

    with pytest.raises(PoisonRead):
        small.host.read_frames(small.pv, np.array([mfn], dtype=np.uint64))
    with pytest.raises(PoisonRead):
        write_words(small.host, small.pv, mfn, 0, np.zeros(1, dtype=np.uint64))


def test_broken_page_has_no_other_type() -> None:
    small = small_host()
    root = small.host.pv(small.pv).layout.root
    small.host.poison(small.host.frame_of(small.pv, root), known=True)

    assert kind_of(small, root) is PageKind.BROKEN


def test_tables_of_a_guest_that_is_not_paused_must_not_be_changed() -> None:
    small = small_host()
    small.host.suspend(small.pv, SuspendLimits())
    entry = direct_entry(small, 9)

    with pytest.raises(UnsafeUpdate):
        set_ptes(small.host, small.pv, [entry])


@pytest.mark.parametrize("keep", [0, PTE_RW])
def test_absent_entry_that_names_a_frame_crashes_the_guest_where_l1tf_counts(keep: int) -> None:
    small = still(HostSpec(l1tf=True))
    entry = direct_entry(small, 100)
    with pytest.raises(XenError) as caught:
        set_entry(small, entry, entry.value & ~0xFFF | keep)

    assert caught.value.errno == ERESTART
    assert small.host.domain(small.pv).shutdown is ShutdownReason.CRASH


def test_zero_is_safe_where_l1tf_counts() -> None:
    small = still(HostSpec(l1tf=True))
    set_entry(small, direct_entry(small, 100), 0)

    assert small.host.crashes == {}


def test_absent_entry_that_names_a_frame_is_harmless_without_l1tf() -> None:
    small = still()
    entry = direct_entry(small, 100)
    set_entry(small, entry, entry.value & ~PTE_PRESENT)

    assert small.host.crashes == {}


def test_cleared_entry_takes_its_references_along() -> None:
    small = still()
    mfn, _ = unmapped_page(small)

    assert small.host.frames.refs[mfn] == 1
    assert small.host.frames.type_refs[mfn] == 0
    small.host.check_invariants()


def test_exchange_without_free_memory_forgets_the_mark() -> None:
    small = still()
    mfn, pfn = unmapped_page(small)
    small.host.offline(mfn)
    small.host.frames.allocate_many(small.host.free_frames())
    with pytest.raises(XenError) as caught:
        swap(small.host, small.pv, mfn, pfn)

    assert caught.value.errno == ENOMEM
    assert small.host.query(mfn) == OfflineState.ONLINE
    assert small.host.m2p(mfn) == pfn


def test_page_registered_with_a_vcpu_cannot_be_exchanged() -> None:
    small = still()
    guest = small.host.pv(small.pv)
    for pfn in (guest.layout.vcpu_info[0], guest.layout.gdt[0]):
        mfn = small.host.frame_of(small.pv, pfn)
        set_entry(small, direct_entry(small, pfn), 0)
        with pytest.raises(XenError) as caught:
            swap(small.host, small.pv, mfn, Pfn(pfn))
        assert caught.value.errno == EINVAL


def test_page_that_dom0_maps_besides_any_grant_cannot_be_exchanged_until_it_lets_go() -> None:
    small = still()
    mfn, pfn = unmapped_page(small)
    hold = small.host.hold(small.pv, pfn, why="qemu", writable=False)
    with pytest.raises(XenError):
        swap(small.host, small.pv, mfn, pfn)
    small.host.release_hold(small.pv, hold)

    assert swap(small.host, small.pv, mfn, pfn) != mfn


def test_exchanged_frame_holds_neither_the_old_contents_nor_zeroes() -> None:
    small = still()
    mfn, pfn = unmapped_page(small)
    before = small.host.read_frames(small.pv, np.array([mfn], dtype=np.uint64))
    new = swap(small.host, small.pv, mfn, pfn)
    after = small.host.read_frames(small.pv, np.array([new], dtype=np.uint64))

    assert (before != after).all()
    assert after.any()


def test_marked_page_that_is_exchanged_leaves_an_idle_cpu_spinning() -> None:
    small = still()
    mfn, pfn = unmapped_page(small)
    small.host.offline(mfn)
    swap(small.host, small.pv, mfn, pfn)

    assert small.host.query(mfn) == OfflineState.OFFLINED
    assert small.host.idle_scrub_spinning


def test_page_that_is_offlined_after_it_was_scrubbed_leaves_the_idle_cpus_alone() -> None:
    small = still()
    mfn, pfn = unmapped_page(small)
    swap(small.host, small.pv, mfn, pfn)
    small.host.clock.wait(3.5)
    small.host.offline(mfn)

    assert small.host.query(mfn) == OfflineState.OFFLINED
    assert not small.host.idle_scrub_spinning


def test_freed_page_may_be_given_to_another_domain() -> None:
    small = still()
    mfn, pfn = unmapped_page(small)
    swap(small.host, small.pv, mfn, pfn)
    small.host.frames.allocate_many(small.host.free_frames())

    assert small.host.frames.state[mfn] == FrameState.INUSE


def test_table_that_nothing_names_any_more_is_data_until_it_is_named_again() -> None:
    small = still()
    guest = small.host.pv(small.pv)
    late = guest.layout.processes[-1]
    second = Mfn(small.host.frame_of(small.pv, late.upper[1]))
    first = small.host.frame_of(small.pv, late.upper[2])
    small.host.references.unpin(first)
    index = next(i for i in range(512) if small.host.frames.contents.word(second, i))
    entry = PteWrite(
        table=second, index=index, value=small.host.frames.contents.word(second, index)
    )
    page = small.host.frame_of(small.pv, late.pages[-1])
    references = int(small.host.frames.refs[page])

    set_entry(small, entry, 0)
    assert kind_of(small, late.upper[2]) is PageKind.DATA
    assert small.host.frames.refs[page] == references - 1
    small.host.check_invariants()

    set_entry(small, entry, entry.value)
    assert kind_of(small, late.upper[2]) is PageKind.L1
    assert small.host.frames.refs[page] == references
    small.host.check_invariants()


def test_table_with_an_entry_of_another_domains_frame_cannot_be_validated_again() -> None:
    small = still()
    layout = small.host.pv(small.pv).layout
    table = small.host.frame_of(small.pv, layout.direct_l2[0])
    foreign = layout.foreign[0] // 512
    index = next(
        i
        for i in range(512)
        if small.host.frames.contents.word(table, i) >> PAGE_SHIFT & 0xFFFFFFF
        == small.host.frame_of(small.pv, layout.direct_l1[foreign])
    )
    entry = PteWrite(table=table, index=index, value=small.host.frames.contents.word(table, index))
    set_entry(small, entry, 0)

    with pytest.raises(XenError):
        set_entry(small, entry, entry.value)


def test_entry_of_another_domains_frame_can_be_written_as_it_was_but_not_made_anew() -> None:
    small = still()
    entry = direct_entry(small, small.host.pv(small.pv).layout.foreign[0])
    set_entry(small, entry, entry.value)
    set_entry(small, entry, 0)

    with pytest.raises(XenError) as caught:
        set_entry(small, entry, entry.value)
    assert caught.value.errno == EBUSY


def test_m2p_entry_is_what_the_guest_makes_it() -> None:
    small = small_host()
    mfn = small.host.frame_of(small.pv, 9)
    small.host.set_m2p(mfn, 12345)

    assert small.host.m2p(mfn) == 12345


def test_frame_of_nobody_cannot_be_named() -> None:
    small = still()
    free = int(np.flatnonzero(small.host.frames.state == FrameState.FREE)[0])
    entry = direct_entry(small, 9)
    with pytest.raises(XenError):
        set_entry(small, entry, free << PAGE_SHIFT | PTE_PRESENT)

    assert direct_entry(small, 9) == entry
    small.host.check_invariants()


def test_memory_of_a_domain_that_is_gone_is_not_there() -> None:
    small = small_host()
    with pytest.raises(XenError):
        swap(small.host, Domid(99), Mfn(1), Pfn(1))
    with pytest.raises(XenError):
        set_ptes(small.host, Domid(99), [])
