import pytest

from pgofflined.core.offline import (
    NOT_HANDLED,
    OfflineFlag,
    OfflineState,
    OnlineFlag,
    decode_offline,
    decode_online,
    decode_query,
)


def test_zero_means_online() -> None:
    assert decode_query(0) is OfflineState.ONLINE


def test_the_same_bit_is_pending_in_a_query_and_failed_in_an_offline_answer() -> None:
    assert decode_query(1 << 3) is OfflineState.OFFLINE_PENDING
    assert decode_offline(1 << 3).flags is OfflineFlag.FAILED


def test_broken_has_a_different_bit_in_each_answer() -> None:
    assert decode_query(1 << 4) is OfflineState.BROKEN
    assert decode_offline(1 << 13).flags is OfflineFlag.BROKEN
    assert decode_online(1 << 13) is OnlineFlag.BROKEN


def test_an_owned_page_names_its_owner() -> None:
    reply = decode_offline(7 << 16 | 1 << 12 | 1 << 2)
    assert reply.flags == OfflineFlag.OWNED | OfflineFlag.PENDING
    assert reply.owner == 7


@pytest.mark.parametrize("flag", [OfflineFlag.XENPAGE, OfflineFlag.ANONYMOUS])
def test_xen_says_of_its_own_and_of_nobodys_pages_whose_they_are_as_well(flag: OfflineFlag) -> None:
    # DOMID_XEN and DOMID_INVALID.
    owner = 0x7FF2 if flag is OfflineFlag.XENPAGE else 0x7FF4
    reply = decode_offline(owner << 16 | flag.value | OfflineFlag.FAILED.value)
    assert (reply.flags, reply.owner) == (flag | OfflineFlag.FAILED, owner)


def test_a_free_page_names_no_owner() -> None:
    assert decode_offline(1 << 1).owner is None


def test_the_crash_answer_names_no_owner_although_the_field_reads_as_dom0() -> None:
    assert decode_offline(1 << 4).owner is None


@pytest.mark.parametrize("decode", [decode_query, decode_offline, decode_online])
def test_a_word_that_xen_did_not_fill_is_refused(decode: object) -> None:
    assert callable(decode)
    with pytest.raises(ValueError, match="did not reach"):
        decode(NOT_HANDLED)


def test_unknown_bits_are_refused() -> None:
    with pytest.raises(ValueError, match="invalid value"):
        decode_query(1 << 5)
    with pytest.raises(ValueError, match="invalid value"):
        decode_offline(1 << 14)
