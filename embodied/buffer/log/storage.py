"""The file operations under the log, in one place, so that tests can record and replay them."""

import os
from collections.abc import Sequence
from pathlib import Path

from embodied.core.files import fsync_directory

Buffer = bytes | bytearray | memoryview


class Storage:
    """Operations on files as the operating system does them; OSError as it raises them."""

    def create(self, path: Path) -> int:
        """Create a file that must not exist, for reading and writing."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)

    def open(self, path: Path) -> int:
        """Open an existing file for reading and writing."""
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def reserve(self, fd: int, nbytes: int) -> None:
        """Reserve space up to nbytes, so that writing there cannot run out of it."""
        os.posix_fallocate(fd, 0, nbytes)

    def write(self, fd: int, parts: Sequence[Buffer], offset: int) -> None:
        """Write all parts, one behind the other."""
        total = sum(len(part) for part in parts)
        written = os.pwritev(fd, parts, offset)
        if written < total:
            rest = memoryview(b"".join(parts))
            while written < total:
                written += os.pwrite(fd, rest[written:], offset + written)

    def truncate(self, fd: int, nbytes: int) -> None:
        """Cut the file off."""
        os.ftruncate(fd, nbytes)

    def sync_data(self, fd: int) -> None:
        """Make contents durable, and of the metadata what reading them needs."""
        os.fdatasync(fd)

    def sync(self, fd: int) -> None:
        """Make contents and metadata durable."""
        os.fsync(fd)

    def close(self, fd: int) -> None:
        """Close the file."""
        os.close(fd)

    def rename(self, source: Path, target: Path) -> None:
        """Rename a file; it replaces the target."""
        os.rename(source, target)

    def unlink(self, path: Path) -> None:
        """Remove a file's name."""
        os.unlink(path)

    def sync_directory(self, path: Path) -> None:
        """Make the names in a directory durable."""
        fsync_directory(path)


STORAGE = Storage()
