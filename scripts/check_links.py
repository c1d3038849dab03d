"""Checks that every relative link and anchor in the project's Markdown leads somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """Anchors that GitHub makes of a page's headings."""
    found = set()
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            heading = line.lstrip("#").strip().lower()
            found.add(re.sub(r"[^\w\- ]", "", heading).replace(" ", "-"))
    return found


def broken_links(page: Path) -> list[str]:
    """Links of a page that lead nowhere, as lines to print."""
    problems = []
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name) if name else page
        if not target.exists():
            problems.append(f"{page}: no such file: {link}")
        elif anchor and target.suffix == ".md" and anchor not in anchors(target):
            problems.append(f"{page}: no such heading: {link}")
    return problems


def main() -> int:
    """Print every broken link; 1 if there is any."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    problems = [line for name in listed if Path(name).exists() for line in broken_links(Path(name))]
    print("\n".join(problems) or f"links: {len(listed)} pages, all fine")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
