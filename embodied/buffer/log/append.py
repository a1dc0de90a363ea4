"""The append-only log under the replay buffer: one writer, any number of live readers."""

import errno
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Self

from embodied.buffer.log.lock import lock_directory
from embodied.buffer.log.segments import (
    FILE_HEADER,
    FIRST_OFFSET,
    RECORD_HEADER,
    SegmentFile,
    Walk,
    file_header,
    list_segments,
    record_header,
    record_size,
    segment_path,
    walk_through,
)
from embodied.buffer.log.storage import STORAGE, Storage
from embodied.core.errors import ConfigError, EmbodiedError
from embodied.core.files import full_disk_named

SEGMENT_BYTES = 128 << 20
MAX_SEGMENT_BYTES = 1 << 31


class LogWriter:
    """Appends records to segment files; holds the directory's writer lock while open.

    What flush has returned survives a crash of the machine; what append has returned survives
    a crash of the process. segment_bytes: size of a segment, whose space is reserved before
    anything is written to it. on_seal: called with the number of each segment that is complete.
    known_next: of sealed segments that need not be read through, the next sequence number.
    read_through: reads a segment to its end when opening; it may begin behind records that are
    known otherwise.
    Raises RunInUseError while another process writes here.
    """

    def __init__(
        self,
        path: Path,
        segment_bytes: int = SEGMENT_BYTES,
        *,
        on_seal: Callable[[int], None] | None = None,
        known_next: Mapping[int, int] | None = None,
        read_through: Callable[[SegmentFile], Walk] = walk_through,
        storage: Storage = STORAGE,
    ) -> None:
        smallest = FILE_HEADER.size + RECORD_HEADER.size
        if not smallest <= segment_bytes <= MAX_SEGMENT_BYTES:
            raise ConfigError(
                f"segment_bytes is {segment_bytes}; it must lie in {smallest}..{MAX_SEGMENT_BYTES}"
            )
        self._path = Path(path)
        self._segment_bytes = segment_bytes
        self._on_seal = on_seal
        self._read_through = read_through
        self._storage = storage
        self._fd: int | None = None
        self._broken = False
        self._offset = self._capacity = 0
        self._next_seq = 0
        self._durable_seq = -1
        with full_disk_named(self._path):
            made = [path for path in (self._path, *self._path.parents) if not path.exists()]
            self._path.mkdir(parents=True, exist_ok=True)
            for path in reversed(made):
                self._storage.sync_directory(path.parent)
            self._lock: int | None = lock_directory(self._path)
        try:
            self._recover(known_next or {})
        except BaseException:
            self.close()
            raise

    @property
    def offset(self) -> int:
        """Where in the segment the next record will begin."""
        return self._offset

    @property
    def next_seq(self) -> int:
        """Sequence number that the next record will get."""
        return self._next_seq

    def _recover(self, known_next: Mapping[int, int]) -> None:
        segments = list_segments(self._path)
        self.segment = max(segments, default=0)
        for number, sealed in reversed(segments.items()):
            if sealed and number in known_next:
                self._next_seq = max(self._next_seq, known_next[number])
                break
            path = segment_path(self._path, number, sealed=sealed)
            with SegmentFile(path, number) as file:
                walk = self._read_through(file)
            self._next_seq = max(self._next_seq, walk.next_seq)
            if not sealed:
                self._recover_open(path, walk)
            if self._next_seq:
                break
        self._durable_seq = self._next_seq - 1

    def _recover_open(self, path: Path, walk: Walk) -> None:
        if walk.damaged and walk.end == FIRST_OFFSET:
            self._storage.unlink(path)  # the crash came before its first record
            self._storage.sync_directory(self._path)
            return
        self._fd = self._storage.open(path)
        self._offset = walk.end
        self._capacity = os.fstat(self._fd).st_size
        if walk.damaged:
            self._seal()  # whole records follow the damage: keep all of it, go on in a new file
            return
        if not walk.blank:
            self._storage.truncate(self._fd, walk.end)
        if not walk.blank or self._capacity < self._segment_bytes:
            with suppress(OSError):  # full: what there is gets used up, the next segment reports it
                self._storage.reserve(self._fd, max(self._capacity, self._segment_bytes))
            self._capacity = os.fstat(self._fd).st_size
        with full_disk_named(path):
            self._storage.sync(self._fd)
            self._storage.sync_directory(self._path)  # a crash may have come before that

    def ensure_room(self, record_bytes: int) -> None:
        """Begin a new segment unless records of this many bytes (sum of record_size) still fit.

        Raises StorageFullError if there is no space for a new segment, ConfigError if they would
        not fit into any.
        """
        self._check_usable()
        if record_bytes > self._segment_bytes - FIRST_OFFSET:
            raise ConfigError(
                f"a record of {record_bytes} bytes does not fit into a segment; set "
                f"segment_bytes (now {self._segment_bytes}) to at least "
                f"{record_bytes + FIRST_OFFSET}"
            )
        if self._fd is not None and self._offset + record_bytes > self._capacity:
            self._seal()
        if self._fd is None:
            self._create()

    def append(self, *payload: bytes | bytearray | memoryview, schema: int = 0) -> int:
        """Write one record, its payload in any number of parts; return its sequence number.

        Raises StorageFullError (nothing was appended; try again once there is space) and
        ConfigError for a record larger than a segment.
        """
        parts = [memoryview(part).cast("B") for part in payload if len(part)]
        payload_bytes = sum(part.nbytes for part in parts)
        self.ensure_room(record_size(payload_bytes))
        assert self._fd is not None
        header = record_header(self._next_seq, schema, parts)
        with full_disk_named(self._path):
            self._storage.write(self._fd, [header, *parts], self._offset)
        self._offset += record_size(payload_bytes)
        self._next_seq += 1
        return self._next_seq - 1

    def flush(self) -> int:
        """Make everything appended durable; return the last durable sequence number, or -1."""
        self._check_usable()
        if self._fd is not None and self._durable_seq < self._next_seq - 1:
            self._sync(self._fd)
        self._durable_seq = self._next_seq - 1
        return self._durable_seq

    def _sync(self, fd: int) -> None:
        try:
            with full_disk_named(self._path):
                self._storage.sync_data(fd)
        except BaseException:
            # The kernel may have dropped the pages; a second fdatasync would wrongly succeed.
            self._broken = True
            raise

    def _check_usable(self) -> None:
        if self._lock is None:
            raise EmbodiedError(f"the log {self._path} is closed")
        if self._broken:
            raise OSError(
                errno.EIO,
                "the disk failed to store data; check it, then restart the process that writes",
                str(self._path),
            )

    def _create(self) -> None:
        path = segment_path(self._path, self.segment + 1, sealed=False)
        with full_disk_named(path):
            fd = self._storage.create(path)
            try:
                self._storage.reserve(fd, self._segment_bytes)
                self._storage.write(fd, [file_header(self.segment + 1, self._next_seq)], 0)
                self._storage.sync(fd)
                self._storage.sync_directory(self._path)
            except BaseException:
                self._storage.close(fd)
                self._storage.unlink(path)
                raise
        self._fd = fd
        self.segment += 1
        self._offset, self._capacity = FIRST_OFFSET, self._segment_bytes

    def _seal(self) -> None:
        assert self._fd is not None
        self._sync(self._fd)
        self._storage.truncate(self._fd, self._offset)
        self._sync(self._fd)
        path = segment_path(self._path, self.segment, sealed=False)
        self._storage.rename(path, segment_path(self._path, self.segment, sealed=True))
        self._storage.close(self._fd)
        self._fd = None
        self._storage.sync_directory(self._path)
        self._durable_seq = self._next_seq - 1
        if self._on_seal is not None:
            self._on_seal(self.segment)

    def remove(self, segment: int) -> None:
        """Delete a sealed segment; its numbers are not used again while later ones are there."""
        self._check_usable()
        self._storage.unlink(segment_path(self._path, segment, sealed=True))
        self._storage.sync_directory(self._path)

    def close(self) -> None:
        """Seal the last segment and give the lock up; safe to call twice."""
        if self._lock is None:
            return
        try:
            if not self._broken and self._fd is not None:
                self._finish()
        finally:
            if self._fd is not None:
                self._storage.close(self._fd)
            os.close(self._lock)
            self._fd = self._lock = None

    def _finish(self) -> None:
        assert self._fd is not None
        if self._offset > FIRST_OFFSET:
            self._seal()
        else:  # it alone may know the next sequence number
            self._storage.truncate(self._fd, FIRST_OFFSET)
            self._sync(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
