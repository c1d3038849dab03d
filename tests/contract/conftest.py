from __future__ import annotations

from collections.abc import Iterator

import pytest

from pgofflined.ports import Hypervisor

from .guestmemory import GuestMemory
from .hosts import BACKENDS, ContractHost, chosen_backend


@pytest.fixture(params=[chosen_backend()])
def host(request: pytest.FixtureRequest) -> Iterator[ContractHost]:
    with BACKENDS[request.param]() as host:
        yield host


@pytest.fixture
def hypervisor(host: ContractHost) -> Hypervisor:
    return host.hypervisor


@pytest.fixture
def guest(host: ContractHost) -> GuestMemory:
    """The memory of the PV guest."""
    return GuestMemory(host.hypervisor, host.pv)
