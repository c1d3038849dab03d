"""What the daemon tells the journal, each kind with an identity that never changes.

The MESSAGE_IDs were drawn at random once.  They are an interface: operators filter and alert on
them, and ``systemd/pgofflined.catalog`` explains each.  A new kind gets a new one, and that of
a kind which is gone is never used again.
"""

from __future__ import annotations

from enum import Enum


class Event(Enum):
    """A kind of journal entry; the value is its MESSAGE_ID."""

    STARTED = "841e6b1c72d34724aeaa4219cdacfc53"
    STOPPING = "8be17c36669545939f69c595d077bf97"
    SOURCE_CHOSEN = "c8d59c0040fd420bb162d82118cc1bb6"
    DEGRADED = "06809da276954134af614fe2f658d345"
    RECORDS_LOST = "b537d3d89bf547be88c567f3f9624e98"
    RECORD_UNDECODABLE = "e3d9048f22ed44339f06769e67d7e6db"
    UNCORRECTED_ERROR = "c03c6f2d0ea64c39a1701e11212fbce3"
    ERROR_SEEN = "868a7260310241349c2c090347f417d6"
    HYPERVISOR_ACTED = "657a992c433043e79a3b259dd8d51a65"
    PAGE_TO_RETIRE = "ca506a252b974f378890d5c6983cba3b"
    PAGE_WOULD_RETIRE = "3a0dfa3dd1fb4e30b9ea9d9587007355"
    PAGE_MARKED = "46af367c35ae423f86104872f4817625"
    PAGE_OFFLINED = "f79994df3b3149439571a13f282c95fb"
    PAGE_REFUSED = "5b54b384e545483284a56925363a90f6"
    PAGE_LEFT = "d394f28d9c9d46ebbae8f1dad422caed"
    PAGE_DAMAGED = "e8d4f21ff5ac4ba88c87a1168820b8e6"
    JOB_RECOVERED = "f1549e2fa03d41e0818d0e82ec770881"
    JOB_NOT_RECOVERED = "73c2903fefb144aa938f862691a199bd"
    EXCHANGE_DONE = "83f617a77cf54d1da516b4e975f5e3ad"
    GUEST_STUCK = "c7becb1c21034f25996dca52cd2a5f2d"
    GUEST_IN_DOUBT = "530fa3b9bfe04f5282649a5a83c1d16e"
    GUEST_LEFT = "ebfd1f6eaa5949f9babc988cc5d86970"
    GUEST_DID_NOT_SUSPEND = "76a4c091637b4cd6b7c6376292baf883"
    GUEST_ENDED = "5695ec9a58984cc8bddf3089acb73a11"
    MIGRATION_DONE = "89752e372603419bb0742e1be64f9db6"
    MIGRATION_FAILED = "47895f1702ff4bcebdba6465175ad001"
    MIGRATION_DEFERRED = "456f2597267c45acbcc1b757ced37768"
    SAVE_BEGUN = "bf662066f436440fb45f7f16249de2f8"
    SAVE_UNFINISHED = "31edcd9a78c84d21b05612a63476173c"
    CAP_REACHED = "212c1beda82b4c078d12c8f19eeabd67"
    QUEUE_FULL = "574996a9a7354f8ca39e9ddda5bb74c3"
    WORKER_STUCK = "4055ded31a3f445e93895a62bfa5594b"
    IDLE_SCRUB_HAZARD = "56d8211271de4c37b5fea66651f8a13a"
    CONFIG_RELOADED = "302a96172b2f4aad9d99ffe6a220a058"
    CONFIG_REJECTED = "ae1c1d1c6c774cdeb1268652976e8e17"
    ACKNOWLEDGED = "df43a36cece742cc8181be045f112542"
    STATE_NOT_STORED = "143a1f35a00447a0a9d994c73350cb9f"
    STATE_DISCARDED = "778217e09b1d41d5bab865cf3b50c613"

    @property
    def message_id(self) -> str:
        """The identity as the journal's MESSAGE_ID field holds it: 32 hexadecimal digits."""
        return self.value
