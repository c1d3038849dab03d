"""What systemd is told of the daemon, and the descriptors that it keeps for us.

See sd_notify(3), sd_watchdog_enabled(3) and sd_listen_fds(3).
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

_log = logging.getLogger(__name__)

# VIRQ numbers are below NR_VIRQS (24), event channels below 2 ** 17 (xen/event_channel.h).
_CHANNEL_NAME: Final = re.compile(r"evtchn-(0|[1-9]\d?)-(0|[1-9]\d{0,5})", re.ASCII)

# systemd cuts STATUS= at no length, but a datagram has one.
_MAX_STATUS: Final = 1000


class Send(Protocol):
    """``systemd.daemon.notify``."""

    def __call__(self, status: str, *, fds: Sequence[int] = ...) -> object:
        """Send assignments, one a line, and descriptors; raises OSError."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelName:
    """Name under which a bound event channel is kept: the VIRQ and its local port."""

    virq: int
    port: int

    def __str__(self) -> str:
        """``evtchn-16-37``."""
        return f"evtchn-{self.virq}-{self.port}"


def parse_channel_name(untrusted_name: str) -> ChannelName | None:
    """The channel that a kept descriptor's name stands for; None for any other name."""
    found = _CHANNEL_NAME.fullmatch(untrusted_name)
    return ChannelName(virq=int(found[1]), port=int(found[2])) if found else None


class Notifier(Protocol):
    """What the daemon says to whoever started it.  No call raises or waits."""

    @property
    def watchdog_interval(self) -> float | None:
        """Seconds between two calls of ``watchdog``; None where nobody watches."""
        ...

    def ready(self, status: str) -> None:
        """Start-up, or a reload, is over."""
        ...

    def status(self, status: str) -> None:
        """One line for ``systemctl status``."""
        ...

    def reloading(self) -> None:
        """The configuration is being read again; ``ready`` follows."""
        ...

    def stopping(self, status: str) -> None:
        """The end has begun."""
        ...

    def watchdog(self) -> None:
        """All is well."""
        ...

    def keep_descriptor(self, name: ChannelName, fd: int) -> None:
        """Have a copy of the descriptor kept over a restart."""
        ...

    def drop_descriptor(self, name: ChannelName) -> None:
        """Have it kept no longer."""
        ...


class NullNotifier:
    """Nobody to tell."""

    watchdog_interval: float | None = None

    def ready(self, status: str) -> None:
        """Do nothing."""

    def status(self, status: str) -> None:
        """Do nothing."""

    def reloading(self) -> None:
        """Do nothing."""

    def stopping(self, status: str) -> None:
        """Do nothing."""

    def watchdog(self) -> None:
        """Do nothing."""

    def keep_descriptor(self, name: ChannelName, fd: int) -> None:
        """Do nothing."""

    def drop_descriptor(self, name: ChannelName) -> None:
        """Do nothing."""


class SystemdNotifier:
    """Tells systemd.  A message that cannot be sent is logged; the work goes on without."""

    def __init__(
        self,
        send: Send,
        *,
        monotonic: Callable[[], float],
        watchdog_interval: float | None,
    ) -> None:
        self.watchdog_interval = watchdog_interval
        self._send = send
        self._monotonic = monotonic

    def ready(self, status: str) -> None:
        """Start-up, or a reload, is over."""
        self._notify("READY=1", _status(status))

    def status(self, status: str) -> None:
        """One line for ``systemctl status``."""
        self._notify(_status(status))

    def reloading(self) -> None:
        """The configuration is being read again; ``ready`` follows."""
        # With Type=notify-reload (systemd 253) the time tells this reload from an earlier one.
        self._notify("RELOADING=1", f"MONOTONIC_USEC={int(self._monotonic() * 1_000_000)}")

    def stopping(self, status: str) -> None:
        """The end has begun."""
        self._notify("STOPPING=1", _status(status))

    def watchdog(self) -> None:
        """All is well."""
        self._notify("WATCHDOG=1")

    def keep_descriptor(self, name: ChannelName, fd: int) -> None:
        """Have a copy of the descriptor kept over a restart."""
        # Without FDPOLL=0 systemd would drop the channel at the first EPOLLERR, which evtchn
        # gives when its ring has overflowed: just when events must not be lost.
        self._notify("FDSTORE=1", f"FDNAME={name}", "FDPOLL=0", fds=[fd])

    def drop_descriptor(self, name: ChannelName) -> None:
        """Have it kept no longer."""
        self._notify("FDSTOREREMOVE=1", f"FDNAME={name}")

    def _notify(self, *assignments: str, fds: Sequence[int] = ()) -> None:
        message = "\n".join(assignments)
        try:
            # systemd-python counts whatever it is given as ``fds``, be it None or empty.
            if fds:
                self._send(message, fds=fds)
            else:
                self._send(message)
        except OSError as error:
            _log.warning("systemd could not be told %s: %s", assignments[0], error)


def _status(text: str) -> str:
    # A line break would start another assignment.
    return "STATUS=" + " ".join(text.split())[:_MAX_STATUS]


def watchdog_interval(environ: Mapping[str, str], pid: int) -> float | None:
    """Half of the time that WATCHDOG_USEC allows, in seconds, where it is meant for us."""
    if environ.get("WATCHDOG_PID", str(pid)) != str(pid):
        return None
    try:
        limit = int(environ.get("WATCHDOG_USEC", ""))
    except ValueError:
        return None
    return limit / 2_000_000 if limit > 0 else None


def make_notifier(monotonic: Callable[[], float]) -> Notifier:
    """The notifier for whoever started this process."""
    if "NOTIFY_SOCKET" not in os.environ:
        _log.debug("NOTIFY_SOCKET is not set: nobody is told when the daemon is ready")
        return NullNotifier()
    try:
        from systemd.daemon import notify
    except ImportError:
        _log.warning(
            "systemd waits for word, but systemd-python is missing: it will take the start for "
            "failed; install python3-systemd"
        )
        return NullNotifier()
    return SystemdNotifier(
        notify,
        monotonic=monotonic,
        watchdog_interval=watchdog_interval(os.environ, os.getpid()),
    )


def kept_descriptors() -> dict[ChannelName, int]:
    """The event channels that systemd kept for us, ours from now on; none at a second call.

    Anything else that was passed to us is closed: it would only be lost in here.
    """
    if "LISTEN_FDS" not in os.environ:
        return {}
    try:
        from systemd.daemon import listen_fds_with_names
    except ImportError:
        _log.warning("systemd-python is missing: event channels kept by systemd are not used")
        return {}
    return sort_descriptors(listen_fds_with_names(unset_environment=True))


def sort_descriptors(untrusted_names: Mapping[int, str]) -> dict[ChannelName, int]:
    """Event channels by name; descriptors of any other name, and second ones, are closed."""
    kept: dict[ChannelName, int] = {}
    for fd, untrusted_name in untrusted_names.items():
        name = parse_channel_name(untrusted_name)
        if name is None or name in kept:
            _log.warning("closed descriptor %d, kept as %r: not to be used", fd, untrusted_name)
            os.close(fd)
        else:
            kept[name] = fd
    return kept
