"""Settings that are legal and hardly meant, or dangerous: each is told, none is refused."""

from __future__ import annotations

import posixpath
from collections.abc import Callable
from ipaddress import ip_address
from typing import Final

from pgofflined.config.problems import Doubt, Line
from pgofflined.core.policy import DomainDefault, Policy, TcpAddress, UnixAddress
from pgofflined.core.units import ShareOfMemory

# By hier(7), file-hierarchy(7).
_VOLATILE: Final = ("/run", "/var/run", "/dev", "/proc", "/sys")
_FOR_EVERYBODY: Final = ("/tmp", "/var/tmp", "/dev/shm")  # noqa: S108 - they are warned of
# ProtectHome= of the unit hides these.
_HIDDEN: Final = ("/home", "/root", "/run/user")
# ProtectSystem= of the unit leaves these writable: RuntimeDirectory=, StateDirectory=.
_WRITABLE: Final = ("/run/pgofflined", "/var/lib/pgofflined")
_SAVES: Final = "/var/lib/pgofflined/saves"
_MUCH: Final = 10
_LOOPBACK_NAMES: Final = ("localhost", "ip6-localhost", "ip6-loopback")

Tell = Callable[[str, str], None]
"""Takes a dotted key and what is doubtful about its value."""


def doubts(policy: Policy, line: Callable[[str], Line | None]) -> tuple[Doubt, ...]:
    """Every doubt about a policy; ``line`` gives the place of a key."""
    found: list[Doubt] = []

    def tell(key: str, text: str) -> None:
        found.append(Doubt(key=key, text=text, line=line(key)))

    for look in (_of_retiring, _of_domains, _of_exchanges, _of_relocations, _of_sockets):
        look(policy, tell)
    return tuple(found)


def _of_retiring(policy: Policy, tell: Tell) -> None:
    limit = policy.retire.max_retired
    # Of a host larger than any.
    if limit.frames(1 << 40) == 0:
        tell(
            "retire.max_retired",
            "no page is ever retired; if that is meant, say so with retire.enabled = false",
        )
    elif isinstance(limit, ShareOfMemory) and limit.percent > _MUCH:
        tell(
            "retire.max_retired",
            f"more than {_MUCH} % of the host's memory may be given up before anybody is told to "
            "replace the memory module",
        )


def _of_domains(policy: Policy, tell: Tell) -> None:
    domains = policy.domains
    if domains.default is DomainDefault.ALLOW and domains.allow:
        tell(
            "domains.allow",
            'it has no effect: domains.default is "allow", so every domain is allowed that '
            'domains.deny does not name; to allow these only, set domains.default = "deny"',
        )
    if domains.default is DomainDefault.DENY and not domains.allow:
        tell("domains.default", 'no domain is allowed: it is "deny", and domains.allow is empty')
    for pattern in domains.deny:
        if pattern in domains.allow:
            tell("domains.allow", f'"{pattern}" has no effect: domains.deny has it too, and wins')


def _of_exchanges(policy: Policy, tell: Tell) -> None:
    if any(not pattern.strip("*") for pattern in policy.exchange.ask_unannounced):
        tell(
            "exchange.ask_unannounced",
            "it names every domain: one that cannot suspend itself (Mini-OS) may crash when one of "
            "its pages fails; name those that are known to run Linux",
        )


def _of_relocations(policy: Policy, tell: Tell) -> None:
    relocation = policy.relocation
    wanted = {"target": bool(relocation.target), "save_restore": relocation.save_restore}
    for name, is_set in wanted.items():
        if is_set and not relocation.enabled:
            tell(f"relocation.{name}", "it has no effect: relocation.enabled is false")
    if "stricthostkeychecking=no" in relocation.ssh_command.lower().replace(" ", "="):
        tell(
            "relocation.ssh_command",
            "ssh is told not to check the host key: whoever answers at the target's address gets "
            "the memory of guests",
        )
    _of_directory(relocation.save_directory, tell)


def _of_directory(directory: str, tell: Tell) -> None:
    key = "relocation.save_directory"
    path = posixpath.normpath(directory)
    if _is_below(path, _FOR_EVERYBODY):
        tell(
            key,
            f"everybody may write next to {path}, and files there are removed by age or with a "
            f"boot of the host: saved guests may be lost; use {_SAVES}",
        )
    elif _is_below(path, _VOLATILE):
        tell(
            key,
            f"{path} is in memory: a saved guest takes dom0's memory, and is lost when the host "
            f"stops; use a directory on a disk, such as {_SAVES}",
        )
    elif _is_below(path, _HIDDEN):
        tell(
            key,
            f"the service does not see {path} (ProtectHome= of its unit), so no guest is saved; "
            f"use {_SAVES}",
        )


def _of_sockets(policy: Policy, tell: Tell) -> None:
    listen = policy.metrics.listen
    if isinstance(listen, TcpAddress) and not _is_loopback(listen.host):
        tell(
            "metrics.listen",
            f"the metrics can be read by whoever reaches {listen}: there is neither encryption nor "
            "a password; let a firewall keep others out, or use 127.0.0.1",
        )
    if isinstance(listen, UnixAddress):
        _of_socket("metrics.listen", listen.path, tell)
    _of_socket("control.socket", policy.control.socket, tell)


def _of_socket(key: str, socket: str, tell: Tell) -> None:
    path = posixpath.normpath(socket)
    if not _is_below(path, _WRITABLE):
        tell(
            key,
            f"the service may write below {' and '.join(_WRITABLE)} only (ProtectSystem= of its "
            f"unit), and cannot make {path}; use /run/pgofflined, or add ReadWritePaths=",
        )


def _is_below(path: str, places: tuple[str, ...]) -> bool:
    return any(path == place or path.startswith(f"{place}/") for place in places)


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower() in _LOOPBACK_NAMES
