"""Whether what lies in a directory stays in memory."""

from __future__ import annotations

from pathlib import Path


def may_reach_a_disk(
    directory: Path,
    *,
    mounts: Path = Path("/proc/self/mountinfo"),
    swaps: Path = Path("/proc/swaps"),
) -> str | None:
    """Why what lies in a directory may be written to a disk; None where it stays in memory."""
    kind, options = _file_system(directory, mounts.read_text(encoding="utf-8"))
    if kind == "ramfs":
        return None
    if kind != "tmpfs":
        return f"{directory} is on {kind}, which is not in memory"
    has_swap = len(swaps.read_text(encoding="utf-8").splitlines()) > 1
    if has_swap and "noswap" not in options:
        return f"{directory} is on a tmpfs that may be swapped out"
    return None


def _file_system(directory: Path, mountinfo: str) -> tuple[str, frozenset[str]]:
    """Type and options of the file system that a path is on (proc_pid_mountinfo(5))."""
    best: tuple[int, str, frozenset[str]] = (-1, "an unknown file system", frozenset())
    for line in mountinfo.splitlines():
        fields, _, rest = line.partition(" - ")
        point = Path(fields.split()[4].encode().decode("unicode_escape"))
        kind, _, options = rest.split(" ", 2)
        # Of several at the same place the last one covers those before.
        if directory.is_relative_to(point) and len(point.parts) >= best[0]:
            best = (len(point.parts), kind, frozenset(options.split(",")))
    return best[1], best[2]
