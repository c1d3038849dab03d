"""Played by test_links.py inside a fresh network namespace."""

from __future__ import annotations

import asyncio

from pgofflined.core.premigration import Hindrance, NoWay, Route, Way
from pgofflined.relocation.links import KernelLinks


async def ip(*arguments: str) -> None:
    process = await asyncio.create_subprocess_exec("ip", *arguments)
    assert await process.wait() == 0, arguments


def no_route(way: Way) -> bool:
    return isinstance(way, NoWay) and way.hindrance is Hindrance.NO_ROUTE


async def main() -> None:
    links = KernelLinks()
    changed = asyncio.Event()
    links.watch(changed.set)

    assert no_route(await links.way("192.0.2.9"))
    assert no_route(await links.way("2001:db8::9"))

    # A pair of interfaces, the far one down: a route, but no carrier.
    await ip("link", "add", "near", "type", "veth", "peer", "name", "far")
    await ip("address", "add", "192.0.2.1/24", "dev", "near")
    await ip("link", "set", "near", "up")
    await asyncio.wait_for(changed.wait(), 30)
    dead = Route(address="192.0.2.9", interface="near", up=True, carrier=False, local=False)
    assert await links.way("192.0.2.9") == dead

    # Nothing happens: nothing is heard.
    while changed.is_set():
        changed.clear()
        await asyncio.sleep(0.2)

    # The far one comes up: we are woken, and there is a way.
    await ip("link", "set", "far", "up")
    await asyncio.wait_for(changed.wait(), 30)
    alive = Route(address="192.0.2.9", interface="near", up=True, carrier=True, local=False)
    assert await links.way("root@192.0.2.9") == alive

    # Our own address is no other host.
    await ip("link", "set", "lo", "up")
    way = await links.way("192.0.2.1")
    assert isinstance(way, Route)
    assert way.local

    # IPv6 too.
    await ip("address", "add", "2001:db8::1/64", "dev", "near", "nodad")
    way = await links.way("2001:db8::9")
    assert isinstance(way, Route)
    assert (way.interface, way.up, way.carrier) == ("near", True, True)

    # The link is taken down: the route goes with it.
    await ip("link", "set", "near", "down")
    assert no_route(await links.way("192.0.2.9"))
    links.unwatch()
    print("scene played")


asyncio.run(main())
