"""Fixtures for tests on real Xen.

A test asks for the fixture `host` and says with a marker which host it needs:

    pytestmark = [pytest.mark.e2e, pytest.mark.hosts("intel-mcelog")]

Names are FLAVOUR-SOURCE or FLAVOUR-SOURCE-noservice (see rig/host.py). With several
names the test runs once on each. Tests are sorted so that each host boots once; a test
marked `spoils_host` is the last on its host, which nobody uses after it.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from .rig.errors import MissingTools, RigError
from .rig.host import Host, HostSpec
from .rig.pool import HostPool
from .rig.tools import check_machine

EVIDENCE = Path(__file__).parents[2] / "build" / "e2e"
POOL = pytest.StashKey[HostPool]()


def pytest_configure(config: pytest.Config) -> None:
    for marker in (
        "hosts(name, ...): which hosts the test needs, such as intel-mcelog or amd-native",
        "spoils_host: the test leaves its host changed or gone, so nobody uses it afterwards",
        "slow: takes minutes; for `make e2e`, not for each commit",
        "xen_complains: Xen is expected to print suspicious lines during the test",
    ):
        config.addinivalue_line("markers", marker)
    config.stash[POOL] = HostPool(EVIDENCE / "boots")


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[POOL].stop()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "host" not in metafunc.fixturenames:
        return
    marker = metafunc.definition.get_closest_marker("hosts")
    if marker is None:
        raise pytest.UsageError(f"{metafunc.definition.nodeid} has no marker `hosts`")
    specs = [HostSpec.parse(name) for name in marker.args]
    metafunc.parametrize("host", specs, indirect=True, ids=str)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order: dict[HostSpec | None, int] = {None: 0}

    def key(item: pytest.Item) -> tuple[int, bool]:
        spoils = item.get_closest_marker("spoils_host") is not None
        return order.setdefault(_spec(item), len(order)), spoils

    items.sort(key=key)


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.config.option.collectonly or not any(_spec(item) for item in session.items):
        return
    try:
        check_machine()
    except MissingTools as error:
        # Never a skip: what was asked for cannot be done.
        pytest.exit(str(error), returncode=1)


def _spec(item: pytest.Item) -> HostSpec | None:
    """The emulated host that a test runs on; None for all other tests."""
    callspec = getattr(item, "callspec", None)
    spec = callspec.params.get("host") if callspec is not None else None
    return spec if isinstance(spec, HostSpec) else None


@pytest.fixture
def host(request: pytest.FixtureRequest) -> Iterator[Host]:
    """A booted host; guests that the test started are gone after it."""
    pool = request.config.stash[POOL]
    capture = request.config.pluginmanager.getplugin("capturemanager")
    assert capture is not None
    # A cold build takes minutes: it is to be seen what it does.
    with capture.global_and_fixture_disabled():
        host = pool.host(request.param)
    lines = len(host.xl_dmesg().splitlines())
    yield host
    if host.lost is None:
        host.destroy_guests()
        if request.node.get_closest_marker("xen_complains") is None:
            suspicious = host.xl_dmesg_suspicious(after=lines)
            assert not suspicious, "Xen complained:\n" + "\n".join(suspicious)
    spoils = request.node.get_closest_marker("spoils_host") is not None
    if spoils or host.lost is not None:
        pool.stop()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    running = getattr(item, "funcargs", {}).get("host")
    if report.failed and isinstance(running, Host):
        folder = EVIDENCE / re.sub(r"[^\w.\[\]-]+", "_", item.nodeid.split("/")[-1])
        shutil.rmtree(folder / call.when, ignore_errors=True)
        running.collect(folder / call.when)
        report.sections.append(("evidence", str(folder.relative_to(EVIDENCE.parents[1]))))
    if report.failed and call.excinfo is not None and call.excinfo.errisinstance(RigError):
        report.sections.append(("rig", "The rig failed here; this says nothing about the test."))
    return report


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    pool = config.stash[POOL]
    # All tests are done: the last host's remarks are wanted as well.
    pool.stop()
    if pool.boots:
        terminalreporter.write_line(f"rig: booted {', '.join(pool.boots)}")
    for remark in pool.remarks:
        terminalreporter.write_line(f"rig: {remark}", yellow=True)
