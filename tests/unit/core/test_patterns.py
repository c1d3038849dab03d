from __future__ import annotations

from fnmatch import fnmatchcase

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgofflined.core.patterns import NAME_LIMIT, unmatchable


@pytest.mark.parametrize(
    "pattern",
    ["web", "*", "?", "web-[0-9]", "[!a]x", "[]]", "[[]", "[!]]", "[]a]", "x" * 64, "*" * 99,
     "[0-9]" * 64, "[b-ac]"],
)  # fmt: skip
def test_a_pattern_that_may_name_a_domain_is_good(pattern: str) -> None:
    assert unmatchable(pattern) is None


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("", "empty"),
        ("web\n", "printed"),
        ("web[z-a]", "no character"),
        ("web[1-3", "has no ] after it"),
        ("[", "written [[]"),
        ("[]", "written [[]"),
        ("[!]", "written [[]"),
        ("[a][b", "written [[]"),
        ("a]", "has no [ before it"),
        ("[a]]", "has no [ before it"),
        ("?" * 65, "64"),
        ("[ab]" * 65, "64"),
        (f"*{'x' * 65}*", "64"),
    ],
)
def test_a_pattern_that_can_name_no_domain_is_told(pattern: str, why: str) -> None:
    problem = unmatchable(pattern)
    assert problem is not None
    assert why in problem


@given(
    pattern=st.text("ab-[]!*?", min_size=1, max_size=8),
    name=st.text("ab-[]!", min_size=1, max_size=8),
)
def test_of_a_pattern_that_names_something_only_broken_brackets_are_told(
    pattern: str, name: str
) -> None:
    assert len(name) <= NAME_LIMIT
    if fnmatchcase(name, pattern):
        problem = unmatchable(pattern)
        assert problem is None or "itself is written" in problem
