import pytest

from pgofflined.core.frames import Maddr, Mfn, maddr_of, mfn_of, parse_mfn

LAST = Mfn(0x3FFFF)


@pytest.mark.parametrize(
    ("text", "mfn"),
    [
        ("0x1f", 0x1F),
        ("31", 31),
        (" 0X1F ", 0x1F),
        ("0x3ffff", 0x3FFFF),
        ("0", 0),
        ("0x" + "0" * 15 + "7", 7),
    ],
)
def test_hexadecimal_and_decimal_mfns_are_read(text: str, mfn: int) -> None:
    assert parse_mfn(text, max_mfn=LAST) == mfn


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0x",
        "1f",
        "-1",
        "0x-1",
        "1_000",
        "0x1_0",
        "0b1",
        "1.0",
        "\N{ARABIC-INDIC DIGIT ONE}",
        "0x" + "0" * 17,
    ],
)
def test_what_is_no_mfn_is_refused_with_what_is_allowed(text: str) -> None:
    with pytest.raises(ValueError, match="0x"):
        parse_mfn(text, max_mfn=LAST)


def test_an_mfn_beyond_the_host_is_refused_naming_the_last_frame() -> None:
    with pytest.raises(ValueError, match="0x3ffff"):
        parse_mfn("0x40000", max_mfn=LAST)


def test_an_address_lies_in_its_frame() -> None:
    assert mfn_of(Maddr(0x1234_5678)) == 0x12345
    assert maddr_of(Mfn(0x12345)) == 0x1234_5000
