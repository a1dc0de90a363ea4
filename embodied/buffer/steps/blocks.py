"""The columnar side of a segment: index and small features of its steps, a row for each.

Everything in a block can be rebuilt from the segment's records; its file saves reading these.
"""

import contextlib
import struct
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec
import numpy as np

from embodied.buffer.log.segments import (
    RECORD_HEADER,
    Record,
    SegmentFile,
    Walk,
)
from embodied.buffer.steps.records import (
    CONTROL_RECORD,
    SCHEMA_RECORD,
    Control,
    StepHeader,
    check_payload,
    decode_control,
    decode_header,
    raw_array,
)
from embodied.buffer.steps.schema import Schema, decode_schema, encode_schema, layout_of, schema_id
from embodied.core.errors import CorruptDataError
from embodied.core.files import read_tensors, write_tensors

_FIXED = struct.Struct("<IIIIqqfB3x")
_FIXED_FIELDS = (
    (".offset", "<u4"),
    (".record", "<u4"),
    (".episode", "<u4"),
    (".index", "<u4"),
    ("policy_version", "<i8"),
    ("t_ns", "<i8"),
    ("reward", "<f4"),
    (".flags", "u1"),
)
_OFFSETS: list[int] = [0, 4, 8, 12, 16, 24, 32, 36]
_FIRST_ROWS = 256
_HEAD = np.dtype(
    {
        "names": [name for name, _ in _FIXED_FIELDS],
        "formats": [kind for _, kind in _FIXED_FIELDS],
        "offsets": _OFFSETS,
        "itemsize": _FIXED.size,
    }
)


@lru_cache(maxsize=64)
def row_dtype(schema: Schema) -> np.dtype:
    """A row: where arrays and record begin in the segment, the step's header, its small features.

    .episode: position in the block's table. ".size/NAME": stored bytes of an encoded feature.
    """
    layout = layout_of(schema)
    names = [name for name, _ in _FIXED_FIELDS]
    formats: list[object] = [kind for _, kind in _FIXED_FIELDS]
    offsets = [*_OFFSETS]
    for part in layout.small:
        names.append(part.name)
        formats.append((part.dtype, part.shape))
        offsets.append(_FIXED.size + part.start)
    end = _FIXED.size + _small_bytes(schema)
    for feature in layout.encoded:
        names.append(f".size/{feature.name}")
        formats.append("<u4")
        offsets.append(end)
        end += 4
    size = end + -end % 8
    return np.dtype({"names": names, "formats": formats, "offsets": offsets, "itemsize": size})


@lru_cache(maxsize=64)
def _small_bytes(schema: Schema) -> int:
    last = layout_of(schema).small[-1]
    return last.start + last.nbytes + -last.nbytes % 8


class EpisodeKey(NamedTuple):
    """An episode of a block: whose it is, its number, and what all of its steps share."""

    stream: str
    number: int
    task: str
    seed: int


class Rows:
    """Growing rows of one schema. data: uint8 [capacity, row], of which the first num are there
    (all if it is not given)."""

    def __init__(
        self, schema: Schema, data: np.ndarray | None = None, num: int | None = None
    ) -> None:
        self.schema = schema
        self._dtype = row_dtype(schema)
        self._small = _small_bytes(schema)
        self._sizes = struct.Struct(f"<{len(layout_of(schema).encoded)}I")
        self._data = np.zeros((_FIRST_ROWS, self._dtype.itemsize), np.uint8)
        self._num = 0
        if data is not None and len(data):
            self._data, self._num = data, len(data) if num is None else num
        self._flat = self._data.data.cast("B")

    def __len__(self) -> int:
        return self._num

    def add(
        self, header: StepHeader, episode: int, record: int, offset: int, small: memoryview
    ) -> None:
        """Append a row. small: the small features, beginning with the payload's arrays."""
        if self._num == len(self._data):
            grown = np.zeros((2 * self._num, self._dtype.itemsize), np.uint8)
            grown[: self._num] = self._data
            self._data, self._flat = grown, grown.data.cast("B")
        at = self._num * self._dtype.itemsize
        _FIXED.pack_into(
            self._flat,
            at,
            offset,
            record,
            episode,
            header.index,
            header.policy_version,
            header.t_ns,
            header.reward,
            header.flags,
        )
        at += _FIXED.size
        self._flat[at : at + self._small] = small[: self._small]
        if header.sizes:
            self._sizes.pack_into(self._flat, at + self._small, *header.sizes)
        self._num += 1

    @property
    def bytes(self) -> np.ndarray:
        """The rows as bytes [n, row]."""
        return self._data[: self._num]

    @property
    def view(self) -> np.ndarray:
        """The rows as a structured array [n]."""
        return self.bytes.view(self._dtype)[:, 0]

    def heads(self, start: int = 0) -> np.ndarray:
        """A copy of rows from `start` on without their features: structured [n], in one pass."""
        return np.ascontiguousarray(self.bytes[start:, : _FIXED.size]).view(_HEAD)[:, 0]


class _Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    segment: int
    size: Annotated[int, msgspec.Meta(ge=0)]
    next_seq: Annotated[int, msgspec.Meta(ge=0)]
    streams: list[str]
    tasks: list[str]
    schemas: list[bytes]
    controls: list[Control]
    damaged: list[int]


class Block:
    """The steps of one segment, by schema. controls: the segment's control records, in order.

    damaged: offsets of records and stretches that could not be read. last: where the newest record
    that was taken in begins.
    """

    def __init__(self, segment: int) -> None:
        self.segment = segment
        self.rows: dict[int, Rows] = {}
        self.episodes: list[EpisodeKey] = []
        self.controls: list[Control] = []
        self.damaged: list[int] = []
        self.next_seq = 0
        self.last = 0
        self._ordinals: dict[tuple[str, int], int] = {}

    def add(self, record: Record) -> tuple[StepHeader, int, int] | None:
        """Take a record in. Of a step: its header, schema id and row; else None.

        Raises CorruptDataError; the record is among the damaged ones then.
        """
        self.next_seq, self.last = record.seq + 1, record.offset
        try:
            return self._add(record)
        except CorruptDataError:
            self.damaged.append(record.offset)
            raise

    def _add(self, record: Record) -> tuple[StepHeader, int, int] | None:
        if record.schema == SCHEMA_RECORD:
            self.declare(decode_schema(record.payload), schema_id(record.payload))
            return None
        if record.schema == CONTROL_RECORD:
            self.controls.append(decode_control(record.payload))
            return None
        rows = self.rows.get(record.schema)
        if rows is None:
            raise CorruptDataError(f"schema {record.schema} is lost")
        header, start = decode_header(record.payload)
        layout = check_payload(record.payload, start, header, rows.schema)
        for part in layout.small:
            if part.dtype == np.bool_:
                raw_array(record.payload, start, part)
        self._row(rows, header, record, start)
        return header, record.schema, len(rows) - 1

    def declare(self, schema: Schema, number: int) -> None:
        """Note a schema that later records of the segment refer to."""
        self.rows.setdefault(number, Rows(schema))

    def know(self, episode: EpisodeKey) -> None:
        """Note an episode that later steps of the segment belong to."""
        self._ordinals[episode.stream, episode.number] = len(self.episodes)
        self.episodes.append(episode)

    @property
    def num_rows(self) -> int:
        """Steps of all schemas."""
        return sum(map(len, self.rows.values()))

    def _row(self, rows: Rows, header: StepHeader, record: Record, start: int) -> None:
        ordinal = self._ordinals.get((header.stream, header.episode))
        if ordinal is None:
            ordinal = len(self.episodes)
            self.know(EpisodeKey(header.stream, header.episode, header.task, header.seed))
        first = record.offset + RECORD_HEADER.size
        rows.add(header, ordinal, record.offset, first + start, record.payload[start:])

    def save(self, path: Path, size: int) -> None:
        """Write the block's file. size: of the segment in bytes."""
        streams = _numbered(key.stream for key in self.episodes)
        tasks = _numbered(key.task for key in self.episodes)
        table = [(streams[k.stream], k.number, tasks[k.task], k.seed) for k in self.episodes]
        header = _Header(
            self.segment,
            size,
            self.next_seq,
            list(streams),
            list(tasks),
            [encode_schema(rows.schema) for rows in self.rows.values()],
            self.controls,
            self.damaged,
        )
        arrays = {f"rows{i}": rows.bytes for i, rows in enumerate(self.rows.values())}
        arrays["episodes"] = np.array(table, np.int64).reshape(len(table), 4)
        write_tensors(path, arrays, msgspec.json.encode(header))

    def extend(self, walk: Walk) -> None:
        """Take in all records of a walk through the segment."""
        for record in walk:
            with contextlib.suppress(CorruptDataError):
                self.add(record)
        self.next_seq = walk.next_seq
        self.damaged = sorted({*self.damaged, *walk.damaged})
        if walk.file.sealed and walk.end < walk.file.size:
            self.damaged.append(walk.end)

    @classmethod
    def read(cls, path: Path, segment: int) -> "Block":
        """Make the block of a segment from its records, stepping over damage."""
        block = cls(segment)
        with SegmentFile(path, segment) as file:
            block.extend(Walk(file))
        return block

    @classmethod
    def load(cls, path: Path, segment: int, size: int) -> "Block":
        """Inverse of save. Raises CorruptDataError if it is damaged or of another segment."""
        arrays, head = read_tensors(path)
        try:
            header = msgspec.json.decode(head, type=_Header)
        except (msgspec.MsgspecError, UnicodeError) as error:
            raise CorruptDataError(f"{path} is not a block file: {error}") from error
        block = cls(segment)
        if (header.segment, header.size) != (segment, size):
            raise CorruptDataError(
                f"{path} belongs to segment {header.segment} of {header.size} bytes, not to "
                f"segment {segment} of {size}"
            )
        block.next_seq, block.controls = header.next_seq, header.controls
        block.damaged = header.damaged
        table = arrays.get("episodes", np.empty((0, 4), np.int64)).tolist()
        try:
            block.episodes = [
                EpisodeKey(header.streams[stream], number, header.tasks[task], seed)
                for stream, number, task, seed in table
            ]
            for i, payload in enumerate(header.schemas):
                schema = decode_schema(payload)
                data = arrays[f"rows{i}"]
                if data.dtype != np.uint8 or data.shape[1:] != (row_dtype(schema).itemsize,):
                    raise CorruptDataError(f"{path}: rows {data.dtype} {data.shape}")
                block.rows[schema_id(payload)] = Rows(schema, data)
        except (IndexError, KeyError, ValueError) as error:
            raise CorruptDataError(f"{path} is not a block file: {error}") from error
        return block


def _numbered(names: Iterable[str]) -> dict[str, int]:
    return {name: i for i, name in enumerate(dict.fromkeys(names))}


def block_path(directory: Path, number: int) -> Path:
    """Path of a segment's block file."""
    return directory / f"{number:08d}.cols"
