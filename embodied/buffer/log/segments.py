"""Segment files: names, the header, records, and finding the next whole record after damage.

A file is a header, then records at multiples of 8 bytes, then (until it is sealed) preallocated
zeros. Record: magic, CRC32C of all that follows, total length, schema id, sequence number, payload.
"""

import errno
import os
import re
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Self

from crc32c import crc32c

from embodied.core.errors import CorruptDataError

FORMAT = 2
RECORD_HEADER = struct.Struct("<4sIIIQ")
FILE_HEADER = struct.Struct("<8sIIQII")
FIRST_OFFSET = FILE_HEADER.size

_MAGIC = b"\xe5REC"
_FILE_MAGIC = b"EMBSEGM\xe5"
_NAME = re.compile(r"(\d{8})\.seg(\.open)?")
_CHECKED_FROM = 8
_BODY = struct.Struct("<IIQ")
_WINDOW = 1 << 20
_ZEROS = bytes(_WINDOW)


class Record(NamedTuple):
    """One record: global sequence number, schema id, payload, and where it lies."""

    seq: int
    schema: int
    payload: memoryview
    segment: int
    offset: int


def record_size(payload_bytes: int) -> int:
    """Bytes that a record takes up in a segment."""
    length = RECORD_HEADER.size + payload_bytes
    return length + -length % 8


def end_of(record: Record) -> int:
    """Offset at which the next record begins."""
    return record.offset + record_size(record.payload.nbytes)


def segment_path(directory: Path, number: int, *, sealed: bool) -> Path:
    """Path of a segment file."""
    return directory / (f"{number:08d}.seg" if sealed else f"{number:08d}.seg.open")


def list_segments(directory: Path) -> dict[int, bool]:
    """Number → whether it is sealed, in ascending order; empty if there is no directory yet."""
    try:
        found = [match for name in os.listdir(directory) if (match := _NAME.fullmatch(name))]
    except FileNotFoundError:
        return {}
    return dict(sorted((int(match[1]), match[2] is None) for match in found))


def file_header(number: int, base_seq: int) -> bytes:
    """Header of segment `number`, whose first record will have the sequence number base_seq."""
    head = FILE_HEADER.pack(_FILE_MAGIC, FORMAT, number, base_seq, 0, 0)
    return FILE_HEADER.pack(_FILE_MAGIC, FORMAT, number, base_seq, crc32c(head), 0)


def record_header(seq: int, schema: int, payload: list[memoryview]) -> bytes:
    """Header of a record with this payload."""
    length = RECORD_HEADER.size + sum(part.nbytes for part in payload)
    crc = crc32c(_BODY.pack(length, schema, seq))
    for part in payload:
        crc = crc32c(part, crc)
    return RECORD_HEADER.pack(_MAGIC, crc, length, schema, seq)


def parse(data: memoryview, at: int, segment: int, offset: int) -> Record | None:
    """The record at data[at:], which lies at `offset` of the segment; None unless it is whole."""
    if not 0 <= at <= len(data) - RECORD_HEADER.size:
        return None
    magic, crc, length, schema, seq = RECORD_HEADER.unpack_from(data, at)
    if magic != _MAGIC or not RECORD_HEADER.size <= length <= len(data) - at:
        return None
    if crc32c(data[at + _CHECKED_FROM : at + length]) != crc:
        return None
    return Record(seq, schema, data[at + RECORD_HEADER.size : at + length], segment, offset)


class SegmentFile:
    """Reads one segment by pread, so that a file truncated meanwhile reads short: no SIGBUS."""

    def __init__(self, path: Path, number: int) -> None:
        self.number = number
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if stat.S_ISDIR(os.fstat(self._fd).st_mode):  # not ours: it reads as an empty file
            os.close(self._fd)
            self._fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self._window = memoryview(b"")
        self._start = 0

    @property
    def sealed(self) -> bool:
        """Whether it was opened under the name of a sealed segment."""
        return self.path.suffix == ".seg"

    @property
    def size(self) -> int:
        """Present size of the file in bytes."""
        return os.fstat(self._fd).st_size

    @property
    def deleted(self) -> bool:
        """Whether the file has lost its name."""
        return os.fstat(self._fd).st_nlink == 0

    def base_seq(self) -> int | None:
        """Sequence number in the file's header; None if the header is damaged or not written."""
        head = os.pread(self._fd, FILE_HEADER.size, 0)
        if len(head) < FILE_HEADER.size:
            return None
        magic, version, number, base_seq, crc, _ = FILE_HEADER.unpack(head)
        blank = FILE_HEADER.pack(magic, version, number, base_seq, 0, 0)
        if magic != _FILE_MAGIC or number != self.number or crc != crc32c(blank):
            return None
        if version != FORMAT:
            raise CorruptDataError(
                f"{self.path} has log format {version}; this release reads format {FORMAT}: "
                "install the release that wrote it"
            )
        return base_seq

    def record_at(self, offset: int) -> Record | None:
        """The whole record that begins at this offset; None if there is none (yet)."""
        record = parse(self._window, offset - self._start, self.number, offset)
        if record is not None:
            return record
        head = self.head_at(offset)
        if len(head) < RECORD_HEADER.size or not head.startswith(_MAGIC):
            return None
        length = RECORD_HEADER.unpack(head)[2]
        if not RECORD_HEADER.size <= length <= self.size - offset:
            return None
        self._window = memoryview(os.pread(self._fd, max(length, _WINDOW), offset))
        self._start = offset
        return parse(self._window, 0, self.number, offset)

    def records(self, offset: int, above_seq: int) -> Iterator[Record]:
        """Whole records one behind the other from this offset on, with rising numbers."""
        while True:
            record = self.record_at(offset)
            if record is None or record.seq <= above_seq:
                return
            offset, above_seq = end_of(record), record.seq
            yield record

    def find_after(self, offset: int, above_seq: int) -> int | None:
        """Offset of the first whole record at or after `offset` numbered above above_seq."""
        data = memoryview(os.pread(self._fd, max(0, self.size - offset), offset))
        raw = data.obj
        at = raw.find(_MAGIC) if isinstance(raw, bytes) else -1
        while at >= 0 and isinstance(raw, bytes):
            if (offset + at) % 8 == 0:
                record = parse(data, at, self.number, offset + at)
                if record is not None and record.seq > above_seq:
                    return offset + at
            at = raw.find(_MAGIC, at + 1)
        return None

    def blank_from(self, offset: int) -> bool:
        """Whether the file holds nothing but zeros from this offset on."""
        while offset < self.size:
            try:  # space that was reserved and never written counts as a hole
                offset = os.lseek(self._fd, offset, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                break
            data = os.pread(self._fd, _WINDOW, offset)
            if data != _ZEROS[: len(data)]:
                return False
            offset += len(data)
        return True

    def head_at(self, offset: int) -> bytes:
        """The bytes of a record's header as they stand at this offset; fewer at the file's end."""
        return os.pread(self._fd, RECORD_HEADER.size, offset)

    def sync(self) -> None:
        """Make what was written so far durable, whoever wrote it."""
        os.fdatasync(self._fd)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Walk:
    """All whole records of a segment in order, stepping over damage; to be iterated over once.

    offset: where a record begins; last_seq: of the record before it. While and after iterating,
    end: behind the last whole record. damaged: offsets of stretches before `end` that cannot be
    read, 0 for the file's header. Afterwards, blank: whether only zeros stand behind `end`.
    """

    def __init__(self, file: SegmentFile, offset: int = FIRST_OFFSET, last_seq: int = -1) -> None:
        base = file.base_seq()
        self.file = file
        self.end = offset
        self.damaged = [0] if base is None else []
        self.blank = False
        self._base = base or 0
        self._last_seq = last_seq

    @property
    def next_seq(self) -> int:
        """The sequence number behind those of all records so far."""
        return max(self._base, self._last_seq + 1)

    def __iter__(self) -> Iterator[Record]:
        found: int | None = self.end
        while found is not None:
            for record in self.file.records(found, self._last_seq):
                found = self.end = end_of(record)
                self._last_seq = record.seq
                yield record
            self.blank = self.file.blank_from(self.end)
            found = None if self.blank else self.file.find_after(self.end + 8, self._last_seq)
            if found is not None:
                self.damaged.append(self.end)


def walk_through(file: SegmentFile) -> Walk:
    """Read a segment to its end."""
    walk = Walk(file)
    for _ in walk:
        pass
    return walk
