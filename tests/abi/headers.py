"""Xen's public headers of two releases, taken from Debian's own packages.

The package of the release that is not the machine's comes through apt as well: with a
configuration directory of its own, made from the machine's sources with the release's name
replaced.  What is unpacked stays in the cache.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "libxen-dev"


class HeadersMissing(Exception):
    """The headers cannot be had; the message says why and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """A Debian release and the Xen that it ships."""

    codename: str
    xen: tuple[int, int]

    def __str__(self) -> str:
        return f"xen-{self.xen[0]}.{self.xen[1]}"


RELEASES = (
    Release(codename="bookworm", xen=(4, 17)),
    Release(codename="trixie", xen=(4, 20)),
)


def cache_dir() -> Path:
    """Where the project keeps what it has fetched."""
    return Path(os.environ.get("PGOFFLINED_CACHE") or Path.home() / ".cache" / "pgofflined")


def headers(release: Release) -> Path:
    """Include directory with ``xen/xen.h`` of a release, fetched if it is not in the cache.

    Raises HeadersMissing.
    """
    target = cache_dir() / "headers" / release.codename
    include = target / "usr" / "include"
    if not (include / "xen" / "xen.h").exists():
        for tool in ("apt-get", "dpkg-deb"):
            if shutil.which(tool) is None:
                raise HeadersMissing(
                    f"{tool} is missing: this test needs a Debian machine to take {PACKAGE} from"
                )
        _fetch(release, target)
    _check(release, include)
    return include


def _fetch(release: Release, target: Path) -> None:
    work = target.with_name(f"{target.name}.partial.{os.getpid()}")
    shutil.rmtree(work, ignore_errors=True)
    try:
        options = _apt_options(release, work / "apt")
        _run(["apt-get", *options, "update"], work)
        _run(["apt-get", *options, "download", PACKAGE], work)
        packages = list(work.glob(f"{PACKAGE}_*.deb"))
        if not packages:
            raise HeadersMissing(f"apt-get download {PACKAGE} of {release.codename} left no file")
        _run(["dpkg-deb", "--extract", str(packages[0]), str(work / "root")], work)
        shutil.rmtree(target, ignore_errors=True)
        (work / "root").rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _run(command: Sequence[str], directory: Path) -> None:
    done = subprocess.run(
        command,
        cwd=directory,
        env={**os.environ, "LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise HeadersMissing(
            f"{' '.join(command)} failed with status {done.returncode}; Xen's headers cannot be "
            f"compared without {PACKAGE} (is the network there?):\n{done.stdout[-2000:]}"
        )


def _apt_options(release: Release, directory: Path) -> list[str]:
    """An apt of its own: the machine's sources for another release, nothing else of the machine's.

    Keys and authentication settings stay the machine's.
    """
    for part in ("sources.list.d", "state/lists/partial", "cache/archives/partial"):
        (directory / part).mkdir(parents=True)
    (directory / "status").touch()
    (directory / "sources.list").touch()
    written = 0
    for source in _machine_sources():
        text = _for_release(
            source.read_text(), release.codename, deb822=source.suffix == ".sources"
        )
        if text:
            (directory / "sources.list.d" / source.name).write_text(text)
            written += 1
    if not written:
        raise HeadersMissing(
            "no apt source of this machine is for its own Debian release: "
            f"cannot tell where to take {PACKAGE} of {release.codename} from"
        )
    settings = {
        "Dir::Etc::SourceList": directory / "sources.list",
        "Dir::Etc::SourceParts": directory / "sources.list.d",
        "Dir::Etc::Preferences": "/dev/null",
        "Dir::Etc::PreferencesParts": "/dev/null",
        "Dir::State": directory / "state",
        "Dir::State::Status": directory / "status",
        "Dir::Cache": directory / "cache",
        "APT::Architecture": "amd64",
        "APT::Architectures": "amd64",
        "APT::Default-Release": "",
        "APT::Sandbox::User": "root" if os.geteuid() == 0 else "",
        "APT::Get::List-Cleanup": "0",
        "APT::Update::Post-Invoke::": "",
        "Acquire::Languages": "none",
        "Acquire::Retries": "3",
    }
    return ["-qq", *(f"-o{name}={value}" for name, value in settings.items())]


def _machine_sources() -> list[Path]:
    parts = Path("/etc/apt/sources.list.d")
    found = [Path("/etc/apt/sources.list"), *sorted(parts.glob("*.sources"))]
    return [path for path in (*found, *sorted(parts.glob("*.list"))) if path.is_file()]


def _machine_codename() -> str:
    text = Path("/etc/os-release").read_text()
    match = re.search(r'^VERSION_CODENAME="?([a-z]+)"?$', text, re.MULTILINE)
    if match is None:
        raise HeadersMissing("/etc/os-release names no VERSION_CODENAME: this is no Debian release")
    return match[1]


def _for_release(text: str, codename: str, *, deb822: bool) -> str:
    """The parts of a source file that are for the machine's release, for another one instead."""
    ours = re.compile(rf"\b{re.escape(_machine_codename())}(?=$|[\s/-])", re.MULTILINE)
    if deb822:
        kept = [
            stanza
            for stanza in re.split(r"\n[ \t]*\n", re.sub(r"^#.*\n?", "", text, flags=re.MULTILINE))
            if re.search(r"^Types:.*\bdeb\b", stanza, re.MULTILINE | re.IGNORECASE)
            and any(ours.search(suites) for suites in re.findall(r"^Suites:(.*)$", stanza, re.M))
        ]
        return "\n\n".join(
            re.sub(r"^Suites:.*$", lambda line: ours.sub(codename, line[0]), stanza, flags=re.M)
            for stanza in kept
        )
    # deb [options] address suite components: only the suite may change.
    lines = [
        re.match(r"^(deb\s+(?:\[[^]]*\]\s+)?\S+\s+)(\S+)(\s.*)$", s) for s in text.splitlines()
    ]
    return "".join(
        f"{line[1]}{ours.sub(codename, line[2])}{line[3]}\n"
        for line in lines
        if line and re.fullmatch(rf"{ours.pattern}\S*", line[2])
    )


def _check(release: Release, include: Path) -> None:
    """Make sure that these are the headers of the release that the test believes them to be."""
    text = (include / "xen" / "domctl.h").read_text()
    expected = {"bookworm": "0x00000015", "trixie": "0x00000017"}[release.codename]
    if f"XEN_DOMCTL_INTERFACE_VERSION {expected}" not in text:
        raise HeadersMissing(
            f"the headers in {include} are not those of Xen {release}; remove them and try again"
        )
