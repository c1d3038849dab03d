"""The main job on real Xen: a failing page leaves a running guest, and nothing else happens."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from .daemon import CONFIG, POLICY, UNIT, announce_suspend, frames, running
from .rig.guest import GuestSpec
from .rig.host import Host
from .rig.nested import tried_again_after_triple_faults
from .rig.qemu import Source
from .rig.waiting import wait_until

MCELOG = "intel-mcelog-noservice"
NATIVE = "intel-native-noservice"
AMD = "amd-mcelog-noservice"

pytestmark = pytest.mark.e2e


@pytest.mark.hosts(MCELOG, NATIVE)
def test_two_corrected_errors_retire_a_page_from_under_a_running_pv_guest(host: Host) -> None:
    source = "mcelog" if host.spec.source is Source.MCELOG else "native"
    guest = host.start_guest(GuestSpec(name="pv", vcpus=2))
    [mfn] = frames(host, "data", guest.domid, 1)
    with running(host) as daemon:
        assert daemon.status()["source"]["name"] == source
        shown = json.loads(host.run(["pgofflined", "status", "--json"]).out)
        assert shown["source"]["name"] == source
        daemon.inject_ce(mfn)
        assert daemon.page(mfn) == {}
        assert daemon.state(mfn) == "ONLINE"
        daemon.inject_ce(mfn)
        daemon.wait_for(mfn, "offlined")
        assert daemon.state(mfn) == "OFFLINED"
        guest.wait_passes(3)
        guest.assert_clean()
        assert daemon.metric("guest_blackout_seconds_count") == 1
        assert 0 < daemon.metric("guest_blackout_seconds_sum") < 60
        assert daemon.metric("errors_total", **{"class": "corrected", "source": source}) == 2
        assert daemon.metric("pages", state="offlined") == 1
        # The scrubber's fault is counted, and the operator told.
        assert daemon.metric("idle_scrub_pages") == 1
        assert "one idle CPU" in daemon.journal()
        told = [entry for entry in daemon.entries() if entry.get("MFN") == f"{mfn:#x}"]
        assert {entry.get("DOMID") for entry in told} >= {str(guest.domid)}
        assert all(re.fullmatch("[0-9a-f]{32}", entry["MESSAGE_ID"]) for entry in told)


@pytest.mark.hosts(NATIVE)
def test_sixty_four_random_pages_are_exchanged_in_jobs_of_1_8_and_55(host: Host) -> None:
    guest = host.start_guest(GuestSpec(name="pv", vcpus=2))
    done = host.run(
        "cd /opt/pgofflined-tests && "
        f"python3 -m tests.e2e.dom0.pages {guest.domid} data 96 | "
        f"python3 -m tests.e2e.dom0.exchange_pages {guest.domid} 1 8 55",
        timeout=300,
    )
    jobs = [json.loads(line) for line in done.out.splitlines()]
    assert sum(job["exchanged"] for job in jobs) == 64
    assert sum(job["offlined"] for job in jobs) == 64
    assert {1, 8, 55} <= {job["pages"] for job in jobs}
    # Areas that a vCPU has registered with Xen look like data, and are few.
    refused = [refusal for job in jobs for refusal in job["refused"]]
    assert len(refused) <= 2, refused
    assert [refusal for refusal in refused if "other_references" not in refusal] == []
    guest.wait_passes(3)
    guest.assert_clean()


@pytest.mark.hosts(NATIVE)
def test_page_tables_of_a_guest_that_l1tf_could_crash_are_left_sound(host: Host) -> None:
    # The flavour is one on which Xen enforces L1TF for guests, without shadow paging to fall
    # back on: a non-present entry that keeps a frame's number crashes the domain.
    assert re.search(r"DomU enabled", host.xl_dmesg())
    lines = len(host.xl_dmesg().splitlines())
    guest = host.start_guest(GuestSpec(name="pv", vcpus=2))
    with running(host) as daemon:
        for mfn in frames(host, "data", guest.domid, 5):
            daemon.offline(mfn)
            daemon.wait_for(mfn, "offlined")
    guest.wait_passes(1)
    guest.assert_clean()
    assert host.xl_dmesg_suspicious(after=lines) == []


@pytest.mark.hosts(NATIVE)
def test_pages_of_nobody_dom0_and_xen_get_their_verdicts(host: Host) -> None:
    with running(host) as daemon:
        [dom0] = frames(host, "dom0", 0, 1)
        daemon.offline(dom0)
        assert daemon.wait_for(dom0, "left")["reason"] == "dom0"
        assert daemon.state(dom0) == "ONLINE"
        base = re.search(r"Xen image base address: (0x[0-9a-f]+)", host.xl_dmesg())
        assert base is not None
        # The image begins 2 MiB above its base (XEN_IMG_OFFSET, xen/arch/x86/arch.mk).
        xens = (int(base[1], 16) + (2 << 20) >> 12) + 1
        daemon.offline(xens)
        assert daemon.wait_for(xens, "left")["reason"] == "xen"
        [free] = frames(host, "free", 0, 1)
        daemon.offline(free)
        daemon.wait_for(free, "offlined")
        assert daemon.state(free) == "OFFLINED"
    # The host goes on: it can build a guest from its heap and run it.
    guest = host.start_guest(GuestSpec(name="pv", vcpus=2))
    guest.wait_passes(1)
    guest.assert_clean()


@pytest.mark.hosts(NATIVE)
def test_a_guest_that_ignores_the_request_to_suspend_is_unharmed(host: Host) -> None:
    guest = host.start_guest(GuestSpec(name="deaf", vcpus=2, ignore_suspend=True))
    [mfn] = frames(host, "data", guest.domid, 1)
    announce_suspend(host, guest.domid)
    with running(host) as daemon:
        daemon.offline(mfn)
        daemon.wait_for(mfn, "left")
        assert daemon.page(mfn)["reason"] == "no_suspend"
        assert daemon.state(mfn) == "OFFLINE_PENDING"
        assert daemon.metric("exchange_pages_total", outcome="no_suspend") == 2
    node = f"/local/domain/{guest.domid}/control/shutdown"
    assert host.run(["xenstore-read", node]).out.strip() == ""
    guest.wait_passes(2)
    guest.assert_clean()


@pytest.mark.hosts(NATIVE)
def test_a_granted_page_is_refused_and_stays_pending(host: Host) -> None:
    guest = host.start_guest(GuestSpec(name="pv", vcpus=2))
    # xenconsoled in dom0 has this page mapped through the grant.
    ring = int(host.run(["xenstore-read", f"/local/domain/{guest.domid}/console/ring-ref"]).out)
    with running(host) as daemon:
        daemon.offline(ring)
        daemon.wait_for(ring, "waiting")
        assert daemon.page(ring)["reason"] == "granted"
        assert daemon.state(ring) == "OFFLINE_PENDING"
        assert daemon.metric("guest_blackout_seconds_count") == 0
    # The console still works: the passes are read from it.
    guest.wait_passes(2)
    guest.assert_clean()


@pytest.mark.hosts(NATIVE)
def test_twenty_marks_on_one_pv_domain_do_not_hang_the_host(host: Host) -> None:
    guest = host.start_guest(GuestSpec(name="pv", vcpus=2))
    words = " ".join(str(mfn) for mfn in frames(host, "data", guest.domid, 20))
    before = affinities(host)
    done = host.run(
        f"cd /opt/pgofflined-tests && python3 -m tests.e2e.dom0.mark_twenty {words}", timeout=120
    )
    assert json.loads(done.out) == {"marked": 20, "online": 20, "cpus": [0]}
    assert affinities(host) == before
    guest.wait_passes(1)
    guest.assert_clean()


TRACING = "/sys/kernel/tracing"


@contextmanager
def mappings_traced(host: Host) -> Iterator[None]:
    """Let dom0's kernel note who maps frames of other domains (arch/x86/xen/mmu_pv.c)."""
    host.run(f"echo 'p:rig/maps xen_remap_pfn' > {TRACING}/kprobe_events")
    host.run(f"echo 1 > {TRACING}/options/record-tgid; echo 1 > {TRACING}/events/rig/maps/enable")
    try:
        yield
    finally:
        host.run(f"echo 0 > {TRACING}/events/rig/maps/enable; echo > {TRACING}/kprobe_events")


def mappings(host: Host, pid: int | None = None) -> list[str]:
    """What was mapped, by a process or by all."""
    noted = [line for line in host.read_text(f"{TRACING}/trace").splitlines() if "maps:" in line]
    return [line for line in noted if pid is None or re.search(rf"\(\s*{pid}\)", line)]


@pytest.mark.spoils_host
@pytest.mark.xen_complains
@pytest.mark.hosts(NATIVE)
def test_a_page_that_xen_broke_itself_is_reported_and_never_mapped(host: Host) -> None:
    guest = host.start_guest(GuestSpec(name="pv", vcpus=2))
    domid = guest.domid
    # Destroying the crashed guest would hang the host (docs/xen-bugs.md); this one is thrown away
    # as it is.
    host.guests.clear()
    with mappings_traced(host), running(host) as daemon:
        [mfn] = frames(host, "data", domid, 1)
        assert mappings(host), "whoever reads a guest's frames is seen"
        host.inject_srao(mfn << 12)
        wait_until(
            lambda: "Xen acted on an uncorrected error" in daemon.journal(),
            timeout=60,
            what="the daemon's word on what Xen did",
        )
        [entry] = [e for e in daemon.entries() if e["MESSAGE"].startswith("Xen acted on")]
        assert (entry["MFN"], entry["DOMID"]) == (f"{mfn:#x}", str(domid))
        assert daemon.page(mfn)["cause"] == "uncorrected"
        assert daemon.request_offline(mfn)["fate"] == "unresolved"
        assert mappings(host, daemon.pid()) == []
        assert daemon.metric("jobs_total", kind="exchange", outcome="done") == 0
        assert "BROKEN" in daemon.state(mfn)


@pytest.mark.hosts(NATIVE)
def test_an_error_during_a_restart_of_the_daemon_is_handled(host: Host) -> None:
    guest = host.start_guest(GuestSpec(name="pv", vcpus=2))
    [mfn] = frames(host, "data", guest.domid, 1)
    pause = f"/run/systemd/system/{UNIT}.d/pause.conf"
    host.write_text(pause, "[Service]\nRestartSec=40\n")
    host.run(["systemctl", "daemon-reload"])
    try:
        with running(host) as daemon:
            daemon.inject_ce(mfn)
            host.run(["systemctl", "kill", "--signal=KILL", UNIT])
            # Xen polls at the latest after 16 s; the daemon is away for 40.
            host.inject_ce(mfn << 12)
            wait_until(
                lambda: (
                    host.run(["systemctl", "is-active", UNIT], check=False).out.strip() == "active"
                ),
                timeout=180,
                what="the restart",
                interval=1,
            )
            daemon.wait_for(mfn, "offlined")
            assert daemon.status()["source"]["name"] == "native"
    finally:
        host.run(["rm", "-f", pause])
        host.run(["systemctl", "daemon-reload"])
    guest.wait_passes(1)
    guest.assert_clean()


@pytest.mark.hosts(MCELOG)
def test_a_broken_configuration_ends_the_start_with_78_and_the_reason(host: Host) -> None:
    host.write_text(CONFIG, '[retire]\nwindow = "72"\nfrequency = 3\n')
    host.run(["systemctl", "reset-failed", UNIT], check=False)
    assert host.run(["systemctl", "start", UNIT], check=False).status != 0
    shown = host.run(["systemctl", "show", "-P", "ExecMainStatus", UNIT]).out.strip()
    assert shown == "78"
    journal = host.journal(UNIT)
    assert f'{CONFIG}: line 2: retire.window: found "72"' in journal
    assert f"{CONFIG}: line 3: retire.frequency: found an unknown key" in journal
    assert host.run(["systemctl", "show", "-P", "NRestarts", UNIT]).out.strip() == "0"


@pytest.mark.hosts(MCELOG)
def test_a_bad_reload_keeps_the_policy_in_force(host: Host) -> None:
    with running(host) as daemon:
        before = daemon.status()["policy_digest"]
        host.write_text(CONFIG, "[retire]\ncorrected_errors = 0\n")
        assert host.run(["systemctl", "reload", UNIT], check=False).status != 0
        wait_until(
            lambda: "line 2: retire.corrected_errors: found 0" in daemon.journal(),
            timeout=30,
            what="the word on the bad file",
        )
        assert daemon.status()["policy_digest"] == before
        assert daemon.metric("config_last_reload_successful") == 0
        assert daemon.attention("config_rejected") != []
        daemon.reload(POLICY + "\n[domains]\ndeny = ['secret*']\n")
        assert daemon.metric("config_last_reload_successful") == 1
        assert daemon.attention("config_rejected") == []


@pytest.mark.hosts(MCELOG)
def test_an_idle_daemon_sleeps_and_is_small(host: Host) -> None:
    with running(host) as daemon:
        pid = daemon.pid()
        seconds = 40
        trace = host.run(
            f"timeout {seconds} strace -f -qq -e trace=all -p {pid} 2>&1 || true",
            timeout=seconds + 30,
        ).out
        # What it was waiting in when strace came is shown as well; the watchdog wants one word
        # each minute, which takes a handful of calls.
        calls = [line for line in trace.splitlines() if "(" in line]
        wakes = [line for line in calls if re.search(r"epoll_p?wait", line)]
        assert len(wakes) <= 2, trace
        assert len(calls) <= 12, trace
        rss = re.search(r"VmRSS:\s+(\d+) kB", host.read_text(f"/proc/{pid}/status"))
        assert rss is not None
        assert int(rss[1]) < 64 * 1024


@pytest.mark.hosts(AMD)
@tried_again_after_triple_faults
def test_a_pvh_guest_is_migrated_off_its_page_and_runs_on(host: Host) -> None:
    guest = host.start_guest(GuestSpec(name="pvh", kind="pvh", vcpus=2))
    before = guest.domid
    [mfn] = frames(host, "hvm", before, 1)
    with running(host) as daemon:
        daemon.offline(mfn)
        daemon.wait_for(mfn, "offlined", limit=300)
        assert daemon.state(mfn) == "OFFLINED"
        assert guest.domid != before
        guest.wait_passes(2)
        guest.assert_clean(migrated=True)
        assert daemon.metric("migrations_total", outcome="migrated") == 1
        assert daemon.metric("jobs_total", kind="relocation", outcome="done") == 1


@pytest.mark.hosts(AMD)
def test_corrected_errors_of_amd_are_counted_and_retire_nothing(host: Host) -> None:
    guest = host.start_guest(GuestSpec(name="pv", vcpus=2))
    [mfn] = frames(host, "data", guest.domid, 1)
    with running(host) as daemon:
        daemon.inject_ce(mfn)
        daemon.inject_ce(mfn)
        assert daemon.page(mfn) == {}
        assert daemon.state(mfn) == "ONLINE"
    guest.assert_clean()


def affinities(host: Host) -> list[list[str]]:
    """Hard and soft affinity of each of dom0's vCPUs."""
    lines = host.run(["xl", "vcpu-list", "0"]).out.splitlines()[1:]
    return [line.split()[-3:] for line in lines]
