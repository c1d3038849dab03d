"""XENMEM_exchange: what it refuses, and what it leaves."""

from __future__ import annotations

from errno import EINVAL

import numpy as np
import pytest

from pgofflined.core.errors import PortError, XenError
from pgofflined.core.frames import DOM0, Domid, Mfn, Pfn
from pgofflined.core.offline import OfflineState
from pgofflined.ports import Hypervisor
from tests.single import set_ptes, swap, write_words

from .guestmemory import DataPage, GuestMemory, assert_runs, standing_still
from .hosts import ContractHost
from .moving import move_one


def test_page_that_is_mapped_is_refused_and_left_as_it_was(
    hypervisor: Hypervisor, guest: GuestMemory
) -> None:
    with standing_still(hypervisor, guest.domid):
        page = guest.data_pages()[0]
        before = guest.read(page.mfn)
        with pytest.raises(XenError) as caught:
            swap(hypervisor, guest.domid, page.mfn, page.pfn)
        after = guest.read(page.mfn)
        mapped = guest.entries_of(np.array([page.mfn], dtype=np.uint64))[page.mfn]

    assert caught.value.errno == EINVAL
    assert np.array_equal(before, after)
    assert tuple(mapped) == page.entries
    assert hypervisor.m2p(page.mfn) == page.pfn
    assert hypervisor.query(page.mfn) == OfflineState.ONLINE


def test_one_entry_that_is_left_is_enough_to_refuse(
    hypervisor: Hypervisor, guest: GuestMemory
) -> None:
    with standing_still(hypervisor, guest.domid):
        page = max(guest.data_pages(), key=lambda page: len(page.entries))
        try:
            set_ptes(hypervisor, guest.domid, page.cleared[:-1])
            with pytest.raises(XenError) as caught:
                swap(hypervisor, guest.domid, page.mfn, page.pfn)
        finally:
            set_ptes(hypervisor, guest.domid, page.entries)

    assert caught.value.errno == EINVAL


def test_a_page_is_seen_through_a_window_as_it_is_and_is_not_exchanged_meanwhile(
    hypervisor: Hypervisor, guest: GuestMemory
) -> None:
    with standing_still(hypervisor, guest.domid):
        page = guest.data_pages()[0]
        other = Mfn(int(guest.tables(1)[0]))
        before = guest.read(page.mfn)
        frames = np.array([other, page.mfn], dtype=np.uint64)
        try:
            set_ptes(hypervisor, guest.domid, page.cleared)
            with hypervisor.window(guest.domid, frames) as window:
                first = window.read(np.array([1]))[0]
                write_words(hypervisor, guest.domid, page.mfn, 7, np.array([77], dtype=np.uint64))
                second = window.read(np.array([1, 0]))
                write_words(hypervisor, guest.domid, page.mfn, 0, before)
                with pytest.raises(XenError) as caught:
                    swap(hypervisor, guest.domid, page.mfn, page.pfn)
            table = guest.read(other)
        finally:
            set_ptes(hypervisor, guest.domid, page.entries)

    assert np.array_equal(first, before)
    assert second[0][7] == 77
    assert np.array_equal(second[1], table)
    # What was read is a copy: it outlives the window, and later changes do not reach it.
    assert np.array_equal(np.delete(second[0], 7), np.delete(before, 7))
    assert caught.value.errno == EINVAL


def test_words_and_differences_are_seen_through_a_window(
    hypervisor: Hypervisor, guest: GuestMemory
) -> None:
    pages = [page.mfn for page in guest.data_pages()[:4]]
    with standing_still(hypervisor, guest.domid):
        frames = np.array(pages, dtype=np.uint64)
        before = hypervisor.read_frames(guest.domid, frames)
        with hypervisor.window(guest.domid, frames) as window:
            words = window.words(np.array([3, 0, 3]), np.array([511, 0, 7], dtype=np.uint64))
            thought = before.copy()
            thought[1, 511] ^= np.uint64(1)
            differing = window.differing(np.arange(4), thought)
            backwards = window.differing(np.array([3, 1]), thought[[3, 1]])

    assert words.tolist() == [before[3, 511], before[0, 0], before[3, 7]]
    assert differing.tolist() == [False, True, False, False]
    assert backwards.tolist() == [False, True]


def test_window_on_a_frame_of_another_domain_is_refused(
    hypervisor: Hypervisor, guest: GuestMemory
) -> None:
    frames = np.array([hypervisor.domain(DOM0).shared_info], dtype=np.uint64)
    with pytest.raises(XenError), hypervisor.window(guest.domid, frames):
        pass


def test_page_table_is_refused(hypervisor: Hypervisor, guest: GuestMemory) -> None:
    with standing_still(hypervisor, guest.domid):
        table = Mfn(int(guest.tables(1)[0]))
        pfn = hypervisor.m2p(table)
        assert pfn is not None
        with pytest.raises(XenError) as caught:
            swap(hypervisor, guest.domid, table, pfn)

    assert caught.value.errno == EINVAL


def test_shared_info_is_refused(hypervisor: Hypervisor, guest: GuestMemory) -> None:
    shared_info = hypervisor.domain(guest.domid).shared_info
    with standing_still(hypervisor, guest.domid), pytest.raises(XenError) as caught:
        swap(hypervisor, guest.domid, shared_info, Pfn(0))
    assert caught.value.errno == EINVAL


def test_frame_of_another_domain_is_refused(hypervisor: Hypervisor, guest: GuestMemory) -> None:
    theirs = hypervisor.domain(DOM0).shared_info
    with standing_still(hypervisor, guest.domid), pytest.raises(XenError) as caught:
        swap(hypervisor, guest.domid, theirs, Pfn(0))
    assert caught.value.errno == EINVAL


def test_console_ring_that_dom0_has_mapped_is_refused(
    hypervisor: Hypervisor, guest: GuestMemory, host: ContractHost
) -> None:
    ring = host.console_ring(guest.domid)
    frame = np.array([ring], dtype=np.uint64)
    with standing_still(hypervisor, guest.domid):
        pfn = hypervisor.m2p(Mfn(ring))
        assert pfn is not None
        entries = tuple(guest.entries_of(frame).get(ring, ()))
        page = DataPage(mfn=Mfn(ring), pfn=pfn, entries=entries)
        try:
            set_ptes(hypervisor, guest.domid, page.cleared)
            with pytest.raises(XenError) as caught:
                swap(hypervisor, guest.domid, page.mfn, pfn)
        finally:
            set_ptes(hypervisor, guest.domid, page.entries)

    assert caught.value.errno == EINVAL


def test_domain_that_is_gone_has_nothing_to_exchange(
    hypervisor: Hypervisor, guest: GuestMemory
) -> None:
    page = guest.data_pages()[0]

    with pytest.raises(PortError):
        swap(hypervisor, Domid(0x7000), page.mfn, page.pfn)


def test_unmapped_page_gets_a_fresh_frame_that_the_m2p_knows(
    hypervisor: Hypervisor, guest: GuestMemory
) -> None:
    with standing_still(hypervisor, guest.domid):
        moved = move_one(hypervisor, guest)

    assert moved.new != moved.page.mfn
    assert hypervisor.m2p(moved.new) == moved.page.pfn
    assert hypervisor.m2p(moved.page.mfn) is None
    assert hypervisor.query(moved.new) == OfflineState.ONLINE
    assert_runs(hypervisor, guest.domid)


def test_old_frame_is_the_guests_no_more(hypervisor: Hypervisor, guest: GuestMemory) -> None:
    with standing_still(hypervisor, guest.domid):
        moved = move_one(hypervisor, guest)
        with pytest.raises(XenError):
            guest.read(moved.page.mfn)


def test_moved_page_has_the_contents_and_the_entries_of_the_old(
    hypervisor: Hypervisor, guest: GuestMemory
) -> None:
    with standing_still(hypervisor, guest.domid):
        moved = move_one(hypervisor, guest)
        frame = np.array([moved.new], dtype=np.uint64)
        contents, entries = guest.read(moved.new), guest.entries_of(frame)[moved.new]
        p2m = guest.p2m()

    assert np.array_equal(contents, moved.contents)
    assert entries == moved.page.moved_to(moved.new)
    assert int(p2m[moved.page.pfn]) == moved.new


def test_size_of_the_guest_stays(hypervisor: Hypervisor, guest: GuestMemory) -> None:
    before = hypervisor.domain(guest.domid).tot_pages
    with standing_still(hypervisor, guest.domid):
        move_one(hypervisor, guest)

    assert hypervisor.domain(guest.domid).tot_pages == before
