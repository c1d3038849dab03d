"""Guests that migrations have left to a person, each known until a person has seen to it."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from uuid import uuid4

import pytest

from pgofflined.core.book import Book, Cause, PageEntry, Phase
from pgofflined.core.conditions import ConditionCode
from pgofflined.core.domains import DomainIdentity
from pgofflined.core.errors import DomainGone, PortError
from pgofflined.core.events import Event
from pgofflined.core.frames import DOM0, Domid, Mfn
from pgofflined.indoubt import GuestsInDoubt, migrated_before
from pgofflined.ports import BY_NAME_ONLY, SuspendLimits
from pgofflined.sim.clock import ManualClock
from pgofflined.sim.faults import Fault, FaultyHypervisor
from pgofflined.sim.scenarios import SmallHost, small_host

from .whole_pages import told

SOMEBODY = "process 77 (xl migrate 2 localhost)"


@dataclass
class Kept:
    """What is kept over a restart, and how often it was written."""

    found: dict[str, str] = field(default_factory=dict)
    written: int = 0

    def get_meta(self, key: str) -> str | None:
        return self.found.get(key)

    def set_meta(self, key: str, value: str) -> None:
        self.found[key] = value
        self.written += 1


class Bench:
    """The guests in doubt of a small host."""

    def __init__(self, *plan: Fault, before: bool = False) -> None:
        self.clock = ManualClock()
        self.small: SmallHost = small_host(clock=self.clock)
        self.xen = FaultyHypervisor(self.small.host, *plan)
        self.store = Kept()
        self.guest = self.small.host.domain(self.small.pvh).identity
        self.guests = self.daemon([self.guest] if before else [])

    def daemon(
        self, before: Iterable[DomainIdentity] = (), target: str | None = "far"
    ) -> GuestsInDoubt:
        return GuestsInDoubt(self.xen, self.clock, self.store, before=before, target=lambda: target)

    def suspend(self) -> None:
        self.small.host.suspend(self.small.pvh, SuspendLimits())

    def is_asked_for(self) -> list[object]:
        return [call.args[0] for call in self.xen.trace.of("somebody_at")]


def test_a_guest_is_in_doubt_from_when_that_is_noted() -> None:
    bench = Bench()
    assert not bench.guests
    bench.clock.wait(5.0)
    bench.guests.note(bench.guest, "it may run twice")
    assert bench.guests
    case = bench.guests.stuck[bench.guest]
    assert case.since == bench.clock.now()
    assert (case.text, case.code) == ("it may run twice", ConditionCode.GUEST_IN_DOUBT)


def test_several_guests_can_be_in_doubt() -> None:
    bench = Bench()
    other = bench.small.host.domain(bench.small.pv).identity
    bench.guests.note(bench.guest, "one")
    bench.guests.note(other, "other")
    assert {one: case.text for one, case in bench.guests.stuck.items()} == {
        bench.guest: "one",
        other: "other",
    }


def test_a_guest_is_in_doubt_until_it_is_settled() -> None:
    bench = Bench()
    bench.suspend()
    bench.guests.note(bench.guest, "so")
    bench.guests.look()
    assert bench.guest in bench.guests.stuck
    bench.small.host.resume(bench.small.pvh)
    bench.guests.look()
    assert not bench.guests


def test_one_that_is_noted_while_guests_are_looked_at_is_looked_at_the_next_time() -> None:
    bench = Bench()
    other = bench.small.host.domain(bench.small.pv).identity
    bench.guests.note(other, "so")
    # It runs: what was seen of it may be from before its migration.
    bench.xen.plan.append(
        Fault(method="conditions", act=lambda: bench.guests.note(bench.guest, "so"))
    )
    bench.guests.look()
    assert set(bench.guests.stuck) == {bench.guest}
    bench.guests.look()
    assert not bench.guests


def test_nothing_is_asked_of_xen_while_no_guest_is_in_doubt() -> None:
    bench = Bench()
    bench.guests.look()
    assert bench.xen.trace.methods == []


def test_while_xen_cannot_be_asked_guests_stay_in_doubt_and_it_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bench = Bench(Fault(method="conditions", times=2), Fault(method="conditions", nth=4))
    bench.suspend()
    bench.guests.note(bench.guest, "so")
    said = []
    for _ in range(4):
        bench.guests.look()
        assert bench.guest in bench.guests.stuck
        said.append(len(caplog.records))
    assert said == [1, 1, 1, 2]
    [first, second] = caplog.records
    assert first.levelno == second.levelno == logging.WARNING
    assert first.getMessage().startswith(
        "what became of guests that were migrated cannot be seen: "
    )
    assert "conditions (injected)" in first.getMessage()


def test_guests_in_doubt_are_the_same_for_the_next_daemon() -> None:
    bench = Bench()
    bench.guests.note(bench.guest, "copies of \udcff run")
    bench.guests.keep()
    bench.clock.wait(60.0)
    later = bench.daemon()
    [(guest, case)] = later.stuck.items()
    assert guest == bench.guest
    assert case.since == bench.guests.stuck[guest].since
    assert (case.text, case.code) == ("copies of \\udcff run", ConditionCode.GUEST_IN_DOUBT)
    # It is that of the next one to see that it is settled, and to have that kept.
    later.look()
    later.keep()
    assert not bench.daemon()


def test_they_are_written_only_where_they_have_changed() -> None:
    bench = Bench()
    bench.guests.keep()
    assert bench.store.written == 0
    bench.guests.note(bench.guest, "so")
    bench.guests.keep()
    bench.guests.keep()
    assert bench.store.written == 1
    later = bench.daemon()
    later.keep()
    assert bench.store.written == 1


def test_without_a_store_nothing_is_kept() -> None:
    bench = Bench()
    guests = GuestsInDoubt(bench.xen, bench.clock)
    guests.note(bench.guest, "so")
    guests.keep()
    assert guests.stuck[bench.guest].text == "so"


def test_what_cannot_be_read_is_said_and_left_out(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    bench.store.found["guests_in_doubt"] = '[{"domain": 7}]'
    assert not bench.daemon()
    [record] = caplog.records
    assert record.levelno == logging.ERROR
    assert "cannot be read" in record.getMessage()
    assert "domain" in record.getMessage()


# Migrations of an earlier daemon.


def test_a_guest_that_an_earlier_migration_left_suspended_is_in_doubt(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bench = Bench(before=True)
    bench.suspend()
    assert bench.guests
    bench.guests.look()
    case = bench.guests.stuck[bench.guest]
    assert case.since == bench.clock.now()
    assert case.text.startswith("this daemon was restarted while it migrated a guest")
    assert f"d{bench.guest.domid} is suspended and may run at far: " in case.text
    [record] = told(caplog, Event.GUEST_IN_DOUBT)
    assert record.levelno == logging.CRITICAL
    assert record.getMessage() == case.text
    assert vars(record)["pgofflined_fields"]["DOMID"] == str(bench.guest.domid)
    # Once: from here on it is a case.
    bench.guests.look()
    assert len(told(caplog, Event.GUEST_IN_DOUBT)) == 1


def test_where_the_policy_names_no_target_any_more_it_is_that_of_the_migration() -> None:
    bench = Bench()
    bench.suspend()
    guests = bench.daemon([bench.guest], target=None)
    guests.look()
    assert "may run at the target of its migration: " in guests.stuck[bench.guest].text


@pytest.mark.parametrize("plan", [(), (Fault(method="conditions"),)])
def test_a_guest_that_runs_after_an_earlier_migration_is_in_no_doubt(
    plan: tuple[Fault, ...], caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench(*plan, before=True)
    for _ in plan:
        bench.guests.look()
        assert bench.guests
    bench.guests.look()
    assert not bench.guests
    assert told(caplog, Event.GUEST_IN_DOUBT) == []


def test_nor_is_one_that_somebody_has_paused() -> None:
    bench = Bench(before=True)
    bench.small.host.pause(bench.small.pvh)
    bench.guests.look()
    assert not bench.guests


def test_a_migration_that_goes_on_is_waited_for() -> None:
    bench = Bench(before=True)
    bench.suspend()
    guest = bench.small.host.simulated(bench.small.pvh)
    guest.somebody = SOMEBODY
    bench.guests.look()
    assert bench.guests
    assert not bench.guests.stuck
    assert bench.is_asked_for() == [bench.small.pvh]
    guest.somebody = f"{BY_NAME_ONLY} tells,"
    bench.guests.look()
    assert bench.guest in bench.guests.stuck


def test_a_migration_of_ours_is_no_earlier_one() -> None:
    bench = Bench(before=True)
    bench.suspend()
    bench.guests.is_migrated(bench.guest)
    assert not bench.guests
    bench.guests.look()
    assert not bench.guests.stuck


def test_a_guest_that_is_gone_is_in_no_doubt_nor_is_another_with_its_domid() -> None:
    bench = Bench()
    gone = replace(bench.guest, uuid=uuid4())
    guests = bench.daemon([gone], target="localhost")
    bench.suspend()
    guests.look()
    assert not guests
    assert bench.is_asked_for() == []


def test_a_guest_that_goes_while_it_is_looked_at_is_waited_for_by_nobody() -> None:
    bench = Bench(before=True)
    bench.xen.plan.append(Fault(method="somebody_at", error=DomainGone(bench.small.pvh)))
    bench.guests.look()
    assert not bench.guests


def test_a_guest_of_which_it_cannot_be_seen_who_is_at_it_is_looked_at_again() -> None:
    bench = Bench(before=True)
    bench.suspend()
    bench.xen.plan.append(Fault(method="somebody_at", error=PortError("no answer")))
    bench.guests.look()
    assert bench.guests
    assert not bench.guests.stuck
    bench.guests.look()
    assert bench.guest in bench.guests.stuck


def test_a_guest_that_is_being_destroyed_is_in_no_doubt() -> None:
    bench = Bench()
    guests = bench.daemon([bench.guest], target="localhost")
    bench.suspend()
    # Somebody still maps a page of it.
    bench.small.host.hold(bench.small.pvh, 3, why="a device model", writable=False)
    bench.small.host.destroy(bench.small.pvh)
    guests.look()
    assert not guests


def test_two_copies_that_both_run_are_in_doubt() -> None:
    bench = Bench(before=True)
    new = bench.small.host.add_hvm()
    bench.small.host.simulated(new).uuid = bench.guest.uuid
    bench.guests.look()
    text = bench.guests.stuck[bench.guest].text
    assert f"d{bench.guest.domid} and d{new} have the same uuid and both run" in text
    assert set(bench.is_asked_for()) == {bench.small.pvh, new}


def test_a_copy_that_took_its_place_and_does_not_run_is_in_doubt() -> None:
    bench = Bench()
    before = DomainIdentity(Domid(900), bench.guest.uuid)
    guests = bench.daemon([before])
    bench.small.host.pause(bench.small.pvh)
    guests.look()
    assert f"d900 is gone and d{bench.small.pvh}" in guests.stuck[before].text


def test_what_a_save_has_left_of_a_pv_guest_is_told_elsewhere() -> None:
    bench = Bench()
    pv = bench.small.host.domain(bench.small.pv).identity
    guests = bench.daemon([pv])
    bench.small.host.suspend(bench.small.pv, SuspendLimits())
    guests.look()
    assert not guests


def test_of_a_guest_that_is_known_to_be_in_doubt_it_is_not_told_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bench = Bench()
    bench.suspend()
    bench.guests.note(bench.guest, "as it was told")
    bench.guests.keep()
    later = bench.daemon([bench.guest])
    later.look()
    assert later.stuck[bench.guest].text == "as it was told"
    assert told(caplog, Event.GUEST_IN_DOUBT) == []


def test_the_guests_of_earlier_migrations_are_those_of_pages_that_they_had() -> None:
    def entry(mfn: int, domid: int, phase: Phase, reason: str = "") -> PageEntry:
        domain = None if domid == DOM0 else DomainIdentity(Domid(domid), uuid4())
        return PageEntry(
            mfn=Mfn(mfn),
            cause=Cause.CORRECTED,
            phase=phase,
            since=1.0,
            domain=domain,
            reason=reason,
        )

    entries = [
        entry(1, 1, Phase.RELOCATION),
        entry(2, 2, Phase.LEFT, "guest_stuck"),
        entry(3, 3, Phase.LEFT, "no_relocation"),
        entry(4, 4, Phase.EXCHANGE),
        entry(5, 5, Phase.WAITING, "guest_stuck"),
        entry(6, 0, Phase.RELOCATION),
    ]
    found = migrated_before(Book(entries))
    assert found == {entry.domain for entry in entries[:2]}
