"""The offline call is made only where pCPU 0 cannot be, and everything is put back afterwards."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import pytest

from pgofflined.core.errors import OfflineCallUnsafe, XenError
from pgofflined.ports.affinity import Narrowed
from pgofflined.xen.placement import (
    Placement,
    Vcpu,
    Whereabouts,
    candidates,
    restore,
)


@dataclass
class Machine:
    """Vcpus and threads of a host, with a scheduler that obeys affinities at once.

    ``stuck`` vCPUs never leave their pCPU.  ``refuses`` are Linux CPUs that no thread can be
    bound to.
    """

    online_pcpu: frozenset[int]
    hard: dict[int, frozenset[int]]
    offline: frozenset[int] = frozenset()
    at: dict[int, int] = field(default_factory=dict)
    stuck: frozenset[int] = frozenset()
    refuses: frozenset[int] = frozenset()
    set_fails: bool = False
    thread: frozenset[int] = frozenset({0, 1, 2, 3})
    on: int = 0
    shifted: bool = False
    log: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for vcpu in self.hard:
            self.at.setdefault(vcpu, min(self.hard[vcpu]))

    # VcpuControl

    def online_pcpus(self) -> int:
        return len(self.online_pcpu)

    def vcpus(self) -> Sequence[Vcpu]:
        return [
            Vcpu(number=n, online=n not in self.offline, hard=mask)
            for n, mask in sorted(self.hard.items())
        ]

    def hard_affinity(self, vcpu: int) -> frozenset[int]:
        return self.hard[vcpu]

    def set_hard_affinity(self, vcpu: int, pcpus: frozenset[int]) -> frozenset[int]:
        self.log.append(f"hard {vcpu} {sorted(pcpus)}")
        if self.set_fails or not pcpus & self.online_pcpu:
            raise XenError(errno.EINVAL, op="setvcpuaffinity")
        self.hard[vcpu] = pcpus
        effective = pcpus & self.online_pcpu
        if self.at[vcpu] not in effective and vcpu not in self.stuck:
            self.at[vcpu] = min(effective)
        return effective

    def whereabouts(self, vcpu: int) -> Whereabouts:
        return Whereabouts(pcpu=self.at[vcpu], running=vcpu == self.on and not self.shifted)

    # ThreadControl

    def affinity(self) -> frozenset[int]:
        return self.thread

    def pin(self, cpus: frozenset[int]) -> None:
        self.log.append(f"thread {sorted(cpus)}")
        if cpus <= self.refuses:
            raise OSError(errno.EINVAL, "Invalid argument")
        self.thread = cpus
        if self.on not in cpus:
            self.on = min(cpus)

    def cpu(self) -> int:
        return self.on


ALL = frozenset({0, 1, 2, 3})


def placement(machine: Machine) -> Placement:
    return Placement(machine, machine, pause=lambda _: None)


def checked_call(machine: Machine) -> Callable[[], str]:
    """The offline call, which fails the test if it would run on, or could be moved to, pCPU 0."""

    def call() -> str:
        assert machine.thread == {machine.on}
        assert machine.at[machine.on] != 0
        assert 0 not in machine.hard[machine.on]
        machine.log.append("call")
        return "done"

    return call


def never() -> str:
    raise AssertionError("the call was made")


def machines() -> dict[str, Machine]:
    return {
        "not pinned": Machine(online_pcpu=ALL, hard={0: ALL, 1: ALL}),
        "pinned one to one": Machine(online_pcpu=ALL, hard={n: frozenset({n}) for n in range(4)}),
        "one vCPU": Machine(online_pcpu=ALL, hard={0: ALL}),
        "kept off already": Machine(online_pcpu=ALL, hard={0: ALL - {0}, 1: ALL - {0}}),
        "second offline": Machine(online_pcpu=ALL, hard={0: ALL, 1: ALL}, offline=frozenset({1})),
        "second not allowed": Machine(
            online_pcpu=ALL, hard={0: ALL, 1: ALL}, refuses=frozenset({1})
        ),
        "second stuck": Machine(
            online_pcpu=ALL, hard={0: ALL, 1: ALL}, at={1: 0}, stuck=frozenset({1})
        ),
    }


@pytest.mark.parametrize("name", machines())
def test_call_runs_off_pcpu0_and_everything_is_restored(name: str) -> None:
    machine = machines()[name]
    hard, thread = dict(machine.hard), machine.thread
    assert placement(machine).run(checked_call(machine)) == "done"
    assert machine.log.count("call") == 1
    assert (machine.hard, machine.thread) == (hard, thread)


@pytest.mark.parametrize("name", machines())
def test_affinities_are_restored_when_the_call_raises(name: str) -> None:
    machine = machines()[name]
    hard, thread = dict(machine.hard), machine.thread

    def fails() -> None:
        checked_call(machine)()
        raise XenError(errno.EINVAL, op="page_offline")

    with pytest.raises(XenError, match="page_offline"):
        placement(machine).run(fails)
    assert (machine.hard, machine.thread) == (hard, thread)


def unsafe_machines() -> dict[str, Machine]:
    only0 = frozenset({0})
    return {
        "one pCPU": Machine(online_pcpu=only0, hard={0: ALL}),
        "pinned to pCPU 0": Machine(online_pcpu=ALL, hard={0: only0, 1: only0}),
        "others offline": Machine(online_pcpu=frozenset({0, 5}), hard={0: frozenset({0, 1})}),
        "stuck on pCPU 0": Machine(online_pcpu=ALL, hard={0: ALL}, stuck=frozenset({0})),
        "affinity refused": Machine(online_pcpu=ALL, hard={0: ALL, 1: ALL}, set_fails=True),
        "threads bound elsewhere": Machine(online_pcpu=ALL, hard={0: ALL}, refuses=frozenset({0})),
        "Linux numbers are not Xen's": Machine(online_pcpu=ALL, hard={0: ALL}, shifted=True),
    }


@pytest.mark.parametrize("name", unsafe_machines())
def test_call_is_never_made_where_pcpu0_cannot_be_excluded(name: str) -> None:
    machine = unsafe_machines()[name]
    hard, thread = dict(machine.hard), machine.thread
    with pytest.raises(OfflineCallUnsafe):
        placement(machine).run(never)
    assert (machine.hard, machine.thread) == (hard, thread)


def test_vcpu_that_came_back_to_pcpu0_is_seen_before_each_call() -> None:
    machine = Machine(online_pcpu=ALL, hard={0: ALL, 1: ALL})
    place = placement(machine)
    with place.placed():
        place.run(checked_call(machine))
        # Somebody pins it back, or dom0's kernel overrides the affinity.
        machine.at[1] = 0
        with pytest.raises(OfflineCallUnsafe, match="came onto pCPU 0"):
            place.run(never)


def test_affinity_widened_by_somebody_else_is_seen_before_each_call() -> None:
    machine = Machine(online_pcpu=ALL, hard={0: ALL, 1: ALL})
    place = placement(machine)
    with place.placed():
        machine.hard[1] = ALL
        with pytest.raises(OfflineCallUnsafe):
            place.run(never)


def test_affinity_set_by_somebody_else_meanwhile_is_left_alone() -> None:
    machine = Machine(online_pcpu=ALL, hard={0: ALL, 1: ALL})
    with placement(machine).placed():
        machine.hard[1] = frozenset({2})
    assert machine.hard[1] == {2}


def test_vcpu_that_needs_no_change_is_not_changed() -> None:
    machine = Machine(online_pcpu=ALL, hard={0: ALL, 1: frozenset({1, 2})})
    placement(machine).run(checked_call(machine))
    assert not [line for line in machine.log if line.startswith("hard")]


def test_several_calls_share_one_place() -> None:
    machine = Machine(online_pcpu=ALL, hard={0: ALL, 1: ALL})
    place = placement(machine)
    with place.placed():
        for _ in range(3):
            place.run(checked_call(machine))
    assert machine.log == [
        "hard 1 [1, 2, 3]",
        "thread [1]",
        "call",
        "call",
        "call",
        "thread [0, 1, 2, 3]",
        "hard 1 [0, 1, 2, 3]",
    ]


def test_restoring_goes_on_after_a_failed_step(caplog: pytest.LogCaptureFixture) -> None:
    machine = Machine(online_pcpu=ALL, hard={0: ALL, 1: ALL})
    with placement(machine).placed():
        machine.refuses = frozenset({0, 1, 2, 3})
    assert machine.hard[1] == ALL
    assert "could not be restored" in caplog.text


def test_pinned_vcpu_comes_before_one_to_be_narrowed() -> None:
    vcpus = [
        Vcpu(number=0, online=True, hard=ALL),
        Vcpu(number=1, online=True, hard=frozenset({3})),
        Vcpu(number=2, online=False, hard=frozenset({2})),
        Vcpu(number=3, online=True, hard=frozenset({0})),
    ]
    found = candidates(vcpus, 4)
    assert [(c.vcpu.number, c.narrow) for c in found] == [(1, None), (0, ALL - {0})]


def test_one_pcpu_host_is_told_what_to_do_instead() -> None:
    with pytest.raises(OfflineCallUnsafe, match="badpage="):
        candidates([Vcpu(number=0, online=True, hard=ALL)], 1)


@dataclass
class Note:
    """A note that outlives the process."""

    notes: dict[int, Narrowed] = field(default_factory=dict)
    fails: bool = False

    def read(self) -> Mapping[int, Narrowed]:
        return dict(self.notes)

    def put(self, vcpu: int, narrowed: Narrowed) -> None:
        if self.fails:
            raise OSError(errno.ENOSPC, "no room")
        self.notes[vcpu] = narrowed

    def clear(self, vcpu: int) -> None:
        self.notes.pop(vcpu, None)


class Killed(BaseException):
    """The process is no more: nothing is put back."""


def killed_at(machine: Machine, note: Note, moment: str) -> None:
    """A process that is killed right before or after it has narrowed a vCPU."""
    dead = False
    change = machine.set_hard_affinity

    def set_hard_affinity(vcpu: int, pcpus: frozenset[int]) -> frozenset[int]:
        nonlocal dead
        if dead:
            raise Killed
        dead = True
        if moment == "after":
            change(vcpu, pcpus)
        raise Killed

    machine.set_hard_affinity = set_hard_affinity  # type: ignore[method-assign]
    with pytest.raises(Killed):
        Placement(machine, machine, note=note).run(never)
    machine.set_hard_affinity = change  # type: ignore[method-assign]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_vcpu_that_a_killed_process_has_narrowed_has_its_affinity_back(moment: str) -> None:
    machine = Machine(online_pcpu=ALL, hard={0: ALL, 1: ALL})
    note = Note()
    killed_at(machine, note, moment)
    assert (machine.hard[1] == ALL) is (moment == "before")
    restore(machine, note)
    assert machine.hard == {0: ALL, 1: ALL}
    assert note.notes == {}


def test_an_affinity_that_somebody_has_set_since_is_left_alone() -> None:
    machine = Machine(online_pcpu=ALL, hard={0: ALL, 1: ALL})
    note = Note()
    killed_at(machine, note, "after")
    machine.hard[1] = frozenset({2})
    restore(machine, note)
    assert machine.hard[1] == {2}
    assert note.notes == {}


def test_what_xen_refuses_stays_noted_and_is_told(caplog: pytest.LogCaptureFixture) -> None:
    machine = Machine(online_pcpu=ALL, hard={0: ALL, 1: ALL})
    note = Note()
    killed_at(machine, note, "after")
    machine.set_fails = True
    restore(machine, note)
    assert 1 in note.notes
    assert "xl vcpu-pin 0 1 all" in caplog.text
    machine.set_fails = False
    restore(machine, note)
    assert machine.hard[1] == ALL


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_stays_noted_of_a_call_that_came_to_its_end(*, fails: bool) -> None:
    machine = Machine(online_pcpu=ALL, hard={0: ALL, 1: ALL})
    note = Note(fails=fails)
    assert Placement(machine, machine, note=note).run(checked_call(machine)) == "done"
    assert machine.hard == {0: ALL, 1: ALL}
    assert note.notes == {}


def test_without_a_note_nothing_is_asked_or_changed() -> None:
    machine = Machine(online_pcpu=ALL, hard={0: ALL, 1: frozenset({1, 2})})
    restore(machine, Note())
    assert machine.log == []
