"""Finds out whether somebody saves or migrates a domain, by what /proc tells of processes.

A guest that stands still for such a process must not be resumed: its memory is being read, or it
runs elsewhere already.  Neither Xen nor xenstore tells who has suspended a domain.

libxl has a helper process for every stream of memory, whoever uses the library (xl, libvirt), with
the domid among its arguments.  xl itself is there before and after it, until the domain is
destroyed or resumed.  The xl that stays behind each guest to monitor it was started to create or to
receive one, which is another verb.

Once the target may start the guest, xl renames what is left here, and no process may be known by
the new name.  If how that ended cannot be told, xl leaves it so, suspended, and is gone: to resume
it then would have the guest run on both hosts.  So the name counts as somebody as well.

What else uses the library is seen as long as its helper runs, and no longer: not a libvirtd that is
about to start one, nor between the helper's end and the domain's.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

from pgofflined.core.errors import PortError
from pgofflined.core.frames import Domid
from pgofflined.core.text import printable
from pgofflined.ports import BY_NAME_ONLY

_HELPER: Final = b"libxl-save-helper"
_XL: Final = b"xl"
# tools/xl/xl_cmdtable.c: the commands that suspend a domain, or read it while it is suspended.
_SUSPENDING: Final = frozenset({b"save", b"migrate", b"remus", b"suspend"})
# tools/xl/xl_migrate.c, migrate_domain(): before the permission to start.
_AWAY: Final = b"--migratedaway"
_SHOWN: Final = 120
_PROC: Final = Path("/proc")
# More than the name of a program, its options, a domain and a file take.
_MOST: Final = 1 << 14
# include/linux/sched.h, PF_KTHREAD; proc_pid_stat(5), the field after those that follow the name.
_KERNEL_THREAD: Final = 0x00200000
_FLAGS: Final = 6


def somebody_at(domid: Domid, name: bytes, proc: Path = _PROC) -> str | None:
    """The first process that works on the domain, named by its number and its arguments.

    ``name`` is the domain's in xenstore, by which xl may have been told of it; it may be empty.
    Takes some microseconds for each process of dom0: ask before a guest stands still.  Raises
    PortError where the processes cannot be read.
    """
    return FirstLook(domid, name, proc).somebody


class FirstLook:
    """A look at all processes, and what makes a second one soon after it cheap.

    ``somebody`` is what ``somebody_at`` gives.  Raises PortError.

    ``newcomer`` is for a guest that stands still and waits, so it passes by the processes that were
    there and cannot be ones that save the domain now.  A process becomes another program by exec,
    under the same number: a child of a shell, of sshd or of libvirtd is there before it is xl or
    the helper, and so is a script that ends in ``exec xl save``, for as long as it likes.  No age
    and no list of shells tells all of them, so only two kinds are passed by, which are the many:

    - the kernel's threads, some hundreds;
    - what a toolstack keeps for each guest, its xl and its device model, which start scripts, not
      xl.  Their arguments have been seen and are not about saving this domain.

    The others, one or two hundred at the most, and all that are new are read again, at some
    microseconds each.  That a process ends and its number comes back meanwhile is left out of
    account: numbers are given out in turn, and it takes tens of thousands of new processes.
    """

    def __init__(self, domid: Domid, name: bytes, proc: Path = _PROC) -> None:
        self._domid = domid
        self._called = {str(domid).encode(), name} - {b""}
        self._proc = proc
        self._settled: set[str] = set()
        self.somebody = self._look(self._processes()) or _gone_away(name)

    def newcomer(self) -> str | None:
        """Who works on the domain by now; nobody did at the first look.  Raises PortError."""
        pids = (pid for pid in _numbers(self._proc) if pid not in self._settled)
        return self._look((pid, _arguments(self._proc, pid)) for pid in pids)

    def _processes(self) -> Iterator[tuple[str, Sequence[bytes]]]:
        """All; those that need not be looked at a second time are noted."""
        for pid in _numbers(self._proc):
            argv = _arguments(self._proc, pid)
            # A process that is just becoming another has no arguments for a moment.
            if _stays_what_it_is(argv) if argv else _is_kernel_thread(self._proc, pid):
                self._settled.add(pid)
            yield pid, argv

    def _look(self, processes: Iterable[tuple[str, Sequence[bytes]]]) -> str | None:
        for pid, argv in processes:
            if _suspends(argv, self._called) or _saves(argv, self._domid):
                words = b" ".join(argv).decode("utf-8", "replace")
                return f"process {pid} ({printable(words[:_SHOWN])})"
        return None


def _gone_away(name: bytes) -> str | None:
    if not name.endswith(_AWAY):
        return None
    shown = printable(name[-_SHOWN:].decode("utf-8", "replace"))
    return f"{BY_NAME_ONLY} ({shown}) tells,"


def _numbers(proc: Path) -> list[str]:
    try:
        return [entry for entry in os.listdir(proc) if entry.isdecimal()]
    except OSError as error:
        raise PortError(f"the processes in {proc} cannot be listed: {error}") from error


def _read(path: str) -> bytes:
    """What a file of a process holds, empty when the process has ended.  Raises PortError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.read(descriptor, _MOST)
        finally:
            os.close(descriptor)
    except (FileNotFoundError, ProcessLookupError):
        return b""
    except OSError as error:
        # Who it is cannot be told: nobody would be a guess.
        raise PortError(f"{path} cannot be read: {error}") from error


def _arguments(proc: Path, pid: str) -> Sequence[bytes]:
    """None for the kernel's threads and the dead."""
    raw = _read(f"{proc}/{pid}/cmdline")
    return raw.rstrip(b"\0").split(b"\0") if raw else ()


def _stays_what_it_is(argv: Sequence[bytes]) -> bool:
    program = os.path.basename(argv[0])
    return program == _XL or program.startswith(b"qemu-system-")


def _is_kernel_thread(proc: Path, pid: str) -> bool:
    # The name of a program may hold spaces and parentheses.
    fields = _read(f"{proc}/{pid}/stat").rpartition(b")")[2].split()
    return len(fields) > _FLAGS and bool(int(fields[_FLAGS]) & _KERNEL_THREAD)


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
