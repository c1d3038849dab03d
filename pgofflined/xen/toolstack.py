"""Finds out whether somebody saves or migrates a domain, by what /proc tells of processes.

A guest that stands still for such a process must not be resumed: its memory is being read, or it
runs elsewhere already.  Neither Xen nor xenstore tells who has suspended a domain.

libxl has a helper process for every stream of memory, whoever uses the library (xl, libvirt), with
the domid among its arguments.  xl itself is there before and after it, until the domain is
destroyed or resumed.  The xl that stays behind each guest to monitor it was started to create or to
receive one, which is another verb.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from pgofflined.core.frames import Domid
from pgofflined.core.text import printable

_HELPER: Final = b"libxl-save-helper"
_XL: Final = b"xl"
# tools/xl/xl_cmdtable.c: the commands that suspend a domain, or read it while it is suspended.
_SUSPENDING: Final = frozenset({b"save", b"migrate", b"remus", b"suspend"})
_SHOWN: Final = 120


def somebody_at(domid: Domid, name: bytes, proc: Path = Path("/proc")) -> str | None:
    """The first process that works on the domain, named by its number and its arguments.

    ``name`` is the domain's in xenstore, by which xl may have been told of it; it may be empty.
    Takes some tens of microseconds for each process of dom0: ask before a guest stands still.
    """
    called = {str(domid).encode(), name} - {b""}
    for pid, argv in _processes(proc):
        if _suspends(argv, called) or _saves(argv, domid):
            words = b" ".join(argv).decode("utf-8", "replace")
            return f"process {pid} ({printable(words[:_SHOWN])})"
    return None


def _processes(proc: Path) -> Iterator[tuple[int, Sequence[bytes]]]:
    """Those that are there and have arguments: neither the kernel's threads nor the dead."""
    for entry in os.listdir(proc):
        if not entry.isdecimal():
            continue
        try:
            raw = (proc / entry / "cmdline").read_bytes()
        except OSError:
            continue  # it has ended
        if raw:
            yield int(entry), raw.rstrip(b"\0").split(b"\0")


def _after_program(argv: Sequence[bytes], program: bytes) -> Sequence[bytes]:
    """A program's own arguments; none where the process is another's."""
    # What is not compiled, or run through sudo, comes second.
    for at, word in enumerate(argv[:2]):
        if os.path.basename(word) == program:
            return argv[at + 1 :]
    return ()


def _suspends(argv: Sequence[bytes], called: set[bytes]) -> bool:
    arguments = list(_after_program(argv, _XL))
    while arguments and arguments[0].startswith(b"-"):
        del arguments[0]  # xl's own options, none of which has a value
    return bool(arguments and arguments[0] in _SUSPENDING and not called.isdisjoint(arguments[1:]))


def _saves(argv: Sequence[bytes], domid: Domid) -> bool:
    """libxl_save_callout.c: --save-domain IO_FD RECV_FD DOMID FLAGS ..."""
    arguments = _after_program(argv, _HELPER)
    return arguments[:1] == [b"--save-domain"] and arguments[3:4] == [str(domid).encode()]
