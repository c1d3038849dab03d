"""Retires failing memory pages on Xen hosts while their owners run on."""

from typing import Final

__version__: Final = "0.1.0"
