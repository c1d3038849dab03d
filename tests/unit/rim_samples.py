"""A snapshot of the daemon for the tests of what shows it."""

from __future__ import annotations

from uuid import UUID

from pgofflined.core.book import Cause, PageEntry, Phase
from pgofflined.core.conditions import Condition, ConditionCode
from pgofflined.core.domains import DomainIdentity
from pgofflined.core.frames import Domid, Mfn
from pgofflined.core.status import JobStatus, Snapshot, SourceStatus, WorkerStatus

STARTED = 1_700_000_000.0
NOW = STARTED + 7200.0
WEB = DomainIdentity(Domid(7), UUID("0f8fad5b-d9cb-469f-a165-70867728950e"))

LEFT_PAGE = PageEntry(
    mfn=Mfn(0x1A2B3),
    cause=Cause.CORRECTED,
    phase=Phase.LEFT,
    since=STARTED + 60.0,
    marked=True,
    reason="dom0",
    detail="it belongs to dom0; plan a reboot with badpage=, or have dom0 give it up",
)
WAITING_PAGE = PageEntry(
    mfn=Mfn(0x2000),
    cause=Cause.OPERATOR,
    phase=Phase.WAITING,
    since=STARTED + 3600.0,
    marked=True,
    domain=WEB,
    domain_name="web-1",
    reason="granted",
    detail="the page is granted to d0",
    attempts=2,
    next_try=NOW + 300.0,
)
OFFLINED_PAGE = PageEntry(
    mfn=Mfn(0x3000),
    cause=Cause.CORRECTED,
    phase=Phase.OFFLINED,
    since=STARTED + 30.0,
    marked=True,
    detail="its owner was moved off it in place",
)

UNRESOLVED = Condition(
    code=ConditionCode.PAGE_UNRESOLVED,
    text="mfn 0x1a2b3 stays in use although it is failing: it belongs to dom0",
    since=STARTED + 60.0,
    mfn=Mfn(0x1A2B3),
)
PUT_OFF = Condition(
    code=ConditionCode.PAGE_PUT_OFF,
    text="mfn 0x2000 waits for a later try: the page is granted to d0",
    since=STARTED + 3600.0,
    mfn=Mfn(0x2000),
    domid=WEB.domid,
)
SCRUB = Condition(
    code=ConditionCode.IDLE_SCRUB,
    text="1 retired pages keep an idle CPU of their NUMA node busy until the host reboots",
    since=STARTED + 30.0,
)

SNAPSHOT = Snapshot(
    version="0.1.0",
    started=STARTED,
    xen_version="4.20.4",
    dry_run=False,
    source=SourceStatus(name="mcelog", note="VIRQ_MCA is the kernel's", last_record=NOW - 90.0),
    reports={("corrected", "mcelog"): 12},
    lost={"mcelog": 3},
    pages_by_phase={"left": 1, "waiting": 1, "offlined": 1},
    retired_frames=3,
    cap_frames=4096,
    tracked_pages=9,
    evicted_pages=1,
    idle_scrub=1,
    oldest_unfinished=STARTED + 3600.0,
    workers=WorkerStatus(
        workers=2, busy=1, queued_pages=5, queue_limit=4096, longest_busy_seconds=2.5
    ),
    jobs=(
        JobStatus(
            job="x4",
            kind="exchange",
            domid=7,
            domain_name="web-1",
            pages=5,
            state="running",
            since=NOW - 3.0,
        ),
    ),
    attention=(UNRESOLVED, PUT_OFF, SCRUB),
    policy=("retire.corrected_errors = 2 errors", "retire.window = 259200 s"),
    policy_digest="3f2a",
    pages=(OFFLINED_PAGE, LEFT_PAGE, WAITING_PAGE),
)
