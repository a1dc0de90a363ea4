"""The part file beside an open segment: its columns so far, so that few records are read again.

A chunk is a fixed head, its contents (msgpack) and the new rows of each schema. It is appended
once the records that it covers are durable, and is not synced itself. It is used if the chunks
before it are, its checksums hold, and its newest record stands in the segment as it says.
"""

import contextlib
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec
import numpy as np
from crc32c import crc32c

from embodied.buffer.log.segments import (
    FIRST_OFFSET,
    RECORD_HEADER,
    SegmentFile,
    record_size,
    segment_path,
)
from embodied.buffer.log.storage import Storage
from embodied.buffer.steps.blocks import Block, EpisodeKey, Rows, row_dtype
from embodied.buffer.steps.records import Control
from embodied.buffer.steps.schema import Schema, decode_schema, encode_schema, schema_id
from embodied.core.errors import CorruptDataError
from embodied.core.files import full_disk_named

CHUNK_ROWS = 4096
"""A chunk is appended when at least so many rows are new."""

_MAGIC = b"EMBCOLS\xe5"
# Magic; CRC32C of the head behind it and the contents, continued from the chunk before; CRC32C of
# the rows; bytes of the contents; segment, its first sequence number, offsets in it at which the
# covered records begin and end, the next sequence number; header of the newest record.
_HEAD = struct.Struct(f"<8sIIIIQQQQ{RECORD_HEADER.size}s")
_CHECKED_FROM = 12
_SPARE_ROWS = 256
_EPISODE = slice(8, 12)  # of a row: see blocks.row_dtype
_Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 32)]


class _Contents(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What is new since the chunk before. rows: how many, of each schema declared so far."""

    episodes: list[EpisodeKey]
    schemas: list[bytes]
    controls: list[Control]
    damaged: list[_Count]
    rows: list[_Count]


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Contents)


@dataclass(slots=True)
class Covered:
    """What the chunks of a part file hold of a segment.

    end: where the first record begins that they do not hold; last_seq: of the one before it.
    nbytes, crc: size of the part file up to there, and checksum of its last chunk. Then how many
    episodes, controls and damaged offsets, and rows of each schema.
    """

    end: int = FIRST_OFFSET
    last_seq: int = -1
    nbytes: int = 0
    crc: int = 0
    episodes: int = 0
    controls: int = 0
    damaged: int = 0
    rows: list[int] = field(default_factory=list)


class _Chunk(NamedTuple):
    """A chunk whose head and contents are whole. at: where its rows begin in the part file."""

    contents: _Contents
    schemas: list[Schema]
    at: int
    nbytes: int
    rows_crc: int
    crc: int
    end: int
    next_seq: int


def part_path(directory: Path, number: int) -> Path:
    """Path of a segment's part file."""
    return directory / f"{number:08d}.cols.part"


def load_chunks(directory: Path, file: SegmentFile) -> tuple[Block, Covered]:
    """What the chunks of a segment's part file hold; nothing if there is none that can be used."""
    try:
        fd = os.open(part_path(directory, file.number), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return Block(file.number), Covered()
    try:
        return _read_rows(fd, file.number, _read_heads(fd, file))
    except OSError:
        return Block(file.number), Covered()
    finally:
        os.close(fd)


def _read_heads(fd: int, file: SegmentFile) -> list[_Chunk]:
    """Chunks one behind the other, up to the first that is damaged or of another segment."""
    found: list[_Chunk] = []
    schemas: list[Schema] = []
    base, size, at = file.base_seq(), os.fstat(fd).st_size, 0
    while base is not None:
        chunk = _read_head(fd, file, base, at, found[-1] if found else None, schemas)
        if chunk is None or chunk.at + chunk.nbytes > size:
            break
        found.append(chunk)
        schemas, at = chunk.schemas, chunk.at + chunk.nbytes
    return found


def _read_head(
    fd: int, file: SegmentFile, base: int, at: int, before: _Chunk | None, schemas: list[Schema]
) -> _Chunk | None:
    raw = os.pread(fd, _HEAD.size, at)
    if len(raw) < _HEAD.size:
        return None
    magic, crc, rows_crc, length, number, base_seq, start, end, next_seq, last = _HEAD.unpack(raw)
    begin, seq = (before.end, before.next_seq) if before else (FIRST_OFFSET, base)
    if magic != _MAGIC or (number, base_seq, start) != (file.number, base, begin):
        return None
    # All of the contents but the numbers of rows are in the records, too.
    most = 2 * (end - start) + 5 * len(schemas)
    if not start < end <= file.size or next_seq <= seq or length > most:
        return None
    contents = os.pread(fd, length, at + _HEAD.size)
    checked = crc32c(raw[_CHECKED_FROM:], before.crc if before else 0)
    if crc32c(contents, checked) != crc or not _stands(file, last, start, end, next_seq):
        return None
    try:
        new = _decoder.decode(contents)
        schemas = [*schemas, *map(decode_schema, new.schemas)]
    except (msgspec.MsgspecError, RecursionError, UnicodeError, CorruptDataError):
        return None
    if len(new.rows) != len(schemas):
        return None
    nbytes = sum(row_dtype(s).itemsize * n for s, n in zip(schemas, new.rows, strict=True))
    at += _HEAD.size + length
    return _Chunk(new, schemas, at, nbytes, rows_crc, crc, end, next_seq)


def _stands(file: SegmentFile, last: bytes, start: int, end: int, next_seq: int) -> bool:
    """Whether the newest record that a chunk covers is in the segment."""
    _, _, length, _, seq = RECORD_HEADER.unpack(last)
    offset = end - record_size(length - RECORD_HEADER.size)
    return seq == next_seq - 1 and start <= offset < end and file.head_at(offset) == last


def _read_rows(fd: int, number: int, chunks: list[_Chunk]) -> tuple[Block, Covered]:
    block, covered = Block(number), Covered()
    schemas = chunks[-1].schemas if chunks else []
    totals = np.zeros(len(schemas), np.int64)
    for chunk in chunks:
        totals[: len(chunk.contents.rows)] += chunk.contents.rows
    arrays = [
        np.zeros((total + total // 8 + _SPARE_ROWS, row_dtype(schema).itemsize), np.uint8)
        for schema, total in zip(schemas, totals.tolist(), strict=True)
    ]
    for chunk in chunks:
        if not _fill(fd, chunk, covered, arrays):
            break
        new = chunk.contents
        for key in new.episodes:
            block.know(key)
        block.controls += new.controls
        block.damaged += new.damaged
        covered.rows += [0] * (len(new.rows) - len(covered.rows))
        covered.rows = [known + n for known, n in zip(covered.rows, new.rows, strict=True)]
        covered.episodes = len(block.episodes)
        covered.end, covered.last_seq = chunk.end, chunk.next_seq - 1
        covered.nbytes, covered.crc = chunk.at + chunk.nbytes, chunk.crc
        block.next_seq = chunk.next_seq
    covered.controls, covered.damaged = len(block.controls), len(block.damaged)
    for schema, array, num in zip(schemas, arrays, covered.rows, strict=False):
        block.rows[schema_id(encode_schema(schema))] = Rows(schema, array, num)
    return block, covered


def _fill(fd: int, chunk: _Chunk, covered: Covered, arrays: list[np.ndarray]) -> bool:
    """Read a chunk's rows to behind those that are there; False if they are damaged."""
    known = [*covered.rows, *[0] * (len(chunk.contents.rows) - len(covered.rows))]
    groups = [
        array[first : first + n]
        for array, first, n in zip(arrays, known, chunk.contents.rows, strict=False)
        if n
    ]
    at, crc, most = chunk.at, 0, covered.episodes + len(chunk.contents.episodes)
    for rows in groups:
        if os.preadv(fd, [rows.data], at) != rows.nbytes:
            break
        crc = crc32c(rows.data, crc)
        at += rows.nbytes
    if crc == chunk.rows_crc and at == chunk.at + chunk.nbytes:
        ordinals = [int(rows[:, _EPISODE].copy().view("<u4").max()) for rows in groups]
        if max(ordinals, default=0) < most:
            return True
    for rows in groups:
        rows[:] = 0
    return False


class ChunkWriter:
    """Appends chunks to the part file of an open segment. covered: what is in it already.

    A chunk that could not be written, or not whole, is written over by the next one.
    """

    def __init__(
        self, directory: Path, segment: int, storage: Storage, rows: int, covered: Covered
    ) -> None:
        self._directory = directory
        self._segment = segment
        self._storage = storage
        self._rows = rows
        self._covered = covered
        self._due = sum(covered.rows) + rows

    def is_due(self, block: Block, times: int = 1) -> bool:
        """Whether `times` as many rows are new as a chunk has at least."""
        return block.num_rows >= self._due + (times - 1) * self._rows

    def write(self, block: Block) -> None:
        """Append all that is new in the block, which must be durable in the segment.

        Raises StorageFullError; it is due again when as many rows have come.
        """
        self._due = block.num_rows + self._rows
        covered, groups = self._covered, list(block.rows.values())
        counts = [len(rows) for rows in groups]
        starts = [*covered.rows, *[0] * (len(groups) - len(covered.rows))]
        path = segment_path(self._directory, self._segment, sealed=False)
        with SegmentFile(path, self._segment) as file:
            last, base = file.head_at(block.last), file.base_seq()
        contents = _encoder.encode(
            _Contents(
                block.episodes[covered.episodes :],
                [encode_schema(rows.schema) for rows in groups[len(covered.rows) :]],
                block.controls[covered.controls :],
                block.damaged[covered.damaged :],
                [n - start for n, start in zip(counts, starts, strict=True)],
            )
        )
        rows = b"".join(rows.bytes[start:].data for rows, start in zip(groups, starts, strict=True))
        end = block.last + record_size(RECORD_HEADER.unpack(last)[2] - RECORD_HEADER.size)
        place = self._segment, base, covered.end, end, block.next_seq, last
        head = _HEAD.pack(_MAGIC, 0, crc32c(rows), len(contents), *place)
        crc = crc32c(contents, crc32c(head[_CHECKED_FROM:], covered.crc))
        head = _HEAD.pack(_MAGIC, crc, crc32c(rows), len(contents), *place)
        self._append([head, contents, rows], covered.nbytes)
        self._covered = Covered(
            end,
            block.next_seq - 1,
            covered.nbytes + len(head) + len(contents) + len(rows),
            crc,
            len(block.episodes),
            len(block.controls),
            len(block.damaged),
            counts,
        )

    def _append(self, parts: list[bytes], offset: int) -> None:
        path = part_path(self._directory, self._segment)
        with full_disk_named(path):
            if offset:
                fd = self._storage.open(path)
            else:
                self.remove()
                fd = self._storage.create(path)
            try:
                self._storage.write(fd, parts, offset)
            finally:
                self._storage.close(fd)

    def remove(self) -> None:
        """Remove the part file if there is one."""
        with contextlib.suppress(FileNotFoundError):
            self._storage.unlink(part_path(self._directory, self._segment))
