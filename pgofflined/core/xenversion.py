"""Xen's version, and which of the hypervisor's known faults it has."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from pgofflined.core.machine import CpuVendor

# What an extra version says after its point release when that release is not out yet.
_PRE_RELEASE: Final = re.compile(r"[-~.+]?(pre|rc|unstable)")


@dataclass(frozen=True, slots=True, order=True)
class XenVersion:
    """Version of the running hypervisor; ``patch`` is the last point release it contains.

    A pre-release such as ``4.20.5-pre`` contains point release 4, not yet 5; one from before the
    first release, such as ``4.22-unstable`` or ``4.22.0-rc1``, has ``patch`` -1.
    """

    major: int
    minor: int
    patch: int

    def __str__(self) -> str:
        """``4.20.4``; ``4.22-pre`` before the first release."""
        if self.patch < 0:
            return f"{self.major}.{self.minor}-pre"
        return f"{self.major}.{self.minor}.{self.patch}"

    @property
    def offlines_free_frames_safely(self) -> bool:
        """Whether taking a frame out of a free buddy keeps the free lists intact.

        Fixed by 71c6a62317 and 5cb7ff13ee (4.22.0), backported as 16b3bd3d57 and cf2995c5f2
        (4.20.4) and d80155634d and 2e3dbcd70c (4.21.2).  Before those, the allocator may give
        the same frame out twice and then bring the host down.  4.22 was a pre-release when it
        was fixed (after 4.22.0-rc1), so no pre-release of it counts.
        """
        match (self.major, self.minor):
            case (4, 20):
                return self.patch >= 4
            case (4, 21):
                return self.patch >= 2
            case (4, 22):
                return self.patch >= 0
            case _:
                return (self.major, self.minor) > (4, 22)

    @property
    def polls_corrected_errors_without_cmci(self) -> bool:
        """Whether Xen's poll looks at any bank where the mask of all banks decides.

        4.13 and later leave that mask empty; 532988dccc (4.19.4, 4.20.2, 4.21.0) fills it.  Intel
        banks with CMCI do without the mask, AMD's only poll does not.
        """
        match (self.major, self.minor):
            case (4, 19):
                return self.patch >= 4
            case (4, 20):
                return self.patch >= 2
            case (4, 21):
                return self.patch >= 0
            case _:
                return not (4, 13) <= (self.major, self.minor) <= (4, 18)

    @property
    def xl_takes_a_suspend_for_the_end(self) -> bool:
        """Whether xl's monitor of a guest exits when the guest suspends.

        Until 6b8c85872e (4.20).
        """
        return (self.major, self.minor) < (4, 20)


def parse_version(version: int, extra: str) -> XenVersion:
    """Version from XENVER_version (major << 16 | minor) and XENVER_extraversion (".5-pre").

    Raises ValueError when the extra version has no point release in front.
    """
    found = re.match(r"\.(\d{1,6})(.*)", extra)
    if found:
        patch = int(found[1])
        if _PRE_RELEASE.match(found[2]):
            patch -= 1
    elif extra.startswith(("-unstable", "-rc", ".x")):
        patch = -1
    else:
        raise ValueError(f"Xen's extra version {extra!r} names no point release")
    return XenVersion(major=version >> 16, minor=version & 0xFFFF, patch=patch)


def unseen_errors(version: XenVersion, vendor: CpuVendor) -> str | None:
    """What this Xen never notices on processors of a vendor, as a sentence; None if nothing."""
    if version.polls_corrected_errors_without_cmci:
        return None
    update = "update Xen to 4.19.4, 4.20.2, 4.21 or later"
    if vendor is CpuVendor.AMD:
        return (
            f"Xen {version} polls no machine-check bank, and nothing else looks at those of AMD "
            f"processors: no memory error of this host is ever reported; {update}"
        )
    return (
        f"Xen {version} polls no machine-check bank: errors in banks without CMCI (Intel's "
        f"interrupt for corrected errors) are never reported; {update}"
    )
