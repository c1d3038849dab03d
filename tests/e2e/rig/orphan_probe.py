"""Starts a QEMU as the rig does, prints its process id and waits to be killed.

Run by a test, which then looks whether the QEMU died as well.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from . import image
from .qemu import Flavour, Machine, Qemu, Source
from .releases import DEBIAN_13


def main() -> None:
    """Boot into nothing in particular; never return."""
    folder = Path(sys.argv[1])
    payload = folder / "empty.img"
    payload.write_bytes(bytes(1 << 20))
    machine = Machine(
        flavour=Flavour.INTEL,
        source=Source.MCELOG,
        image=image.obtain(DEBIAN_13),
        payload=payload,
    )
    qemu = Qemu(machine, folder, folder)
    sys.stdout.write(f"{qemu.pid()}\n")
    sys.stdout.flush()
    signal.pause()


if __name__ == "__main__":
    main()
