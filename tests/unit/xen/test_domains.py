from __future__ import annotations

import ctypes
import errno
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

from pgofflined.core.domains import GuestKind, ShutdownReason
from pgofflined.core.errors import DomainGone, PortError, XenError
from pgofflined.core.frames import Domid
from pgofflined.xen.abi.domctl import GetDomainInfo
from pgofflined.xen.abi.sysctl import GetDomainInfoList
from pgofflined.xen.abi.xen import HYPERVISOR_domctl
from pgofflined.xen.control import Control
from pgofflined.xen.domains import Domains

from .recorder import INTERFACE, calling, domain_info, domctl_at, put, sysctl_at


class Names:
    """A xenstore with names only, or, without, one that does not answer."""

    def __init__(self, names: dict[int, bytes] | None) -> None:
        self.names = names

    def read(self, path: str) -> bytes | None:
        _, top, *rest = path.split("/")
        if top != "local" or rest[2] != "name":
            return None
        if self.names is None:
            raise PortError("xenstored does not answer")
        return self.names.get(int(rest[1]))


NO_NAMES: dict[int, bytes] = {}


def domains_of(infos: list[GetDomainInfo], names: dict[int, bytes] | None = NO_NAMES) -> Domains:
    def answer(number: int, arguments: tuple[int, ...]) -> int:
        if number == HYPERVISOR_domctl:
            request, place = domctl_at(arguments[0])
            # Like Xen up to 4.17: the next domain, when this one does not exist.
            put(place, next(info for info in infos if info.domain >= request.domain))
            return 0
        _, place = sysctl_at(arguments[0])
        ask = GetDomainInfoList.from_address(place)
        found = [info for info in infos if info.domain >= ask.first_domain][: ask.max_domains]
        for index, info in enumerate(found):
            put(ask.buffer + index * ctypes.sizeof(GetDomainInfo), info)
        ask.num_domains = len(found)
        return 0

    @contextmanager
    def stores() -> Iterator[Names]:
        yield Names(names)

    call, _ = calling(answer)
    return Domains(call, Control(call, INTERFACE), stores=stores)  # type: ignore[arg-type]


def test_domains_come_in_order_over_several_calls() -> None:
    infos = [domain_info(domid) for domid in range(0, 600, 2)]
    assert [info.domid for info in domains_of(infos).domains()] == list(range(0, 600, 2))


def test_domains_are_listed_although_xenstore_cannot_be_read() -> None:
    domains = domains_of([domain_info(domid) for domid in range(300)], None)
    assert [(info.domid, info.name) for info in domains.conditions()] == [
        (domid, "") for domid in range(300)
    ]
    with pytest.raises(PortError, match="xenstored"):
        domains.domains()


def test_domain_is_decoded() -> None:
    info = domain_info(4, flags=1 << 2 | 1 << 3 | 2 << 16)
    info.handle[:] = list(range(16))
    info.shared_info_frame = 0x4321
    found = domains_of([info], {4: b"web"}).domain(Domid(4))
    assert (found.name, found.kind, found.shutdown) == ("web", GuestKind.PV, ShutdownReason.SUSPEND)
    assert (found.paused, found.dying, found.max_vcpu_id) == (True, False, 1)
    assert (found.shared_info, str(found.uuid)) == (0x4321, "00010203-0405-0607-0809-0a0b0c0d0e0f")


def test_domain_without_vcpus_has_no_highest_one() -> None:
    info = domain_info(4)
    info.max_vcpu_id = 0xFFFFFFFF
    assert domains_of([info]).domain(Domid(4)).max_vcpu_id == -1


def test_next_domain_is_not_mistaken_for_the_one_asked_for() -> None:
    with pytest.raises(DomainGone):
        domains_of([domain_info(0), domain_info(9)]).domain(Domid(4))


@pytest.mark.parametrize(
    ("untrusted", "name"),
    [
        (b"a\x1b[31mb\n", "a?[31mb?"),
        (b"\xff\xfe", "??".replace("?", "\N{REPLACEMENT CHARACTER}")),
        (b"n" * 4000, "n" * 64),
        (b"", ""),
    ],
)
def test_names_are_printable_and_short(untrusted: bytes, name: str) -> None:
    assert domains_of([domain_info(0)], {0: untrusted}).domains()[0].name == name


@pytest.mark.parametrize(
    ("nodes", "told"),
    [
        ({}, None),
        ({"/local/domain/4/backend": b""}, "serves devices"),
        ({"/local/domain/4/target": b"7"}, "emulates the devices"),
        ({"/tool/xenstored/domid": b"4"}, "runs xenstored"),
        ({"/tool/xenstored/domid": b"0", "/local/domain/5/backend": b""}, None),
    ],
)
def test_what_other_domains_need_one_for_is_in_xenstore(
    nodes: dict[str, bytes], told: str | None
) -> None:
    @contextmanager
    def stores() -> Iterator[Nodes]:
        yield Nodes(nodes)

    call, _ = calling(lambda _number, _arguments: 0)
    domains = Domains(call, Control(call, INTERFACE), stores=stores)  # type: ignore[arg-type]
    found = domains.serves(Domid(4))
    assert (found is None) if told is None else (found is not None and told in found)


class Nodes:
    """A xenstore with these nodes."""

    def __init__(self, nodes: dict[str, bytes]) -> None:
        self._nodes = nodes

    def read(self, path: str) -> bytes | None:
        return self._nodes.get(path)


def test_a_name_is_none_where_xenstore_does_not_answer(caplog: pytest.LogCaptureFixture) -> None:
    def stores() -> AbstractContextManager[Names]:
        raise XenError(errno.ECONNREFUSED, op="xs_open")

    call, _ = calling(lambda *_: 0)
    domains = Domains(call, Control(call, INTERFACE), stores=stores)  # type: ignore[arg-type]
    assert domains.name_in_store(Domid(7)) == b""
    assert "the name of d7 cannot be read" in caplog.text
