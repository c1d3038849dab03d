"""A guest that does not answer is left as it was."""

from __future__ import annotations

import pytest

from pgofflined.core.errors import GuestDidNotSuspend
from pgofflined.ports import Hypervisor, SuspendLimits

from .guestmemory import assert_runs
from .hosts import ContractHost

SHORT = SuspendLimits(acknowledge=2.0, suspend=2.0)


def test_guest_that_ignores_the_request_runs_on(hypervisor: Hypervisor, host: ContractHost) -> None:
    with pytest.raises(GuestDidNotSuspend) as caught:
        hypervisor.suspend(host.deaf, SHORT)

    assert caught.value.stage == "acknowledge"
    assert caught.value.domid == host.deaf
    assert_runs(hypervisor, host.deaf)


def test_withdrawn_request_leaves_no_trace_for_the_next(
    hypervisor: Hypervisor, host: ContractHost
) -> None:
    for _ in range(2):
        with pytest.raises(GuestDidNotSuspend) as caught:
            hypervisor.suspend(host.deaf, SHORT)
        assert caught.value.stage == "acknowledge"
