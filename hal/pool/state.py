"""Where this host's state lies that outlives a process: one directory per user."""

import os
from pathlib import Path

from embodied.core.errors import ConfigError
from embodied.core.files import full_disk_named

# fmt: off
_NETWORK = frozenset((
    "nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "ceph", "lustre", "gpfs", "beegfs", "ocfs2",
    "gfs2", "fuse.sshfs", "fuse.glusterfs", "fuse.ceph", "fuse.juicefs",
))
# fmt: on


def state_dir() -> Path:
    """The directory of this host's state, made with mode 0700 if it is not there.

    $EMBODIED_STATE, else $XDG_STATE_HOME/embodied, else ~/.local/state/embodied. Raises
    ConfigError if the name is relative or cannot be made, StorageFullError on a full disk.
    """
    path = _configured()
    try:
        with full_disk_named(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"the state directory {path} cannot be made: {error.strerror}. Set EMBODIED_STATE to "
            "a directory that you may write to"
        ) from error
    return path


def pool_path() -> Path:
    """The file of this host's pool, for `hal.pool.pool.Pool`."""
    return state_dir() / "pool.sqlite"


def check_local(path: Path) -> None:
    """ConfigError if `path` lies on a network file system, which several hosts may share.

    Locks and shared memory do not reach from one host to another, so two hosts would lease
    the same device twice.
    """
    kind = _filesystem(path)
    if kind in _NETWORK:
        raise ConfigError(
            f"{path} lies on a network file system ({kind}); a pool belongs to one host and needs "
            "a local disk. Set EMBODIED_STATE to a local directory, such as /var/tmp/embodied"
        )


def _configured() -> Path:
    given = os.environ.get("EMBODIED_STATE")
    if given:
        path = Path(given).expanduser()
        if not path.is_absolute():
            raise ConfigError(
                f"EMBODIED_STATE is '{given}'; it must be an absolute path, or processes started "
                "in different directories would not see each other's devices"
            )
        return path
    base = os.environ.get("XDG_STATE_HOME", "")
    if os.path.isabs(base):
        return Path(base) / "embodied"
    try:
        return Path.home() / ".local" / "state" / "embodied"
    except RuntimeError as error:
        raise ConfigError(
            "this user has no home directory; set EMBODIED_STATE to a directory for the state"
        ) from error


def _filesystem(path: Path) -> str:
    """Type of the file system that holds `path`, '' where the kernel does not tell."""
    try:
        device = os.stat(path).st_dev
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return ""
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in lines:
        fields = line.split()
        if fields[2] == number:
            return fields[fields.index("-") + 1]
    return ""
