from __future__ import annotations

import ctypes
import errno

import pytest

from pgofflined.core.errors import XenError
from pgofflined.core.frames import Domid, Mfn
from pgofflined.ports import PteWrite
from pgofflined.xen.abi.xen import HYPERVISOR_mmu_update, MmuUpdate
from pgofflined.xen.pagetables import PageTables

from .recorder import calling, failing


def writes(count: int) -> list[PteWrite]:
    return [PteWrite(table=Mfn(0x100 + n), index=n % 512, value=0x8000 | n) for n in range(count)]


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
    PageTables(calling(xen)[0]).update_ptes(Domid(5), writes(1100))
    assert len(xen.foreigndoms) == 3
    assert xen.taken == [((0x100 + n) << 12 | n % 512 * 8, 0x8000 | n) for n in range(1100)]


@pytest.mark.parametrize("refused", [0, 3, 511, 512, 777])
def test_refusal_tells_what_was_done_and_which_table(refused: int) -> None:
    with pytest.raises(XenError) as caught:
        PageTables(calling(MmuUpdates(refused))[0]).update_ptes(Domid(5), writes(800))
    assert (caught.value.done, caught.value.mfn) == (refused, 0x100 + refused)
    assert (caught.value.errno, caught.value.domid) == (errno.EINVAL, 5)


def test_index_outside_a_table_is_refused_before_anything_is_written() -> None:
    xen = MmuUpdates()
    with pytest.raises(XenError):
        PageTables(calling(xen)[0]).update_ptes(
            Domid(5), [*writes(1), PteWrite(table=Mfn(1), index=512, value=0)]
        )
    assert xen.taken == []


def test_nothing_to_write_asks_nothing() -> None:
    xen = MmuUpdates()
    PageTables(calling(xen)[0]).update_ptes(Domid(5), [])
    assert xen.foreigndoms == []
