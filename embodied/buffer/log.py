"""The append-only log under the replay buffer: one writer, any number of live readers."""

import errno
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Self

from embodied.buffer.lock import lock_directory
from embodied.buffer.segments import (
    FILE_HEADER,
    FIRST_OFFSET,
    RECORD_HEADER,
    Record,
    SegmentFile,
    end_of,
    file_header,
    list_segments,
    record_header,
    record_size,
    scan,
    segment_path,
)
from embodied.core.errors import ConfigError, EmbodiedError
from embodied.core.files import fsync_directory, full_disk_named

SEGMENT_BYTES = 64 << 20
MAX_SEGMENT_BYTES = 1 << 31


class LogWriter:
    """Appends records to segment files; holds the directory's writer lock while open.

    What flush has returned survives a crash of the machine; what append has returned survives
    a crash of the process. segment_bytes: size of a segment, whose space is reserved before
    anything is written to it. Raises RunInUseError while another process writes here.
    """

    def __init__(self, path: Path, segment_bytes: int = SEGMENT_BYTES) -> None:
        smallest = FILE_HEADER.size + RECORD_HEADER.size
        if not smallest <= segment_bytes <= MAX_SEGMENT_BYTES:
            raise ConfigError(
                f"segment_bytes is {segment_bytes}; it must lie in {smallest}..{MAX_SEGMENT_BYTES}"
            )
        self._path = Path(path)
        self._segment_bytes = segment_bytes
        self._fd: int | None = None
        self._broken = False
        self._offset = self._capacity = 0
        self._next_seq = 0
        self._durable_seq = -1
        with full_disk_named(self._path):
            self._path.mkdir(parents=True, exist_ok=True)
            self._lock: int | None = lock_directory(self._path)
        try:
            self._recover()
        except BaseException:
            self.close()
            raise

    @property
    def next_seq(self) -> int:
        """Sequence number that the next record will get."""
        return self._next_seq

    def _recover(self) -> None:
        segments = list_segments(self._path)
        self.segment = max(segments, default=0)
        for number, sealed in reversed(segments.items()):
            found = scan(segment_path(self._path, number, sealed=sealed), number)
            self._next_seq = max(self._next_seq, found.next_seq or 0)
            if not sealed:
                self._recover_open(number, found.end, found.clean)
            if self._next_seq:
                break
        self._durable_seq = self._next_seq - 1

    def _recover_open(self, number: int, end: int, clean: bool) -> None:
        path = segment_path(self._path, number, sealed=False)
        if not clean and end == FIRST_OFFSET:
            path.unlink()  # the crash came before its first record
            fsync_directory(self._path)
            return
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._offset = end
        self._capacity = os.fstat(self._fd).st_size
        if not clean:
            self._seal()  # whole records follow the damage: keep all of it, go on in a new file
            return
        with SegmentFile(path, number) as file:
            torn = not file.blank_from(end)
        if torn:
            os.ftruncate(self._fd, end)
        if torn or self._capacity < self._segment_bytes:
            with suppress(OSError):  # full: what there is gets used up, the next segment reports it
                os.posix_fallocate(self._fd, 0, max(self._capacity, self._segment_bytes))
            self._capacity = os.fstat(self._fd).st_size
        with full_disk_named(path):
            os.fsync(self._fd)

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
        total = RECORD_HEADER.size + payload_bytes
        self.ensure_room(record_size(payload_bytes))
        assert self._fd is not None
        header = record_header(self._next_seq, schema, parts)
        with full_disk_named(self._path):
            written = os.pwritev(self._fd, [header, *parts], self._offset)
            if written < total:
                rest = memoryview(b"".join([header, *parts]))
                while written < total:
                    written += os.pwrite(self._fd, rest[written:], self._offset + written)
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
                os.fdatasync(fd)
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
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            try:
                os.posix_fallocate(fd, 0, self._segment_bytes)
                os.pwrite(fd, file_header(self.segment + 1, self._next_seq), 0)
                os.fsync(fd)
                fsync_directory(self._path)
            except BaseException:
                os.close(fd)
                path.unlink()
                raise
        self._fd = fd
        self.segment += 1
        self._offset, self._capacity = FIRST_OFFSET, self._segment_bytes

    def _seal(self) -> None:
        assert self._fd is not None
        self._sync(self._fd)
        os.ftruncate(self._fd, self._offset)
        self._sync(self._fd)
        path = segment_path(self._path, self.segment, sealed=False)
        os.rename(path, segment_path(self._path, self.segment, sealed=True))
        os.close(self._fd)
        self._fd = None
        fsync_directory(self._path)

    def close(self) -> None:
        """Flush and give the lock up; safe to call twice. The last segment stays open on disk."""
        if self._lock is None:
            return
        try:
            if not self._broken and self._fd is not None and hasattr(self, "_durable_seq"):
                self.flush()
        finally:
            if self._fd is not None:
                os.close(self._fd)
            os.close(self._lock)
            self._fd = self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class LogReader:
    """Reads records in order, following a live writer. Needs no lock and never blocks.

    damaged: (segment, offset) of each stretch of a sealed segment that could not be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = Path(path)
        self._file: SegmentFile | None = None
        self._number = 0
        self._offset = FIRST_OFFSET
        self._last_seq = -1
        self.damaged: list[tuple[int, int]] = []

    def poll(self) -> Iterator[Record]:
        """New whole records since the last call. It may also yield what is not flushed yet."""
        while self._file is not None or self._open_next():
            assert self._file is not None
            if self._file.deleted:  # it was empty; its number may be in use again
                self._number -= 1
                self.close()
                continue
            # Asked before reading: once it is sealed, what is read below is all there will be.
            sealed = not segment_path(self._path, self._number, sealed=False).exists()
            while True:
                record = self._file.record_at(self._offset)
                if record is not None and record.seq > self._last_seq:
                    self._offset, self._last_seq = end_of(record), record.seq
                    yield record
                elif not sealed or not self._skip_damage():
                    break
            if not sealed:
                return
            self.close()

    def _open_next(self) -> bool:
        for number, sealed in list_segments(self._path).items():
            if number <= self._number:
                continue
            try:
                path = segment_path(self._path, number, sealed=sealed)
                self._file = SegmentFile(path, number)
            except FileNotFoundError:  # sealed between listing and opening
                self._file = SegmentFile(segment_path(self._path, number, sealed=True), number)
            self._number, self._offset, self._last_seq = number, FIRST_OFFSET, -1
            if self._file.base_seq() is None and sealed:
                self.damaged.append((number, 0))
            return True
        return False

    def _skip_damage(self) -> bool:
        """Go to the next whole record of a sealed segment; False if there is none."""
        assert self._file is not None
        if self._offset >= self._file.size:
            return False
        self.damaged.append((self._number, self._offset))
        found = self._file.find_after(self._offset + 8, self._last_seq)
        if found is None:
            return False
        self._offset = found
        return True

    def close(self) -> None:
        """Close the segment file; safe to call twice."""
        if self._file is not None:
            self._file.close()
            self._file = None
