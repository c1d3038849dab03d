"""Word of domains that have ended, from xenstored.

``@releaseDomain`` fires when a domain is gone, and when one shuts down (docs/misc/xenstore.txt).
"""

from __future__ import annotations

from pgofflined.xen.store import Store


class XenstoreEnds:
    """``ports.DomainEnds``.  Opening it raises XenError where xenstored cannot be reached."""

    def __init__(self, store: Store | None = None) -> None:
        self._store = store or Store()
        try:
            self._store.watch("@releaseDomain")
        except BaseException:
            self._store.close()
            raise

    def fileno(self) -> int:
        """The connection's descriptor for watches."""
        return self._store.fileno()

    def drain(self) -> None:
        """Take the events that are there.  Raises XenError when the connection is lost."""
        self._store.drain()

    def close(self) -> None:
        """Close the connection."""
        self._store.close()
