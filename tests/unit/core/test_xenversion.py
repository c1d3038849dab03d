import pytest

from pgofflined.core.machine import CpuVendor
from pgofflined.core.xenversion import XenVersion, parse_version, unseen_errors


@pytest.mark.parametrize(
    ("version", "extra", "expected"),
    [
        (4 << 16 | 17, ".7", XenVersion(4, 17, 7)),
        (4 << 16 | 20, ".5-pre", XenVersion(4, 20, 4)),
        (4 << 16 | 20, ".4-pre", XenVersion(4, 20, 3)),
        (4 << 16 | 20, ".0-rc3", XenVersion(4, 20, -1)),
        (4 << 16 | 23, "-unstable", XenVersion(4, 23, -1)),
        (4 << 16 | 17, ".5-13\0\0", XenVersion(4, 17, 5)),
        (4 << 16 | 22, "-unstable", XenVersion(4, 22, -1)),
        (4 << 16 | 22, ".0-rc1", XenVersion(4, 22, -1)),
        (4 << 16 | 22, "-rc", XenVersion(4, 22, -1)),
        (4 << 16 | 21, ".2-rc1", XenVersion(4, 21, 1)),
        (4 << 16 | 20, ".4~rc2", XenVersion(4, 20, 3)),
        (4 << 16 | 17, ".5 \0", XenVersion(4, 17, 5)),
        (4 << 16 | 22, ".x", XenVersion(4, 22, -1)),
    ],
)
def test_a_pre_release_contains_only_the_point_release_before_it(
    version: int, extra: str, expected: XenVersion
) -> None:
    assert parse_version(version, extra) == expected


def test_an_extra_version_without_point_release_is_refused() -> None:
    with pytest.raises(ValueError, match="names no point release"):
        parse_version(4 << 16 | 20, "custom")


@pytest.mark.parametrize(
    ("version", "safe"),
    [
        (XenVersion(4, 17, 7), False),
        (XenVersion(4, 19, 5), False),
        (XenVersion(4, 20, 3), False),
        (XenVersion(4, 20, 4), True),
        (XenVersion(4, 21, 1), False),
        (XenVersion(4, 21, 2), True),
        (XenVersion(4, 22, -1), False),
        (XenVersion(4, 22, 0), True),
        (XenVersion(4, 23, -1), True),
        (XenVersion(5, 0, 0), True),
    ],
)
def test_only_fixed_releases_count_as_safe_for_free_frames(
    version: XenVersion,
    safe: bool,  # noqa: FBT001
) -> None:
    assert version.offlines_free_frames_safely is safe


@pytest.mark.parametrize(
    ("extra", "safe"),
    [
        ((22, "-unstable"), False),
        ((22, ".0-rc1"), False),
        ((22, ".0"), True),
        ((20, ".4-pre"), False),
        ((20, ".4-rc1"), False),
        ((20, ".4"), True),
        ((20, ".5-pre"), True),  # Debian 13: later than 4.20.4
        ((21, ".2-rc1"), False),
        ((21, ".2-pre"), False),
        ((21, ".2"), True),
    ],
)
def test_pre_releases_of_fixed_versions_are_older_than_the_fix(
    extra: tuple[int, str],
    safe: bool,  # noqa: FBT001
) -> None:
    minor, rest = extra
    assert parse_version(4 << 16 | minor, rest).offlines_free_frames_safely is safe


def test_a_version_before_its_first_release_is_named_so() -> None:
    assert str(XenVersion(4, 22, -1)) == "4.22-pre"
    assert str(XenVersion(4, 20, 4)) == "4.20.4"
    assert str(XenVersion(4, 22, 0)) == "4.22.0"
    assert str(XenVersion(4, 22, 1)) == "4.22.1"


@pytest.mark.parametrize(
    ("version", "polls"),
    [
        (XenVersion(4, 12, 4), True),
        *((XenVersion(4, minor, patch), False) for minor in range(13, 19) for patch in (0, 9)),
        (XenVersion(4, 19, -1), False),
        (XenVersion(4, 19, 3), False),
        (XenVersion(4, 19, 4), True),
        (XenVersion(4, 20, 1), False),
        (XenVersion(4, 20, 2), True),
        (XenVersion(4, 21, -1), False),
        (XenVersion(4, 21, 0), True),
        (XenVersion(4, 22, -1), True),
    ],
)
def test_polling_is_dead_from_4_13_to_its_fix(
    version: XenVersion,
    polls: bool,  # noqa: FBT001
) -> None:
    assert version.polls_corrected_errors_without_cmci is polls


def test_an_amd_host_on_a_xen_that_polls_nothing_is_called_blind() -> None:
    blind = unseen_errors(XenVersion(4, 17, 7), CpuVendor.AMD)
    assert blind is not None
    assert "no memory error of this host is ever reported" in blind
    partly = unseen_errors(XenVersion(4, 19, 3), CpuVendor.INTEL)
    assert partly is not None
    assert "without CMCI" in partly
    for vendor in CpuVendor:
        told = unseen_errors(XenVersion(4, 17, 7), vendor)
        assert told is not None
        assert told.startswith("Xen 4.17.7 polls no machine-check bank")
        assert told.endswith("; update Xen to 4.19.4, 4.20.2, 4.21 or later")
        assert unseen_errors(XenVersion(4, 20, 2), vendor) is None


@pytest.mark.parametrize(
    ("version", "ends"),
    [
        (XenVersion(4, 17, 7), True),
        (XenVersion(4, 19, 5), True),
        (XenVersion(4, 20, 0), False),
        (XenVersion(4, 21, 0), False),
        (XenVersion(5, 0, 0), False),
    ],
)
def test_until_4_20_what_monitors_a_guest_ends_when_it_suspends(
    version: XenVersion,
    ends: bool,  # noqa: FBT001
) -> None:
    assert version.xl_takes_a_suspend_for_the_end is ends
