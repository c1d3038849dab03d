"""Shell patterns by which an operator names domains: by their name, or by their uuid.

A domain is known by the name that the toolstack has written into xenstore, cleaned for logs (see
``xen.domains``): printable, at most 64 characters.  It may be empty, where xenstore does not tell.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase, translate
from typing import Final
from uuid import UUID

NAME_LIMIT: Final = 64
"""Characters of a name that are kept."""

# One element of a pattern each, as ``fnmatch`` understands them; a bracket alone has no partner.
_ELEMENTS: Final = re.compile(r"\[!?\]?[^\]]*\]|.", re.DOTALL)
_EMPTY_CLASS: Final = translate("[b-a]")
# Whoever means a uuid writes its first group at least; "db*" is a name.
_UUID: Final = re.compile(r"[0-9a-fA-F]{8}-", re.ASCII)


def unmatchable(pattern: str) -> str | None:
    """Why no domain can be named by a pattern, or not the one that is meant; None where one can.

    A bracket without its partner stands for itself in the shell, and is hardly meant to: the
    domain that somebody wanted to protect is not named then.
    """
    if not pattern:
        return "an empty pattern names no domain"
    if not pattern.isprintable():
        return "no domain's name has characters that cannot be printed"
    elements = _ELEMENTS.findall(pattern)
    for element in elements:
        # ``[]`` and ``[!]`` are no classes: a ] that comes first is one of the characters.
        if element in ("[", "[]", "[!]"):
            return "one of its [ has no ] after it; the character [ itself is written [[]"
        if element == "]":
            return "one of its ] has no [ before it; the character ] itself is written []]"
    if any(translate(element) == _EMPTY_CLASS for element in elements):
        return "there is no character in one of its [...]"
    if sum(element != "*" for element in elements) > NAME_LIMIT:
        return f"no domain's name has more than {NAME_LIMIT} characters"
    return None


def is_for_uuids(pattern: str) -> bool:
    """Whether a pattern is meant for uuids."""
    return bool(_UUID.match(pattern))


def names(pattern: str, name: str) -> bool:
    """Whether a pattern is for a domain of this name; what has no name is named by none but ``*``.

    A pattern of nothing but ``*`` is for every domain.
    """
    return not pattern.strip("*") or (bool(name) and fnmatchcase(name, pattern))


def any_names(patterns: Iterable[str], name: str, uuid: UUID) -> bool:
    """Whether one of some patterns is meant for a domain; one that reads like a name is one."""
    return any(
        names(pattern, name) or (is_for_uuids(pattern) and names_uuid(pattern, uuid))
        for pattern in patterns
    )


def names_uuid(pattern: str, uuid: UUID) -> bool:
    """Whether a pattern matches a uuid, whatever it was meant for."""
    return fnmatchcase(str(uuid), pattern.lower())
