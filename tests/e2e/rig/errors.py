"""What can go wrong with the rig, told apart from what can go wrong in a test."""

from __future__ import annotations


class RigError(Exception):
    """The rig failed, not the program under test."""


class MissingTools(RigError):
    """The machine lacks something; the message says what and how to get it."""


class BuildFailed(RigError):
    """The dom0 image, the guest or the payload could not be made."""


class BootFailed(RigError):
    """The host did not come up; the message ends with its serial console's tail."""


class HostLost(RigError):
    """The host went away or hangs; the message says where its CPUs are."""


class GuestFailed(RigError):
    """A guest did not boot; the message ends with its console's tail."""


class CommandFailed(AssertionError):
    """A command in dom0 ended with a status other than 0."""


class CommandTimeout(AssertionError):
    """A command in dom0 did not end in time and was killed; the host is well."""


class ConditionNotMet(AssertionError):
    """What a test waited for did not happen in time."""
