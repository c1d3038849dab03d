"""Contents, types and grants of a PV guest's frames, and updates of its page tables."""

from __future__ import annotations

from errno import EINVAL

import numpy as np
import pytest

from pgofflined.core.errors import PortError, XenError
from pgofflined.core.frames import DOM0, PAGE_SHIFT, WORDS_PER_PAGE, Domid, Mfn
from pgofflined.core.moves import PteWrite, PteWrites, frames_of
from pgofflined.core.pages import (
    L4_XEN_SLOTS,
    PTE_PRESENT,
    PTE_RW,
    PageKind,
    decode_page_type,
)
from pgofflined.ports import Hypervisor
from tests.single import set_ptes, write_words

from .guestmemory import GuestMemory, not_the_domains, paused, standing_still
from .hosts import ContractHost

UNUSED = Domid(0x7000)


def one(mfn: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    return np.array([mfn], dtype=np.uint64)


def test_contents_stand_still_while_the_guest_is_paused(
    hypervisor: Hypervisor, guest: GuestMemory
) -> None:
    with paused(hypervisor, guest.domid):
        frames = guest.own_frames()[:64]
        first = hypervisor.read_frames(guest.domid, frames)
        second = hypervisor.read_frames(guest.domid, frames)

    assert first.shape == (len(frames), WORDS_PER_PAGE)
    assert first.dtype == np.uint64
    assert np.array_equal(first, second)


def test_frames_come_in_the_order_asked_for(hypervisor: Hypervisor, guest: GuestMemory) -> None:
    with paused(hypervisor, guest.domid):
        frames = guest.own_frames()[:8]
        forwards = hypervisor.read_frames(guest.domid, frames)
        backwards = hypervisor.read_frames(guest.domid, frames[::-1].copy())

    assert np.array_equal(forwards, backwards[::-1])


def test_reading_no_frame_gives_nothing(hypervisor: Hypervisor, guest: GuestMemory) -> None:
    contents = hypervisor.read_frames(guest.domid, np.empty(0, dtype=np.uint64))

    assert contents.shape == (0, WORDS_PER_PAGE)


def test_what_was_read_is_a_copy(hypervisor: Hypervisor, guest: GuestMemory) -> None:
    page = guest.data_pages()[0]
    with paused(hypervisor, guest.domid):
        before = guest.read(page.mfn)
        guest.read(page.mfn)[:] = 0
        after = guest.read(page.mfn)

    assert np.array_equal(before, after)


def test_written_words_are_read_back_and_nothing_else_changes(
    hypervisor: Hypervisor, guest: GuestMemory
) -> None:
    page = guest.data_pages()[0]
    words = np.array([0x0123_4567_89AB_CDEF, 0xFEDC_BA98_7654_3210], dtype=np.uint64)
    with standing_still(hypervisor, guest.domid):
        before = guest.read(page.mfn)
        write_words(hypervisor, guest.domid, page.mfn, 9, words)
        written = guest.read(page.mfn)
        write_words(hypervisor, guest.domid, page.mfn, 9, before[9:11])
        restored = guest.read(page.mfn)

    assert written[9:11].tolist() == words.tolist()
    assert np.array_equal(np.delete(written, [9, 10]), np.delete(before, [9, 10]))
    assert np.array_equal(restored, before)


def test_page_table_cannot_be_written_to(hypervisor: Hypervisor, guest: GuestMemory) -> None:
    with standing_still(hypervisor, guest.domid):
        table = Mfn(int(guest.tables(1)[0]))
        before = guest.read(table)
        with pytest.raises(XenError):
            write_words(hypervisor, guest.domid, table, 0, before[:1])
        assert np.array_equal(guest.read(table), before)


def test_words_beyond_the_end_of_a_frame_are_refused(
    hypervisor: Hypervisor, guest: GuestMemory
) -> None:
    page = guest.data_pages()[0]

    with pytest.raises(XenError) as caught:
        write_words(hypervisor, guest.domid, page.mfn, 511, np.zeros(2, dtype=np.uint64))
    assert caught.value.errno == EINVAL


def test_contents_are_written_before_the_words(hypervisor: Hypervisor, guest: GuestMemory) -> None:
    first, second, third = (page.mfn for page in guest.data_pages()[:3])
    mfns = frames_of([second, first])
    slots = PteWrites(
        tables=frames_of([first, third]), indexes=frames_of([7, 511]), values=frames_of([77, 78])
    )
    with standing_still(hypervisor, guest.domid):
        before = [guest.read(mfn) for mfn in (first, second, third)]
        contents = np.stack([before[1], before[0]]) ^ np.uint64(5)
        hypervisor.write_frames(guest.domid, mfns, contents, slots)
        written = [guest.read(mfn) for mfn in (first, second, third)]
        all_three = frames_of([first, second, third])
        nothing = PteWrites.of([])
        hypervisor.write_frames(guest.domid, all_three, np.stack(before), nothing)
        restored = [guest.read(mfn) for mfn in (first, second, third)]

    expected = [before[0] ^ np.uint64(5), before[1] ^ np.uint64(5), before[2].copy()]
    expected[0][7], expected[2][511] = 77, 78
    assert np.array_equal(np.stack(written), np.stack(expected))
    assert np.array_equal(np.stack(restored), np.stack(before))


def test_frame_of_another_domain_cannot_be_read(hypervisor: Hypervisor, guest: GuestMemory) -> None:
    theirs = hypervisor.domain(DOM0).shared_info

    with pytest.raises(XenError):
        hypervisor.read_frames(guest.domid, one(theirs))


def test_frame_beyond_the_hosts_memory_cannot_be_read(
    hypervisor: Hypervisor, guest: GuestMemory
) -> None:
    with pytest.raises(XenError):
        hypervisor.read_frames(guest.domid, one(hypervisor.max_mfn() + (1 << 20)))


def test_domain_that_is_gone_has_no_memory(hypervisor: Hypervisor, guest: GuestMemory) -> None:
    page = guest.data_pages()[0]

    with pytest.raises(PortError):
        hypervisor.read_frames(UNUSED, one(page.mfn))
    with pytest.raises(PortError):
        hypervisor.page_types(UNUSED, one(page.mfn))
    with pytest.raises(PortError):
        hypervisor.granted_frames(UNUSED)


def test_page_types_tell_tables_of_every_level_from_data(
    hypervisor: Hypervisor, guest: GuestMemory
) -> None:
    with standing_still(hypervisor, guest.domid):
        own = guest.own_frames()
        types = [decode_page_type(word) for word in hypervisor.page_types(guest.domid, own)]

    kinds = {found.kind for found in types}
    assert kinds >= {PageKind.DATA, PageKind.L1, PageKind.L2, PageKind.L3, PageKind.L4}
    assert any(found.kind is PageKind.L4 and found.pinned for found in types)
    assert not any(found.kind is PageKind.DATA and found.pinned for found in types)


def test_root_of_the_p2m_is_an_l4_table(hypervisor: Hypervisor, guest: GuestMemory) -> None:
    with standing_still(hypervisor, guest.domid):
        root = int(guest.shared_info()[3]) >> PAGE_SHIFT
        word = int(hypervisor.page_types(guest.domid, one(root))[0])

    assert decode_page_type(word).kind is PageKind.L4


def test_frame_of_another_domain_has_no_type(hypervisor: Hypervisor, guest: GuestMemory) -> None:
    theirs = hypervisor.domain(DOM0).shared_info

    assert not_the_domains(int(hypervisor.page_types(guest.domid, one(theirs))[0]))


def test_shared_info_has_no_type(hypervisor: Hypervisor, guest: GuestMemory) -> None:
    shared_info = hypervisor.domain(guest.domid).shared_info

    assert not_the_domains(int(hypervisor.page_types(guest.domid, one(shared_info))[0]))


def test_console_ring_is_granted(hypervisor: Hypervisor, host: ContractHost) -> None:
    granted = hypervisor.granted_frames(host.pv)

    assert host.console_ring(host.pv) in granted.tolist()
    assert np.array_equal(granted, np.unique(granted))


def test_entry_can_be_cleared_and_restored(hypervisor: Hypervisor, guest: GuestMemory) -> None:
    with standing_still(hypervisor, guest.domid):
        page = guest.data_pages()[0]
        entry = page.entries[0]
        before = guest.read(entry.table)
        set_ptes(hypervisor, guest.domid, page.cleared)
        cleared = guest.read(entry.table)
        set_ptes(hypervisor, guest.domid, page.entries)
        restored = guest.read(entry.table)

    assert int(cleared[entry.index]) == 0
    assert np.array_equal(restored, before)


def test_refused_entry_says_how_many_took_effect_before_it(
    hypervisor: Hypervisor, guest: GuestMemory
) -> None:
    theirs = hypervisor.domain(DOM0).shared_info
    with standing_still(hypervisor, guest.domid):
        page = guest.data_pages()[0]
        entry = page.entries[0]
        foreign = PteWrite(
            table=entry.table, index=entry.index, value=theirs << PAGE_SHIFT | PTE_PRESENT
        )
        try:
            with pytest.raises(XenError) as caught:
                set_ptes(hypervisor, guest.domid, [page.cleared[0], foreign, entry])
            left = int(guest.read(entry.table)[entry.index])
        finally:
            set_ptes(hypervisor, guest.domid, [entry])

    assert caught.value.done == 1
    assert left == 0


def test_table_of_another_domain_cannot_be_updated(
    hypervisor: Hypervisor, guest: GuestMemory
) -> None:
    theirs = hypervisor.domain(DOM0).shared_info
    with standing_still(hypervisor, guest.domid), pytest.raises(XenError) as caught:
        set_ptes(hypervisor, guest.domid, [PteWrite(table=theirs, index=0, value=0)])
    assert caught.value.done == 0


def test_page_table_cannot_be_mapped_writable(hypervisor: Hypervisor, guest: GuestMemory) -> None:
    with standing_still(hypervisor, guest.domid):
        entry = guest.data_pages()[0].entries[0]
        table = int(guest.tables(2)[0])
        bad = PteWrite(
            table=entry.table, index=entry.index, value=table << PAGE_SHIFT | PTE_PRESENT | PTE_RW
        )
        with pytest.raises(XenError):
            set_ptes(hypervisor, guest.domid, [bad])
        assert int(guest.read(entry.table)[entry.index]) == entry.value


def test_xens_own_slots_of_an_l4_cannot_be_updated(
    hypervisor: Hypervisor, guest: GuestMemory
) -> None:
    with standing_still(hypervisor, guest.domid):
        root = Mfn(int(guest.tables(4)[0]))
        with pytest.raises(XenError):
            set_ptes(
                hypervisor, guest.domid, [PteWrite(table=root, index=L4_XEN_SLOTS.start, value=0)]
            )


def test_every_root_maps_itself_in_xens_slots(hypervisor: Hypervisor, guest: GuestMemory) -> None:
    """Why a scan for references has to leave these slots out."""
    with standing_still(hypervisor, guest.domid):
        roots = guest.tables(4).tolist()
        own = [int(guest.read(root)[258]) for root in roots]

    assert [entry >> PAGE_SHIFT & (1 << 40) - 1 for entry in own] == roots
