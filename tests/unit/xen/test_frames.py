from __future__ import annotations

import ctypes
import errno
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import pytest

from pgofflined.core.errors import PortError, XenError
from pgofflined.core.frames import Domid, Mfn, Pfn
from pgofflined.core.offline import OfflineFlag, OfflineReply, OfflineState, OnlineFlag
from pgofflined.core.xenversion import XenVersion
from pgofflined.xen.abi.memory import (
    MachphysMfnList,
    XENMEM_machphys_mfn_list,
    XENMEM_maximum_ram_page,
)
from pgofflined.xen.abi.sysctl import (
    PageOfflineOp,
    Physinfo,
    XEN_SYSCTL_page_offline_op,
    XEN_SYSCTL_physinfo,
    sysctl_page_offline,
    sysctl_page_online,
    sysctl_query_page_offline,
)
from pgofflined.xen.abi.xen import DOMID_XEN, HYPERVISOR_memory_op, HYPERVISOR_sysctl
from pgofflined.xen.control import Control
from pgofflined.xen.frames import Frames

from .recorder import INTERFACE, Answer, calling, failing, put, sysctl_at

MFN = Mfn(0x12345)
_Result = TypeVar("_Result")


class Anywhere:
    """A placement that counts; the real one has tests of its own."""

    def __init__(self) -> None:
        self.runs = 0

    def run(self, call: Callable[[], _Result]) -> _Result:
        self.runs += 1
        return call()


class M2pPages:
    """DOMID_XEN's frames, each holding what a test puts there."""

    def __init__(self, entries: dict[int, list[int]] | None = None) -> None:
        self.entries = entries or {}
        self.mapped: list[int] = []

    @contextmanager
    def frames(self, domid: Domid, mfns: Sequence[int]) -> Iterator[int]:
        assert domid == DOMID_XEN
        assert len(mfns) == 1
        self.mapped += mfns
        page = (ctypes.c_uint64 * 512)(*self.entries[mfns[0]])
        yield ctypes.addressof(page)


def frames_over(
    answer: Answer, *, place: Anywhere | None = None, pages: M2pPages | None = None
) -> Frames:
    call, _ = calling(answer)
    return Frames(
        call=call,
        control=Control(call, INTERFACE),
        pages=pages or M2pPages(),  # type: ignore[arg-type]
        placement=place or Anywhere(),  # type: ignore[arg-type]
        version=XenVersion(4, 20, 4),
    )


def page_op(command: int, word: int | None, error: int = 0) -> Answer:
    """Xen's side of page_offline_op: fills the word, then fails if so asked."""

    def answer(number: int, arguments: tuple[int, ...]) -> int:
        assert number == HYPERVISOR_sysctl
        request, place = sysctl_at(arguments[0])
        assert (request.cmd, request.interface_version) == (XEN_SYSCTL_page_offline_op, 0x15)
        operation = PageOfflineOp.from_address(place)
        assert (operation.cmd, operation.start, operation.end) == (command, MFN, MFN)
        if word is not None:
            ctypes.c_uint32.from_address(operation.status).value = word
        if error:
            raise failing(error)
        return 0

    return answer


@pytest.mark.parametrize(
    ("word", "state"),
    [
        (0, OfflineState.ONLINE),
        (1 << 3, OfflineState.OFFLINE_PENDING),
        (1 << 1 | 1 << 4, OfflineState.OFFLINED | OfflineState.BROKEN),
    ],
)
def test_query_asks_for_one_frame(word: int, state: OfflineState) -> None:
    place = Anywhere()
    assert frames_over(page_op(sysctl_query_page_offline, word), place=place).query(MFN) == state
    assert place.runs == 0


def test_offline_names_the_owner_and_runs_in_its_place() -> None:
    place = Anywhere()
    host = frames_over(page_op(sysctl_page_offline, 7 << 16 | 1 << 12 | 1 << 2), place=place)
    assert host.offline(MFN) == OfflineReply(
        flags=OfflineFlag.OWNED | OfflineFlag.PENDING, owner=Domid(7)
    )
    assert place.runs == 1


def test_offline_of_xens_image_is_an_answer() -> None:
    word = 0x7FF2 << 16 | 1 << 8 | 1 << 3
    reply = frames_over(page_op(sysctl_page_offline, word, errno.EPERM)).offline(MFN)
    assert reply.flags == OfflineFlag.XENPAGE | OfflineFlag.FAILED
    assert reply.owner == 0x7FF2


def test_offline_of_what_is_no_ram_is_an_answer() -> None:
    reply = frames_over(page_op(sysctl_page_offline, 1 << 11 | 1 << 3, errno.EINVAL)).offline(MFN)
    assert reply.flags == OfflineFlag.NOT_CONV_RAM | OfflineFlag.FAILED


@pytest.mark.parametrize("word", [None, 0x01010101, 0])
def test_offline_of_no_frame_of_the_host_is_an_error(word: int | None) -> None:
    with pytest.raises(XenError) as caught:
        frames_over(page_op(sysctl_page_offline, word, errno.EINVAL)).offline(MFN)
    assert (caught.value.errno, caught.value.mfn) == (errno.EINVAL, MFN)


def test_success_without_a_word_is_an_error() -> None:
    with pytest.raises(PortError, match="no status"):
        frames_over(page_op(sysctl_query_page_offline, 0x01010101)).query(MFN)


def test_unknown_bits_are_an_error_of_the_port() -> None:
    with pytest.raises(PortError, match="0x4000 about mfn 0x12345"):
        frames_over(page_op(sysctl_query_page_offline, 1 << 14)).query(MFN)


def test_online_of_a_broken_frame_is_an_answer() -> None:
    host = frames_over(page_op(sysctl_page_online, 1 << 13 | 1 << 3, errno.EINVAL))
    assert host.online(MFN) == OnlineFlag.FAILED | OnlineFlag.BROKEN


@pytest.mark.parametrize("mfn", [-1, 1 << 32])
def test_frames_that_the_call_cannot_carry_are_not_asked_for(mfn: int) -> None:
    def answer(_number: int, _arguments: tuple[int, ...]) -> int:
        raise AssertionError("asked")

    with pytest.raises(XenError):
        frames_over(answer).offline(Mfn(mfn))


def test_free_frames_are_without_the_claimed_ones() -> None:
    def answer(_number: int, arguments: tuple[int, ...]) -> int:
        request, place = sysctl_at(arguments[0])
        assert request.cmd == XEN_SYSCTL_physinfo
        put(place, Physinfo(free_pages=1000, outstanding_pages=300))
        return 0

    assert frames_over(answer).free_frames() == 700


CHUNK_FRAMES = (2 << 20) // 8


def m2p_host(chunks: list[int], pages: M2pPages) -> Frames:
    def answer(number: int, arguments: tuple[int, ...]) -> int:
        assert number == HYPERVISOR_memory_op
        if arguments[0] == XENMEM_maximum_ram_page:
            return len(chunks) * CHUNK_FRAMES
        assert arguments[0] == XENMEM_machphys_mfn_list
        request = MachphysMfnList.from_address(arguments[1])
        assert request.max_extents == len(chunks)
        listed = (ctypes.c_uint64 * len(chunks))(*chunks)
        ctypes.memmove(request.extent_start, listed, ctypes.sizeof(listed))
        request.nr_extents = len(chunks)
        return 0

    return frames_over(answer, pages=pages)


def test_highest_frame_is_the_one_before_xens_answer() -> None:
    assert m2p_host([0x1000], M2pPages()).max_mfn() == CHUNK_FRAMES - 1


def test_m2p_entry_is_read_from_its_chunk_and_page() -> None:
    mfn = Mfn(CHUNK_FRAMES + 3 * 512 + 5)
    pages = M2pPages({0x2003: [0] * 5 + [0x777] + [0] * 506})
    assert m2p_host([0x1000, 0x2000], pages).m2p(mfn) == Pfn(0x777)
    assert pages.mapped == [0x2003]


@pytest.mark.parametrize("entry", [2**64 - 1, 2**64 - 2, 0x5555555555555555, 1 << 40])
def test_invalid_shared_and_unbelievable_entries_are_none(entry: int) -> None:
    pages = M2pPages({0x1000: [entry] * 512})
    assert m2p_host([0x1000], pages).m2p(Mfn(1)) is None


@pytest.mark.parametrize("chunks", [[0, 0x2000], [0x1000, 0x1000, 0x3000]])
def test_hole_of_the_m2p_is_none_and_not_mapped(chunks: list[int]) -> None:
    pages = M2pPages()
    hole = 0 if chunks[0] == 0 else 1
    assert m2p_host(chunks, pages).m2p(Mfn(hole * CHUNK_FRAMES + 9)) is None
    assert pages.mapped == []


def test_frame_beyond_the_m2p_is_none() -> None:
    assert m2p_host([0x1000], M2pPages()).m2p(Mfn(5 * CHUNK_FRAMES)) is None


def memory(words: dict[int, int], *, count: int, holes: range) -> Answer:
    """Xen's side of queries over a host's frames; it stops at what is no memory."""

    def answer(number: int, arguments: tuple[int, ...]) -> int:
        if number == HYPERVISOR_memory_op:
            return count
        _, place = sysctl_at(arguments[0])
        operation = PageOfflineOp.from_address(place)
        assert operation.cmd == sysctl_query_page_offline
        assert operation.end < count, "no frame beyond the host's"
        asked = range(operation.start, operation.end + 1)
        told = (ctypes.c_uint32 * len(asked)).from_address(operation.status)
        told[:] = [0x01010101] * len(asked)
        for index, mfn in enumerate(asked):
            if mfn in holes:
                raise failing(errno.EINVAL)
            told[index] = words.get(mfn, 0)
        return 0

    return answer


def test_all_frames_are_found_that_xen_holds_back() -> None:
    words = {0: 1 << 3, 1023: 1 << 2, 1024: 1 << 1 | 1 << 4, 1999: 1 << 3, 5002: 1 << 3}
    host = frames_over(memory(words, count=5003, holes=range(2000, 4100)))
    found = host.held_back()
    assert {mfn: int(state.value) for mfn, state in found.items()} == words


def test_a_large_hole_costs_few_calls_and_hides_nothing_behind_it() -> None:
    asked = 0
    answer = memory({0: 1 << 3, 9_001: 1 << 3, 9_300: 1 << 3}, count=9_301, holes=range(1, 9_001))

    def counted(number: int, arguments: tuple[int, ...]) -> int:
        nonlocal asked
        asked += 1
        return answer(number, arguments)

    assert set(frames_over(counted).held_back()) == {0, 9_001, 9_300}
    assert asked < 600


def test_a_host_that_holds_nothing_back_says_so() -> None:
    assert frames_over(memory({}, count=3000, holes=range(0))).held_back() == {}


@pytest.mark.parametrize(("word", "error"), [(None, errno.ENOMEM), (1 << 14, 0)])
def test_what_is_held_back_cannot_be_told_by_an_answer_that_makes_no_sense(
    word: int | None, error: int
) -> None:
    def answer(number: int, arguments: tuple[int, ...]) -> int:
        if number == HYPERVISOR_memory_op:
            return 1
        _, place = sysctl_at(arguments[0])
        if word is not None:
            ctypes.c_uint32.from_address(PageOfflineOp.from_address(place).status).value = word
        if error:
            raise failing(error)
        return 0

    with pytest.raises(PortError):
        frames_over(answer).held_back()
