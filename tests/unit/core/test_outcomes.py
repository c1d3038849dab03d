from __future__ import annotations

import pytest

from pgofflined.core.frames import Mfn, Pfn
from pgofflined.core.outcomes import (
    Damaged,
    Exchanged,
    PageResult,
    Refusal,
    RefusalReason,
    page_of,
)


@pytest.mark.parametrize(
    "result",
    [
        Refusal(mfn=Mfn(5), reason=RefusalReason.GRANTED, detail=""),
        Exchanged(old=Mfn(5), new=Mfn(6), pfn=Pfn(7), references=1, offlined=True),
        Damaged(old=Mfn(5), new=Mfn(6), pfn=Pfn(7), detail=""),
    ],
)
def test_a_result_is_about_the_bad_page_and_not_about_the_new_one(result: PageResult) -> None:
    assert page_of(result) == 5


def test_a_reason_that_lies_in_the_page_itself_does_not_pass() -> None:
    lasting = {reason for reason in RefusalReason if not reason.may_pass}
    assert lasting >= {
        *(RefusalReason.NOT_PENDING, RefusalReason.BROKEN, RefusalReason.NOT_THE_DOMAINS),
        *(RefusalReason.SHARED_INFO, RefusalReason.DESCRIPTOR_TABLE, RefusalReason.LINEAR_MAPPING),
        *(RefusalReason.NOT_PV, RefusalReason.HAS_DEVICES, RefusalReason.DENIED),
        *(RefusalReason.DOMAIN_GONE, RefusalReason.INTERNAL),
    }
    assert not lasting & {
        RefusalReason.GRANTED,
        RefusalReason.XEN_REFUSED,
        RefusalReason.NO_SUSPEND,
    }
