from __future__ import annotations

import pytest

from tests.fuzz.hostile import Case

# `make fuzz` runs a hundred thousand.
CASES = 600


@pytest.mark.parametrize("first", range(0, CASES, 100))
def test_a_hostile_guest_harms_neither_us_nor_others(first: int) -> None:
    for seed in range(first, first + 100):
        Case(seed).run()
