from __future__ import annotations

from errno import ESRCH
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from pgofflined.core.book import PageEntry
from pgofflined.core.domains import ShutdownReason
from pgofflined.core.errors import PortError
from pgofflined.core.frames import Domid, Mfn
from pgofflined.core.moves import PteWrite, PteWrites
from pgofflined.core.offline import OfflineState
from pgofflined.core.outcomes import Exchanged, ExchangeReport, Refusal, RefusalReason
from pgofflined.core.pages import PTE_PRESENT
from pgofflined.core.policy import ExchangePolicy, Policy
from pgofflined.core.suspending import SuspendSupport
from pgofflined.exchanger import exchange
from pgofflined.exchanger.survey import survey
from pgofflined.exchanging import Exchanging
from pgofflined.jobstore import JobStore
from pgofflined.ledger import Ledger
from pgofflined.ports import SuspendLimits
from pgofflined.retiring import Retirer
from pgofflined.sim.faults import Fault, FaultyHypervisor, Killed, Moment
from pgofflined.sim.guests import Answer, SuspendBehaviour
from pgofflined.sim.linux import ARCH_MAX_PFN, ARCH_P2M_CR3, ARCH_P2M_GENERATION, ARCH_P2M_VADDR
from pgofflined.uncorrected import UncorrectedErrors
from tests.single import set_ptes
from tests.unit.exchanger.conftest import Bench


def _only_refusal(bench: Bench, mfns: list[Mfn]) -> Refusal:
    report = bench.exchange(mfns)
    [result] = report.results
    assert isinstance(result, Refusal)
    assert report.stuck is None
    after = bench.assert_guest_runs_unharmed()
    assert bench.before.moved(after) == []
    return result


def test_a_data_page_is_exchanged_and_the_guest_cannot_tell(bench: Bench) -> None:
    pfn = bench.layout.plain[3]
    [mfn] = bench.mark(pfn)
    report = bench.exchange([mfn])
    [result] = report.results
    assert isinstance(result, Exchanged)
    assert (result.old, result.pfn, result.offlined) == (mfn, pfn, True)
    after = bench.assert_guest_runs_unharmed()
    assert bench.before.moved(after) == [pfn]
    assert bench.host.query(mfn) is OfflineState.OFFLINED
    assert report.blackout is not None


def test_every_mapping_of_a_page_follows_it(bench: Bench) -> None:
    text, user = bench.layout.text[0], bench.layout.user_pages[0]
    report = bench.exchange(bench.mark(text, user))
    references = [result.references for result in report.results if isinstance(result, Exchanged)]
    assert len(references) == 2
    assert min(references) >= 2
    bench.assert_guest_runs_unharmed()


def test_many_pages_of_a_guest_go_in_one_suspend(bench: Bench) -> None:
    pfns = [*bench.layout.plain[:40], *bench.layout.user_pages[:15]]
    report, xen = bench.exchange_traced(bench.mark(*pfns))
    assert [type(result) for result in report.results] == [Exchanged] * 55
    assert xen.trace.methods.count("suspend") == 1
    after = bench.assert_guest_runs_unharmed()
    assert bench.before.moved(after) == sorted(pfns)


def test_a_page_named_twice_is_moved_once(bench: Bench) -> None:
    [mfn] = bench.mark(bench.layout.plain[0])
    report = bench.exchange([mfn, mfn])
    assert len(report.results) == 1


def test_entries_are_cleared_to_zero_and_never_keep_a_frame_number(bench: Bench) -> None:
    # A non-present entry that names a frame crashes the guest on processors with L1TF.
    _, xen = bench.exchange_traced(bench.mark(bench.layout.plain[0], bench.layout.text[0]))
    writes = [call.args[1] for call in xen.trace.of("update_ptes")]
    values = [v for some in writes if isinstance(some, PteWrites) for v in some.values.tolist()]
    absent = [value for value in values if not value & PTE_PRESENT]
    assert absent
    assert set(absent) == {0}


def test_the_guest_is_paused_whenever_its_page_tables_change(bench: Bench) -> None:
    _, xen = bench.exchange_traced(bench.mark(bench.layout.plain[0]))
    methods = xen.trace.methods
    first, last = methods.index("update_ptes"), len(methods) - methods[::-1].index("update_ptes")
    assert methods.index("suspend") < methods.index("pause") < first
    # The other way round, a pause that somebody makes in between could be taken for ours.
    assert last <= methods.index("resume") < methods.index("unpause")


def test_a_granted_page_is_refused_before_the_guest_is_suspended(bench: Bench) -> None:
    pfn = bench.layout.plain[5]
    bench.host.grant(bench.domid, pfn)
    [mfn] = bench.mark(pfn)
    report, xen = bench.exchange_traced([mfn])
    [result] = report.results
    assert isinstance(result, Refusal)
    assert result.reason is RefusalReason.GRANTED
    assert "suspend" not in xen.trace.methods
    assert bench.host.query(mfn) is OfflineState.OFFLINE_PENDING


def test_a_page_that_dom0_maps_without_a_grant_is_refused_by_xens_count(bench: Bench) -> None:
    pfn = bench.layout.plain[5]
    bench.host.hold(bench.domid, pfn, why="a process in dom0")
    refusal = _only_refusal(bench, bench.mark(pfn))
    assert refusal.reason is RefusalReason.OTHER_REFERENCES


@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_page_tables_of_every_level_are_moved(bench: Bench, level: int) -> None:
    foreign = bench.layout.foreign[0] // 512
    others = {pfn for pfn, of in bench.layout.tables.items() if of == level}
    pfns = sorted(others - {bench.layout.direct_l1[foreign]})
    report = bench.exchange(bench.mark(*pfns))
    assert [type(result) for result in report.results] == [Exchanged] * len(pfns)
    after = bench.assert_guest_runs_unharmed()
    assert bench.before.moved(after) == pfns


def test_tables_of_a_process_are_moved_pinned_or_not(bench: Bench) -> None:
    # The last process is the one that no vCPU is in; Linux pins it on its way into the suspend.
    process = bench.layout.processes[-1]
    pfns = sorted(process.tables)
    report = bench.exchange(bench.mark(*pfns))
    assert [type(result) for result in report.results] == [Exchanged] * len(pfns)
    after = bench.assert_guest_runs_unharmed()
    assert bench.before.moved(after) == pfns


def test_a_table_of_the_direct_map_that_maps_itself_is_moved(bench: Bench) -> None:
    [pfn] = [pfn for pfn in bench.layout.direct_l1 if bench.layout.direct_l1[pfn // 512] == pfn]
    [result] = bench.exchange(bench.mark(pfn)).results
    assert isinstance(result, Exchanged)
    bench.assert_guest_runs_unharmed()


def test_everything_at_once_goes_in_one_suspend(bench: Bench) -> None:
    layout = bench.layout
    pfns = sorted(
        {
            *layout.plain[:20],
            *layout.p2m_list,
            *layout.p2m_mid,
            layout.p2m_top,
            *layout.all_tables,
            *layout.text,
        }
        - {layout.direct_l1[layout.foreign[0] // 512]}
        - {root for p in layout.processes[:2] for root in (p.kernel_root, p.user_root)}
    )
    report, xen = bench.exchange_traced(bench.mark(*pfns))
    assert [r for r in report.results if not isinstance(r, Exchanged)] == []
    assert xen.trace.methods.count("suspend") == 1
    after = bench.assert_guest_runs_unharmed()
    assert bench.before.moved(after) == pfns


def test_the_root_of_the_address_space_that_a_vcpu_is_in_is_refused(bench: Bench) -> None:
    process = bench.layout.processes[0]
    for root in (process.kernel_root, process.user_root):
        refusal = _only_refusal(bench, bench.mark(root))
        assert refusal.reason is RefusalReason.ROOT_IN_USE
        assert refusal.reason.may_pass


def test_a_table_that_maps_frames_of_others_is_refused_before_the_suspend(bench: Bench) -> None:
    # A granted frame is mapped through the grant table, and cannot be mapped anew by an entry.
    table = bench.layout.direct_l1[bench.layout.foreign[0] // 512]
    report, xen = bench.exchange_traced(bench.mark(table))
    [result] = report.results
    assert isinstance(result, Refusal)
    assert result.reason is RefusalReason.MAPS_OTHERS
    assert "suspend" not in xen.trace.methods


def test_frames_that_hold_the_p2m_are_moved(bench: Bench) -> None:
    layout = bench.layout
    pfns = sorted({*layout.p2m_list, *layout.p2m_mid, layout.p2m_top})
    report = bench.exchange(bench.mark(*pfns))
    assert [type(result) for result in report.results] == [Exchanged] * len(pfns)
    bench.assert_guest_runs_unharmed()


def test_shared_info_is_refused_before_the_suspend(bench: Bench) -> None:
    shared = bench.host.domain(bench.domid).shared_info
    bench.host.offline(shared)
    report, xen = bench.exchange_traced([shared])
    [result] = report.results
    assert isinstance(result, Refusal)
    assert result.reason is RefusalReason.SHARED_INFO
    assert "suspend" not in xen.trace.methods


def test_a_descriptor_table_is_refused_before_the_suspend(bench: Bench) -> None:
    report, xen = bench.exchange_traced(bench.mark(bench.layout.gdt[0]))
    [result] = report.results
    assert isinstance(result, Refusal)
    assert result.reason is RefusalReason.DESCRIPTOR_TABLE
    assert "suspend" not in xen.trace.methods


def test_a_guest_with_devices_of_the_host_is_refused(bench: Bench) -> None:
    bench.host.simulated(bench.domid).has_devices = True
    assert _only_refusal(bench, bench.mark(bench.layout.plain[0])).reason is (
        RefusalReason.HAS_DEVICES
    )


def test_nothing_is_suspended_for_a_job_that_cannot_be_kept(bench: Bench) -> None:
    store = JobStore(Path("/nowhere"), refusal=lambda: "there is no room")
    mfns = bench.mark(bench.layout.plain[0])
    xen = FaultyHypervisor(bench.host)
    report = exchange(
        bench.identity,
        mfns,
        xen=xen,
        journal=store,
        clock=bench.host.clock,
        limits=SuspendLimits(),
    )
    [result] = report.results
    assert isinstance(result, Refusal)
    assert (result.reason, result.detail) == (RefusalReason.NOT_KEPT, "there is no room")
    assert "suspend" not in xen.trace.methods


def test_the_guest_stands_still_for_no_search_through_its_page_tables(bench: Bench) -> None:
    # What is read while it stands still is a handful of frames, whatever its size.
    _, xen = bench.exchange_traced(bench.mark(bench.layout.plain[0]))
    methods = xen.trace.methods
    held = xen.trace.calls[methods.index("suspend") : methods.index("resume")]
    read = [call.args[1] for call in held if call.method == "read_frames"]
    assert sum(len(np.asarray(frames)) for frames in read) < 8


def test_an_entry_that_the_guest_adds_after_the_survey_is_found_by_another(bench: Bench) -> None:
    pfn = bench.layout.plain[0]
    [mfn] = bench.mark(pfn)
    table = bench.host.frame_of(bench.domid, bench.layout.fixmap_l1)
    entry = mfn << 12 | 0x8000_0000_0000_0063
    busy = FaultyHypervisor(
        bench.host,
        Fault(method="pause", moment=Moment.AFTER, act=lambda: _map(bench, table, 7, entry)),
        Fault(method="unpause", act=lambda: _map(bench, table, 7, 0)),
    )
    [result] = bench.exchange([mfn], busy).results
    assert isinstance(result, Exchanged)
    bench.assert_guest_runs_unharmed()


def test_a_second_survey_is_not_made_beyond_the_limit_of_the_blackout(bench: Bench) -> None:
    pfn = bench.layout.plain[0]
    [mfn] = bench.mark(pfn)
    table = bench.host.frame_of(bench.domid, bench.layout.fixmap_l1)
    entry = mfn << 12 | 0x8000_0000_0000_0063
    clock = bench.host.clock
    busy = FaultyHypervisor(
        bench.host,
        Fault(method="granted_frames", act=lambda: clock.wait(0.6)),
        Fault(method="pause", moment=Moment.AFTER, act=lambda: _map(bench, table, 7, entry)),
        Fault(method="granted_frames", nth=2, act=lambda: clock.wait(0.6)),
        Fault(method="unpause", act=lambda: _map(bench, table, 7, 0)),
    )
    [result] = bench.exchange([mfn], busy).results
    assert isinstance(result, Refusal)
    assert result.reason is RefusalReason.BLACKOUT_LIMIT
    assert result.reason.may_pass
    bench.assert_guest_runs_unharmed()


def _map(bench: Bench, table: Mfn, index: int, entry: int) -> None:
    set_ptes(bench.host, bench.domid, [PteWrite(table=table, index=index, value=entry)])


def test_a_registered_vcpu_info_page_is_refused_by_xens_count(bench: Bench) -> None:
    refusal = _only_refusal(bench, bench.mark(bench.layout.vcpu_info[0]))
    assert refusal.reason is RefusalReason.OTHER_REFERENCES


def test_an_unmarked_page_is_refused_so_that_it_is_not_handed_to_another(bench: Bench) -> None:
    mfn = bench.host.frame_of(bench.domid, bench.layout.plain[0])
    assert _only_refusal(bench, [mfn]).reason is RefusalReason.NOT_PENDING


def test_a_broken_page_is_refused_and_never_read(bench: Bench) -> None:
    [mfn] = bench.mark(bench.layout.plain[0])
    # Reading poison raises in the simulation, as it would raise #MC on a host.
    bench.host.poison(mfn, known=True)
    report, xen = bench.exchange_traced([mfn])
    [result] = report.results
    assert isinstance(result, Refusal)
    assert result.reason is RefusalReason.BROKEN
    assert "read_frames" not in xen.trace.methods
    assert "suspend" not in xen.trace.methods


def test_a_page_that_only_we_know_to_be_poisoned_is_never_read(bench: Bench) -> None:
    [mfn] = bench.mark(bench.layout.plain[0])
    bench.host.poison(mfn)
    report = exchange(
        bench.identity,
        [mfn],
        xen=bench.host,
        journal=bench.journal,
        clock=bench.host.clock,
        limits=SuspendLimits(),
        never_read=lambda: frozenset({mfn}),
    )
    [result] = report.results
    assert isinstance(result, Refusal)
    assert result.reason is RefusalReason.BROKEN


@pytest.mark.parametrize("moment", ["granted_frames", "free_frames", "somebody_at"])
def test_nothing_is_suspended_for_a_page_whose_error_is_reported_during_the_survey(
    bench: Bench, moment: str
) -> None:
    [mfn] = bench.mark(bench.layout.plain[0])
    poisoned: set[Mfn] = set()

    def report_error() -> None:
        bench.host.poison(mfn)  # only we know: to read it raises, as #MC would be on a host
        poisoned.add(mfn)

    xen = FaultyHypervisor(bench.host, Fault(method=moment, act=report_error))
    [result] = _exchange_with(bench, xen, [mfn], poisoned).results
    assert isinstance(result, Refusal)
    assert result.reason is RefusalReason.BROKEN
    assert "suspend" not in xen.trace.methods


def test_a_page_whose_error_is_reported_as_the_guest_suspends_itself_stays_and_no_other(
    bench: Bench,
) -> None:
    bad, good = bench.mark(*bench.layout.plain[:2])
    poisoned: set[Mfn] = set()

    def report_error() -> None:
        bench.host.poison(bad)
        poisoned.add(bad)

    xen = FaultyHypervisor(bench.host, Fault(method="suspend", act=report_error))
    refused, moved = _exchange_with(bench, xen, [bad, good], poisoned).results
    assert isinstance(refused, Refusal)
    assert refused.reason is RefusalReason.BROKEN
    assert isinstance(moved, Exchanged)
    assert bench.host.frame_of(bench.domid, bench.layout.plain[0]) == bad
    assert bench.host.domain(bench.domid).shutdown is None
    assert not bench.host.domain(bench.domid).paused


def test_a_page_is_not_moved_whose_page_table_has_an_error_since_the_survey(bench: Bench) -> None:
    [mfn] = bench.mark(bench.layout.plain[0])
    [facts] = survey(bench.host, bench.host.domain(bench.domid), [mfn])
    table = Mfn(int(facts.references.tables[0]))
    poisoned: set[Mfn] = set()

    def report_error() -> None:
        bench.host.poison(table)
        poisoned.add(table)

    xen = FaultyHypervisor(bench.host, Fault(method="suspend", act=report_error))
    [result] = _exchange_with(bench, xen, [mfn], poisoned).results
    assert isinstance(result, Refusal)
    assert result.reason is RefusalReason.BROKEN
    assert bench.host.domain(bench.domid).shutdown is None


def _exchange_with(
    bench: Bench, xen: FaultyHypervisor, mfns: list[Mfn], poisoned: set[Mfn]
) -> ExchangeReport:
    work = Exchanging(
        xen=xen,
        journal=bench.journal,
        clock=bench.host.clock,
        policy=ExchangePolicy,
        poisoned=lambda: frozenset(poisoned),
    )
    return work.run(bench.identity, tuple(mfns))


def test_a_page_of_another_domain_is_refused(bench: Bench) -> None:
    other = bench.host.add_pv()
    mfn = bench.host.frame_of(other, bench.host.pv(other).layout.plain[0])
    bench.host.offline(mfn)
    assert _only_refusal(bench, [mfn]).reason is RefusalReason.NOT_THE_DOMAINS


@pytest.mark.parametrize("answer", [Answer.IGNORES, Answer.STALLS])
def test_a_guest_that_does_not_suspend_runs_on(bench: Bench, answer: Answer) -> None:
    bench.host.simulated(bench.domid).behaviour = SuspendBehaviour(answer=answer)
    refusal = _only_refusal(bench, bench.mark(bench.layout.plain[0]))
    assert refusal.reason is RefusalReason.NO_SUSPEND


@pytest.mark.parametrize(
    ("support", "reason"),
    [
        (SuspendSupport.DENIED, RefusalReason.NO_SUSPEND_SUPPORT),
        (SuspendSupport.SILENT, RefusalReason.SUSPEND_UNANNOUNCED),
    ],
)
def test_a_guest_that_may_crash_when_asked_is_not_even_surveyed(
    bench: Bench, support: SuspendSupport, reason: RefusalReason
) -> None:
    mfns = bench.mark(bench.layout.plain[0])
    bench.host.simulated(bench.domid).suspend_support = support
    report, traced = bench.exchange_traced(mfns)
    [result] = report.results
    assert isinstance(result, Refusal)
    assert result.reason is reason
    assert not {"suspend", "page_types", "read_frames"} & set(traced.trace.methods)
    assert report.ended is None


def test_a_guest_that_xenstore_does_not_tell_of_is_not_asked(bench: Bench) -> None:
    mfns = bench.mark(bench.layout.plain[0])
    xen = FaultyHypervisor(bench.host, Fault(method="suspend_support"))
    [result] = bench.exchange(mfns, xen).results
    assert isinstance(result, Refusal)
    assert result.reason is RefusalReason.XEN_REFUSED
    assert "suspend" not in xen.trace.methods


@pytest.mark.parametrize("method", ["pause", "update_ptes", "resume", "tell_resumed"])
def test_a_guest_that_crashes_before_it_runs_again_is_our_doing(bench: Bench, method: str) -> None:
    mfns = bench.mark(bench.layout.plain[0])
    crash = Fault(
        method=method,
        act=lambda: bench.host.simulated(bench.domid).__setattr__("shutdown", ShutdownReason.CRASH),
    )
    report = bench.exchange(mfns, FaultyHypervisor(bench.host, crash))
    assert report.ended is not None
    assert f"d{bench.domid} crashed" in report.ended


def test_a_guest_that_was_not_asked_has_not_ended_by_our_doing(bench: Bench) -> None:
    mfns = bench.mark(bench.layout.plain[0])
    xen = FaultyHypervisor(
        bench.host, Fault(method="suspend", act=lambda: bench.host.destroy(bench.domid))
    )
    report = bench.exchange(mfns, xen)
    assert report.ended is None


def test_a_guest_that_runs_on_has_not_ended(bench: Bench) -> None:
    assert bench.exchange(bench.mark(bench.layout.plain[0])).ended is None


@pytest.mark.parametrize("answer", [Answer.DIES, Answer.REBOOTS])
def test_a_guest_that_ends_while_asked_to_suspend_is_let_go(bench: Bench, answer: Answer) -> None:
    identity = bench.identity
    mfns = bench.mark(bench.layout.plain[0])
    bench.host.simulated(bench.domid).behaviour = SuspendBehaviour(answer=answer)
    report = bench.exchange(mfns)
    [result] = report.results
    assert isinstance(result, Refusal)
    assert result.reason is RefusalReason.DOMAIN_GONE
    assert report.stuck is None
    assert report.domain == identity
    assert report.ended is not None
    assert "is gone" in report.ended


def test_a_guest_that_is_destroyed_at_any_call_before_the_suspend_is_gone() -> None:
    pick = Bench.build()
    _, dry = pick.exchange_traced(pick.mark(pick.layout.plain[0]))
    calls = dry.trace.methods.index("suspend")
    for nth in range(1, calls + 1):
        bench = Bench.build()
        mfns = bench.mark(bench.layout.plain[0])
        end = Fault(nth=nth, act=partial(bench.host.destroy, bench.domid))
        report = bench.exchange(mfns, FaultyHypervisor(bench.host, end))
        [result] = report.results
        assert isinstance(result, Refusal)
        # Xen may have taken the page out by then, which is as true.
        gone = {RefusalReason.DOMAIN_GONE, RefusalReason.NOT_PENDING}
        assert result.reason in gone, dry.trace.methods[nth - 1]
        assert report.stuck is None


@pytest.mark.parametrize("method", ["page_types", "granted_frames", "read_frames", "exchange"])
def test_esrch_is_the_domains_end_only_where_it_is_gone(bench: Bench, method: str) -> None:
    mfns = bench.mark(bench.layout.plain[0])
    esrch = Fault(method=method, times=10**6, errno=ESRCH)
    [result] = bench.exchange(mfns, FaultyHypervisor(bench.host, esrch)).results
    assert isinstance(result, Refusal)
    assert result.reason in {RefusalReason.XEN_REFUSED, RefusalReason.GUEST_LAYOUT}
    bench.assert_guest_runs_unharmed()


@pytest.mark.parametrize("method", ["page_types", "granted_frames", "read_frames"])
def test_esrch_of_a_domain_that_is_gone_is_its_end(bench: Bench, method: str) -> None:
    mfns = bench.mark(bench.layout.plain[0])
    xen = FaultyHypervisor(
        bench.host,
        Fault(method=method, act=partial(bench.host.destroy, bench.domid)),
        Fault(method=method, nth=2, times=10**6, errno=ESRCH),
    )
    [result] = bench.exchange(mfns, xen).results
    assert isinstance(result, Refusal)
    assert result.reason is RefusalReason.DOMAIN_GONE


def test_a_guest_that_is_destroyed_while_it_stands_still_is_gone(bench: Bench) -> None:
    mfns = bench.mark(bench.layout.plain[0])
    end = Fault(method="exchange", act=partial(bench.host.destroy, bench.domid))
    report = bench.exchange(mfns, FaultyHypervisor(bench.host, end))
    [result] = report.results
    assert isinstance(result, Refusal)
    assert result.reason is RefusalReason.DOMAIN_GONE
    assert report.stuck is None


def test_a_guest_that_somebody_saves_is_not_asked_to_suspend(bench: Bench) -> None:
    bench.host.simulated(bench.domid).somebody = "process 5 (xl save)"
    mfns = bench.mark(bench.layout.plain[0])
    report, xen = bench.exchange_traced(mfns)
    [result] = report.results
    assert isinstance(result, Refusal)
    assert result.reason is RefusalReason.DOMAIN_BUSY
    assert result.reason.may_pass
    assert "process 5 (xl save)" in result.detail
    assert not {"suspend", "pause", "resume"} & set(xen.trace.methods)
    assert bench.journal.kept == {}


def test_who_saves_a_guest_is_not_looked_for_while_it_stands_still(bench: Bench) -> None:
    _, xen = bench.exchange_traced(bench.mark(bench.layout.plain[0]))
    methods = xen.trace.methods
    assert methods.count("somebody_at") == 1
    assert methods.index("somebody_at") == methods.index("suspend") - 1


def test_a_guest_that_is_suspended_with_our_request_unread_is_not_resumed(bench: Bench) -> None:
    mfns = bench.mark(bench.layout.plain[0])

    def saved() -> None:
        bench.host.suspend(bench.domid, SuspendLimits())
        bench.host.simulated(bench.domid).unread_request = True
        raise PortError("xenstored is gone")

    xen = FaultyHypervisor(bench.host, Fault(method="suspend", act=saved))
    report = bench.exchange(mfns, xen)
    assert report.stuck is None
    assert "resume" not in xen.trace.methods
    assert bench.host.domain(bench.domid).shutdown is ShutdownReason.SUSPEND
    assert bench.journal.kept == {}


def test_a_guest_that_somebody_paused_is_left_alone(bench: Bench) -> None:
    mfns = bench.mark(bench.layout.plain[0])
    bench.host.pause(bench.domid)
    report, xen = bench.exchange_traced(mfns)
    [result] = report.results
    assert isinstance(result, Refusal)
    assert result.reason is RefusalReason.DOMAIN_BUSY
    assert "suspend" not in xen.trace.methods
    assert bench.host.domain(bench.domid).paused


def test_a_host_without_free_memory_refuses_before_the_suspend(bench: Bench) -> None:
    mfns = bench.mark(bench.layout.plain[0])
    bench.host.frames.allocate_many(bench.host.free_frames() - 10)
    report, xen = bench.exchange_traced(mfns)
    [result] = report.results
    assert isinstance(result, Refusal)
    assert result.reason is RefusalReason.NO_FREE_MEMORY
    assert "suspend" not in xen.trace.methods


def test_a_refused_page_does_not_keep_its_neighbours_from_going(bench: Bench) -> None:
    held, free = bench.layout.plain[5], bench.layout.plain[6]
    bench.host.hold(bench.domid, held, why="a process in dom0")
    report = bench.exchange(bench.mark(held, free))
    refused, moved = report.results
    assert isinstance(refused, Refusal)
    assert isinstance(moved, Exchanged)
    after = bench.assert_guest_runs_unharmed()
    assert bench.before.moved(after) == [free]


@pytest.mark.parametrize(
    ("word", "value"),
    [
        (ARCH_MAX_PFN, 0),
        (ARCH_MAX_PFN, 1 << 63),
        (ARCH_P2M_CR3, 0x7FFF_FFFF_F000),
        (ARCH_P2M_CR3, (1 << 63) + (1 << 55)),
        (ARCH_P2M_CR3, 0x3000),
        (ARCH_P2M_VADDR, 0xFFFF_C900_0000_0008),
        (ARCH_P2M_VADDR, 0xFFFF_FFFF_FFFF_F000),
        (ARCH_P2M_GENERATION, 1),
    ],
)
def test_a_guest_that_lies_about_its_p2m_is_refused(bench: Bench, word: int, value: int) -> None:
    mfns = bench.mark(bench.layout.plain[0])
    guest = bench.host.pv(bench.domid)
    shared = bench.host.frames.contents.page(bench.host.domain(bench.domid).shared_info)
    truth = int(shared[word])
    guest.set_shared_info(word, value)
    report, xen = bench.exchange_traced(mfns)
    # The simulated kernel itself needs the truth.
    guest.set_shared_info(word, truth)
    [result] = report.results
    assert isinstance(result, Refusal)
    assert result.reason in (RefusalReason.GUEST_LAYOUT, RefusalReason.P2M_DISAGREES)
    assert "suspend" not in xen.trace.methods
    bench.assert_guest_runs_unharmed()


def test_a_p2m_that_contradicts_xen_is_refused(bench: Bench) -> None:
    pfn = bench.layout.plain[0]
    mfns = bench.mark(pfn)
    bench.host.pv(bench.domid).lie(pfn, int(bench.host.frame_of(bench.domid, pfn + 1)))
    report = bench.exchange(mfns)
    [result] = report.results
    assert isinstance(result, Refusal)
    assert result.reason is RefusalReason.P2M_DISAGREES


def test_a_page_that_changes_after_it_was_copied_is_put_back(bench: Bench) -> None:
    pfn = bench.layout.plain[0]
    [mfn] = bench.mark(pfn)
    word = np.array([0xBAD], dtype=np.uint64)
    # Its entries are cleared by then: who writes needs none.
    writer = FaultyHypervisor(
        bench.host,
        Fault(
            method="update_ptes",
            moment=Moment.AFTER,
            act=lambda: bench.host.frames.contents.write(mfn, 7, word),
        ),
    )
    [result] = bench.exchange([mfn], writer).results
    assert isinstance(result, Refusal)
    assert result.reason is RefusalReason.CONTENTS_CHANGED
    assert bench.host.frame_of(bench.domid, pfn) == mfn
    assert bench.host.domain(bench.domid).shutdown is None


def test_a_guest_that_somebody_else_suspends_meanwhile_is_his_to_resume(bench: Bench) -> None:
    [mfn] = bench.mark(bench.layout.plain[0])
    # `xl save`, while we look through its page tables.
    saving = Fault(
        method="vcpu_frames", act=lambda: bench.host.suspend(bench.domid, SuspendLimits())
    )
    xen = FaultyHypervisor(bench.host, saving)
    report = bench.exchange([mfn], xen)
    [result] = report.results
    assert isinstance(result, Refusal)
    assert result.reason is RefusalReason.DOMAIN_BUSY
    assert not {"resume", "unpause", "pause"} & set(xen.trace.methods)
    assert bench.host.simulated(bench.domid).suspended
    assert bench.journal.kept == {}


@pytest.mark.parametrize("method", ["write_frames", "update_ptes", "read_frames"])
def test_a_fault_of_our_own_costs_neither_the_guest_nor_its_pages(
    bench: Bench, method: str
) -> None:
    def fail() -> None:
        raise MemoryError

    rehearsal = Bench.build()
    _, dry = rehearsal.exchange_traced(rehearsal.mark(*rehearsal.layout.plain[:3]))
    methods = dry.trace.methods
    held = methods[: methods.index("suspend")].count(method)
    for nth in range(held + 1, methods.count(method) + 1):
        bench = Bench.build()
        mfns = bench.mark(*bench.layout.plain[:3])
        report = bench.exchange(
            mfns, FaultyHypervisor(bench.host, Fault(method=method, nth=nth, act=fail))
        )
        assert report.stuck is None
        after = bench.assert_guest_runs_unharmed()
        moved = [result.pfn for result in report.results if isinstance(result, Exchanged)]
        assert bench.before.moved(after) == sorted(moved)
        assert bench.journal.kept == {}
        assert bench.journal.aside == []


def test_a_blackout_ends_when_the_guest_may_run_and_not_when_we_run_again(bench: Bench) -> None:
    class GuestFirst(FaultyHypervisor):
        """Lets the guest run for a while before the call returns, as a pCPU of both would."""

        def unpause(self, domid: Domid) -> None:
            super().unpause(domid)
            bench.host.clock.wait(3)

    report = bench.exchange(bench.mark(bench.layout.plain[0]), GuestFirst(bench.host))
    assert report.blackout is not None
    assert report.blackout.whole < 3


@pytest.mark.parametrize("moment", ["pause", "exchange"])
def test_who_looks_after_guests_keeps_off_one_that_an_exchange_holds(
    bench: Bench, moment: str
) -> None:
    """A save has failed that was under way when the exchange began its survey."""
    mfns = tuple(bench.mark(bench.layout.plain[0]))

    def a_save_has_failed() -> None:
        retirer.asked_in_vain(bench.identity)
        retirer.care.look()

    xen = FaultyHypervisor(
        bench.host,
        Fault(method=moment, act=a_save_has_failed),
        Fault(method="write_frames", kills=True),
    )
    memory = Facts()
    retirer = Retirer(
        xen=xen,
        journal=bench.journal,
        clock=bench.host.clock,
        policy=Policy(),
        ledger=Ledger(memory, bench.host.clock),
        errors=UncorrectedErrors(memory),
    )
    with pytest.raises(Killed):
        retirer.exchanging.run(bench.identity, mfns)
    # What it was about to change is on record still, and the next process puts it right.
    [report] = bench.end_jobs()
    assert [type(result) for result in report.results] == [Exchanged]
    bench.assert_guest_runs_unharmed()


def test_a_guest_of_a_save_that_failed_is_looked_after_when_its_exchange_has_ended(
    bench: Bench,
) -> None:
    mfns = tuple(bench.mark(bench.layout.plain[0]))
    memory = Facts()
    retirer = Retirer(
        xen=FaultyHypervisor(
            bench.host,
            Fault(method="pause", act=lambda: retirer.asked_in_vain(bench.identity)),
        ),
        journal=bench.journal,
        clock=bench.host.clock,
        policy=Policy(),
        ledger=Ledger(memory, bench.host.clock),
        errors=UncorrectedErrors(memory),
    )
    report = retirer.exchanging.run(bench.identity, mfns)
    assert [type(result) for result in report.results] == [Exchanged]
    bench.host.suspend(bench.domid, SuspendLimits())
    retirer.care.look()
    bench.assert_guest_runs_unharmed()


class Facts:
    """A store that keeps nothing."""

    def get_meta(self, key: str) -> str | None:
        del key
        return None

    def set_meta(self, key: str, value: str) -> None:
        del key, value

    def put_page(self, entry: PageEntry) -> None:
        del entry

    def remove_page(self, mfn: Mfn) -> None:
        del mfn


def retirer_of(bench: Bench, xen: FaultyHypervisor, journal: JobStore) -> Retirer:
    memory = Facts()
    return Retirer(
        xen=xen,
        journal=journal,
        clock=bench.host.clock,
        policy=Policy(),
        ledger=Ledger(memory, bench.host.clock),
        errors=UncorrectedErrors(memory),
    )


def test_a_failed_save_leaves_the_record_of_a_guest_in_the_middle_of_a_change(
    bench: Bench, tmp_path: Path
) -> None:
    mfns = tuple(bench.mark(bench.layout.plain[0]))
    # Its job can neither put it right nor let it go, and nor can the first look after it.
    failing = [Fault(method=method, times=10**6) for method in ("write_frames", "unpause")]
    xen = FaultyHypervisor(bench.host, *failing)
    retirer = retirer_of(bench, xen, JobStore(tmp_path))
    retirer.exchanging.run(bench.identity, mfns)
    [stage] = tmp_path.glob("*-stage")
    assert stage.read_bytes()[:1] == b"M"
    retirer.asked_in_vain(bench.identity)
    retirer.care.look()
    assert stage.read_bytes()[:1] == b"M"
    xen.plan.clear()
    while retirer.care.exchanging.has_rest:
        bench.host.clock.wait(5)
        retirer.care.look()
    bench.assert_guest_runs_unharmed()


def test_a_guest_of_whom_no_record_can_be_kept_is_not_said_to_have_one(
    bench: Bench, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    refusals = ["there is no ramfs"]
    journal = JobStore(tmp_path, refusal=lambda: refusals[-1] if refusals else None)
    retirer = retirer_of(bench, FaultyHypervisor(bench.host), journal)
    retirer.asked_in_vain(bench.identity)
    for _ in range(3):
        retirer.care.look()
        assert [guest.is_kept for guest in retirer.aftercare.left()] == [False]
    assert caplog.text.count("there is no ramfs") == 1
    retirer.care.tell_left()
    assert "No record of it could be kept" in caplog.text
    assert "Its record is kept" not in caplog.text
    refusals.clear()
    retirer.care.look()
    assert [guest.is_kept for guest in retirer.aftercare.left()] == [True]
    assert list(tmp_path.glob("*.job"))
