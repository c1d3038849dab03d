"""What people ask of the daemon through the control socket, save for its snapshot."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from errno import EINVAL
from functools import partial
from typing import Final, TypeVar, assert_never

from pgofflined.core.book import NOT_RAM, PageEntry, Phase
from pgofflined.core.conditions import Condition, ConditionCode
from pgofflined.core.domains import DomainInfo
from pgofflined.core.errors import PortError, XenError
from pgofflined.core.events import Event
from pgofflined.core.frames import Domid, Mfn
from pgofflined.core.incidents import Acknowledged, Incidents
from pgofflined.core.offline import OfflineState
from pgofflined.core.status import Fate, FrameAnswer, OfflineAnswer
from pgofflined.intake import Intake
from pgofflined.journal_log import event
from pgofflined.ledger import Ledger
from pgofflined.owners import find_pv_owner, named_if_possible, what_of_broken
from pgofflined.ports import Clock, Hypervisor

log = logging.getLogger(__name__)

_T = TypeVar("_T")

# Queries are rare and take milliseconds; more threads would only help one who asks in a loop.
_QUERY_THREADS: Final = 2
_QUERY_SECONDS: Final = 20.0
# The first look at a page takes milliseconds, unless Xen or many other pages keep it waiting.
_FIRST_LOOK_SECONDS: Final = 30.0


class _Questions:
    """Asks Xen in threads of its own, a few at a time.

    Not in asyncio's pool, in which triage works: should Xen not answer, its threads would be used
    up.  And not in a pool of the library's, whose threads would keep the process from ending.
    """

    def __init__(self) -> None:
        self._free = asyncio.Semaphore(_QUERY_THREADS)

    async def ask(self, question: Callable[[], _T]) -> _T:
        """The answer.  Raises PortError if it does not come in time, and what ``question`` does."""
        try:
            async with asyncio.timeout(_QUERY_SECONDS):
                await self._free.acquire()
                return await self._begin(question)
        except TimeoutError:
            raise PortError(
                f"Xen has not answered within {_QUERY_SECONDS:g} s; look at `xl dmesg`"
            ) from None

    def _begin(self, question: Callable[[], _T]) -> asyncio.Future[_T]:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[_T] = loop.create_future()

        def settle(give: Callable[[], None]) -> None:
            self._free.release()
            if not answer.done():
                give()

        def work() -> None:
            give: Callable[[], None]
            try:
                give = partial(answer.set_result, question())
            except Exception as error:  # noqa: BLE001 - whoever asked gets it
                give = partial(answer.set_exception, error)
            with suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(settle, give)

        threading.Thread(target=work, name="query", daemon=True).start()
        return answer


class Operations:
    """Answers about single pages, and takes acknowledgements.  Belongs to the loop's thread."""

    def __init__(
        self,
        *,
        xen: Hypervisor,
        clock: Clock,
        intake: Intake,
        ledger: Ledger,
        incidents: Incidents,
        is_poisoned: Callable[[Mfn], bool],
    ) -> None:
        self._xen = xen
        self._clock = clock
        self._intake = intake
        self._ledger = ledger
        self._incidents = incidents
        self._is_poisoned = is_poisoned
        self._questions = _Questions()
        self._change = asyncio.Event()

    def page_changed(self, entry: PageEntry) -> None:
        """Take note of what has become of a page."""
        if entry.phase is Phase.OFFLINED:
            self._incidents.resolve(ConditionCode.UNCORRECTED_ERROR, mfn=entry.mfn)
        change, self._change = self._change, asyncio.Event()
        change.set()

    async def query(self, mfn: Mfn) -> FrameAnswer:
        """Xen's state of a frame, its owner as far as that can be told, and our entry.

        Raises PortError where Xen cannot be asked, or does not answer.
        """
        state, owner, note = await self._questions.ask(lambda: _look(mfn, self._xen))
        is_poisoned = self._is_poisoned(mfn)
        is_broken = state is not None and bool(state & OfflineState.BROKEN)
        if state is not None and (is_poisoned or is_broken):
            note = _of_uncorrected(mfn, state, note, known=is_poisoned)
        return FrameAnswer(
            mfn=mfn,
            state="NOT_RAM" if state is None else state.name or "UNKNOWN",
            owner=owner,
            hits_in_window=self._intake.history.hits(mfn, self._clock.monotonic()),
            entry=self._ledger.book.get(mfn),
            note=note,
            uncorrected=is_poisoned or is_broken,
        )

    async def offline(self, mfn: Mfn, *, is_awaited: bool) -> OfflineAnswer:
        """Retire a frame by the policy's rules.

        ``is_awaited``: answer when the first look at it is over, and not before.
        """
        taken, detail = self._intake.request(mfn)
        if not taken:
            return OfflineAnswer(mfn=mfn, fate=Fate.REFUSED, detail=detail)
        if is_awaited:
            await self._until(mfn, lambda phase: phase is not Phase.TRIAGE, _FIRST_LOOK_SECONDS)
        return self._fate(mfn)

    async def wait(self, mfn: Mfn, seconds: float) -> OfflineAnswer:
        """What has become of a frame that is in hand; waits for its end, but no longer."""
        await self._until(mfn, lambda phase: phase.is_final, seconds)
        return self._fate(mfn)

    def acknowledge(
        self, code: ConditionCode | None, mfn: Mfn | None, domid: Domid | None, *, uid: int
    ) -> Acknowledged:
        """Note that the user ``uid`` knows of conditions; None stands for any."""
        answer = self._incidents.acknowledge(code, mfn=mfn, domid=domid)
        for condition in answer.done:
            _tell_acknowledged(condition, uid)
        return answer

    async def _until(self, mfn: Mfn, is_over: Callable[[Phase], bool], seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while (entry := self._ledger.book.get(mfn)) and not is_over(entry.phase):
                    await self._change.wait()

    def _fate(self, mfn: Mfn) -> OfflineAnswer:
        entry = self._ledger.book.get(mfn)
        if entry is None:
            detail = "the daemon does not know this page"
            return OfflineAnswer(mfn=mfn, fate=Fate.UNKNOWN, detail=detail)
        detail = entry.detail or entry.reason
        match entry.phase:
            case Phase.OFFLINED:
                fate = Fate.OUT_OF_USE
            case Phase.LEFT:
                fate = Fate.REFUSED if entry.reason == NOT_RAM else Fate.UNRESOLVED
            case Phase.TRIAGE | Phase.WAITING:
                fate, detail = Fate.UNDER_WAY, f"{entry.phase.value}: {detail}"
            case Phase.EXCHANGE | Phase.RELOCATION:
                owner = "its owner" if entry.domain is None else f"d{entry.domain.domid}"
                fate, detail = Fate.UNDER_WAY, f"{entry.phase.value} of {owner}"
            case _:
                assert_never(entry.phase)
        return OfflineAnswer(mfn=mfn, fate=fate, detail=detail)


def _look(mfn: Mfn, xen: Hypervisor) -> tuple[OfflineState | None, str, str]:
    """State (None for no RAM), owner, and a note.  Raises PortError."""
    try:
        state = xen.query(mfn)
    except XenError as error:
        if error.errno != EINVAL:
            raise
        return None, "nobody", "no memory of this host: there is nothing to retire"
    if state & OfflineState.OFFLINED:
        return state, "nobody: it is out of use", ""
    owner = find_pv_owner(mfn, xen)
    note = what_of_broken(owner, xen) if state & OfflineState.BROKEN else ""
    if owner is not None:
        return state, _told(named_if_possible(owner, xen)), note
    if xen.m2p(mfn) is None:
        return state, "free, or Xen's own", note
    if note:
        return state, "an HVM or PVH guest", note
    return state, "an HVM or PVH guest", "Xen names it only when the page is marked"


def _told(owner: DomainInfo) -> str:
    return f"d{owner.domid} ({owner.kind.value}) {owner.name}".strip()


def _of_uncorrected(mfn: Mfn, state: OfflineState, of_broken: str, *, known: bool) -> str:
    """What is true of a page with an uncorrected error, and what ends it."""
    who = "" if known else ", which this daemon was not told of"
    what = f"the page has had an uncorrected error{who}; "
    if state & OfflineState.OFFLINED:
        return f"{what}it is out of use and does no harm"
    reboot = f"put badpage={mfn:#x} on Xen's command line for the next boot"
    never = "until then its owner is neither saved nor migrated"
    if state & OfflineState.BROKEN:
        return f"{what}Xen has marked it broken; {of_broken}; {never}"
    if state & OfflineState.OFFLINE_PENDING:
        return (
            f"{what}it is marked, and goes out of use when its owner ends: restart that guest; "
            f"{never}"
        )
    return (
        f"{what}it is not marked, so that who gets it after its owner would get the error too; "
        f"{reboot}; {never}"
    )


def _tell_acknowledged(condition: Condition, uid: int) -> None:
    what = f"uid {uid} acknowledged {condition.code.value}: {condition.text}"
    event(
        log,
        logging.INFO,
        Event.ACKNOWLEDGED,
        what,
        mfn=condition.mfn,
        domid=condition.domid,
    )
