from __future__ import annotations

from errno import EINVAL

import numpy as np
import pytest

from pgofflined.core.frames import PAGE_SHIFT
from pgofflined.sim.errors import InvariantViolation, Refused
from pgofflined.sim.layout import DIRECT_MAP, USER
from pgofflined.sim.pagetables import PageFault, mapped_frames, walk
from pgofflined.sim.scenarios import SmallHost, small_host


@pytest.fixture
def small() -> SmallHost:
    return small_host()


def test_new_host_is_in_order(small: SmallHost) -> None:
    small.host.check_invariants()


def test_guest_reaches_a_user_page_by_two_addresses(small: SmallHost) -> None:
    guest, contents = small.host.pv(small.pv), small.host.frames.contents
    process = guest.layout.processes[0]
    pfn = process.pages[-1]
    root = guest.mfn(process.user_root)
    user = mapped_frames(contents, root, USER + ((len(process.pages) - 1) << PAGE_SHIFT), 1)

    assert user[0] == guest.mfn(pfn)
    assert mapped_frames(contents, guest.root, DIRECT_MAP + (pfn << PAGE_SHIFT), 1)[0] == user[0]
    with pytest.raises(PageFault):
        walk(contents, root, DIRECT_MAP)


def test_p2m_has_missing_identity_and_foreign_entries(small: SmallHost) -> None:
    guest = small.host.pv(small.pv)
    p2m, layout = guest.p2m(), guest.layout

    assert all(int(p2m[pfn]) == 2**64 - 1 for pfn in layout.missing)
    assert all(int(p2m[pfn]) >> 62 == 1 for pfn in layout.identity)
    assert all(int(p2m[pfn]) >> 62 == 2 for pfn in layout.foreign)
    assert len(p2m) == layout.max_pfn


def test_frame_lists_name_the_frames_of_the_p2m_list(small: SmallHost) -> None:
    guest, contents = small.host.pv(small.pv), small.host.frames.contents
    shared_info = small.host.domain(small.pv).shared_info
    top = contents.word(shared_info, 3088 // 8 + 1)
    middle = contents.word(top, 0)

    for chunk, pfn in enumerate(guest.layout.p2m_list):
        assert contents.word(middle, chunk) == guest.mfn(pfn)


def test_view_shows_changed_contents(small: SmallHost) -> None:
    before = small.host.snapshot(small.pv)
    pfn = small.host.pv(small.pv).plain_pfns()[0]
    small.host.frames.contents.write(small.host.frame_of(small.pv, pfn), 5, np.ones(1, "u8"))

    assert before.differences(small.host.snapshot(small.pv)) == [f"contents of pfn {pfn:#x}"]


def test_view_shows_a_lost_entry(small: SmallHost) -> None:
    guest = small.host.pv(small.pv)
    before = small.host.snapshot(small.pv)
    slot = walk(small.host.frames.contents, guest.root, DIRECT_MAP + (9 << PAGE_SHIFT))
    small.host.frames.contents.write(slot.table, slot.index, np.zeros(1, "u8"))

    found = before.differences(small.host.snapshot(small.pv))
    assert any("only one maps 0x888000009000" in line for line in found)


def test_view_shows_changed_flags(small: SmallHost) -> None:
    guest = small.host.pv(small.pv)
    before = small.host.snapshot(small.pv)
    slot = walk(small.host.frames.contents, guest.root, DIRECT_MAP + (9 << PAGE_SHIFT))
    word = np.array([slot.entry ^ 2], dtype=np.uint64)
    small.host.frames.contents.write(slot.table, slot.index, word)

    found = before.differences(small.host.snapshot(small.pv))
    assert any("maps otherwise" in line for line in found)


def test_view_shows_swapped_pages(small: SmallHost) -> None:
    guest = small.host.pv(small.pv)
    before = small.host.snapshot(small.pv)
    first, second = guest.plain_pfns()[:2]
    one, other = guest.mfn(first), guest.mfn(second)
    guest.lie(first, other)
    guest.lie(second, one)
    after = small.host.snapshot(small.pv)

    assert before.differences(after)
    assert before.moved(after) == [first, second]


def test_books_show_a_lost_reference(small: SmallHost) -> None:
    small.host.frames.refs[small.host.frame_of(small.pv, 9)] += 1

    with pytest.raises(InvariantViolation, match="references"):
        small.host.check_invariants()


def test_books_show_a_p2m_that_contradicts_the_m2p(small: SmallHost) -> None:
    guest = small.host.pv(small.pv)
    guest.lie(9, guest.mfn(10))

    with pytest.raises(InvariantViolation, match="pfn 0x9"):
        small.host.check_invariants()


def test_books_show_a_free_frame_with_an_owner(small: SmallHost) -> None:
    small.host.frames.m2p[small.host.frames.state == 3] = 5

    with pytest.raises(InvariantViolation, match="free and in use"):
        small.host.check_invariants()


def test_pinned_table_is_not_pinned_twice(small: SmallHost) -> None:
    guest = small.host.pv(small.pv)
    with pytest.raises(Refused) as caught:
        small.host.references.pin(guest.mfn(guest.layout.root), small.pv, 4)
    assert caught.value.errno == EINVAL
