"""Stands in for xl, as an executable: behaves as the scenario in its folder says.

The lines are those of tools/xl/xl_migrate.c.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

HERE = Path(sys.argv[0]).parent
SAVING = "Saving to migration stream new xl format (info 0x3/0x0/1234)"
ACKNOWLEDGED = "migration sender: Target has acknowledged transfer."
PERMISSION = "migration sender: Giving target permission to start."


def say(*lines: str) -> None:
    for line in lines:
        os.write(2, f"{line}\n".encode())


def fail(*lines: str) -> None:
    say(*lines)
    sys.exit(1)


def child(*argv: str, says: str = "") -> subprocess.Popen[bytes]:
    """A child that does nothing until it is told to end."""
    idle = f"import os, signal; os.write(2, {says.encode()!r}); signal.pause()"
    return subprocess.Popen([sys.executable, "-c", idle, *argv])


def success() -> None:
    say(SAVING, ACKNOWLEDGED, PERMISSION, "migration sender: Target reports successful startup.")


def failure() -> None:
    fail(
        SAVING, "libxl: error: no assigned devices, please", "Migration failed, resuming at sender."
    )


def refuses() -> None:
    fail("No config file stored for running domain and none supplied - cannot migrate.")


def startup_failure() -> None:
    say(SAVING, ACKNOWLEDGED, PERMISSION)
    fail("migration sender: Trying to resume at our end.", "migration sender: Resumed OK.")


def glued() -> None:
    """Permission behind what the other end has not finished, and then the line breaks."""
    say(SAVING)
    os.write(2, b"\rxc: info: Saving domain: 5678/5678  100%")
    os.write(2, b"migration target: Transfer complete, requ")
    say(ACKNOWLEDGED)
    os.write(2, b"esting permission to start dom")
    os.write(2, PERMISSION.encode())
    fail("client_loop: send disconnect: Broken pipe")


def undefined() -> None:
    """The permission itself got lost."""
    fail(SAVING, "Domain state is now undefined !")


def called_resumed() -> None:
    """The transport breaks after permission; the guest is called what xl would say."""
    name = "web\nmigration sender: Trying to resume at our end.\nmigration sender: Resumed OK.\n"
    fail(SAVING, ACKNOWLEDGED, PERMISSION, f'libxl: error: Domain "{name}" ...')


def final_handshake() -> None:
    fail(SAVING, ACKNOWLEDGED, PERMISSION, "** Migration failed during final handshake **")


def killed() -> None:
    say(SAVING)
    os.kill(os.getpid(), signal.SIGKILL)


def talks_too_much() -> None:
    for number in range(5000):
        say(f"progress {number} " + "x" * 500)
    fail("the end of it")


def pretends() -> None:
    fail(f"guest called {PERMISSION}", "y" * 9000 + PERMISSION, "failed")


def hangs_connecting() -> None:
    child("ssh", "spare", says="ready\n").wait()
    fail("migration receiver stream: unexpected EOF")


def hangs_saving() -> None:
    bystander = child("libxl-save-helper", "--save-domain", "5", "6", "1007", "1")
    say(SAVING)
    saver = child("libxl-save-helper", "--save-domain", "5", "6", sys.argv[4], "1", says="ready\n")
    saver.wait()
    spared = bystander.poll() is None
    bystander.terminate()
    bystander.wait()
    fail(f"the bystander was spared: {spared}", "Migration failed, resuming at sender.")


def hangs_in_the_handshake() -> None:
    transport = child("ssh", "spare")
    say(SAVING, ACKNOWLEDGED, "ready")
    with (HERE / "release").open():
        pass
    spared = transport.poll() is None
    transport.terminate()
    transport.wait()
    if not spared:
        fail("the transport was ended")


def leaves_a_daemon() -> None:
    daemon = subprocess.Popen(
        [sys.executable, "-c", "import signal; signal.pause()"], start_new_session=True
    )
    (HERE / "daemon.pid").write_text(str(daemon.pid))
    success()
    daemon.returncode = 0


(HERE / "argv.json").write_text(json.dumps(sys.argv[1:]))
(HERE / "pid").write_text(str(os.getpid()))
globals()[(HERE / "scenario").read_text()]()
