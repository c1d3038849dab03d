"""Ends jobs that an earlier process left, by its record and by what Xen says is true.

A guest that still stands still is as the process left it: its entries are cleared or set, its pages
exchanged or not, and Xen knows which.  What was exchanged is settled, what was not is undone, and
the guest is let go.  Doing this a second time, or for a group that was settled already, changes
nothing.

A guest that runs is not touched: nobody may change page tables under it.
"""

from __future__ import annotations

from pgofflined.core.domains import DomainInfo, ShutdownReason
from pgofflined.core.errors import DomainGone, PortError
from pgofflined.core.frames import Domid
from pgofflined.core.moves import Group
from pgofflined.core.outcomes import PageResult
from pgofflined.core.recovery import Recovered, RecoveryReport
from pgofflined.exchanger.letgo import let_go, told
from pgofflined.exchanger.transfer import SETTLE_TRIES, Transfer
from pgofflined.ports import Hypervisor, JobRecord, UnfinishedJob


def recover(unfinished: UnfinishedJob, xen: Hypervisor) -> RecoveryReport:
    """End one job and close its record, unless the guest could not be let go.

    Raises PortError when Xen cannot even be asked for the domain.
    """
    domid = unfinished.record.domain.domid
    try:
        info = xen.domain(domid)
        if not _is_same(info, unfinished.record):
            raise DomainGone(domid)
        report = _end(unfinished, xen, info)
    except DomainGone as error:
        report = _report(unfinished, Recovered.GONE, str(error))
    if report.stuck is None:
        unfinished.job.close()
    return report


def _is_same(info: DomainInfo, record: JobRecord) -> bool:
    return (
        info.identity == record.domain
        and not info.dying
        and info.shared_info == record.shared_info
        and info.cpu_time >= record.cpu_time
    )


def _end(unfinished: UnfinishedJob, xen: Hypervisor, info: DomainInfo) -> RecoveryReport:
    domid, group = info.domid, unfinished.group
    if info.shutdown is ShutdownReason.SUSPEND:
        return _finish(unfinished, xen, info)
    if info.shutdown is not None:
        detail = f"d{domid} is shut down ({info.shutdown.name.lower()})"
        return _report(unfinished, Recovered.GONE, detail)
    if group is None:
        # It may still have a request of ours to read, or have read it.
        xen.withdraw_suspend(domid)
        return _report(unfinished, Recovered.NOTHING_TO_DO, f"d{domid} runs", may_suspend_late=True)
    pages = ", ".join(f"{mfn:#x}" for mfn in group.mfns.tolist())
    detail = (
        f"d{domid} was let go by somebody else in the middle of the exchange of mfn {pages}: what "
        "it maps there may be missing; restart it when convenient"
    )
    return _report(unfinished, Recovered.LEFT_ALONE, detail)


def _finish(unfinished: UnfinishedJob, xen: Hypervisor, info: DomainInfo) -> RecoveryReport:
    """Make the memory of a guest that stands still whole, and let it go."""
    domid = info.domid
    problem = ""
    for _ in range(SETTLE_TRIES):
        try:
            results = _make_whole(xen, domid, unfinished.group)
            unfinished.job.settled()
        except _ChangedByOthers as error:
            # Whoever let it go and stopped it again has plans of his own with it.
            detail = f"d{domid} is not as it was left: {error}"
            return _report(unfinished, Recovered.LEFT_ALONE, detail)
        except DomainGone:
            raise
        except PortError as error:
            problem = str(error)
        else:
            detail = f"d{domid} still stood still; its memory is whole, and it was let go"
            stuck = let_go(xen, domid)
            told(xen, domid)
            return _report(unfinished, Recovered.FINISHED, detail, results=results, stuck=stuck)
    # What is not mapped it will fault at, which harms it less than to stand still for ever.
    detail = f"d{domid} could not be put right: {problem}"
    stuck = let_go(xen, domid)
    told(xen, domid)
    return _report(unfinished, Recovered.LEFT_ALONE, detail, stuck=stuck)


class _ChangedByOthers(Exception):
    """The guest's page tables are neither as we found them nor as we left them."""


def _make_whole(xen: Hypervisor, domid: Domid, group: Group | None) -> tuple[PageResult, ...]:
    """Settle what was exchanged and undo what was not.  Raises _ChangedByOthers, PortError."""
    if not xen.condition(domid).paused:
        xen.pause(domid)
    if group is None:
        return ()
    transfer = Transfer(xen, domid, group)
    transfer.take_over()
    changed = transfer.changed_by_others()
    if changed is not None:
        raise _ChangedByOthers(changed)
    transfer.settle()
    return tuple(transfer.results())


def _report(
    unfinished: UnfinishedJob,
    outcome: Recovered,
    detail: str,
    *,
    results: tuple[PageResult, ...] = (),
    stuck: str | None = None,
    may_suspend_late: bool = False,
) -> RecoveryReport:
    return RecoveryReport(
        domain=unfinished.record.domain,
        outcome=outcome,
        detail=detail,
        results=results,
        stuck=stuck,
        may_suspend_late=may_suspend_late,
    )
