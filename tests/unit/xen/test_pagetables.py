from __future__ import annotations

import ctypes
import errno

import pytest

from pgofflined.core.errors import XenError
from pgofflined.core.frames import Domid, Mfn
from pgofflined.core.moves import PteWrite, PteWrites, frames_of
from pgofflined.xen.abi.xen import (
    HYPERVISOR_mmu_update,
    HYPERVISOR_mmuext_op,
    MmuextOp,
    MmuUpdate,
)
from pgofflined.xen.pagetables import PageTables

from .recorder import calling, failing


def writes(count: int) -> PteWrites:
    return PteWrites.of(
        PteWrite(table=Mfn(0x100 + n), index=n % 512, value=0x8000 | n) for n in range(count)
    )


class MmuUpdates:
    """Xen's side: takes requests in order, refuses the one with this number."""

    def __init__(self, refuse: int | None = None) -> None:
        self.refuse = refuse
        self.taken: list[tuple[int, int]] = []
        self.foreigndoms: list[int] = []

    def __call__(self, number: int, arguments: tuple[int, ...]) -> int:
        assert number == HYPERVISOR_mmu_update
        address, count, done, foreigndom = arguments
        self.foreigndoms.append(foreigndom)
        counter = ctypes.c_uint32.from_address(done)
        assert counter.value == 0
        for request in (MmuUpdate * count).from_address(address):
            if len(self.taken) == self.refuse:
                raise failing(errno.EINVAL)
            self.taken.append((request.ptr, request.val))
            counter.value += 1
        return 0


def test_the_table_and_the_frames_are_the_domains() -> None:
    xen = MmuUpdates()
    PageTables(calling(xen)[0]).update_ptes(Domid(5), writes(2))
    # PFD is the domid plus one in the upper half; without it Xen takes the table for dom0's.
    assert xen.foreigndoms == [6 << 16 | 5]
    assert xen.taken == [(0x100000, 0x8000), (0x101008, 0x8001)]


def test_many_writes_go_in_batches_in_order() -> None:
    xen = MmuUpdates()
    PageTables(calling(xen)[0]).update_ptes(Domid(5), writes(9000))
    assert len(xen.foreigndoms) == 3
    assert xen.taken == [((0x100 + n) << 12 | n % 512 * 8, 0x8000 | n) for n in range(9000)]


@pytest.mark.parametrize("refused", [0, 3, 4095, 4096, 4777])
def test_refusal_tells_what_was_done_and_which_table(refused: int) -> None:
    with pytest.raises(XenError) as caught:
        PageTables(calling(MmuUpdates(refused))[0]).update_ptes(Domid(5), writes(5000))
    assert (caught.value.done, caught.value.mfn) == (refused, 0x100 + refused)
    assert (caught.value.errno, caught.value.domid) == (errno.EINVAL, 5)


def test_index_outside_a_table_is_refused_before_anything_is_written() -> None:
    xen = MmuUpdates()
    with pytest.raises(XenError):
        PageTables(calling(xen)[0]).update_ptes(
            Domid(5),
            PteWrites.of(
                [
                    PteWrite(table=Mfn(1), index=511, value=0),
                    PteWrite(table=Mfn(1), index=512, value=0),
                ]
            ),
        )
    assert xen.taken == []


def test_nothing_to_write_asks_nothing() -> None:
    xen = MmuUpdates()
    PageTables(calling(xen)[0]).update_ptes(Domid(5), writes(0))
    assert xen.foreigndoms == []


def test_tables_are_pinned_at_their_level_and_unpinned_in_their_domain() -> None:
    asked: list[tuple[int, ...]] = []

    def answer(number: int, arguments: tuple[int, ...]) -> int:
        address, count, done, foreigndom = arguments
        assert number == HYPERVISOR_mmuext_op
        # Of mmuext_op the upper half of foreigndom means nothing.
        requests = (MmuextOp * count).from_address(address)
        asked.extend((request.cmd, request.arg1, foreigndom) for request in requests)
        ctypes.c_uint32.from_address(done).value = count
        return 0

    tables = PageTables(calling(answer)[0])
    for level in (1, 2, 3, 4):
        tables.pin_tables(Domid(5), frames_of([0xABC, 0xABD]), level)
    tables.unpin_tables(Domid(5), frames_of([0xABC, 0xABD]))
    tables.unpin_tables(Domid(5), frames_of([]))
    assert asked == [(command, mfn, 5) for command in (0, 1, 2, 3, 4) for mfn in (0xABC, 0xABD)]


def test_a_table_that_cannot_be_pinned_is_named() -> None:
    def answer(_number: int, arguments: tuple[int, ...]) -> int:
        ctypes.c_uint32.from_address(arguments[2]).value = 1
        raise failing(errno.EINVAL)

    with pytest.raises(XenError) as caught:
        PageTables(calling(answer)[0]).pin_tables(Domid(5), frames_of([0xABC, 0xABD]), 1)
    assert (caught.value.errno, caught.value.mfn, caught.value.domid) == (errno.EINVAL, 0xABD, 5)
    assert caught.value.done == 1
