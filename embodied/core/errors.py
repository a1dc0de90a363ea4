"""What can go wrong, as types: every message says what, where, and what would be right."""


class EmbodiedError(Exception):
    """Base of all errors meant for a user; the command line prints only its message."""


class ConfigError(EmbodiedError, ValueError):
    """A configuration names something unknown or holds a value that cannot be used."""


class SpecError(EmbodiedError, ValueError):
    """An array does not fit the ArraySpec it was declared with."""


class CorruptDataError(EmbodiedError):
    """Stored or received bytes fail their checksum, bounds or schema."""


class StorageFullError(EmbodiedError):
    """The file system has no space left; everything acknowledged before is intact."""


class RunInUseError(EmbodiedError):
    """Another process holds the run directory."""


class DeviceLostError(EmbodiedError):
    """A device's driver failed: the device takes no more work until it is opened again."""


class LeaseError(EmbodiedError):
    """A lease that is needed is not held, has run out, or cannot be had."""


class LinkError(EmbodiedError):
    """The other end of a channel did not answer in time."""


class IdentityError(EmbodiedError):
    """Who is at the other end is not known, or not allowed to do this."""


class NoActionError(EmbodiedError):
    """A policy gave no decision in time: what is committed plays, then the robot holds."""


class MissingDependencyError(EmbodiedError):
    """A package or system library that this feature needs is not installed."""
