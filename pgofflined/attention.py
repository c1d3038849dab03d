"""What needs a person: states that the daemon's snapshot shows, and incidents that are kept."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from pgofflined.aftercare import StuckGuest
from pgofflined.core.book import NOT_RAM, Cause, PageEntry, Phase
from pgofflined.core.conditions import Condition, ConditionCode, unreported_error
from pgofflined.core.domains import DomainIdentity
from pgofflined.core.frames import Domid, Mfn
from pgofflined.core.incidents import Incidents
from pgofflined.core.machine import CpuVendor
from pgofflined.core.outcomes import Damaged, ExchangeReport
from pgofflined.core.policy import Policy, effective
from pgofflined.core.recovery import Recovered, RecoveryReport
from pgofflined.core.status import Snapshot
from pgofflined.core.xenversion import XenVersion, unseen_errors
from pgofflined.ports import Clock

log = logging.getLogger(__name__)

_INCIDENTS: Final = "incidents"


class FactStore(Protocol):
    """What is kept over a restart of the daemon."""

    def get_meta(self, key: str) -> str | None:
        """A value by its key."""
        ...

    def set_meta(self, key: str, value: str) -> None:
        """Keep a value."""
        ...


class Attention:
    """Incidents with their store, and all conditions of a moment.  For the loop's thread.

    Whoever sees something happen tells ``incidents``.
    """

    def __init__(self, store: FactStore, clock: Clock) -> None:
        self.incidents = Incidents(self._keep)
        self._store = store
        self._clock = clock
        self._lost = 0
        stored = store.get_meta(_INCIDENTS)
        if stored is not None:
            try:
                self.incidents.load(stored)
            except ValueError as error:
                log.error("cannot read stored incidents; continuing without them: %s", error)

    def conditions(self, snapshot: Snapshot, about: Circumstances) -> tuple[Condition, ...]:
        """Everything that is true now or has happened, the most urgent first."""
        self.note_lost(snapshot.lost)
        return self.incidents.with_states(
            states(snapshot, about),
            open_pages={page.mfn for page in snapshot.pages if page.phase is not Phase.OFFLINED},
        )

    def note_exchange(self, report: ExchangeReport) -> None:
        """Take note of what an exchange did that a person has to know: pages it has damaged."""
        domid = report.domain.domid
        if report.ended is not None:
            self._note(ConditionCode.GUEST_ENDED, report.ended, domid)
        for page in report.results:
            if isinstance(page, Damaged):
                self._note_damaged(page, domid)

    def _note_damaged(self, page: Damaged, domid: Domid) -> None:
        text = (
            f"d{domid} lost mfn {page.old:#x} ({page.detail}): restart it at once and check its "
            "data, for its programs may read zeros there"
        )
        self.incidents.note(
            Condition(
                code=ConditionCode.PAGE_DAMAGED,
                text=text,
                since=self._clock.now(),
                mfn=page.old,
                domid=domid,
            )
        )

    def note_ended(self, domain: DomainIdentity, how: str) -> None:
        """Take note of a guest that has ended when it was asked to suspend itself for us."""
        self._note(ConditionCode.GUEST_ENDED, how, domain.domid)

    def note_broken(self, mfn: Mfn, detail: str) -> None:
        """Take note of a page that Xen has broken, of whose error no source has told."""
        self.incidents.note(unreported_error(mfn, detail, self._clock.now()))

    def note_freed_marked(self, mfn: Mfn) -> None:
        """Take note of a page that was freed with its mark, which damages an old allocator."""
        text = (
            f"mfn {mfn:#x} was freed while it was marked or broken, which may have damaged this "
            "Xen's allocator: the host may stop, or one frame be given to two guests; move the "
            "guests away and reboot it, then update Xen"
        )
        self.incidents.note(
            Condition(code=ConditionCode.HEAP_IN_DOUBT, text=text, since=self._clock.now(), mfn=mfn)
        )

    def note_state_lost(self, text: str) -> None:
        """Take note that what was known of this boot of the host is lost."""
        self.incidents.note(
            Condition(code=ConditionCode.STATE_LOST, text=text, since=self._clock.now())
        )

    def note_state_found(self, lost: str, held_back: int) -> None:
        """Take note of how many pages Xen holds back of which nothing is known any more."""
        if not held_back:
            self.incidents.resolve(ConditionCode.STATE_LOST)
            return
        self.note_state_lost(
            f"{lost}, and Xen holds {held_back} pages back: those in use count as pages with an "
            "uncorrected error, errors are counted anew, and what was known of guests and jobs is "
            "in the journal only"
        )

    def note_recovered(self, reports: Iterable[RecoveryReport]) -> None:
        """Take note of jobs of an earlier process that could not be ended well."""
        for report in reports:
            code = ConditionCode.JOB_NOT_RECOVERED
            if report.outcome is Recovered.CRASHED:
                code = ConditionCode.GUEST_ENDED
            self._note(code, report.detail, report.domain.domid)
            for page in report.damaged:
                self._note_damaged(page, report.domain.domid)

    def _note(self, code: ConditionCode, text: str, domid: Domid) -> None:
        self.incidents.note(Condition(code=code, text=text, since=self._clock.now(), domid=domid))

    def note_lost(self, by_place: Mapping[str, int]) -> None:
        """Records that were lost since the last look are an incident."""
        lost = sum(by_place.values())
        if lost == self._lost:
            return
        self._lost = lost
        places = ", ".join(f"{count} {place}" for place, count in by_place.items() if count)
        text = (
            f"{lost} machine-check records were lost or made no sense ({places}): their errors "
            "count against no page; look at the board's own log"
        )
        self.incidents.note(
            Condition(code=ConditionCode.RECORDS_LOST, text=text, since=self._clock.now())
        )

    def _keep(self) -> None:
        self._store.set_meta(_INCIDENTS, self.incidents.dump())


@dataclass(frozen=True, slots=True, kw_only=True)
class Circumstances:
    """What conditions depend on besides the snapshot.

    ``now`` is in seconds since the epoch, ``vendor`` the processors'.  ``stuck`` says of guests
    that stand still what keeps them, ``overdue`` of saves of ours what a person has to know;
    ``saves`` is about those of earlier daemons.  ``trouble`` says why state is not stored,
    ``worker`` what keeps a worker for too long, ``exchanges_off`` why no exchange can be begun.
    """

    now: float
    policy: Policy
    version: XenVersion
    vendor: CpuVendor = CpuVendor.INTEL
    stuck: Mapping[DomainIdentity, StuckGuest] = field(default_factory=dict)
    overdue: Mapping[DomainIdentity, str] = field(default_factory=dict)
    saves: Sequence[Condition] = ()
    trouble: str | None = None
    worker: str | None = None
    exchanges_off: str | None = None


def policy_digest(policy: Policy) -> str:
    """Twelve hexadecimal digits that change with the policy."""
    text = "\n".join(effective(policy))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def states(snapshot: Snapshot, about: Circumstances) -> tuple[Condition, ...]:
    """All conditions that are true of this moment."""
    return (
        *_guests(about),
        *_pages(snapshot),
        *_daemon(snapshot, about),
        *_policy(about),
        *_xen(snapshot, about),
    )


def config_rejected(problems: Sequence[str], when: float) -> Condition:
    """The last reload was refused; ``problems`` are those of the file."""
    return Condition(
        code=ConditionCode.CONFIG_REJECTED,
        text=(
            f"the configuration was refused, the one before is in force: {'; '.join(problems)}; "
            "correct it, then `pgofflined check-config` and `systemctl reload pgofflined`; "
            "until then the daemon would not start again"
        ),
        since=when,
    )


def _guests(about: Circumstances) -> Iterator[Condition]:
    for domain, stuck in about.stuck.items():
        is_ours = stuck.code is ConditionCode.GUEST_STUCK
        what = f"d{domain.domid} does not run because of pgofflined: " if is_ours else ""
        yield Condition(
            code=stuck.code,
            text=f"{what}{stuck.text}",
            since=stuck.since,
            domid=domain.domid,
        )
    for domain, what in about.overdue.items():
        yield Condition(
            code=ConditionCode.SAVE_OVERDUE, text=what, since=about.now, domid=domain.domid
        )
    yield from about.saves


def is_unresolved(entry: PageEntry) -> bool:
    """Whether a page that was to go stays in use.

    Of a page with an uncorrected error there is an incident, and so there is of one whose guest
    was damaged: it is not in use any more.  What is no memory is used by nobody.
    """
    return (
        entry.phase is Phase.LEFT
        and entry.cause in (Cause.CORRECTED, Cause.OPERATOR)
        and entry.reason not in ("damaged", NOT_RAM)
    )


def _pages(snapshot: Snapshot) -> Iterator[Condition]:
    put_off = {
        job.domid: job.put_off
        for job in snapshot.jobs
        if job.kind == "relocation" and job.put_off is not None
    }
    for entry in snapshot.pages:
        domid = None if entry.domain is None else entry.domain.domid
        if is_unresolved(entry):
            yield _unresolved(entry, entry.reason, entry.detail or entry.reason)
        elif entry.phase is Phase.WAITING:
            yield _waits(entry, entry.detail or entry.reason)
        elif entry.phase is Phase.EXCHANGE and entry.reason:
            # Something was in the way before: all is well only when the page has gone.
            yield _waits(entry, entry.detail or entry.reason, "is tried again; until now")
        elif entry.phase is Phase.RELOCATION and domid in put_off:
            why = put_off[domid]
            if why.needs_person and entry.cause is not Cause.UNCORRECTED:
                yield _unresolved(entry, why.reason, why.detail)
            else:
                yield _waits(entry, why.detail)


def _unresolved(entry: PageEntry, reason: str, why: str) -> Condition:
    what = "an operator wants it retired" if entry.cause is Cause.OPERATOR else "it is failing"
    text = f"mfn {entry.mfn:#x} stays in use although {what}: {why}"
    return _of_page(entry, ConditionCode.PAGE_UNRESOLVED, text, reason)


def _waits(entry: PageEntry, why: str, what: str = "waits for a later try") -> Condition:
    text = f"mfn {entry.mfn:#x} {what}: {why}"
    return _of_page(entry, ConditionCode.PAGE_PUT_OFF, text)


def _of_page(entry: PageEntry, code: ConditionCode, text: str, kind: str = "") -> Condition:
    domid = None if entry.domain is None else entry.domain.domid
    return Condition(code=code, text=text, since=entry.since, mfn=entry.mfn, domid=domid, kind=kind)


def _daemon(snapshot: Snapshot, about: Circumstances) -> Iterator[Condition]:
    if not snapshot.reload.successful:
        yield config_rejected(snapshot.reload.problems, snapshot.reload.when)
    if snapshot.source.name is None:
        yield _now(about, ConditionCode.NO_SOURCE, snapshot.source.note)
    if snapshot.retired_frames >= snapshot.cap_frames:
        yield _now(
            about,
            ConditionCode.CAP_REACHED,
            f"{snapshot.retired_frames} pages are retired, which is all that retire.max_retired "
            "allows: replace the memory module",
        )
    if about.worker is not None:
        yield _now(about, ConditionCode.WORKER_STUCK, about.worker)
    if about.trouble is not None:
        yield _now(about, ConditionCode.STATE_NOT_STORED, about.trouble)
    if about.exchanges_off is not None and about.policy.exchange.enabled:
        yield _now(about, ConditionCode.EXCHANGES_OFF, about.exchanges_off)


def _policy(about: Circumstances) -> Iterator[Condition]:
    retire = about.policy.retire
    if not retire.enabled:
        yield _now(
            about,
            ConditionCode.RETIRING_OFF,
            "retiring is switched off (retire.enabled = false): errors are counted, no page is "
            "taken out of use",
        )
    elif retire.dry_run:
        yield _now(
            about,
            ConditionCode.DRY_RUN,
            "dry run (retire.dry_run = true): decisions are logged only",
        )


def _xen(snapshot: Snapshot, about: Circumstances) -> Iterator[Condition]:
    version = about.version
    unseen = unseen_errors(version, about.vendor)
    if unseen is not None:
        yield _now(about, ConditionCode.NO_POLLING, unseen)
    if not version.offlines_free_frames_safely:
        yield _now(
            about,
            ConditionCode.FREE_FRAMES_UNSAFE,
            f"Xen {version} cannot take free pages out safely; only pages of PV guests are "
            "retired: update Xen",
        )
    if snapshot.idle_scrub:
        yield _now(
            about,
            ConditionCode.IDLE_SCRUB,
            f"{snapshot.idle_scrub} retired pages keep an idle CPU of their NUMA node busy until "
            "the host reboots",
        )


def _now(about: Circumstances, code: ConditionCode, text: str) -> Condition:
    """A state that nobody has noted the beginning of."""
    return Condition(code=code, text=text, since=about.now)
