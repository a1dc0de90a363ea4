"""One writer per directory: a lock that the kernel gives up when its holder dies."""

import fcntl
import os
from pathlib import Path

from embodied.core.errors import RunInUseError

LOCK_NAME = "writer.lock"


def lock_directory(directory: Path) -> int:
    """Take the writer's lock; it is held until the returned descriptor is closed.

    Raises RunInUseError that names the pid of the process that holds it.
    """
    path = directory / LOCK_NAME
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    except BlockingIOError:
        holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
        os.close(fd)
        raise RunInUseError(
            f"{directory} is being written by the process with pid {holder}; stop it, or use "
            "another directory"
        ) from None
    except BaseException:
        os.close(fd)
        raise
    return fd
