"""How long a guest says nothing: python3 -m tests.e2e.dom0.silence ADDRESS.

Sends an ICMP echo request every few milliseconds until standard input ends.  Prints one JSON
object: how many answers came, and the longest time between two of them in seconds.
"""

from __future__ import annotations

import json
import os
import select
import socket
import struct
import sys
import time

_EVERY = 0.01
_ECHO, _REPLY = 8, 0


def _request(number: int) -> bytes:
    body = struct.pack("!BBHHH", _ECHO, 0, 0, os.getpid() & 0xFFFF, number & 0xFFFF)
    total = sum(struct.unpack(f"!{len(body) // 2}H", body))
    total = (total & 0xFFFF) + (total >> 16)
    return body[:2] + struct.pack("!H", ~total & 0xFFFF) + body[4:]


def main(address: str) -> None:
    """Ask and listen."""
    wire = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    wire.settimeout(0)
    number, answers, last, longest, asked = 0, 0, 0.0, 0.0, 0.0
    while True:
        now = time.monotonic()
        if now - asked >= _EVERY:
            number, asked = number + 1, now
            wire.sendto(_request(number), (address, 0))
        ready, _, _ = select.select([wire, sys.stdin], [], [], _EVERY)
        if sys.stdin in ready and not sys.stdin.read(1):
            break
        if wire not in ready or wire.recv(2048)[20] != _REPLY:
            continue
        now = time.monotonic()
        longest = max(longest, now - last) if answers else 0.0
        last, answers = now, answers + 1
    longest = max(longest, time.monotonic() - last)
    print(json.dumps({"answers": answers, "longest": longest}))


if __name__ == "__main__":
    main(sys.argv[1])
