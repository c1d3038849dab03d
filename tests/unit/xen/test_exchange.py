from __future__ import annotations

import ctypes
import errno

import pytest

from pgofflined.core.errors import DomainGone, PortError, XenError
from pgofflined.core.frames import Domid
from pgofflined.core.moves import frames_of
from pgofflined.ports import Swapped
from pgofflined.xen.abi.memory import MemoryExchange, XENMEM_exchange
from pgofflined.xen.abi.xen import HYPERVISOR_memory_op
from pgofflined.xen.exchange import Exchange

from .recorder import Answer, calling, failing

OLD = [0xABC, 0xABD, 0xABE]
PFNS = [0x77, 0x78, 0x79]
NEW = [0xBEEF, 0xBEF0, 0xBEF1]


def xen(*, done: int = 3, error: int = 0, new: list[int] = NEW) -> Answer:
    """Xen's side: exchanges the first frames, then fails or not."""

    def answer(number: int, arguments: tuple[int, ...]) -> int:
        assert (number, arguments[0]) == (HYPERVISOR_memory_op, XENMEM_exchange)
        request = MemoryExchange.from_address(arguments[1])
        assert request.nr_exchanged == 0
        for part in (request.in_, request.out):
            assert (part.nr_extents, part.extent_order, part.mem_flags, part.domid) == (3, 0, 0, 9)
        wanted = (ctypes.c_uint64 * 3).from_address(request.in_.extent_start)
        assert list(wanted) == OLD
        # What the M2P will say of the new frames is an input.
        out = (ctypes.c_uint64 * 3).from_address(request.out.extent_start)
        assert list(out) == PFNS
        for row in range(min(done, 3)):
            out[row] = new[row]
        request.nr_exchanged = done
        if error:
            raise failing(error)
        return 0

    return answer


def exchange(answer: Answer) -> Swapped:
    return Exchange(calling(answer)[0]).exchange(Domid(9), frames_of(OLD), frames_of(PFNS))


def test_pfns_are_handed_in_and_the_new_frames_come_out() -> None:
    answer = exchange(xen())
    assert answer.new.tolist() == NEW
    assert answer.error is None


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOMEM, errno.EOPNOTSUPP])
@pytest.mark.parametrize("done", [0, 1, 2])
def test_refusal_names_the_frame_and_tells_those_before_it(code: int, done: int) -> None:
    answer = exchange(xen(done=done, error=code))
    assert answer.new.tolist() == NEW[:done]
    assert isinstance(answer.error, XenError)
    assert (answer.error.errno, answer.error.mfn, answer.error.domid) == (code, OLD[done], 9)


def test_success_without_all_exchanges_means_a_dying_domain() -> None:
    answer = exchange(xen(done=1))
    assert answer.new.tolist() == NEW[:1]
    assert isinstance(answer.error, DomainGone)


@pytest.mark.parametrize("answer", [xen(done=4), xen(done=3, error=errno.EINVAL)])
def test_an_impossible_count_says_nothing_of_any_frame(answer: Answer) -> None:
    said = exchange(answer)
    assert said.new.tolist() == []
    assert isinstance(said.error, PortError)
    assert not isinstance(said.error, (XenError, DomainGone))


def test_a_frame_that_came_for_itself_is_an_error() -> None:
    said = exchange(xen(new=[NEW[0], OLD[1], NEW[2]]))
    assert said.new.tolist() == NEW[:1]
    assert isinstance(said.error, PortError)


def test_nothing_to_exchange_asks_nothing() -> None:
    call, fake = calling(xen())
    answer = Exchange(call).exchange(Domid(9), frames_of([]), frames_of([]))
    assert answer.new.tolist() == []
    assert fake.calls == []
