"""``version.h``: which Xen runs."""

from __future__ import annotations

from typing import Final

XENVER_version: Final = 0
XENVER_extraversion: Final = 1

# sizeof(xen_extraversion_t).
EXTRAVERSION_SIZE: Final = 16
