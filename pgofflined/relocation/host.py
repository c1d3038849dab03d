"""What is asked of and done to the host around a migration; synchronous, for worker threads."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar, assert_never

from pgofflined.core.aftermath import (
    RESUME_SINCE,
    Ended,
    Moved,
    Resume,
    RunsOn,
    Stuck,
    after_failure,
    after_success,
)
from pgofflined.core.domains import DomainIdentity, DomainInfo, ShutdownReason
from pgofflined.core.errors import DomainGone, PortError
from pgofflined.core.frames import Domid, Mfn
from pgofflined.core.offline import OfflineState
from pgofflined.core.premigration import MigrationFacts, Way
from pgofflined.core.saves import SaveFacts
from pgofflined.core.suspending import MayNotBeAsked, SuspendSupport, how_it_ended
from pgofflined.core.xenversion import XenVersion
from pgofflined.ports import nothing
from pgofflined.saving import Saves

T = TypeVar("T")


class InThread(Protocol):
    """Runs a blocking call off the event loop, as ``asyncio.to_thread`` does."""

    def __call__(self, call: Callable[[], T], /) -> Awaitable[T]:
        """The call's result."""
        ...


class Host(Protocol):
    """The part of ``ports.Hypervisor`` that migrations need."""

    def version(self) -> XenVersion:
        """Version of the running hypervisor."""
        ...

    def free_frames(self) -> int:
        """Frames that the hypervisor could hand out now."""
        ...

    def query(self, mfn: Mfn) -> OfflineState:
        """Offline state of a frame."""
        ...

    def domains(self) -> Sequence[DomainInfo]:
        """All domains."""
        ...

    def domain(self, domid: Domid) -> DomainInfo:
        """One domain.  Raises DomainGone."""
        ...

    def somebody_at(self, domid: Domid) -> str | None:
        """The process that saves or migrates the domain for somebody; None for none."""
        ...

    def serves(self, domid: Domid) -> str | None:
        """What other domains need the domain for ("serves ..."); None for nothing known."""
        ...

    def suspend_support(self, domid: Domid) -> SuspendSupport:
        """Whether the guest has announced that it suspends itself when asked."""
        ...

    def has_devices(self, domid: Domid) -> bool:
        """Whether devices of the host are assigned to the domain."""
        ...

    def resume(self, domid: Domid, before: Callable[[], None] = nothing) -> None:
        """Let a suspended guest run on."""
        ...

    def tell_resumed(self, domid: Domid) -> None:
        """Tell xenstored of it."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """The pages after their owner has gone.  ``detail`` says what is with the remaining ones."""

    offlined: frozenset[Mfn]
    remaining: frozenset[Mfn]
    new_domid: Domid | None
    detail: str
    stuck: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Care:
    """Where the guest is after a failure.  None of ``moved``, ``ended``, ``stuck``: it runs on."""

    moved: bool = False
    ended: bool = False
    stuck: str | None = None
    note: str = ""


class MigrationHost:
    """Questions to a host, each answered at one go.

    ``poison`` names a page with an uncorrected error that a domain owns or may own, if there is
    one; ``is_poisoned`` knows such pages one by one.  ``objection`` says why a domain must not be
    asked to suspend itself.
    """

    def __init__(
        self,
        xen: Host,
        poison: Callable[[DomainInfo], str | None],
        is_poisoned: Callable[[Mfn], bool],
        objection: MayNotBeAsked,
        saves: Saves | None = None,
    ) -> None:
        self._xen = xen
        self._poison = poison
        self._is_poisoned = is_poisoned
        self._objection = objection
        self._saves = saves if saves is not None else Saves()

    def facts(
        self,
        domain: DomainIdentity,
        mfns: Iterable[Mfn],
        way: Way | None,
        save_directory: Path | None = None,
    ) -> MigrationFacts:
        """What decides whether a domain may be migrated now.  Raises PortError.

        With ``save_directory``, whether it may be saved there and restored.
        """
        states = {mfn: self._xen.query(mfn) for mfn in sorted(mfns)}
        # Looked for before and after: memory that was free while a guest was in a file is its own.
        # The process that saves and restores it may have been started by an earlier daemon.
        saves = self._saves.left_over(self._xen.domains)
        free_frames = self._xen.free_frames()
        saves += self._saves.left_over(self._xen.domains)
        version = self._xen.version()
        info, twins = self._find(domain)
        save: SaveFacts | None = None
        if save_directory is not None:
            serves = None if info is None else self._xen.serves(info.domid)
            save = self._saves.facts(domain, save_directory, serves)
        return MigrationFacts(
            domain=info,
            twins=twins,
            version=version,
            states=states,
            free_frames=free_frames,
            way=way,
            somebody=None if info is None else self._xen.somebody_at(info.domid),
            save=save,
            has_devices=info is not None and self._xen.has_devices(info.domid),
            poison=None if info is None else self._poison(info),
            poisoned=frozenset(filter(self._is_poisoned, states)),
            objection=None
            if info is None
            else self._objection(info, self._xen.suspend_support(info.domid)),
            saved_guest=saves[0].text if saves else None,
        )

    def poison_in(self, domain: DomainIdentity) -> str | None:
        """The page of a domain that must not be read, if there is one.  Raises PortError."""
        info, _ = self._find(domain)
        return None if info is None else self._poison(info)

    def standing(
        self, jobs: Mapping[DomainIdentity, frozenset[Mfn]]
    ) -> dict[DomainIdentity, DomainInfo | None]:
        """Which of the domains are there and own any of their pages; None for one that is done.

        Little is asked, for this is asked often.  Raises PortError.
        """
        here = {info.identity: info for info in self._xen.domains() if not info.dying}
        return {
            domain: None if self._are_offline(mfns) else here.get(domain)
            for domain, mfns in jobs.items()
        }

    def aftercare(self, domain: DomainIdentity, *, target: str, in_doubt: bool) -> Care:
        """See where a guest is after a failed migration; resume it if that is certainly right.

        Raises PortError where that cannot be seen.
        """
        info, twins = self._find(domain)
        aftermath = after_failure(domain, info, twins, target=target, in_doubt=in_doubt)
        match aftermath:
            case RunsOn(note=note):
                return Care(note=note)
            case Ended():
                return Care(ended=True)
            case Moved():
                return Care(moved=True)
            case Stuck(what=what):
                return Care(stuck=what)
            case Resume():
                return self._resume(domain)
            case _:
                assert_never(aftermath)

    def end_of(
        self, domain: DomainIdentity, *, may_be_away: bool = False, crash_only: bool = False
    ) -> str | None:
        """How a guest has ended that a toolstack has asked to suspend itself for us, if it has.

        ``may_be_away``: that it is not here may have another cause.  ``crash_only``: it may not
        have been asked yet, so that any other end is somebody's order.  Raises PortError.
        """
        info, twins = self._find(domain)
        if crash_only and (info is None or info.shutdown is not ShutdownReason.CRASH):
            return None
        if info is None or info.dying:
            return None if twins or may_be_away else how_it_ended(domain.domid, None)
        if info.shutdown in (None, ShutdownReason.SUSPEND):
            return None
        return how_it_ended(domain.domid, info.shutdown)

    def settled(self, domain: DomainIdentity, mfns: Iterable[Mfn]) -> Settled:
        """Which of the pages are offline now, and where the guest is on this host, if it is."""
        offlined: set[Mfn] = set()
        problems: dict[Mfn, str] = {}
        for mfn in sorted(mfns):
            try:
                state = self._xen.query(mfn)
            except PortError as error:
                problems[mfn] = str(error)
                continue
            if OfflineState.OFFLINED in state:
                offlined.add(mfn)
            else:
                problems[mfn] = f"mfn {mfn:#x} is {_words(state)}"
        detail = "; ".join(list(problems.values())[:4])
        new_domid: Domid | None = None
        stuck: str | None = None
        try:
            domains = self._xen.domains()
            new_domid, stuck = after_success(domain, domains)
        except PortError as error:
            domains = ()
            detail = f"{detail}; {error}"
        if problems and any(here.identity == domain for here in domains):
            detail += (
                f"; d{domain.domid} is still there, and holds them until `xl destroy "
                f"{domain.domid}` has removed it"
            )
        return Settled(
            offlined=frozenset(offlined),
            remaining=frozenset(problems),
            new_domid=new_domid,
            detail=detail,
            stuck=stuck,
        )

    def _are_offline(self, mfns: Iterable[Mfn]) -> bool:
        return all(OfflineState.OFFLINED in self._xen.query(mfn) for mfn in mfns)

    def _resume(self, domain: DomainIdentity) -> Care:
        domid = domain.domid
        # Our own xl has ended; another one may have suspended the guest anew.
        somebody = self._xen.somebody_at(domid)
        if somebody is not None:
            return Care(
                stuck=f"d{domid} is suspended, and {somebody} is at work on it; should it still "
                f"stand still when that has ended, `xl resume {domid}` {RESUME_SINCE} lets it run"
            )
        try:
            self._xen.resume(domid)
            self._xen.tell_resumed(domid)
            still = self._xen.domain(domid).shutdown
        except DomainGone:
            return Care(ended=True)
        except PortError as error:
            return Care(stuck=f"d{domid} is left suspended and cannot be resumed: {error}")
        if still is not None:
            what = f"d{domid} is left suspended; `xl resume {domid}` {RESUME_SINCE} lets it run"
            return Care(stuck=what)
        return Care(note=f"xl left d{domid} suspended, so it was resumed")

    def _find(self, domain: DomainIdentity) -> tuple[DomainInfo | None, tuple[DomainInfo, ...]]:
        """The domain, and the others with its uuid."""
        same = [info for info in self._xen.domains() if info.uuid == domain.uuid]
        twins = tuple(info for info in same if info.domid != domain.domid and not info.dying)
        return next((info for info in same if info.domid == domain.domid), None), twins


def _words(state: OfflineState) -> str:
    if OfflineState.OFFLINE_PENDING in state:
        return "still in use (offline pending)"
    if OfflineState.BROKEN in state:
        return "broken and still in use"
    return "in normal use"
