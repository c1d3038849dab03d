from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from uuid import UUID

import pytest

from pgofflined.core.frames import Mfn
from pgofflined.core.policy import (
    Allowed,
    Backoff,
    CapReached,
    Denied,
    DomainDefault,
    DomainPolicy,
    DryRun,
    Ignore,
    Policy,
    RelocationPolicy,
    Retire,
    RetirePolicy,
    TcpAddress,
    UnixAddress,
    Verdict,
    Watch,
    decide,
    domain_allowed,
    effective,
)
from pgofflined.core.reports import (
    CorrectedPageError,
    ErrorReport,
    HypervisorActed,
    HypervisorResult,
    OtherError,
    OtherKind,
    UncorrectedPageError,
)
from pgofflined.core.telemetry import BankEntry
from pgofflined.core.units import AmountOfMemory, ShareOfMemory

PAGE = Mfn(0x1234)
HOST_FRAMES = 1 << 20
BANK = BankEntry(bank=9, status=0, addr=0, misc=0)
CORRECTED = CorrectedPageError(
    mfn=PAGE, count=1, overflow=False, granularity=64, domid=None, bank=BANK
)
ACTED = HypervisorActed(
    mfn=PAGE,
    domid=None,
    broken=True,
    result=HypervisorResult.OFFLINED,
    reason="the page is offline",
    bank=BANK,
)
UUID_7 = UUID("0123abcd-0000-4000-8000-000000000007")


def verdict(
    hits: int,
    policy: RetirePolicy | None = None,
    *,
    report: ErrorReport = CORRECTED,
    retired: int = 0,
    poisoned: frozenset[Mfn] = frozenset(),
) -> Verdict:
    return decide(
        report,
        hits,
        policy or RetirePolicy(),
        retired_frames=retired,
        host_frames=HOST_FRAMES,
        poisoned=poisoned,
    )


def test_page_is_watched_below_the_threshold() -> None:
    assert verdict(1) == Watch(mfn=PAGE, hits=1, of=2)


@pytest.mark.parametrize("hits", [2, 3, 1000])
def test_page_is_retired_from_the_threshold_on(hits: int) -> None:
    found = verdict(hits)
    assert isinstance(found, Retire)
    assert found.mfn == PAGE
    assert f"{hits} corrected errors within 259200 s" in found.reason


def test_dry_run_says_what_would_be_retired() -> None:
    assert isinstance(verdict(2, RetirePolicy(dry_run=True)), DryRun)
    assert isinstance(verdict(1, RetirePolicy(dry_run=True)), Watch)


def test_cap_stops_the_first_page_beyond_it() -> None:
    policy = RetirePolicy(max_retired=AmountOfMemory(size=8 * 4096))
    assert isinstance(verdict(2, policy, retired=7), Retire)
    assert verdict(2, policy, retired=8) == CapReached(mfn=PAGE, retired_frames=8, limit_frames=8)


def test_cap_of_nothing_retires_nothing() -> None:
    policy = RetirePolicy(max_retired=ShareOfMemory(percent=Fraction(0)))
    assert isinstance(verdict(2, policy), CapReached)


def test_default_cap_is_a_thousandth_of_the_host() -> None:
    assert isinstance(verdict(2, retired=HOST_FRAMES // 1000 - 1), Retire)
    assert isinstance(verdict(2, retired=HOST_FRAMES // 1000), CapReached)


def test_nothing_is_retired_while_switched_off() -> None:
    found = verdict(99, RetirePolicy(enabled=False))
    assert isinstance(found, Ignore)
    assert "retire.enabled" in found.reason


def test_page_with_an_uncorrected_error_is_not_copied_for_its_corrected_ones() -> None:
    found = verdict(99, poisoned=frozenset({PAGE}))
    assert isinstance(found, Ignore)
    assert "must not be read" in found.reason


@pytest.mark.parametrize(
    "report",
    [
        ACTED,
        *(OtherError(kind=kind, bank=BANK) for kind in OtherKind),
        *(
            UncorrectedPageError(mfn=PAGE, kind=kind, domid=None, bank=BANK)
            for kind in OtherKind
            if kind.is_uncorrected
        ),
    ],
)
def test_no_other_report_retires_a_page(report: ErrorReport) -> None:
    found = verdict(99, report=report)
    assert isinstance(found, Ignore)
    assert found.reason


@pytest.mark.parametrize(
    ("policy", "allowed"),
    [
        (DomainPolicy(), True),
        (DomainPolicy(default=DomainDefault.DENY), False),
        (DomainPolicy(deny=("web-*",)), False),
        (DomainPolicy(deny=("web",)), True),
        (DomainPolicy(deny=("db-?",)), True),
        (DomainPolicy(deny=("WEB-*",)), True),
        (DomainPolicy(default=DomainDefault.DENY, allow=("web-[0-9]",)), True),
        (DomainPolicy(default=DomainDefault.DENY, allow=("web-*",), deny=("web-1",)), False),
        (DomainPolicy(default=DomainDefault.DENY, allow=(str(UUID_7),)), True),
        (DomainPolicy(deny=(str(UUID_7).upper(),)), False),
        (DomainPolicy(deny=("0123abcd-*",)), False),
    ],
)
def test_domains_are_allowed_by_name_and_uuid(policy: DomainPolicy, allowed: bool) -> None:  # noqa: FBT001
    found = domain_allowed(policy, "web-1", UUID_7)
    assert isinstance(found, Allowed if allowed else Denied)
    if isinstance(found, Denied):
        assert "web-1" in found.reason


def test_domain_without_a_name_is_known_by_its_uuid() -> None:
    assert isinstance(domain_allowed(DomainPolicy(deny=("0123*",)), "", UUID_7), Denied)
    found = domain_allowed(DomainPolicy(default=DomainDefault.DENY, allow=("w*",)), "", UUID_7)
    assert isinstance(found, Denied)
    assert str(UUID_7) in found.reason


@pytest.mark.parametrize(
    ("policy", "allowed"),
    [
        (DomainPolicy(), True),
        (DomainPolicy(deny=("*",)), False),
        # It may be the one.
        (DomainPolicy(deny=("db",)), False),
        (DomainPolicy(deny=(str(UUID(int=9)),)), True),
        (DomainPolicy(default=DomainDefault.DENY, allow=("*",)), True),
        (DomainPolicy(default=DomainDefault.DENY, allow=("?*",)), False),
        (DomainPolicy(default=DomainDefault.DENY, allow=(str(UUID_7),)), True),
        (DomainPolicy(default=DomainDefault.DENY, allow=(f"{str(UUID_7)[:9]}*",)), True),
    ],
)
def test_a_domain_without_a_name_is_not_allowed_in_doubt(
    policy: DomainPolicy,
    allowed: bool,  # noqa: FBT001
) -> None:
    assert isinstance(domain_allowed(policy, "", UUID_7), Allowed if allowed else Denied)


def test_a_name_is_not_allowed_because_a_uuid_begins_like_it() -> None:
    assert str(UUID_7).startswith("0123")
    policy = DomainPolicy(default=DomainDefault.DENY, allow=("0123*", "0*"))
    assert isinstance(domain_allowed(policy, "web-1", UUID_7), Denied)
    assert isinstance(domain_allowed(policy, "0123", UUID_7), Allowed)


def test_waits_double_up_to_the_last_and_end() -> None:
    retry = Backoff(first=10.0, last=60.0, attempts=6)
    assert [retry.delay(failures) for failures in range(1, 7)] == [10, 20, 40, 60, 60, None]


def test_waits_without_a_limit_never_end() -> None:
    assert Backoff(first=1.0, last=300.0).delay(10**9) == 300.0


@pytest.mark.parametrize("target", ["", "localhost", "xen2"])
def test_only_localhost_is_this_host(target: str) -> None:
    assert RelocationPolicy(target=target).is_local == (target == "localhost")


def test_effective_policy_is_in_plain_units() -> None:
    policy = Policy()
    lines = effective(
        replace(policy, retire=replace(policy.retire, window=86_400.0)), host_frames=1_000_000
    )
    assert "retire.window = 86400 s" in lines
    assert "retire.corrected_errors = 2 errors" in lines
    assert "retire.dry_run = false" in lines
    assert "exchange.suspend_timeout = 60 s" in lines
    assert "relocation.free_memory_reserve = 268435456 bytes" in lines
    assert "sources.order = native, mcelog" in lines
    assert "metrics.listen = 127.0.0.1:9709" in lines
    assert lines[-1] == (
        "retire.max_retired is 1000 pages (4096000 bytes) of this host's 1000000 pages"
    )


def test_effective_policy_tells_off_and_none() -> None:
    policy = Policy()
    lines = effective(replace(policy, metrics=replace(policy.metrics, listen=None)))
    assert "metrics.listen = off" in lines
    assert "domains.deny = none" in lines


def test_addresses_read_back_as_they_are_written() -> None:
    assert str(TcpAddress(host="::1", port=9709)) == "[::1]:9709"
    assert str(UnixAddress(path="/run/x.sock")) == "unix:/run/x.sock"
