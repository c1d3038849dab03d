from __future__ import annotations

from pathlib import Path

import pytest

from pgofflined.diskless import may_reach_a_disk

MOUNTS = """\
22 1 0:20 / / rw - ext4 /dev/root rw
23 22 0:21 / /run rw,nosuid shared:5 - tmpfs tmpfs rw,size=100k,mode=755
24 23 0:22 / /run/jobs rw - ramfs ramfs rw
25 23 0:23 / /run/kept rw - tmpfs tmpfs rw,noswap
26 22 0:24 / /run\\040away rw - xfs /dev/sda rw
"""
NO_SWAP = "Filename Type Size Used Priority\n"
SWAP = NO_SWAP + "/dev/sda2 partition 100 0 -2\n"


@pytest.mark.parametrize(
    ("directory", "swaps", "leaks"),
    [
        ("/run/jobs", SWAP, None),
        ("/run/jobs/deep", SWAP, None),
        ("/run/kept", SWAP, None),
        ("/run/other", SWAP, "swapped out"),
        ("/run/other", NO_SWAP, None),
        ("/run/jobsworth", SWAP, "swapped out"),
        ("/var/lib", NO_SWAP, "ext4"),
        ("/run away/x", NO_SWAP, "xfs"),
    ],
)
def test_only_memory_that_is_never_written_to_a_disk_will_do(
    directory: str, swaps: str, leaks: str | None, tmp_path: Path
) -> None:
    mounts_file, swaps_file = tmp_path / "mountinfo", tmp_path / "swaps"
    mounts_file.write_text(MOUNTS)
    swaps_file.write_text(swaps)
    found = may_reach_a_disk(Path(directory), mounts=mounts_file, swaps=swaps_file)
    if leaks is None:
        assert found is None
    else:
        assert found is not None
        assert leaks in found
