"""The state that outlives the daemon."""

from __future__ import annotations

import logging
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pytest

from pgofflined.core.book import Cause, PageEntry, Phase
from pgofflined.core.domains import DomainIdentity
from pgofflined.core.frames import Domid, Mfn
from pgofflined.core.history import PageHits
from pgofflined.store import Store, StoredHit, StoreInUse, read_boot_id

BOOT = "6b6dd2ba-5a5c-4ac4-a3a0-3f9f3c2f3b7e"
ENTRY = PageEntry(
    mfn=Mfn(0x1A2B3),
    cause=Cause.CORRECTED,
    phase=Phase.WAITING,
    since=1_700_000_000.25,
    marked=True,
    domain=DomainIdentity(Domid(7), UUID("0f8fad5b-d9cb-469f-a165-70867728950e")),
    domain_name="web-1",
    reason="granted",
    detail="the page is granted to d0",
    attempts=3,
    next_try=1_700_000_600.0,
)
PLAIN = PageEntry(mfn=Mfn(5), cause=Cause.OPERATOR, phase=Phase.LEFT, since=1.5)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "state.db"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    with closing(Store.open(path, BOOT)) as store:
        yield store


def fill(store: Store) -> None:
    """Make every further growth of the database fail as on a full disk."""
    pages = store._connection.execute("PRAGMA page_count").fetchone()[0]
    store._connection.execute(f"PRAGMA max_page_count = {pages}")


def trouble(store: Store) -> str:
    return store.trouble or "none"


def hits(count: int) -> list[StoredHit]:
    return [StoredHit(Mfn(number), 100.0 + number, 1) for number in range(count)]


def test_what_was_stored_is_there_after_a_restart(path: Path) -> None:
    with closing(Store.open(path, BOOT)) as first:
        first.put_page(ENTRY)
        first.put_page(PLAIN)
        first.set_meta("affinity", "0-3")
        first.add_hits([StoredHit(Mfn(9), 50.0, 2)])
    with closing(Store.open(path, BOOT)) as second:
        assert second.load_pages() == (PLAIN, ENTRY)
        assert second.get_meta("affinity") == "0-3"
        assert second.load_hits(since=0.0) == (PageHits(mfn=Mfn(9), hits=((50.0, 2),)),)


def test_what_was_stored_survives_a_kill(path: Path, tmp_path: Path) -> None:
    with closing(Store.open(path, BOOT)) as store:
        store.put_page(ENTRY)
        # What a killed process leaves: the file and its log as they are, not folded together.
        left = tmp_path / "left"
        left.mkdir()
        for file in path.parent.iterdir():
            (left / file.name).write_bytes(file.read_bytes())
    with closing(Store.open(left / "state.db", BOOT)) as again:
        assert again.load_pages() == (ENTRY,)


def test_a_page_is_replaced_and_removed_with_its_hits(store: Store) -> None:
    store.put_page(ENTRY)
    store.add_hits([StoredHit(ENTRY.mfn, 10.0, 1), StoredHit(Mfn(2), 11.0, 1)])
    done = replace(ENTRY, phase=Phase.OFFLINED, next_try=None)
    store.put_page(done)
    assert store.load_pages() == (done,)
    store.remove_page(ENTRY.mfn)
    assert store.load_pages() == ()
    assert [page.mfn for page in store.load_hits(since=0.0)] == [2]


def test_hits_come_back_with_the_page_hit_longest_ago_first(store: Store) -> None:
    store.add_hits([StoredHit(Mfn(1), 1.0, 1), StoredHit(Mfn(2), 2.0, 5)])
    store.add_hits([StoredHit(Mfn(1), 3.0, 2)])
    assert store.load_hits(since=0.0) == (
        PageHits(mfn=Mfn(2), hits=((2.0, 5),)),
        PageHits(mfn=Mfn(1), hits=((1.0, 1), (3.0, 2))),
    )
    assert store.load_hits(since=2.0) == (PageHits(mfn=Mfn(1), hits=((3.0, 2),)),)


def test_pruned_hits_are_gone_and_later_ones_are_not(store: Store) -> None:
    store.add_hits(hits(10))
    store.prune(before=104.0)
    assert [page.mfn for page in store.load_hits(since=0.0)] == [5, 6, 7, 8, 9]


def test_only_so_many_hits_are_kept(path: Path) -> None:
    with closing(Store.open(path, BOOT, max_hits=3)) as store:
        store.add_hits(hits(5))
        store.add_hits([StoredHit(Mfn(77), 200.0, 1)])
        assert [page.mfn for page in store.load_hits(since=0.0)] == [3, 4, 77]


def test_state_of_another_boot_is_discarded(path: Path) -> None:
    with closing(Store.open(path, BOOT)) as store:
        store.put_page(ENTRY)
        store.add_hits(hits(3))
    with closing(Store.open(path, "another boot")) as later:
        assert later.load_pages() == ()
        assert later.load_hits(since=0.0) == ()
        assert later.trouble is None
    assert [file.name for file in path.parent.iterdir()] == ["state.db"]


@pytest.mark.parametrize("rubbish", [b"no database", b"SQLite format 3\0" + b"\xff" * 5000])
def test_a_damaged_file_is_moved_aside(
    path: Path, rubbish: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path.parent.mkdir()
    path.write_bytes(rubbish)
    path.with_name("state.db-wal").write_bytes(b"a log that belongs to the damaged file")
    with closing(Store.open(path, BOOT)) as store:
        assert store.trouble is None
        store.put_page(ENTRY)
        assert store.load_pages() == (ENTRY,)
    assert path.with_name("state.db.damaged").read_bytes() == rubbish
    assert "cannot be used" in caplog.text


def test_a_file_damaged_within_is_moved_aside(path: Path) -> None:
    with closing(Store.open(path, BOOT)) as store:
        store.add_hits(hits(5000))
    whole = bytearray(path.read_bytes())
    whole[8192:16384] = b"\xa5" * 8192
    path.write_bytes(whole)
    with closing(Store.open(path, BOOT)) as store:
        assert store.load_hits(since=0.0) == ()
    assert path.with_name("state.db.damaged").exists()


def test_a_file_of_another_version_is_moved_aside(path: Path) -> None:
    Store.open(path, BOOT).close()
    with closing(sqlite3.connect(path)) as other:
        other.execute("PRAGMA user_version = 99")
    with closing(Store.open(path, BOOT)) as store:
        assert store.load_pages() == ()
    assert path.with_name("state.db.damaged").exists()


def test_the_state_of_the_release_before_is_taken_over(path: Path) -> None:
    with closing(Store.open(path, BOOT)) as store:
        store.put_page(ENTRY)
        store.set_meta("poisoned", "[7]")
        store.add_hits([StoredHit(Mfn(9), 1_700_000_050.0, 2)])
    with closing(sqlite3.connect(path)) as other:
        # Its hits had the date; the rest was the same.
        other.execute("PRAGMA user_version = 1")
    for _ in range(2):
        with closing(Store.open(path, BOOT, epoch=1_700_000_000.0)) as store:
            assert store.load_pages() == (ENTRY,)
            assert store.get_meta("poisoned") == "[7]"
            assert store.load_hits(since=0.0) == (PageHits(mfn=Mfn(9), hits=((50.0, 2),)),)


def test_an_empty_file_as_of_a_start_that_was_killed_is_begun_anew(path: Path) -> None:
    path.parent.mkdir()
    path.touch()
    with closing(Store.open(path, BOOT)) as store:
        store.put_page(PLAIN)
        assert store.load_pages() == (PLAIN,)


def test_a_second_daemon_is_turned_away(path: Path, store: Store) -> None:
    store.put_page(PLAIN)
    with pytest.raises(StoreInUse, match="another pgofflined runs"):
        Store.open(path, BOOT)
    assert store.load_pages() == (PLAIN,)
    assert not path.with_name("state.db.damaged").exists()


def test_the_host_is_taken_from_the_start(path: Path, store: Store) -> None:
    assert store.trouble is None
    with pytest.raises(StoreInUse):
        Store.open(path, "another boot")


def test_where_no_file_can_be_had_state_is_kept_in_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    with closing(Store.open(tmp_path / "file" / "state.db", BOOT)) as store:
        store.put_page(ENTRY)
        assert store.load_pages() == (ENTRY,)
        assert "a restart will lose it" in trouble(store)
    assert "no state can be kept" in caplog.text


def test_a_full_disk_is_told_and_nothing_but_old_hits_is_lost(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(Store.open(path, BOOT)) as store:
        store.put_page(PLAIN)
        fill(store)
        store.add_hits(hits(20_000))
        assert "full" in trouble(store)
        store.put_page(ENTRY)
        store.remove_page(PLAIN.mfn)
        store.set_meta("idle_scrub", "4")
        assert store.get_meta("idle_scrub") == "4"
        store._connection.execute("PRAGMA max_page_count = 1000000")
        store.set_meta("another", "change")
        assert trouble(store) == "none"
        assert store.load_pages() == (ENTRY,)
        assert store.get_meta("idle_scrub") == "4"
        assert len(store.load_hits(since=0.0)) == 10_000
    told = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(told) == 1


def test_what_waits_is_written_at_the_end(path: Path) -> None:
    with closing(Store.open(path, BOOT)) as store:
        fill(store)
        store.add_hits(hits(5_000))
        store.put_page(ENTRY)
        store._connection.execute("PRAGMA max_page_count = 1000000")
    with closing(Store.open(path, BOOT)) as later:
        assert later.load_pages() == (ENTRY,)


def test_a_name_that_is_no_utf8_does_no_harm(store: Store) -> None:
    store.put_page(replace(ENTRY, domain_name="caf\udce9"))
    assert store.load_pages()[0].domain_name == "caf\\udce9"


def test_a_row_that_makes_no_sense_is_left_out(path: Path) -> None:
    with closing(Store.open(path, BOOT)) as store:
        store.put_page(ENTRY)
        store.put_page(PLAIN)
    with closing(sqlite3.connect(path)) as other, other:
        other.execute("UPDATE pages SET phase = 'dreaming' WHERE mfn = 5")
    with closing(Store.open(path, BOOT)) as store:
        assert store.load_pages() == (ENTRY,)


def test_nobody_else_may_read_the_file(path: Path, store: Store) -> None:
    assert store.trouble is None
    modes = {stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
    assert modes == {0o600}
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_the_boots_key_is_not_for_others(store: Store) -> None:
    with pytest.raises(ValueError, match="own key"):
        store.set_meta("boot_id", "mine")


def test_the_boot_is_the_kernels(tmp_path: Path) -> None:
    (tmp_path / "boot_id").write_text(f"{BOOT}\n")
    assert read_boot_id(tmp_path / "boot_id") == BOOT
