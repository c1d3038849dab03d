from __future__ import annotations

import pytest

from pgofflined.core.text import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("web-1", "web-1"),
        ("ähnlich", "ähnlich"),
        ("", ""),
        ("two\nlines", r"two\nlines"),
        ("a\x1b[2Jb", r"a\x1b[2Jb"),
        ("ä\tb", r"ä\tb"),
        ("left\u202eright", r"left\u202eright"),
        ("\U000e0001", r"\U000e0001"),
    ],
)
def test_what_a_terminal_would_act_on_is_shown_as_an_escape(text: str, shown: str) -> None:
    assert printable(text) == shown
