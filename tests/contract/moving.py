"""Moves one page of a guest that stands still, step by step through the ports."""

from __future__ import annotations

from dataclasses import dataclass
from errno import EINVAL
from typing import TYPE_CHECKING

from pgofflined.core.errors import XenError
from pgofflined.core.frames import Mfn
from pgofflined.ports import Hypervisor
from tests.single import set_ptes, swap, write_words

from .guestmemory import DataPage, GuestMemory

if TYPE_CHECKING:
    from pgofflined.ports import Words

_TRIES = 10


@dataclass(frozen=True, kw_only=True)
class Moved:
    """A page that has another frame now, and what it held."""

    page: DataPage
    new: Mfn
    contents: Words


def move_one(hypervisor: Hypervisor, guest: GuestMemory, *, mark: bool = False) -> Moved:
    """Exchange a page and make it whole again.

    A page may turn out to have other references (a vCPU's registered area): then another one is
    tried, after its entries have been restored.
    """
    for page in guest.data_pages()[:_TRIES]:
        if mark:
            hypervisor.offline(page.mfn)
        set_ptes(hypervisor, guest.domid, page.cleared)
        contents = guest.read(page.mfn)
        try:
            new = swap(hypervisor, guest.domid, page.mfn, page.pfn)
        except XenError as error:
            set_ptes(hypervisor, guest.domid, page.entries)
            if mark:
                hypervisor.online(page.mfn)
            if error.errno != EINVAL:
                raise
            continue
        write_words(hypervisor, guest.domid, new, 0, contents)
        guest.set_p2m(page.pfn, new)
        set_ptes(hypervisor, guest.domid, page.moved_to(new))
        return Moved(page=page, new=new, contents=contents)
    raise AssertionError(f"none of {_TRIES} ordinary pages could be exchanged")
