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
SUSPENDS = re.compile("Freezing user space processes")

pytestmark = [pytest.mark.e2e, pytest.mark.hosts("intel-native-noservice")]


def quiet(host: Host, announcement: str | None) -> Guest:
    """A guest in whose node this stands; None: there is no such node.

    Linux has announced it as it booted; what does not is not packaged.
    """
    guest = host.start_guest(GuestSpec(name="quiet", memory_mib=96))
    node = f"/local/domain/{guest.domid}/control/feature-suspend"
    assert host.run(["xenstore-read", node]).out.strip() == "1"
    words = ["xenstore-rm", node]
    if announcement is not None:
        words = ["xenstore-write", node, announcement]
    host.run(words)
    return guest


@contextmanager
def watched(host: Host, guest: Guest) -> Iterator[None]:
    """Fail if anybody asks the guest for anything."""
    node = f"/local/domain/{guest.domid}/control/shutdown"
    host.run(f"xenstore-watch {node} > {ASKED} 2>&1 & echo $! > {ASKED}.pid")
    # A watch fires once by itself.
    wait_until(lambda: host.read_text(ASKED).split() == [node], timeout=30, what="the watch")
    try:
        yield
        assert host.read_text(ASKED).split() == [node]
    finally:
        host.run(f"kill $(cat {ASKED}.pid)")


def assert_never_asked(host: Host, guest: Guest, policy: str) -> None:
    [mfn] = frames(host, "data", guest.domid, 1)
    with running(host, policy) as daemon, watched(host, guest):
        daemon.offline(mfn)
        # If it is tried again at all, then once.
        page = daemon.wait_for(mfn, "left")
        assert "feature-suspend" in page["detail"], page
        assert daemon.metric("guest_blackout_seconds_count") == 0
    assert not SUSPENDS.search(guest.console())
    guest.assert_clean()


@pytest.mark.parametrize("announcement", [None, "", "0"], ids=["absent", "empty", "0"])
def test_a_guest_that_does_not_announce_it_is_never_asked_to_suspend(
    host: Host, announcement: str | None
) -> None:
    assert_never_asked(host, quiet(host, announcement), POLICY)


def test_a_guest_that_denies_it_is_not_asked_although_the_policy_names_it(host: Host) -> None:
    assert_never_asked(host, quiet(host, "0"), NAMED)


@pytest.mark.parametrize("announcement", [None, ""], ids=["absent", "empty"])
def test_a_guest_that_does_not_announce_it_is_asked_where_the_policy_names_it(
    host: Host, announcement: str | None
) -> None:
    guest = quiet(host, announcement)
    [mfn] = frames(host, "data", guest.domid, 1)
    with running(host, NAMED) as daemon:
        daemon.offline(mfn)
        daemon.wait_for(mfn, "offlined")
        assert daemon.metric("guest_blackout_seconds_count") == 1
    assert SUSPENDS.search(guest.console())
    guest.wait_passes(1)
    guest.assert_clean()
