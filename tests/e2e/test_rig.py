"""The rig itself, on real Xen: what all other tests here rely on."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from .rig import channel
from .rig.devices import disk_file
from .rig.errors import CommandFailed, CommandTimeout, GuestFailed, HostLost
from .rig.guest import GuestSpec
from .rig.host import Host
from .rig.nested import tried_again_after_triple_faults
from .rig.qemu import Source
from .rig.waiting import wait_until

OLDER = "intel417-native-noservice"
ALL_HOSTS = ("intel-mcelog-noservice", "intel-native-noservice", "amd-mcelog-noservice", OLDER)
INTEL = "intel-mcelog-noservice"
AMD = "amd-mcelog-noservice"
POLL_LIMIT = 60.0
"""Seconds within which Xen's poll must have found an error: 16 on real time, with a margin."""

pytestmark = pytest.mark.e2e


@pytest.mark.hosts(*ALL_HOSTS)
def test_xen_and_dom0_are_up(host: Host) -> None:
    version = f"xen_version            : {host.spec.release.xen}."
    assert version in host.run(["xl", "info"]).out
    assert host.run("xenstore-read /local/domain/0/name").out.strip() == "Domain-0"
    assert host.run("pidof xenconsoled").status == 0
    assert host.run("systemctl is-system-running", check=False).out.strip() == "running"


@pytest.mark.hosts(*ALL_HOSTS)
def test_event_source_is_the_one_asked_for(host: Host) -> None:
    has_mcelog = host.run("test -e /dev/mcelog", check=False).status == 0
    assert has_mcelog == (host.spec.source is Source.MCELOG)


@pytest.mark.hosts(*ALL_HOSTS)
def test_project_is_installed_as_a_package_would_install_it(host: Host) -> None:
    assert host.run("command -v pgofflined").out.strip() == "/usr/bin/pgofflined"
    host.python("import pgofflined; assert pgofflined.__file__.startswith('/usr/lib/python3/')")


@pytest.mark.hosts(INTEL)
def test_large_output_arrives_whole_with_its_status(host: Host) -> None:
    source = (
        "import sys\n"
        "for i in range(1 << 17): sys.stdout.buffer.write(i.to_bytes(8, 'little'))\n"
        "sys.stderr.write('to the other stream')\n"
        "raise SystemExit(7)\n"
    )
    done = host.python(source, check=False)
    assert done.status == 7
    assert done.err == "to the other stream"
    assert done.stdout == b"".join(i.to_bytes(8, "little") for i in range(1 << 17))


@pytest.mark.hosts(INTEL)
def test_failing_command_says_what_it_printed(host: Host) -> None:
    with pytest.raises(CommandFailed, match=r"(?s)status 3.*the reason"):
        host.run("echo the reason; exit 3")


@pytest.mark.hosts(INTEL)
def test_slow_command_is_killed_and_the_host_is_well(host: Host) -> None:
    with pytest.raises(CommandTimeout, match=r"(?s)sleep.*so far"):
        host.run("echo so far; sleep 1234 & sleep 1234", timeout=3)
    left = host.run("ps -e -o args").out
    assert "sleep 1234" not in left


@pytest.mark.hosts(INTEL)
def test_long_command_does_not_hold_up_others(host: Host) -> None:
    with concurrent.futures.ThreadPoolExecutor() as threads:
        long = threads.submit(host.run, "until [ -e /tmp/go ]; do sleep 0.2; done", timeout=60)
        assert host.run("echo answered").out == "answered\n"
        assert not long.done()
        host.run("touch /tmp/go")
        assert long.result().status == 0


@pytest.mark.hosts(INTEL)
def test_files_come_back_as_they_were(host: Host, tmp_path: Path) -> None:
    data = os.urandom(300_001)
    path = tmp_path / "data"
    path.write_bytes(data)
    host.put(path, "/tmp/a/b/data", mode=0o640)  # noqa: S108 - in dom0
    assert host.get("/tmp/a/b/data") == data  # noqa: S108 - in dom0
    assert host.get("/tmp/a/b/data", offset=300_000) == data[-1:]  # noqa: S108 - in dom0
    assert host.run("stat -c %a /tmp/a/b/data").out == "640\n"
    with pytest.raises(FileNotFoundError):
        host.get("/tmp/a/nothing")  # noqa: S108 - in dom0


@pytest.mark.hosts(INTEL, AMD)
def test_pv_guest_with_two_vcpus_checks_its_memory(host: Host) -> None:
    guest = host.start_guest(GuestSpec(name="pv1"))
    guest.wait_passes(2)
    guest.assert_clean()
    assert "workers=2" in guest.console()
    assert len(guest.checker_pfns()) == 64
    guest.shutdown()
    assert not guest.exists()


@pytest.mark.hosts(INTEL)
def test_pages_of_the_checker_can_be_found_in_the_machine(host: Host) -> None:
    guest = host.start_guest(GuestSpec(name="pv1"))
    p2m = guest.p2m()
    mfns = {p2m[pfn] for pfn in guest.checker_pfns()}
    assert len(mfns) == 64
    # The machine's 3 GiB are below the PCI hole.
    assert max(mfns) < (3 << 30) >> 12


@pytest.mark.hosts(AMD)
@pytest.mark.parametrize("kind", ["pvh", "hvm"])
@tried_again_after_triple_faults
def test_guest_with_second_level_tables_checks_its_memory(host: Host, kind: str) -> None:
    guest = host.start_guest(GuestSpec(name=kind, kind="pvh" if kind == "pvh" else "hvm"))
    guest.wait_passes(2)
    guest.assert_clean()


@pytest.mark.hosts(AMD)
@tried_again_after_triple_faults
def test_pvh_guest_survives_a_migration_to_the_same_host(host: Host) -> None:
    guest = host.start_guest(GuestSpec(name="pvh1", kind="pvh"))
    before = guest.domid
    host.run(["xl", "migrate", "-s", "", "pvh1", "xl migrate-receive"], timeout=180)
    assert guest.domid != before
    guest.wait_passes(2)
    guest.assert_clean(migrated=True)


@pytest.mark.hosts(INTEL)
def test_one_flipped_bit_is_found(host: Host) -> None:
    guest = host.start_guest(GuestSpec(name="pv1", cmdline_extra="memcheck.damage_at=3"))
    wait_until(guest.trouble, timeout=60, what="the checker to find the flipped bit")
    with pytest.raises(AssertionError, match="MISMATCH worker=0"):
        guest.assert_clean()


@pytest.mark.hosts(INTEL)
def test_guest_whose_kernel_panics_at_boot_is_started_thrice_and_told_of(host: Host) -> None:
    before = len(host.remarks)
    with pytest.raises(GuestFailed, match="Kernel panic"):
        host.start_guest(GuestSpec(name="dead", cmdline_extra="rdinit=/nothing"))
    # These were wanted, and are no news for the summary.
    told, host.remarks[before:] = host.remarks[before:], []
    assert len(told) == 3


@pytest.mark.hosts(INTEL)
def test_damage_on_a_busy_disk_is_found(host: Host) -> None:
    guest = host.start_guest(GuestSpec(name="pv1", vcpus=1, disk=True))
    host.run(
        f"dd if=/dev/urandom of={disk_file('pv1')} bs=64k seek=100 count=1 conv=notrunc", timeout=60
    )
    wait_until(guest.trouble, timeout=60, what="the load to find the damage")
    with pytest.raises(AssertionError, match="disk MISMATCH chunk=100"):
        guest.assert_clean()


@pytest.mark.hosts(INTEL)
def test_guest_that_ignores_suspend_does_not_watch_for_it(host: Host) -> None:
    guest = host.start_guest(GuestSpec(name="deaf", ignore_suspend=True))
    control = f"/local/domain/{guest.domid}/control/shutdown"
    host.run(["xenstore-write", control, "suspend"])
    guest.wait_passes(5)
    # A guest that listens clears the request at once.
    assert host.run(["xenstore-read", control]).out.strip() == "suspend"
    guest.assert_clean()


@pytest.mark.hosts(INTEL)
def test_guest_that_listens_suspends_and_goes_on(host: Host) -> None:
    guest = host.start_guest(GuestSpec(name="pv1"))
    # A checkpoint suspends the guest by the same request, and resumes it.
    host.run(["xl", "save", "-c", "pv1", "/root/pv1.save"], timeout=120)
    host.run("rm /root/pv1.save")
    guest.wait_passes(2)
    guest.assert_clean()


@pytest.mark.hosts(INTEL)
def test_corrected_error_reaches_dev_mcelog(host: Host) -> None:
    wanted = 0x4567_8000
    host.inject_ce(wanted)
    source = (
        "import os, select, struct, sys\n"
        "device = os.open('/dev/mcelog', os.O_RDONLY)\n"
        "poll = select.poll(); poll.register(device, select.POLLIN)\n"
        f"assert poll.poll({POLL_LIMIT * 1000:.0f}), 'nothing came'\n"
        "data = os.read(device, 32 * 4096)\n"
        "status, misc, address = struct.unpack_from('<3Q', data)\n"
        "print(hex(status), hex(address), len(data))\n"
    )
    done = host.python(source, timeout=POLL_LIMIT + 30)
    assert done.out.split() == ["0x8c00004000000090", hex(wanted), "112"]


@pytest.mark.hosts(INTEL)
@pytest.mark.spoils_host
def test_host_that_is_gone_is_told_apart_from_a_failed_test(host: Host) -> None:
    os.kill(host.pid(), signal.SIGKILL)
    with pytest.raises(HostLost, match=r"(?s)QEMU ended.*serial console"):
        host.run("true")
    with pytest.raises(HostLost):
        host.run("true")


@pytest.mark.hosts(AMD)
@pytest.mark.spoils_host
def test_stopped_host_is_lost_within_the_silence_limit(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "SILENCE_LIMIT", 10.0)
    host.qmp("stop")
    with pytest.raises(HostLost, match=r"(?s)silent for 10 s.*CPU 0: RIP=.*CPU 1: RIP="):
        host.run("true")


def test_killed_test_run_leaves_no_qemu(tmp_path: Path) -> None:
    run = subprocess.Popen(
        [sys.executable, "-m", f"{__package__}.rig.orphan_probe", str(tmp_path)],
        cwd=Path(__file__).parents[__package__.count(".") + 1],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert run.stdout is not None
    qemu = int(run.stdout.readline())
    assert _alive(qemu)
    run.kill()
    run.wait()
    run.stdout.close()
    wait_until(lambda: not _alive(qemu), timeout=10, what="QEMU to die with its parent")


def _alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False
