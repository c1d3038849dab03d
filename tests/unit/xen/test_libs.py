"""Wrappers of the libraries."""

from __future__ import annotations

import ctypes

from .recorder import calling


def test_a_buffer_that_is_used_again_is_zero_and_nobody_elses() -> None:
    call, fake = calling(lambda *_: 0)
    with call.buffer(16) as first:
        ctypes.memset(first, 0xFF, 16)
        with call.buffer(16) as other:
            assert other != first
    with call.buffer(4096) as again:
        assert again in (first, other)
        assert ctypes.string_at(again, 4096)[:16] == bytes(16)
    with call.buffer(4097) as large:
        assert ctypes.string_at(large, 4097) == bytes(4097)
    assert large not in fake.buffers
    call.close()
    assert fake.buffers == {}
