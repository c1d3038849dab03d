"""The benchmarks measure what they say: on a host, or a guest, that is small enough for a test."""

from __future__ import annotations

import ctypes
from typing import cast

import numpy as np
import pytest

from bench import references, scan, survey
from bench.blackout import Job, NotExchanged, jobs_that_count
from bench.dom0.full_scan import all_tables, compare, scan_batched, scan_one_by_one
from bench.figures import Figure
from bench.sparse import DOMID, SparseGuest
from pgofflined.core.frames import PAGE_SIZE, Domid, Mfn, Pfn
from pgofflined.core.pagetable import guest_frames
from pgofflined.exchanger.survey import read_p2m
from pgofflined.ports import Hypervisor
from pgofflined.sim.machine import SimulatedHost
from pgofflined.xen.libs import ForeignPages


class SimulatedLibrary:
    """libxenforeignmemory over a simulated host; mappings are copies."""

    def __init__(self, host: SimulatedHost) -> None:
        self._host = host
        self._mapped: dict[int, object] = {}
        self.sizes: list[int] = []

    def xenforeignmemory_open(self, *_: object) -> int:
        return 1

    def xenforeignmemory_map(
        self,
        _handle: int,
        domid: int,
        _protection: int,
        count: int,
        gfns: ctypes.Array[ctypes.c_uint64],
        _errors: object,
    ) -> int:
        words = self._host.read_frames(Domid(domid), np.array(list(gfns), dtype=np.uint64))
        page = ctypes.create_string_buffer(words.tobytes(), count * PAGE_SIZE)
        self._mapped[ctypes.addressof(page)] = page
        self.sizes.append(count)
        return ctypes.addressof(page)

    def xenforeignmemory_unmap(self, _handle: int, address: int, _count: int) -> int:
        del self._mapped[address]
        return 0

    @property
    def mapped(self) -> int:
        return len(self._mapped)


def test_both_full_scans_find_every_entry_that_maps_a_page() -> None:
    host = SimulatedHost()
    domid = host.add_pv()
    library = SimulatedLibrary(host)
    pages = ForeignPages(library)
    tables, levels = all_tables(host, domid)
    contents = host.read_frames(domid, tables)
    p2m = read_p2m(host, host.domain(domid)).entries
    own = [Mfn(mfn) for mfn in p2m[guest_frames(p2m)].tolist()]

    found = 0
    for mfn in own[:: len(own) // 40]:
        present = (contents & np.uint64(1)).astype(np.bool_)
        maps = present & ((contents & np.uint64(0x000F_FFFF_FFFF_F000)) >> np.uint64(12) == mfn)
        # Xen's own slots of an L4.
        maps[levels == 4, 256:272] = False
        hits = tuple(zip(*(axis.tolist() for axis in np.nonzero(maps)), strict=True))
        assert scan_one_by_one(pages, domid, tables, levels, mfn) == hits
        assert scan_batched(host, domid, tables, levels, mfn) == hits
        found += len(hits)
    assert found > 40


def test_the_way_of_2009_maps_each_table_alone_and_lets_go_of_it() -> None:
    host = SimulatedHost()
    domid = host.add_pv()
    library = SimulatedLibrary(host)

    scans = compare(host, domid, 2, ForeignPages(library))

    assert scans["tables"] == len(all_tables(host, domid)[0])
    assert scans["found"] >= 1
    assert library.sizes == [1] * (3 * scans["tables"])
    assert library.mapped == 0
    assert {len(scans[way]) for way in ("one_by_one", "batched", "survey")} == {2}
    assert len(scans["of_it_python"]) == 2


@pytest.mark.parametrize("gib", [1, 2])
def test_a_sparse_guest_maps_each_of_its_pages_once_at_each_place(gib: int) -> None:
    guest = SparseGuest(gib)
    xen = cast("Hypervisor", guest)
    p2m = read_p2m(xen, guest.domain(DOMID))
    assert len(p2m.entries) == guest.pages
    assert np.array_equal(np.unique(p2m.entries), np.sort(p2m.entries))

    tables, levels = all_tables(xen, DOMID)
    assert len(tables) == guest.tables
    # A table for each 2 MiB, in the direct map alone.
    assert np.count_nonzero(levels == 1) > gib << 9
    for pfn in (Pfn(0), guest.data_page()):
        assert len(scan_batched(xen, DOMID, tables, levels, guest.mfn(pfn))) == 1
        assert guest.m2p(guest.mfn(pfn)) == pfn
    # A frame of the p2m list is mapped twice: by the direct map, and where the list is read.
    for leaf in p2m.leaf_mfns[[0, -1]].tolist():
        assert len(scan_batched(xen, DOMID, tables, levels, Mfn(leaf))) == 2


def test_the_cost_of_a_survey_is_told_for_each_size() -> None:
    figures = survey.measure(1, (1, 2))
    named = {figure.name: figure for figure in figures}
    assert named["survey of 2 GiB, peak memory"].median > 10
    assert named["for each page table, 2 GiB / 1 GiB"].met is not None
    assert named["memory for each page table, 2 GiB / 1 GiB"].met is not None
    whole = named["survey of 2 GiB, with making its frames up"].median
    assert named["survey of 2 GiB"].median < whole


def test_the_cost_of_many_mappings_is_told_beside_that_of_one() -> None:
    figures = references.measure(1, 1, (0, 1 << 17))
    named = {figure.name: figure for figure in figures}
    assert named["survey, one page mapped 131,073 times, peak memory"].median > 10
    assert named["for each page table, 131,073 mappings / 1"].median > 0
    # The bound that the project promises; each mapping was an object once.
    assert named["peak memory, 131,073 mappings / 1"].median < 2


def test_searches_are_measured_beside_the_fastest_way_of_reading() -> None:
    figures = scan.measure(2, tables=2048)
    reading = [figure for figure in figures if figure.name.startswith("reading, as ")]
    ratios = [figure for figure in figures if figure.unit == "ratio"]
    assert len(reading) == 1
    assert len(by_name(figures, "copying, as memcpy does").samples) == 2
    assert len(ratios) == len(scan.WANTED)
    for count, ratio in zip(scan.WANTED, ratios, strict=True):
        rate = by_name(figures, ratio.name.removesuffix(" / reading"))
        assert str(count) in ratio.name
        expected = [a / b for a, b in zip(rate.samples, reading[0].samples, strict=True)]
        assert ratio.samples == pytest.approx(expected)


def by_name(figures: list[Figure], name: str) -> Figure:
    (found,) = [figure for figure in figures if figure.name == name]
    return found


def job(pages: int, exchanged: int) -> Job:
    return Job(pages=pages, exchanged=exchanged, refused=(), whole=0.2, ours=0.01)


def test_jobs_that_make_up_for_refused_pages_are_no_samples() -> None:
    jobs = [job(1, 1), job(1, 1), job(256, 255), job(1, 0), job(1, 1), job(8, 8)]
    assert jobs_that_count(jobs, (1, 1, 256, 8)) == [jobs[0], jobs[1], jobs[2], jobs[5]]


@pytest.mark.parametrize(
    "jobs",
    [
        [job(1, 0), job(1, 1), job(256, 256)],
        [job(1, 1), job(256, 200), job(56, 56)],
        [job(1, 1)],
        [],
    ],
)
def test_a_job_that_moved_too_little_is_no_measurement(jobs: list[Job]) -> None:
    with pytest.raises(NotExchanged, match="too few"):
        jobs_that_count(jobs, (1, 256))
