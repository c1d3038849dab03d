"""Tests on HVM and PVH guests, against QEMU's nested SVM.

Guests triple-fault now and then under QEMU 7.2 and 10.0, as they boot and as they are migrated.
QEMU's own log (10.0) of one such end: right after Xen had resumed the guest, the page of its next
instruction was found not present, nor were those of the interrupt table.  That is a page fault, a
double fault, a triple fault; Xen logs the last and ends the domain.  Only Xen and xl ever write to
the memory of such guests: nothing of ours in dom0 can bring this about.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import ParamSpec

from .errors import RigError
from .host import Host

ATTEMPTS = 3
TRIPLE_FAULT = re.compile(r"d\d+v\d+ Triple fault")

P = ParamSpec("P")


def tried_again_after_triple_faults(test: Callable[P, None]) -> Callable[P, None]:
    """Run a failed test anew, at most twice, if a guest triple-faulted; the summary says so.

    Any other failure counts at once.
    """

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        # pytest hands fixtures over by name.
        host = kwargs["host"]
        assert isinstance(host, Host)
        for attempt in range(1, ATTEMPTS + 1):
            lines = len(host.xl_dmesg().splitlines())
            try:
                test(*args, **kwargs)
            except (AssertionError, RigError) as error:
                if attempt == ATTEMPTS or host.lost is not None:
                    raise
                fault = _triple_fault(host, after=lines)
                if fault is None:
                    raise
                first = str(error).partition("\n")[0]
                host.remarks.append(f"{test.__name__}: attempt {attempt}: {fault}; {first}")
                host.destroy_guests()
            else:
                return

    return run


def _triple_fault(host: Host, *, after: int) -> str | None:
    for line in host.xl_dmesg().splitlines()[after:]:
        if found := TRIPLE_FAULT.search(line):
            return found[0]
    return None
