from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from errno import EINVAL

import numpy as np
import pytest

from pgofflined.core.errors import PortError, XenError
from pgofflined.core.frames import PAGE_SIZE, Domid, Mfn
from pgofflined.core.moves import PteWrites, no_contents
from pgofflined.xen.abi.domctl import GetPageFrameInfo3, XEN_DOMCTL_getpageframeinfo3
from pgofflined.xen.abi.grant_table import (
    GnttabGetVersion,
    GNTTABOP_get_version,
    GNTTABOP_query_size,
    GnttabQuerySize,
)
from pgofflined.xen.abi.xen import HYPERVISOR_grant_table_op
from pgofflined.xen.control import Control
from pgofflined.xen.memory import Memory

from .recorder import INTERFACE, Answer, calling, domctl_at

GUEST = Domid(6)


class Pages:
    """A domain's frames and resources; counts what is mapped at any one time."""

    def __init__(self, contents: dict[int, bytes] | None = None) -> None:
        self.store = {
            mfn: ctypes.create_string_buffer(data, PAGE_SIZE)
            for mfn, data in (contents or {}).items()
        }
        self.resources: dict[int, bytes] = {}
        self.mapped = 0
        self.batches: list[int] = []

    @contextmanager
    def frames(self, domid: Domid, mfns: Sequence[int], *, writable: bool = False) -> Iterator[int]:
        assert domid == GUEST
        for mfn in mfns:
            if mfn not in self.store:
                raise XenError(22, op="xenforeignmemory_map", domid=domid, mfn=Mfn(mfn))
        self.batches.append(len(mfns))
        area = ctypes.create_string_buffer(b"".join(bytes(self.store[m]) for m in mfns))
        self.mapped += 1
        yield ctypes.addressof(area)
        self.mapped -= 1
        if writable:
            for index, mfn in enumerate(mfns):
                data = ctypes.string_at(ctypes.addressof(area) + index * PAGE_SIZE, PAGE_SIZE)
                self.store[mfn] = ctypes.create_string_buffer(data, PAGE_SIZE)

    @contextmanager
    def resource(self, domid: Domid, kind: int, number: int, frames: int) -> Iterator[int]:
        assert (domid, kind) == (GUEST, 1)
        # Asking for more than there is would make a real table grow.
        assert frames * PAGE_SIZE == len(self.resources[number])
        area = ctypes.create_string_buffer(self.resources[number])
        yield ctypes.addressof(area)


def memory(pages: Pages, answer: Answer | None = None) -> Memory:
    def unasked(_number: int, _arguments: tuple[int, ...]) -> int:
        raise AssertionError("no hypercall is needed for this")

    call, _ = calling(answer or unasked)
    return Memory(call=call, control=Control(call, INTERFACE), pages=pages)  # type: ignore[arg-type]


def frames(*mfns: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    return np.array(mfns, dtype=np.uint64)


def page(number: int) -> bytes:
    return np.full(512, number, dtype=np.uint64).tobytes()


def test_contents_come_in_the_order_asked_for() -> None:
    pages = Pages({mfn: page(mfn) for mfn in range(100)})
    contents = memory(pages).read_frames(GUEST, frames(7, 99, 7, 3))
    assert contents.shape == (4, 512)
    assert contents[:, 0].tolist() == [7, 99, 7, 3]
    assert contents[:, 511].tolist() == [7, 99, 7, 3]
    assert pages.mapped == 0


def test_many_frames_are_mapped_in_batches() -> None:
    pages = Pages({mfn: page(mfn) for mfn in range(5000)})
    contents = memory(pages).read_frames(GUEST, np.arange(5000, dtype=np.uint64))
    assert contents[:, 17].tolist() == list(range(5000))
    assert max(pages.batches) <= 2048


def test_no_frames_are_no_contents() -> None:
    assert memory(Pages()).read_frames(GUEST, frames()).shape == (0, 512)


def test_frames_of_all_batches_are_seen_through_a_window() -> None:
    pages = Pages({mfn: page(mfn) for mfn in range(5000)})
    rows = np.array([4999, 0, 2048, 2047], dtype=np.intp)
    with memory(pages).window(GUEST, np.arange(5000, dtype=np.uint64)) as window:
        assert window.read(rows)[:, 17].tolist() == rows.tolist()
        assert window.words(rows, frames(511, 0, 1, 2)).tolist() == rows.tolist()
        thought = np.repeat(rows.astype(np.uint64)[:, None], 512, axis=1)
        thought[2, 511] += np.uint64(1)
        assert window.differing(rows, thought).tolist() == [False, False, True, False]
        in_order = np.arange(2000, 2100, dtype=np.uint64)
        thought = np.repeat(in_order[:, None], 512, axis=1)
        thought[48, 0] = 7
        differing = window.differing(in_order.astype(np.intp), thought)
        assert np.flatnonzero(differing).tolist() == [48]
    assert max(pages.batches) <= 2048
    assert pages.mapped == 0


def test_what_is_compared_in_one_piece_is_the_same_as_what_is_not() -> None:
    pages = Pages({mfn: page(mfn) for mfn in range(8)})
    with memory(pages).window(GUEST, frames(*range(8))) as window:
        for rows in ([2, 3, 4], [4, 3, 2], [2, 4, 6], [5], []):
            thought = np.repeat(frames(*rows)[:, None], 512, axis=1)
            places = np.array(rows, dtype=np.intp)
            assert not window.differing(places, thought).any()
            assert window.differing(places, thought + np.uint64(1)).all()


def test_whole_frames_are_written_in_batches() -> None:
    pages = Pages({mfn: page(0) for mfn in range(5000)})
    contents = np.repeat(np.arange(5000, dtype=np.uint64)[:, None], 512, axis=1)
    memory(pages).write_frames(GUEST, np.arange(5000, dtype=np.uint64), contents, slots())
    assert {int.from_bytes(bytes(pages.store[mfn])[:8], "little") for mfn in range(5000)} == set(
        range(5000)
    )
    assert bytes(pages.store[4999]) == page(4999)
    assert max(pages.batches) <= 2048


def test_a_frame_that_does_not_keep_what_is_written_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pages = Pages({5: page(1), 6: page(1)})

    def forgetful(target: int, source: int, size: int) -> None:
        ctypes.memmove(target, source, size - 8)

    monkeypatch.setattr("pgofflined.xen.memory.ctypes", _Ctypes(forgetful))
    with pytest.raises(PortError, match="mfn 0x6 of d6 does not hold"):
        memory(pages).write_frames(
            GUEST, frames(5, 6), np.full((2, 512), 9, dtype=np.uint64), slots()
        )


class _Ctypes:
    """ctypes with another memmove."""

    def __init__(self, memmove: object) -> None:
        self.memmove = memmove

    def __getattr__(self, name: str) -> object:
        return getattr(ctypes, name)


def slots(*words: tuple[int, int, int]) -> PteWrites:
    """Writes of (frame, index, word)."""
    tables, indexes, values = zip(*words, strict=True) if words else ((), (), ())
    return PteWrites(tables=frames(*tables), indexes=frames(*indexes), values=frames(*values))


def words_of(pages: Pages, mfn: int) -> list[int]:
    words: list[int] = np.frombuffer(bytes(pages.store[mfn])[:PAGE_SIZE], dtype=np.uint64).tolist()
    return words


def test_words_are_written_where_they_belong() -> None:
    pages = Pages({5: page(1), 7: page(2)})
    memory(pages).write_frames(
        GUEST, frames(), no_contents(0), slots((7, 0, 3), (5, 510, 8), (5, 511, 9))
    )
    assert words_of(pages, 5)[508:] == [1, 1, 8, 9]
    assert words_of(pages, 7)[:2] == [3, 2]
    # Each frame is mapped once.
    assert pages.batches == [2]


def test_words_are_written_after_the_contents_and_through_the_same_mapping() -> None:
    pages = Pages({mfn: page(0) for mfn in (4, 5, 9)})
    contents = np.full((2, 512), 6, dtype=np.uint64)
    memory(pages).write_frames(
        GUEST, frames(9, 4), contents, slots((4, 1, 77), (5, 2, 88), (9, 3, 99))
    )
    assert words_of(pages, 4)[:4] == [6, 77, 6, 6]
    assert words_of(pages, 5)[:4] == [0, 0, 88, 0]
    assert words_of(pages, 9)[:4] == [6, 6, 6, 99]
    assert pages.batches == [3]


def test_contents_of_all_batches_are_written_before_the_first_word() -> None:
    # The p2m slot of the first page lies in the last one, which is mapped with another batch.
    pages = Pages({mfn: page(0) for mfn in range(5000)})
    mfns = np.arange(5000, dtype=np.uint64)
    contents = np.repeat(mfns[:, None], 512, axis=1)
    memory(pages).write_frames(GUEST, mfns, contents, slots((4999, 8, 1), (0, 9, 2)))
    assert words_of(pages, 4999)[7:10] == [4999, 1, 4999]
    assert words_of(pages, 0)[8:10] == [0, 2]


def test_nothing_is_mapped_where_there_is_nothing_to_write() -> None:
    pages = Pages()
    memory(pages).write_frames(GUEST, frames(), no_contents(0), slots())
    assert pages.batches == []


@pytest.mark.parametrize("index", [512, 1 << 63])
def test_words_outside_the_frame_are_refused_before_anything_is_written(index: int) -> None:
    pages = Pages({5: page(1)})
    with pytest.raises(XenError) as caught:
        memory(pages).write_frames(GUEST, frames(5), no_contents(1), slots((5, index, 0)))
    assert caught.value.errno == EINVAL
    assert words_of(pages, 5) == [1] * 512


def test_types_are_asked_for_in_calls_of_1024() -> None:
    sizes: list[int] = []

    def answer(_number: int, arguments: tuple[int, ...]) -> int:
        request, place = domctl_at(arguments[0])
        assert (request.cmd, request.domain) == (XEN_DOMCTL_getpageframeinfo3, GUEST)
        ask = GetPageFrameInfo3.from_address(place)
        sizes.append(ask.num)
        array = (ctypes.c_uint64 * ask.num).from_address(ask.array)
        for index in range(ask.num):
            array[index] = (array[index] % 5) << 28
        return 0

    types = memory(Pages(), answer).page_types(GUEST, np.arange(2500, dtype=np.uint64))
    assert sizes == [1024, 1024, 452]
    assert types.dtype == np.uint32
    assert types.tolist() == [mfn % 5 << 28 for mfn in range(2500)]


def test_types_that_are_not_understood_are_an_error() -> None:
    def answer(_number: int, arguments: tuple[int, ...]) -> int:
        ask = GetPageFrameInfo3.from_address(domctl_at(arguments[0])[1])
        ctypes.c_uint64.from_address(ask.array).value = 1 << 40
        return 0

    with pytest.raises(PortError):
        memory(Pages(), answer).page_types(GUEST, frames(1))


def granted(version: int, table: bytes, status: bytes = b"") -> list[int]:
    pages = Pages()
    pages.resources = {0: table, 1: status}

    def answer(number: int, arguments: tuple[int, ...]) -> int:
        command, address, count = arguments
        assert (number, count) == (HYPERVISOR_grant_table_op, 1)
        if command == GNTTABOP_query_size:
            size = GnttabQuerySize.from_address(address)
            assert size.dom == GUEST
            size.nr_frames, size.max_nr_frames, size.status = len(table) // PAGE_SIZE, 64, 0
        else:
            assert command == GNTTABOP_get_version
            GnttabGetVersion.from_address(address).version = version
        return 0

    found: list[int] = memory(pages, answer).granted_frames(GUEST).tolist()
    return found


def v1(*entries: tuple[int, int]) -> bytes:
    """Entries of (flags, frame)."""
    table = np.zeros(512, dtype=[("flags", "<u2"), ("domid", "<u2"), ("frame", "<u4")])
    for index, (flags, frame) in enumerate(entries):
        table[index * 3] = (flags, 0, frame)
    return table.tobytes()


def v2(*entries: tuple[int, int]) -> bytes:
    table = np.zeros(
        256, dtype=[("flags", "<u2"), ("domid", "<u2"), ("other", "<u4"), ("frame", "<u8")]
    )
    for index, (flags, frame) in enumerate(entries):
        table[index] = (flags, 0, 0xFFFF, frame)
    return table.tobytes()


def test_version_1_offers_every_entry_that_is_not_invalid() -> None:
    table = v1((1, 0x900), (0, 0x111), (1 | 4, 0x800), (2, 0x700), (1, 0x900))
    assert granted(1, table) == [0x700, 0x800, 0x900]


def test_version_1_entry_taken_back_while_mapped_counts() -> None:
    assert granted(1, v1((1 << 3, 0x900), (1 << 4, 0x901), (1 << 2, 0x902))) == [0x900, 0x901]


def test_version_2_offers_whole_and_partial_pages_but_no_transitive_entry() -> None:
    table = v2((1, 0x1_0000_0001), (1 | 1 << 8, 0x900), (3, 0x111), (2, 0x700), (0, 0x112))
    assert granted(2, table, bytes(PAGE_SIZE)) == [0x700, 0x900, 0x1_0000_0001]


def test_version_2_entry_taken_back_while_mapped_counts() -> None:
    status = np.zeros(PAGE_SIZE // 2, dtype=np.uint16)
    status[1] = 1 << 3
    assert granted(2, v2((0, 0x111), (0, 0x900)), status.tobytes()) == [0x900]


def test_version_2_status_is_as_long_as_the_table_needs() -> None:
    # 9 pages of 256 entries have 2304 status words, which fill one page and begin a second.
    assert granted(2, v2((1, 0x5)) * 9, bytes(2 * PAGE_SIZE)) == [0x5]


def test_unknown_version_is_an_error() -> None:
    with pytest.raises(PortError, match="unknown version 3"):
        granted(3, v1())


def test_domain_without_a_table_grants_nothing() -> None:
    assert granted(1, b"") == []


@pytest.mark.parametrize("differing", [[], [0], [63, 64], [3, 128, 199]])
def test_those_that_differ_among_many_are_found(differing: list[int]) -> None:
    pages = Pages({mfn: page(mfn) for mfn in range(200)})
    thought = np.repeat(np.arange(200, dtype=np.uint64)[:, None], 512, axis=1)
    thought[differing, 510] += np.uint64(1)
    rows = np.arange(200, dtype=np.intp)
    with memory(pages).window(GUEST, rows.astype(np.uint64)) as window:
        assert np.flatnonzero(window.differing(rows, thought)).tolist() == differing
