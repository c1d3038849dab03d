from __future__ import annotations

import string
from fnmatch import fnmatchcase

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgofflined.core.patterns import NAME_LIMIT, names, unmatchable


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


@pytest.mark.parametrize("pattern", ["*", "**", "*****"])
def test_nothing_but_stars_names_every_domain_also_one_without_a_name(pattern: str) -> None:
    assert names(pattern, "")
    assert names(pattern, "web")


@pytest.mark.parametrize("letter", string.ascii_letters)
def test_any_other_pattern_names_only_what_it_matches(letter: str) -> None:
    for pattern in (letter, letter * 2, f"{letter}*", f"*{letter}"):
        assert names(pattern, letter * 2) is (pattern != letter)
        assert not names(pattern, "7")
        assert not names(pattern, "")
