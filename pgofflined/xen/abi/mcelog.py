"""Linux's ``/dev/mcelog`` under Xen.

Source: Linux ``include/xen/interface/xen-mca.h`` (the ioctls and ``struct xen_mce``) and
``drivers/xen/mcelog.c`` (their meaning); no packaged header has them.
"""

from __future__ import annotations

from typing import Final

# _IOR('M', n, int); each gives an int.
MCE_GET_RECORD_LEN: Final = 0x80044D01
MCE_GET_LOG_LEN: Final = 0x80044D02
MCE_GETCLEAR_FLAGS: Final = 0x80044D03

# Bit 0 (XEN_MCE_OVERFLOW) of MCE_GETCLEAR_FLAGS: records came while the log was full.
XEN_MCE_OVERFLOW_FLAG: Final = 1 << 0

# The shortest record: 88 bytes before Linux added synd, ipid and ppin (112 bytes since).
SHORTEST_RECORD: Final = 88
