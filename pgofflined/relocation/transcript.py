"""What xl says while it migrates a guest, and how far it therefore is.

The lines are those of ``tools/xl/xl_migrate.c`` and ``xl_saverestore.c``, which are the same
from Xen 4.17 to 4.22.  They are compared whole: a name that somebody gave to a guest or a host
cannot pass for one of them.
"""

from __future__ import annotations

import re
from enum import IntEnum
from typing import Final

_SAVING: Final = re.compile(r"Saving to migration stream new xl format \(info [0-9a-fx/]+\)")
_ACKNOWLEDGED: Final = "migration sender: Target has acknowledged transfer."
_PERMISSION: Final = "migration sender: Giving target permission to start."
_RESUMED: Final = "migration sender: Resumed OK."

_TAIL: Final = 16 << 10
_LONGEST_LINE: Final = 4096


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


class Transcript:
    """Reads xl's output piece by piece and keeps no more than its end."""

    def __init__(self) -> None:
        self.stage = Stage.CONNECTING
        self.resumed = False
        self._tail = bytearray()
        self._line = bytearray()

    def feed(self, untrusted_output: bytes) -> None:
        """Take the next piece."""
        self._tail += untrusted_output
        del self._tail[:-_TAIL]
        for piece in re.split(rb"([\r\n])", untrusted_output):
            if piece in (b"\r", b"\n"):
                self._heed(self._line.decode("ascii", "replace"))
                self._line.clear()
            else:
                self._line += piece[: _LONGEST_LINE - len(self._line)]

    @property
    def in_doubt(self) -> bool:
        """Whether, should xl fail now, the guest may be running at the target."""
        return self.stage is Stage.GIVEN and not self.resumed

    def last_words(self, lines: int = 4) -> str:
        """The last lines, for an error message."""
        text = self._tail.decode("utf-8", "replace")
        said = [line.strip() for line in re.split(r"[\r\n]", text) if line.strip()]
        return "; ".join(said[-lines:]) or "nothing"

    def _heed(self, line: str) -> None:
        if _SAVING.fullmatch(line):
            self.stage = max(self.stage, Stage.SAVING)
        elif line == _ACKNOWLEDGED:
            self.stage = max(self.stage, Stage.HANDSHAKE)
        elif line == _PERMISSION:
            self.stage = Stage.GIVEN
        elif line == _RESUMED:
            self.resumed = True
