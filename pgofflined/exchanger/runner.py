"""One exchange job: look, suspend, survey, transfer, resume.

The guest is kept for as short as can be: what can be refused from outside is refused before the
suspend.  Whatever happens between suspend and resume, the guest is let go on every way out.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from pgofflined.core.domains import (
    DomainIdentity,
    DomainInfo,
    GuestKind,
    ShutdownReason,
)
from pgofflined.core.errors import DomainGone, GuestDidNotSuspend, PortError
from pgofflined.core.frames import Domid, Mfn
from pgofflined.core.offline import OfflineState
from pgofflined.core.outcomes import (
    Blackout,
    ExchangeReport,
    PageResult,
    Refusal,
    RefusalReason,
)
from pgofflined.core.pages import decode_page_type
from pgofflined.exchanger.plan import (
    make_plan,
    refuse_by_kind,
    refuse_by_state,
    refuse_granted,
)
from pgofflined.exchanger.survey import GuestLayoutError, survey
from pgofflined.exchanger.transfer import transfer
from pgofflined.ports import Clock, Hypervisor, SuspendLimits

# Frames that have to stay free in the host besides the ones we take: an exchange that runs out
# of memory half-way may silently lose the page's mark (assign_pages, xen/common/page_alloc.c).
FREE_RESERVE = 64
_RELEASE_TRIES = 10


class _Letgo:
    """Notes whether the guest could be let go, and when."""

    def __init__(self) -> None:
        self.asked = 0.0
        self.held = 0.0
        self.released = 0.0
        self.stuck: str | None = None
        self.may_suspend_late = False


def exchange(
    domain: DomainIdentity,
    mfns: Sequence[Mfn],
    *,
    xen: Hypervisor,
    clock: Clock,
    limits: SuspendLimits,
    never_read: Container[Mfn] = (),
) -> ExchangeReport:
    """Exchange pages of one PV domain, all in one suspend.

    The pages are marked offline-pending already; those in ``never_read`` are known to hold an
    uncorrected error and are refused, whatever Xen knows of them.  Gives a result for every
    page; raises only for faults of our own.  Synchronous on purpose: doing and undoing happen
    in one thread, so no cancellation can make them overlap.
    """
    pages = tuple(dict.fromkeys(mfns))
    early = _look(xen, domain, pages, never_read)
    candidates = [mfn for mfn in pages if mfn not in early]
    if not candidates:
        return _report(domain, pages, early, None)
    letgo = _Letgo()
    results: dict[Mfn, PageResult] = dict(early)
    try:
        with _suspended(xen, clock, domain.domid, limits, letgo):
            results |= _move(xen, domain, candidates)
    except GuestDidNotSuspend as error:
        letgo.may_suspend_late = error.stage == "suspend"
        results |= _refuse_all(candidates, RefusalReason.NO_SUSPEND, str(error))
    except DomainGone as error:
        results |= _refuse_all(candidates, RefusalReason.DOMAIN_GONE, str(error))
    except GuestLayoutError as error:
        results |= _refuse_all(
            candidates, RefusalReason.GUEST_LAYOUT, f"the guest cannot be believed: {error}"
        )
    except PortError as error:
        results |= _refuse_all(candidates, RefusalReason.XEN_REFUSED, str(error))
    return _report(domain, pages, results, letgo)


def _look(
    xen: Hypervisor, domain: DomainIdentity, mfns: Sequence[Mfn], never_read: Container[Mfn]
) -> dict[Mfn, PageResult]:
    """Refusals that can be seen while the guest runs."""
    try:
        info = xen.domain(domain.domid)
        busy = _refuse_domain(domain, info)
        if busy is not None:
            return _refuse_all(mfns, *busy)
        needed = len(mfns) + FREE_RESERVE
        if xen.free_frames() < needed:
            return _refuse_all(
                mfns,
                RefusalReason.NO_FREE_MEMORY,
                f"the host has fewer than {needed} free frames; free some memory",
            )
        return _look_at_pages(xen, domain.domid, mfns, never_read)
    except DomainGone as error:
        return _refuse_all(mfns, RefusalReason.DOMAIN_GONE, str(error))
    except PortError as error:
        return _refuse_all(mfns, RefusalReason.XEN_REFUSED, str(error))


def _refuse_domain(domain: DomainIdentity, info: DomainInfo) -> tuple[RefusalReason, str] | None:
    if info.identity != domain or info.dying:
        return RefusalReason.DOMAIN_GONE, f"d{domain.domid} is gone or dying"
    if info.kind is not GuestKind.PV or info.is_dom0:
        return RefusalReason.NOT_PV, f"d{domain.domid} is no PV guest"
    if info.shutdown is not None or info.paused:
        state = "paused" if info.shutdown is None else f"shut down ({info.shutdown.name.lower()})"
        return (
            RefusalReason.DOMAIN_BUSY,
            f"d{domain.domid} is {state} by someone else; it is left alone until it runs",
        )
    return None


def _look_at_pages(
    xen: Hypervisor, domid: Domid, mfns: Sequence[Mfn], never_read: Container[Mfn]
) -> dict[Mfn, PageResult]:
    wanted = np.array(mfns, dtype=np.uint64)
    types = xen.page_types(domid, wanted)
    granted = np.isin(wanted, xen.granted_frames(domid))
    refusals: dict[Mfn, PageResult] = {}
    for position, mfn in enumerate(mfns):
        kind = decode_page_type(int(types[position])).kind
        state = OfflineState.BROKEN if mfn in never_read else xen.query(mfn)
        refusal = refuse_by_state(mfn, state) or refuse_by_kind(mfn, kind)
        if refusal is None and granted[position]:
            refusal = refuse_granted(mfn)
        if refusal is not None:
            refusals[mfn] = refusal
    return refusals


def _move(xen: Hypervisor, domain: DomainIdentity, mfns: Sequence[Mfn]) -> dict[Mfn, PageResult]:
    """Survey, plan and transfer; the guest is suspended and paused."""
    info = xen.domain(domain.domid)
    if info.identity != domain or info.dying:
        raise DomainGone(domain.domid)
    if info.shutdown is not ShutdownReason.SUSPEND:
        return _refuse_all(
            mfns, RefusalReason.DOMAIN_BUSY, f"d{domain.domid} was resumed by someone else"
        )
    plan = make_plan(survey(xen, info, mfns))
    results: dict[Mfn, PageResult] = {refusal.mfn: refusal for refusal in plan.refusals}
    moved = transfer(xen, domain.domid, plan.pages)
    return results | {page.mfn: result for page, result in zip(plan.pages, moved, strict=True)}


@contextmanager
def _suspended(
    xen: Hypervisor, clock: Clock, domid: Domid, limits: SuspendLimits, letgo: _Letgo
) -> Iterator[None]:
    """Hold the guest suspended and paused; let it go on every way out."""
    letgo.asked = clock.monotonic()
    try:
        xen.suspend(domid, limits)
    except (GuestDidNotSuspend, DomainGone):
        raise
    except PortError:
        # We cannot tell how far the request got; resuming a guest that runs does nothing.
        letgo.stuck = _release(lambda: xen.resume(domid), "resume")
        raise
    letgo.held = clock.monotonic()
    try:
        # The guest has stopped itself, but its vCPUs' state may still be loaded on a pCPU:
        # only a pause waits for that, and only then are changes to its page tables safe.
        xen.pause(domid)
        yield
    finally:
        problems = (
            _release(lambda: _unpause(xen, domid), "unpause"),
            _release(lambda: xen.resume(domid), "resume"),
        )
        letgo.released = clock.monotonic()
        letgo.stuck = "; ".join(problem for problem in problems if problem) or None


def _unpause(xen: Hypervisor, domid: Domid) -> None:
    """Take our pause back, if there is one: the reply to the pause may have been lost."""
    if xen.domain(domid).paused:
        xen.unpause(domid)


def _release(act: Callable[[], None], what: str) -> str | None:
    """Do what frees the guest, again and again if need be; what is wrong if it cannot be."""
    problem = ""
    for _ in range(_RELEASE_TRIES):
        try:
            act()
        except DomainGone:
            return None
        except PortError as error:
            problem = str(error)
        else:
            return None
    return f"could not {what} it: {problem}"


def _refuse_all(mfns: Sequence[Mfn], reason: RefusalReason, detail: str) -> dict[Mfn, PageResult]:
    return {mfn: Refusal(mfn=mfn, reason=reason, detail=detail) for mfn in mfns}


def _report(
    domain: DomainIdentity,
    mfns: Sequence[Mfn],
    results: dict[Mfn, PageResult],
    letgo: _Letgo | None,
) -> ExchangeReport:
    blackout = None
    if letgo is not None and letgo.released:
        blackout = Blackout(whole=letgo.released - letgo.asked, ours=letgo.released - letgo.held)
    return ExchangeReport(
        domain=domain,
        results=tuple(results[mfn] for mfn in mfns),
        blackout=blackout,
        stuck=letgo.stuck if letgo is not None else None,
        may_suspend_late=letgo is not None and letgo.may_suspend_late,
    )
