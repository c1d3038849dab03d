"""Every test of this directory is for a Xen of each kind, with marks set before or when held."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pgofflined.core.xenversion import XenVersion
from tests.unit.exchanger.conftest import FIXED, UNFIXED, Bench


@pytest.fixture(params=[FIXED, UNFIXED], ids=["fixed", "unfixed"])
def version(request: pytest.FixtureRequest) -> XenVersion:
    """What the hosts of a test run; a test whose cases depend on it names its own."""
    found: XenVersion = request.param
    return found


@pytest.fixture(autouse=True)
def hosts(version: XenVersion, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The hosts of a test.  However it has gone, their guests can be destroyed in the end."""
    built: list[Bench] = []
    build = Bench.build

    def built_and_noted(*, l1tf: bool = True, reuses_first: bool = False) -> Bench:
        bench = build(l1tf=l1tf, reuses_first=reuses_first)
        built.append(bench)
        return bench

    monkeypatch.setattr(Bench, "version", version)
    monkeypatch.setattr(Bench, "build", built_and_noted)
    yield
    if not version.offlines_free_frames_safely:
        for bench in built:
            bench.assert_heap_stays_sound()
