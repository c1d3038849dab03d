"""Failures at the ports that their callers tell apart."""

from __future__ import annotations

from errno import errorcode

from pgofflined.core.domains import ShutdownReason
from pgofflined.core.frames import Domid, Mfn


def _where(domid: Domid | None, mfn: Mfn | None) -> str:
    parts = []
    if domid is not None:
        parts.append(f"d{domid}")
    if mfn is not None:
        parts.append(f"mfn {mfn:#x}")
    return f" ({', '.join(parts)})" if parts else ""


class PortError(Exception):
    """Something outside refused or failed; the message says what, where and with which errno."""


class XenError(PortError):
    """A hypercall or a call to a Xen library failed.

    ``op`` names it in Xen's words, ``errno`` is positive.  ``done`` counts the elements of a
    batch that took effect before the failure.
    """

    def __init__(
        self,
        errno: int,
        *,
        op: str,
        domid: Domid | None = None,
        mfn: Mfn | None = None,
        done: int = 0,
    ) -> None:
        self.errno = errno
        self.op = op
        self.domid = domid
        self.mfn = mfn
        self.done = done
        name = errorcode.get(errno, str(errno))
        super().__init__(f"{op} failed with {name}{_where(domid, mfn)}")


class DomainGone(PortError):
    """The domain does not exist any more, or another one has its domid now."""

    def __init__(self, domid: Domid) -> None:
        self.domid = domid
        super().__init__(f"d{domid} is gone")


class GuestEnded(DomainGone):
    """The domain shut down or vanished after it had been asked to suspend itself.

    ``reason`` is that of its shutdown, None where it is gone altogether.
    """

    def __init__(self, domid: Domid, reason: ShutdownReason | None) -> None:
        super().__init__(domid)
        self.reason = reason
        what = "is gone" if reason is None else f"has shut down ({reason.name.lower()})"
        self.args = (f"d{domid} {what} after it was asked to suspend itself",)


class GuestDidNotSuspend(PortError):
    """The guest was asked to suspend and did not within the limits.

    ``stage`` is ``"acknowledge"``: it never read the request, which is withdrawn; or
    ``"suspend"``: it did, and may still follow it, since nothing is left to withdraw.
    """

    def __init__(self, domid: Domid, *, stage: str, seconds: float) -> None:
        self.domid = domid
        self.stage = stage
        self.seconds = seconds
        what = {
            "acknowledge": "did not take notice of the request to suspend itself",
            "suspend": "took notice of the request to suspend itself, but did not",
        }.get(stage, stage)
        super().__init__(f"d{domid} {what} within {seconds:g} s; it runs on")


class SuspendNotAsked(XenError):
    """The guest was not even asked to suspend, and nothing of ours is to be taken back.

    EBUSY where somebody else has it suspended, or is about to: it is his to resume.
    """


class SuspendShared(SuspendNotAsked):
    """The guest was asked by us and by somebody else at once, and is his, should he go on.

    It may suspend for us alone, if he is stopped before.
    """


class OfflineCallUnsafe(PortError):
    """No thread can be placed so that the offline call stays off pCPU 0 (see xen-bugs)."""


class SourceUnavailable(PortError):
    """A telemetry source could not be opened; another one, or a later try, may do.

    ``errno`` is positive and tells why: EEXIST (another has bound VIRQ_MCA, usually the kernel's
    own driver), EBUSY (another holds /dev/mcelog), ENOENT (no such device here), EPERM.
    """

    def __init__(self, errno: int, *, source: str, reason: str) -> None:
        self.errno = errno
        self.source = source
        self.reason = reason
        name = errorcode.get(errno, str(errno))
        super().__init__(f"the {source} source is unavailable ({name}): {reason}")
