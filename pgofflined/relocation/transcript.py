"""What is said while a guest is migrated, and how far the migration therefore is.

Both ends, ssh and libxl write to one pipe.  A message may stand behind a line that another of
them has not finished, and what the other end says may come in pieces.  And some of it comes from
outside: names of guests and hosts, messages of whatever runs at the target.  So the messages after
which the guest may run at the target are looked for anywhere: to see one that is none costs no more
than that a person has to look.  What would take the doubt away has to be a line of its own in its
place, and counts in statistics only: no guest is resumed because of it.

The messages are those of ``tools/xl/xl_migrate.c`` and ``xl_saverestore.c``, which are the same
from Xen 4.17 to 4.22.
"""

from __future__ import annotations

import re
from enum import IntEnum
from typing import Final

from pgofflined.core.text import printable


class Stage(IntEnum):
    """How far a migration is.

    ``CONNECTING``: the guest has not been touched.  ``SAVING``: its memory is on its way, and a
    failure lets it run on.  ``HANDSHAKE``: all is transferred, both ends are agreeing.
    ``GIVEN``: the target has been told that it may start the guest.
    """

    CONNECTING = 0
    SAVING = 1
    HANDSHAKE = 2
    GIVEN = 3


# Both say so by themselves, after the permission.
_UNDEFINED: Final = (
    b"failed during final handshake",
    b"state is now undefined",
    b"check at both ends",
)
_PERMISSION: Final = b"giving target permission to start"
# In lower case.  One would do for each stage; the others are for the case that it is garbled.
_MARKERS: Final = {
    Stage.SAVING: (b"saving to migration stream",),
    Stage.HANDSHAKE: (
        b"target has acknowledged transfer",
        b"migration target: transfer complete",
    ),
    Stage.GIVEN: (
        _PERMISSION,
        b"got permission, starting domain",
        b"migration target: domain started",
        b"migration target: failure, destroying",
        b"granting sender permission to resume",
        b"target reports startup failure",
        b"target reports successful startup",
        b"trying to resume at our end",
        b"migration failed due to problems at target",
        *_UNDEFINED,
    ),
}
_OVERLAP: Final = max(len(marker) for markers in _MARKERS.values() for marker in markers) - 1

_GAVE_UP: Final = b"Migration failed, resuming at sender."
_TRYING: Final = b"migration sender: Trying to resume at our end."
_RESUMED: Final = b"migration sender: Resumed OK."

_TAIL: Final = 16 << 10
_LONGEST_LINE: Final = 4096


class Transcript:
    """Reads the output piece by piece and keeps no more than its end."""

    def __init__(self) -> None:
        self.stage = Stage.CONNECTING
        self._tail = bytearray()
        self._line = bytearray()
        self._recent = b""
        self._is_undefined = False
        self._was_permitted = False
        self._tries_to_resume = False
        self._says_it_runs_here = False

    def feed(self, untrusted_output: bytes) -> None:
        """Take the next piece."""
        self._tail += untrusted_output
        del self._tail[:-_TAIL]
        self._look_for_markers(untrusted_output)
        for piece in re.split(rb"([\r\n])", untrusted_output):
            if piece in (b"\r", b"\n"):
                self._heed(bytes(self._line))
                self._line.clear()
            else:
                self._line += piece[: _LONGEST_LINE - len(self._line)]

    @property
    def may_run_there(self) -> bool:
        """Whether the target may have started the guest, should the migration end now.

        Nothing that is said afterwards takes that back.
        """
        return self.stage >= Stage.HANDSHAKE

    @property
    def is_in_doubt(self) -> bool:
        """The same, and not even xl says that the guest runs on here."""
        return self.may_run_there and (self._is_undefined or not self._says_it_runs_here)

    def last_words(self, lines: int = 4) -> str:
        """The last lines, for an error message."""
        text = self._tail.decode("utf-8", "replace")
        said = [line.strip() for line in re.split(r"[\r\n]", text) if line.strip()]
        return "; ".join(map(printable, said[-lines:])) or "nothing"

    def _look_for_markers(self, piece: bytes) -> None:
        text = self._recent + piece.lower()
        self._recent = text[-_OVERLAP:]
        for stage, markers in _MARKERS.items():
            if stage > self.stage and any(marker in text for marker in markers):
                self.stage = stage
        self._is_undefined |= any(marker in text for marker in _UNDEFINED)

    def _heed(self, line: bytes) -> None:
        if line == _GAVE_UP:
            self._says_it_runs_here = True
        elif _PERMISSION in line.lower():
            self._was_permitted = True
            self._tries_to_resume = self._says_it_runs_here = False
        elif line == _TRYING:
            self._tries_to_resume = self._was_permitted
        elif line == _RESUMED and self._tries_to_resume:
            self._says_it_runs_here = True
