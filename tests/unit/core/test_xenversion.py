import pytest

from pgofflined.core.xenversion import XenVersion, parse_version


@pytest.mark.parametrize(
    ("version", "extra", "expected"),
    [
        (4 << 16 | 17, ".7", XenVersion(4, 17, 7)),
        (4 << 16 | 20, ".5-pre", XenVersion(4, 20, 4)),
        (4 << 16 | 20, ".4-pre", XenVersion(4, 20, 3)),
        (4 << 16 | 20, ".0-rc3", XenVersion(4, 20, -1)),
        (4 << 16 | 23, "-unstable", XenVersion(4, 23, -1)),
        (4 << 16 | 17, ".5-13\0\0", XenVersion(4, 17, 5)),
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
        (XenVersion(4, 22, 0), True),
        (XenVersion(5, 0, 0), True),
    ],
)
def test_only_fixed_releases_count_as_safe_for_free_frames(
    version: XenVersion,
    safe: bool,  # noqa: FBT001
) -> None:
    assert version.offlines_free_frames_safely is safe


def test_polling_is_dead_from_4_14_to_4_18() -> None:
    polls = {
        minor: XenVersion(4, minor, 0).polls_corrected_errors_without_cmci
        for minor in range(13, 21)
    }
    assert [minor for minor, alive in polls.items() if not alive] == [14, 15, 16, 17, 18]
