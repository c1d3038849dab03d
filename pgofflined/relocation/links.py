"""The way to another host, and word from the kernel when ways change.

pyroute2 asks for routes and links; it is loaded only then.  To be woken, an ordinary socket in
the kernel's multicast groups is enough: that something changed says nothing yet, the route is
asked for anew.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterable
from typing import Any, Final, Protocol

from pgofflined.core.premigration import Hindrance, NoWay, Route, Way

# linux/rtnetlink.h
_RTMGRP_LINK: Final = 0x1
_RTMGRP_IPV4_ROUTE: Final = 0x40
_RTMGRP_IPV6_ROUTE: Final = 0x400
_RTN_LOCAL: Final = 2
# linux/if.h
_IFF_UP: Final = 0x1
_IFF_LOWER_UP: Final = 0x10000

_LONGEST_MESSAGE: Final = 32 << 10


class Links(Protocol):
    """What the service needs to know of the network."""

    async def way(self, target: str) -> Way:
        """How the target would be reached now."""
        ...

    def watch(self, changed: Callable[[], None]) -> None:
        """Call ``changed`` when a link or route changes, until ``unwatch``."""
        ...

    def unwatch(self) -> None:
        """Watch no more; nothing happens if nothing is watched."""
        ...


class KernelLinks:
    """Links and routes of the network namespace that we run in."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None

    async def way(self, target: str) -> Way:
        """How the target would be reached now, over the best of its addresses."""
        host = target.rpartition("@")[2]
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            # UnicodeError: it has an empty label, or one that is too long.
            why = error.strerror if isinstance(error, OSError) else error
            return NoWay(
                hindrance=Hindrance.TARGET_UNRESOLVED,
                detail=f"the name {host} cannot be resolved: {why}; names from ssh's "
                "configuration file are not known here",
            )
        addresses = list(dict.fromkeys((family, where[0]) for family, *_, where in found))
        return await asyncio.to_thread(_best_way, host, addresses)

    def watch(self, changed: Callable[[], None]) -> None:
        """Call ``changed`` when a link or route changes, until ``unwatch``."""
        if self._socket is not None:
            return
        watched = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        watched.settimeout(0)
        watched.bind((0, _RTMGRP_LINK | _RTMGRP_IPV4_ROUTE | _RTMGRP_IPV6_ROUTE))
        self._socket = watched
        asyncio.get_running_loop().add_reader(watched, self._drain, watched, changed)

    def unwatch(self) -> None:
        """Watch no more; nothing happens if nothing is watched."""
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
            self._socket = None

    def _drain(self, watched: socket.socket, changed: Callable[[], None]) -> None:
        while True:
            try:
                watched.recv(_LONGEST_MESSAGE)
            except BlockingIOError:
                break
            except OSError:
                # ENOBUFS: there were more messages than room, which is a change all the same.
                break
        changed()


def _best_way(host: str, addresses: Iterable[tuple[int, object]]) -> Way:
    """The first usable way, else the first that there is.  Runs in a thread of its own."""
    from pyroute2 import IPRoute

    ways: list[Way] = []
    with IPRoute() as netlink:
        for family, address in addresses:
            way = _way(netlink, host, family, str(address))
            if isinstance(way, Route) and (way.local or (way.up and way.carrier)):
                return way
            ways.append(way)
    routes = [way for way in ways if isinstance(way, Route)]
    return (routes or ways)[0]


def _way(netlink: Any, host: str, family: int, address: str) -> Way:  # noqa: ANN401, pyroute2 has no types
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        [route, *_] = netlink.route("get", dst=address, family=family)
        index = route.get_attr("RTA_OIF")
        [link, *_] = netlink.get_links(index)
    except NetlinkError as error:
        return NoWay(
            hindrance=Hindrance.NO_ROUTE,
            detail=f"there is no route to {host} ({address}): {error.args[-1]}",
        )
    flags = link["flags"]
    carrier = link.get_attr("IFLA_CARRIER")
    return Route(
        address=address,
        interface=link.get_attr("IFLA_IFNAME"),
        up=bool(flags & _IFF_UP),
        carrier=bool(flags & _IFF_LOWER_UP if carrier is None else carrier),
        local=route["type"] == _RTN_LOCAL,
    )
