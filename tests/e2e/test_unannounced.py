"""Guests that do not say that they can suspend themselves (control/feature-suspend)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from .daemon import POLICY, frames, running
from .rig.guest import Guest, GuestSpec
from .rig.host import Host
from .rig.waiting import wait_until

NAMED = POLICY.replace("[exchange]", '[exchange]\nask_unannounced = ["quiet*"]')
ASKED = "/run/rig-guests/asked"

# What Linux logs when it is asked to suspend itself.
SUSPENDS = re.compile("Freezing user space processes(?! completed)")

pytestmark = [pytest.mark.e2e, pytest.mark.hosts("intel-native-noservice")]


def quiet(host: Host) -> Guest:
    """A guest that can suspend itself and has announced it, which is to be taken back.

    A guest that cannot is not packaged.
    """
    guest = host.start_guest(GuestSpec(name="quiet", memory_mib=96))
    assert host.run(["xenstore-read", node(guest)]).out.strip() == "1"
    return guest


def node(guest: Guest) -> str:
    """Where it is announced."""
    return f"/local/domain/{guest.domid}/control/feature-suspend"


def announce(host: Host, guest: Guest, what: str | None) -> None:
    """What stands there; None: there is no such node."""
    words = ["xenstore-rm", node(guest)]
    if what is not None:
        words = ["xenstore-write", node(guest), what]
    host.run(words)


@contextmanager
def watched(host: Host, guest: Guest) -> Iterator[None]:
    """Fail if anybody asks the guest for anything."""
    request = f"/local/domain/{guest.domid}/control/shutdown"
    host.run(f"xenstore-watch {request} > {ASKED} 2>&1 & echo $! > {ASKED}.pid")
    # A watch fires once by itself.
    wait_until(lambda: host.read_text(ASKED).split() == [request], timeout=30, what="the watch")
    try:
        yield
        assert host.read_text(ASKED).split() == [request]
    finally:
        host.run(f"kill $(cat {ASKED}.pid)")


@pytest.mark.parametrize(
    ("policy", "announcements"),
    [
        pytest.param(POLICY, (None, "", "0"), id="not-named"),
        pytest.param(NAMED, ("0",), id="named", marks=pytest.mark.slow),
    ],
)
def test_a_guest_that_does_not_announce_it_is_never_asked_to_suspend(
    host: Host, policy: str, announcements: tuple[str | None, ...]
) -> None:
    guest = quiet(host)
    mfns = frames(host, "data", guest.domid, len(announcements))
    with running(host, policy) as daemon:
        for what, mfn in zip(announcements, mfns, strict=True):
            announce(host, guest, what)
            with watched(host, guest):
                daemon.offline(mfn)
                # If it is tried again at all, then once.
                page = daemon.wait_for(mfn, "left")
                assert "feature-suspend" in page["detail"], page
        assert daemon.metric("guest_blackout_seconds_count") == 0
    assert not SUSPENDS.search(guest.console())
    guest.wait_passes(1)
    guest.assert_clean()


@pytest.mark.slow
def test_a_guest_that_does_not_announce_it_is_asked_where_the_policy_names_it(host: Host) -> None:
    guest = quiet(host)
    mfns = frames(host, "data", guest.domid, 2)
    with running(host, NAMED) as daemon:
        for what, mfn in zip((None, ""), mfns, strict=True):
            announce(host, guest, what)
            daemon.offline(mfn)
            daemon.wait_for(mfn, "offlined")
        assert daemon.metric("guest_blackout_seconds_count") == 2
    assert len(SUSPENDS.findall(guest.console())) == 2
    guest.wait_passes(1)
    guest.assert_clean()
