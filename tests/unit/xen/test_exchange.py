from __future__ import annotations

import ctypes
import errno

import pytest

from pgofflined.core.errors import DomainGone, PortError, XenError
from pgofflined.core.frames import Domid, Mfn, Pfn
from pgofflined.xen.abi.memory import MemoryExchange, XENMEM_exchange
from pgofflined.xen.abi.xen import HYPERVISOR_memory_op
from pgofflined.xen.exchange import Exchange

from .recorder import Answer, calling, failing


def xen(*, new: int = 0xBEEF, exchanged: int = 1, error: int = 0) -> Answer:
    def answer(number: int, arguments: tuple[int, ...]) -> int:
        assert (number, arguments[0]) == (HYPERVISOR_memory_op, XENMEM_exchange)
        request = MemoryExchange.from_address(arguments[1])
        assert request.nr_exchanged == 0
        for part in (request.in_, request.out):
            assert (part.nr_extents, part.extent_order, part.mem_flags, part.domid) == (1, 0, 0, 9)
        assert ctypes.c_uint64.from_address(request.in_.extent_start).value == 0xABC
        # What the M2P will say of the new frame is an input.
        out = ctypes.c_uint64.from_address(request.out.extent_start)
        assert out.value == 0x77
        if error:
            raise failing(error)
        if exchanged:
            out.value = new
        request.nr_exchanged = exchanged
        return 0

    return answer


def exchange(answer: Answer) -> int:
    return Exchange(calling(answer)[0]).exchange(Domid(9), Mfn(0xABC), Pfn(0x77))


def test_pfn_is_handed_in_and_the_new_frame_comes_out() -> None:
    assert exchange(xen()) == 0xBEEF


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOMEM, errno.EOPNOTSUPP])
def test_refusal_names_frame_and_domain(code: int) -> None:
    with pytest.raises(XenError) as caught:
        exchange(xen(error=code))
    assert (caught.value.errno, caught.value.mfn, caught.value.domid) == (code, 0xABC, 9)


def test_success_without_an_exchange_means_a_dying_domain() -> None:
    with pytest.raises(DomainGone):
        exchange(xen(exchanged=0))


@pytest.mark.parametrize("answer", [xen(exchanged=2), xen(new=0xABC)])
def test_contradictory_answers_are_errors(answer: Answer) -> None:
    with pytest.raises(PortError):
        exchange(answer)
