"""The control socket: how the command line talks to the daemon."""

from pgofflined.control.server import ControlServer, Operations

__all__ = ["ControlServer", "Operations"]
