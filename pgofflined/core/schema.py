"""The sections and keys of the configuration file, and how each value is read."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping
from enum import StrEnum
from ipaddress import ip_address
from typing import Annotated, Any, Final, TypeVar, cast

import msgspec

from pgofflined.core.patterns import unmatchable
from pgofflined.core.policy import (
    Dom0Action,
    DomainDefault,
    Marking,
    SourceName,
    TcpAddress,
    UnixAddress,
)
from pgofflined.core.schedule import WINDOW_ALLOWED, parse_window
from pgofflined.core.units import (
    DURATION_ALLOWED,
    LIMIT_ALLOWED,
    SIZE_ALLOWED,
    parse_duration,
    parse_limit,
    parse_size,
)

T = TypeVar("T")

Reader = Callable[[object], object]
"""From a TOML value to a field of a policy; raises Invalid."""


class Invalid(Exception):
    """A value that is not allowed, with what is.

    ``items`` has the element of a list that is not, where that can be told; ``twice`` says that it
    is there more than once.
    """

    def __init__(
        self, allowed: str, *, items: tuple[object, ...] = (), twice: bool = False
    ) -> None:
        self.allowed = allowed
        self.items = items
        self.twice = twice


def _strict(untrusted_value: object, expected: object, allowed: str) -> object:
    """The value if it is of the expected type and within its limits; nothing is converted."""
    try:
        value: object = msgspec.convert(untrusted_value, type=expected, strict=True)
    except msgspec.ValidationError:
        raise Invalid(allowed) from None
    return value


def _flag(untrusted_value: object) -> bool:
    return bool(_strict(untrusted_value, bool, "true or false"))


def _whole(least: int, most: int) -> Reader:
    expected = Annotated[int, msgspec.Meta(ge=least, le=most)]
    return lambda value: _strict(value, expected, f"a whole number from {least} to {most}")


def _text(untrusted_value: object, allowed: str) -> str:
    return str(_strict(untrusted_value, Annotated[str, msgspec.Meta(max_length=1024)], allowed))


def _parsed(value: object, parse: Callable[[str], T], allowed: str) -> T:
    try:
        return parse(_text(value, allowed))
    except ValueError:
        raise Invalid(allowed) from None


def _duration(least: str, most: str) -> Reader:
    bounds = parse_duration(least), parse_duration(most)
    allowed = f"{DURATION_ALLOWED}, from {least} to {most}"

    def read(untrusted_value: object) -> float:
        seconds = _parsed(untrusted_value, parse_duration, allowed)
        if not bounds[0] <= seconds <= bounds[1]:
            raise Invalid(allowed)
        return seconds

    return read


def _size(untrusted_value: object) -> int:
    return _parsed(untrusted_value, parse_size, SIZE_ALLOWED)


def _limit(untrusted_value: object) -> object:
    return _parsed(untrusted_value, parse_limit, LIMIT_ALLOWED)


def _choice(kind: type[StrEnum]) -> Reader:
    allowed = " or ".join(f'"{member}"' for member in kind)
    return lambda value: _strict(value, kind, allowed)


def _list(read: Callable[[object], T], allowed: str, *, least: int = 0) -> Reader:
    def read_all(untrusted_value: object) -> tuple[T, ...]:
        expected = Annotated[list[Any], msgspec.Meta(min_length=least, max_length=1000)]
        items = cast("list[object]", _strict(untrusted_value, expected, allowed))
        values: list[T] = []
        for item in items:
            try:
                value = read(item)
            except Invalid as invalid:
                raise Invalid(invalid.allowed, items=(item,)) from None
            if value in values:
                raise Invalid(allowed, items=(item,), twice=True)
            values.append(value)
        return tuple(values)

    return read_all


_PATTERNS_ALLOWED: Final = (
    "a list of different domain names or uuids; shell patterns (* ? [...]) are understood"
)


def _pattern(untrusted_value: object) -> str:
    pattern = _text(untrusted_value, _PATTERNS_ALLOWED)
    problem = unmatchable(pattern)
    if problem is not None:
        raise Invalid(f"{_PATTERNS_ALLOWED}; {problem}")
    return pattern


_SOURCES_ALLOWED: Final = 'a list of one or both of "native" and "mcelog", none of them twice'
_WINDOWS_ALLOWED: Final = f"a list of different {WINDOW_ALLOWED}"
_TARGET_ALLOWED: Final = '"" (none), "localhost", or a host name or address'
# No leading dash: the name goes to ssh, which would take it for an option.
_HOST: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,252})", re.ASCII)


def _is_host(text: str) -> bool:
    if _HOST.fullmatch(text):
        return True
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def _target(untrusted_value: object) -> str:
    target = _text(untrusted_value, _TARGET_ALLOWED)
    if target and not _is_host(target):
        raise Invalid(_TARGET_ALLOWED)
    return target


_COMMAND_ALLOWED: Final = 'a command with its arguments, such as "ssh -p 2222"'


def _command(untrusted_value: object) -> str:
    command = _text(untrusted_value, _COMMAND_ALLOWED)
    try:
        words = shlex.split(command)
    except ValueError:
        raise Invalid(_COMMAND_ALLOWED) from None
    if not words or not command.isprintable():
        raise Invalid(_COMMAND_ALLOWED)
    return command


_PATH_ALLOWED: Final = "an absolute path of at most 107 bytes"
# sun_path of struct sockaddr_un, unix(7), less the terminating zero.
_MAX_SOCKET_PATH: Final = 107


def _socket_path(untrusted_value: object) -> str:
    path = _text(untrusted_value, _PATH_ALLOWED)
    fits = len(path.encode()) <= _MAX_SOCKET_PATH
    if not (path.startswith("/") and path.isprintable() and fits) or path.endswith("/"):
        raise Invalid(_PATH_ALLOWED)
    return path


_DIRECTORY_ALLOWED: Final = "an absolute path without blanks, such as /var/lib/pgofflined/saves"
# It stands in commands that people are told to type.
_DIRECTORY: Final = re.compile(r"(?:/[A-Za-z0-9_.+@:-]+)+", re.ASCII)


def _directory(untrusted_value: object) -> str:
    path = _text(untrusted_value, _DIRECTORY_ALLOWED)
    if not _DIRECTORY.fullmatch(path) or ".." in path.split("/"):
        raise Invalid(_DIRECTORY_ALLOWED)
    return path


_LISTEN_ALLOWED: Final = (
    '"ADDRESS:PORT" such as "127.0.0.1:9709" or "[::1]:9709", "unix:/PATH", or "off"'
)


def _listen(untrusted_value: object) -> TcpAddress | UnixAddress | None:
    text = _text(untrusted_value, _LISTEN_ALLOWED)
    if text == "off":
        return None
    if text.startswith("unix:"):
        return UnixAddress(path=_socket_path(text.removeprefix("unix:")))
    host, _, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if bracketed:
        host = host[1:-1]
    # An address with colons needs its brackets, a name has none.
    numbered = re.fullmatch(r"\d{1,5}", port, re.ASCII) and 1 <= int(port) <= 0xFFFF
    if not numbered or not _is_host(host) or bracketed != (":" in host):
        raise Invalid(_LISTEN_ALLOWED)
    return TcpAddress(host=host, port=int(port))


_RETRIES: Final[Mapping[str, Reader]] = {
    "retry_first": _duration("100ms", "1d"),
    "retry_last": _duration("100ms", "7d"),
}
_ATTEMPTS: Final = _whole(1, 1000)

# The keys of each section are the fields of the policy of that name.
SECTIONS: Final[Mapping[str, Mapping[str, Reader]]] = {
    "retire": {
        "enabled": _flag,
        "dry_run": _flag,
        "corrected_errors": _whole(1, 1000),
        "window": _duration("1s", "365d"),
        "max_tracked_pages": _whole(1, 10_000_000),
        "max_retired": _limit,
    },
    "domains": {
        "default": _choice(DomainDefault),
        "allow": _list(_pattern, _PATTERNS_ALLOWED),
        "deny": _list(_pattern, _PATTERNS_ALLOWED),
        "dom0": _choice(Dom0Action),
    },
    "exchange": {
        "enabled": _flag,
        "workers": _whole(1, 64),
        "max_queued": _whole(1, 1_000_000),
        "max_pages_per_suspend": _whole(1, 4096),
        # Together less than TimeoutStopSec= of the unit.
        "acknowledge_timeout": _duration("100ms", "2m"),
        "suspend_timeout": _duration("100ms", "2m"),
        "ask_unannounced": _list(_pattern, _PATTERNS_ALLOWED),
        # For no longer than 60 s does libxl wait for a guest that somebody else holds; then it
        # takes what it finds suspended for its own.
        "max_blackout": _duration("10ms", "20s"),
        "mark": _choice(Marking),
        "scrub_wait": _duration("1s", "1h"),
        **_RETRIES,
        "attempts": _ATTEMPTS,
    },
    "relocation": {
        "enabled": _flag,
        "target": _target,
        "parallel": _whole(1, 16),
        "max_queued": _whole(1, 32_768),
        "time_limit": _duration("1s", "7d"),
        **_RETRIES,
        "attempts": _ATTEMPTS,
        "maintenance_windows": _list(
            lambda value: _parsed(value, parse_window, _WINDOWS_ALLOWED), _WINDOWS_ALLOWED
        ),
        "ssh_command": _command,
        "save_restore": _flag,
        "save_directory": _directory,
        "free_memory_reserve": _size,
    },
    "sources": {
        "order": _list(_choice(SourceName), _SOURCES_ALLOWED, least=1),
        **_RETRIES,
    },
    "metrics": {"listen": _listen},
    "control": {"socket": _socket_path},
}
