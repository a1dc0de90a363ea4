"""What another site has acknowledged of a log: a small file that lets its writer delete.

Two slots in a file of fixed size, written in turn, so that a full disk cannot stop it and a torn
write leaves the slot before. Losing it only costs asking the other site again.
"""

import fcntl
import os
import struct
from pathlib import Path
from typing import Annotated

import msgspec
from crc32c import crc32c

from embodied.buffer.log.segments import list_segments
from embodied.core.errors import ConfigError, RunInUseError
from embodied.core.files import fsync_directory, full_disk_named

NAME = "acknowledged"

_SLOT_BYTES = 1 << 18
_HEAD = struct.Struct("<IIQ")  # CRC32C of all that follows, bytes of the contents, generation
_CHECKED_FROM = 4
_MOST_SEGMENTS = 1 << 14
_Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class Acknowledged(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """segments: those of whose steps and episodes nothing is left to send, ascending. newest: the
    log's newest segment by then. episodes: stream → smallest number above all of its episodes."""

    segments: tuple[_Count, ...] = ()
    newest: _Count = 0
    episodes: dict[str, _Count] = {}


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Acknowledged)


class AcknowledgedFile:
    """Stores what is acknowledged; for the one process that sends the log.

    Raises RunInUseError while another one does.
    """

    def __init__(self, directory: Path) -> None:
        reserve_acknowledged(directory)
        self._path = directory / NAME
        self._fd: int | None = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise RunInUseError(
                f"{directory} is being sent by another process; stop that, or use another spool"
            ) from None
        self._generation = max(_read_slots(self._fd), default=0)

    def store(self, value: Acknowledged) -> None:
        """Make it durable. Raises ConfigError for more streams than there is room for."""
        assert self._fd is not None
        kept = msgspec.structs.replace(value, segments=value.segments[:_MOST_SEGMENTS])
        contents = _encoder.encode(kept)
        if _HEAD.size + len(contents) > _SLOT_BYTES:
            raise ConfigError(
                f"{self._path} has no room for {len(value.episodes)} streams; name streams after "
                "robots, not after episodes"
            )
        self._generation += 1
        head = _HEAD.pack(0, len(contents), self._generation)
        crc = crc32c(contents, crc32c(head[_CHECKED_FROM:]))
        head = _HEAD.pack(crc, len(contents), self._generation)
        with full_disk_named(self._path):
            os.pwrite(self._fd, head + contents, self._generation % 2 * _SLOT_BYTES)
            os.fdatasync(self._fd)

    def close(self) -> None:
        """Close the file; safe to call twice."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def reserve_acknowledged(directory: Path) -> None:
    """Make the file, unless it is there, with all the space that it will ever need."""
    path = directory / NAME
    with full_disk_named(path):
        if not directory.exists():
            directory.mkdir(parents=True, exist_ok=True)
            fsync_directory(directory.parent)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            if os.fstat(fd).st_size < 2 * _SLOT_BYTES:
                os.posix_fallocate(fd, 0, 2 * _SLOT_BYTES)
                os.fsync(fd)
                fsync_directory(directory)
        finally:
            os.close(fd)


def load_acknowledged(directory: Path) -> Acknowledged:
    """What the file in a log's directory says; nothing if it is not there, damaged, or of a log
    that was here before."""
    try:
        fd = os.open(directory / NAME, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return Acknowledged()
    try:
        found = _read_slots(fd)
    finally:
        os.close(fd)
    value = found[max(found)] if found else Acknowledged()
    return value if value.newest <= max(list_segments(directory), default=0) else Acknowledged()


def _read_slots(fd: int) -> dict[int, Acknowledged]:
    """Generation → contents of the slots that are whole."""
    found: dict[int, Acknowledged] = {}
    for slot in range(2):
        data = os.pread(fd, _SLOT_BYTES, slot * _SLOT_BYTES)
        if len(data) < _HEAD.size:
            continue
        crc, length, generation = _HEAD.unpack_from(data)
        end = _HEAD.size + length
        if not 0 < length <= len(data) - _HEAD.size or crc32c(data[_CHECKED_FROM:end]) != crc:
            continue
        try:
            found[generation] = _decoder.decode(data[_HEAD.size : end])
        except (msgspec.MsgspecError, UnicodeError):
            continue
    return found
