"""Routes and links, in a network namespace of the test's own."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pgofflined.core.premigration import Hindrance, NoWay, Route
from pgofflined.relocation.links import KernelLinks

ROOT = Path(__file__).parents[3]


def in_namespace(*argv: str) -> list[str]:
    """A command in fresh network (and, where not root, user) namespaces."""
    users = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    return ["unshare", *users, "--net", "--", *argv]


def namespaces_work() -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(in_namespace("true"), capture_output=True, check=False).returncode == 0


needs_namespaces = pytest.mark.skipif(
    not namespaces_work(), reason="network namespaces cannot be made here (run as root)"
)


@needs_namespaces
def test_ways_and_their_changes_in_a_namespace() -> None:
    result = subprocess.run(
        in_namespace(sys.executable, "-W", "error", "-m", "tests.unit.relocation.links_scene"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["scene played"]


async def test_this_host_is_told_from_others() -> None:
    way = await KernelLinks().way("root@127.0.0.1")
    # In a namespace whose loopback is down there is no route at all.
    if isinstance(way, Route):
        assert way.local
    else:
        assert way.hindrance is Hindrance.NO_ROUTE


async def test_a_name_that_nobody_knows() -> None:
    way = await KernelLinks().way("no-such-host.invalid")
    assert isinstance(way, NoWay)
    assert way.hindrance is Hindrance.TARGET_UNRESOLVED
    assert "no-such-host.invalid" in way.detail


async def test_watching_twice_and_unwatching_twice_does_no_harm() -> None:
    links = KernelLinks()
    links.watch(lambda: None)
    links.watch(lambda: None)
    links.unwatch()
    links.unwatch()
    await asyncio.sleep(0)


def test_pyroute2_is_not_loaded_before_it_is_needed() -> None:
    code = "import pgofflined.relocation, sys; sys.exit('pyroute2' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


@pytest.mark.parametrize("name", ["spare..example", "x" * 70])
async def test_a_name_that_no_resolver_takes_is_a_target_that_cannot_be_resolved(name: str) -> None:
    way = await KernelLinks().way(f"root@{name}")
    assert isinstance(way, NoWay)
    assert way.hindrance is Hindrance.TARGET_UNRESOLVED
    assert name in way.detail
