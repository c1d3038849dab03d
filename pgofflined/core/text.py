"""Text that comes from outside, made fit for people's terminals and logs."""

from __future__ import annotations


def printable(text: str) -> str:
    """The text on one line and without control characters, which are shown as escapes."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
        for char in text
    )
