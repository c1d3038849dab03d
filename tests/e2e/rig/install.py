"""Installs the payload disk's content in dom0, as a package of the project would.

Runs once at boot, on dom0's Python, before the agent.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

PAYLOAD = Path("/run/rig")
UNITS = Path("/usr/lib/systemd/system")
CONFIG = Path("/etc/pgofflined")
TESTS = Path("/opt/pgofflined-tests")
SERVICE = "pgofflined.service"
REPORT = Path("/run/rig-install.json")


def install() -> None:
    """Put wheel, units, configuration and tests into place; start the service if asked."""
    wishes = json.loads((PAYLOAD / "payload.json").read_text())
    wheels = sorted((PAYLOAD / "wheel").glob("*.whl"))
    for wheel in wheels:
        # Debian's layout, so that the program is /usr/bin/pgofflined.
        _call(
            [sys.executable, "-m", "installer", "--prefix", "/usr", str(wheel)],
            DEB_PYTHON_INSTALL_LAYOUT="deb",
        )
    _copy(PAYLOAD / "systemd", UNITS)
    _copy(PAYLOAD / "config", CONFIG)
    _copy(PAYLOAD / "tests", TESTS)
    _call(["systemctl", "daemon-reload"])
    if wheels and wishes["start_service"] and (UNITS / SERVICE).exists():
        _call(["systemctl", "enable", SERVICE])
        # Without waiting: this runs inside the boot transaction that it would wait for.
        _call(["systemctl", "start", "--no-block", SERVICE])


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)


def _call(argv: list[str], **environment: str) -> None:
    done = subprocess.run(
        argv,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        said = done.stdout + done.stderr
        raise RuntimeError(f"{' '.join(argv)}: status {done.returncode}\n{said}")


def main() -> None:
    """Install, and leave a report that the test run reads."""
    try:
        install()
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        REPORT.write_text(json.dumps({"ok": False, "message": f"{type(error).__name__}: {error}"}))
        raise
    REPORT.write_text(json.dumps({"ok": True, "message": ""}))


if __name__ == "__main__":
    main()
