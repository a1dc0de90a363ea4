"""The one writer of a replay: checks order, drops duplicates, appends to the log."""

import contextlib
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Self

import msgspec
import numpy as np

from embodied.buffer.log.append import SEGMENT_BYTES, LogWriter
from embodied.buffer.log.segments import (
    Record,
    SegmentFile,
    Walk,
    list_segments,
    record_size,
    segment_path,
)
from embodied.buffer.log.storage import STORAGE, Storage
from embodied.buffer.steps.blocks import Block, block_path
from embodied.buffer.steps.chunks import CHUNK_ROWS, ChunkWriter, Covered, load_chunks
from embodied.buffer.steps.records import (
    CONTROL_RECORD,
    SCHEMA_RECORD,
    Control,
    StepHeader,
    check_finite,
    decode_arrays,
    decode_header,
    encode_control,
    encode_step,
)
from embodied.buffer.steps.schema import Codecs, Schema, encode_schema, schema_id
from embodied.buffer.write.acknowledged import load_acknowledged, reserve_acknowledged
from embodied.buffer.write.catalogue import Catalogue
from embodied.buffer.write.progress import Journal, StepOrderError, StreamCounts
from embodied.buffer.write.retention import Retention, SegmentUse
from embodied.core.episodes import Step
from embodied.core.errors import ConfigError, CorruptDataError, RunInUseError, StorageFullError

__all__ = ["Counts", "ReplayWriter", "StepOrderError", "StreamCounts"]

_LATE = 4
_PASSES = (StorageFullError, RunInUseError)  # a catalogue is put right when it is next opened


class Counts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a replay holds. episodes: closed ones. damaged: records that could not be read."""

    steps: int
    episodes: int
    streams: dict[str, StreamCounts]
    damaged: int = 0


class ReplayWriter:
    """Appends steps, each at most once, also across restarts.

    A step must have the next index of its episode and the same arrays as the others of its
    stream. codecs: see schema.Codecs. retention: what to delete when; None keeps everything.
    chunk_rows: columns of the open segment are written in portions of at least so many steps; at
    most about four times as many records are read again after a crash.
    Raises RunInUseError while another process writes here, ConfigError for wrong sizes.
    """

    def __init__(
        self,
        path: Path,
        segment_bytes: int = SEGMENT_BYTES,
        *,
        codecs: Mapping[str, str] | None = None,
        retention: Retention | None = None,
        chunk_rows: int = CHUNK_ROWS,
        storage: Storage = STORAGE,
    ) -> None:
        if chunk_rows < 1:
            raise ConfigError(f"chunk_rows is {chunk_rows}; it must be positive")
        self._path = Path(path)
        self._codecs = Codecs(dict(codecs or {}))
        self._retention = retention
        self._segment_bytes = segment_bytes
        self._storage = storage
        self._journal = Journal()
        self._schemas: dict[str, Schema] = {}
        self._declared: set[int] = set()
        self._damaged = 0
        self._uses: dict[int, SegmentUse] = {}
        self._block = Block(0)
        self._chunk_rows = chunk_rows
        self._chunks = self._chunks_of(0, Covered())
        self._retaining = False
        self._unrecorded: Control | None = None
        blocks = self._load_blocks()
        known_next = {number: block.next_seq for number, block in blocks.items()}
        self._log = LogWriter(
            self._path,
            segment_bytes,
            on_seal=self._on_seal,
            known_next=known_next,
            read_through=partial(self._read_through, blocks),
            storage=storage,
        )
        try:
            if retention is not None and retention.acknowledged_only:
                reserve_acknowledged(self._path)
            self._catalogue = Catalogue(self._path)
            self._restore(blocks, known_next.keys())
        except BaseException:
            self._log.close()
            raise

    def _load_blocks(self) -> dict[int, Block]:
        """Blocks of sealed segments that are whole; read before the lock is taken, as they are
        never changed."""
        blocks: dict[int, Block] = {}
        for number, sealed in list_segments(self._path).items():
            path = segment_path(self._path, number, sealed=True)
            if sealed:
                with contextlib.suppress(CorruptDataError, FileNotFoundError):
                    size = path.stat().st_size
                    blocks[number] = Block.load(block_path(self._path, number), number, size)
        return blocks

    def _read_through(self, blocks: dict[int, Block], file: SegmentFile) -> Walk:
        """Make the block of a segment, from its chunks as far as they go."""
        block, covered = load_chunks(self._path, file)
        walk = Walk(file, covered.end, covered.last_seq)
        block.extend(walk)
        blocks[file.number] = block
        self._chunks = self._chunks_of(file.number, covered)
        return walk

    def _chunks_of(self, segment: int, covered: Covered) -> ChunkWriter:
        return ChunkWriter(self._path, segment, self._storage, self._chunk_rows, covered)

    def _restore(self, blocks: dict[int, Block], saved: Collection[int]) -> None:
        """Take over all segments. saved: those that have a block file."""
        segments, known = list_segments(self._path), self._catalogue.segments()
        for number, sealed in segments.items():
            path = segment_path(self._path, number, sealed=sealed)
            block = blocks.get(number) or Block.read(path, number)
            if sealed and number not in saved:
                self._save(block)
            size = path.stat().st_size
            if sealed and known.get(number) != size:
                self._catalogue.note(block, size)
            self._note(block, size)
            self._block = block
        for number in known.keys() - segments.keys():
            self._catalogue.remove(number)
        for path in (*self._path.glob("*.cols"), *self._path.glob("*.cols.part")):
            number = path.name.partition(".")[0]
            sealed = path.suffix == ".cols"
            if number.isdigit() and segments.get(int(number)) is not sealed:
                self._storage.unlink(path)
        for path in self._path.glob(".*.cols.*.tmp"):  # a crash came while they were written
            self._storage.unlink(path)
        if segments.get(self._block.segment, True):
            self._block = Block(self._log.segment)
        else:
            self._write_chunk()
        self._declared = set(self._block.rows)
        self._retain()

    def _note(self, block: Block, size: int) -> None:
        self._journal.note_block(block)
        self._damaged += len(block.damaged)
        streams = {key.stream for key in block.episodes}
        for rows in block.rows.values():
            ordinals = np.flatnonzero(np.bincount(rows.view[".episode"])).tolist()
            for stream in {block.episodes[ordinal].stream for ordinal in ordinals}:
                self._schemas.setdefault(stream, rows.schema)
        self._uses[block.segment] = SegmentUse(block.segment, size, frozenset(streams))

    def _save(self, block: Block) -> int:
        """Write a block's file; without space it is left out, and made when next opened.

        Returns the size of the segment.
        """
        size = segment_path(self._path, block.segment, sealed=True).stat().st_size
        with contextlib.suppress(StorageFullError):
            block.save(block_path(self._path, block.segment), size)
        return size

    def _on_seal(self, segment: int) -> None:
        if self._block.segment != segment:  # found damaged when opening: noted then
            return
        size = self._save(self._block)
        self._chunks.remove()
        streams = frozenset(key.stream for key in self._block.episodes)
        self._uses[segment] = SegmentUse(segment, size, streams)
        with contextlib.suppress(*_PASSES):
            self._catalogue.note(self._block, size)

    def append(self, step: Step) -> int | None:
        """Append a step; its sequence number, or None if the replay already has its key.

        Raises StepOrderError, SpecError if its arrays differ from earlier steps' of the stream or
        cannot be stored, and StorageFullError, after which the same step can be appended again.
        """
        schema = self._codecs.schema_of(step)
        self._check_schema(schema, step.stream, f"step {step.key}")
        payload = encode_step(step, schema)
        header, _ = decode_header(payload)
        if self._journal.is_duplicate(header):
            return None
        return self._write(header, schema, payload)

    def append_encoded(self, payload: memoryview, schema: Schema) -> int | None:
        """As append, for a payload of encode_step. Raises CorruptDataError if it is not one."""
        header, start = decode_header(payload)
        self._check_schema(schema, header.stream, f"step at {header.where}")
        if self._journal.is_duplicate(header):
            return None
        try:
            observation, action = decode_arrays(payload, start, header, schema)
        except CorruptDataError as error:
            raise CorruptDataError(f"step at {header.where}: {error}") from error
        for name, array in (*observation.items(), ("action", action)):
            check_finite(name, array, (header.stream, header.episode, header.index))
        return self._write(header, schema, payload)

    def _check_schema(self, schema: Schema, stream: str, where: str) -> None:
        known = self._schemas.get(stream)
        if known is not None and known is not schema:
            known.check_same_arrays(schema, where, f"stream '{stream}'")

    def _write(self, header: StepHeader, schema: Schema, payload: bytearray | memoryview) -> int:
        if self._chunks.is_due(self._block, _LATE):
            self.flush()
        declaration = encode_schema(schema)
        number = schema_id(declaration)
        try:
            self._ensure_room(record_size(len(payload)) + record_size(len(declaration)))
        except ConfigError as error:
            raise ConfigError(f"step at {header.where}: {error}") from error
        if number not in self._declared:
            self._append(SCHEMA_RECORD, declaration)
            self._declared.add(number)
        seq = self._append(number, payload)
        self._journal.note(header, self._log.segment)
        self._schemas.setdefault(header.stream, schema)
        return seq

    def _ensure_room(self, record_bytes: int) -> None:
        before = self._log.segment
        try:
            self._log.ensure_room(record_bytes)
        except StorageFullError:
            if not self._give_way():
                raise
            self._log.ensure_room(record_bytes)
        if self._log.segment != before:
            self._block = Block(self._log.segment)
            self._chunks = self._chunks_of(self._log.segment, Covered())
            self._declared = set()
            if self._unrecorded is not None:
                control, self._unrecorded = self._unrecorded, None
                self.append_control(control)
            self._retain()

    def _append(self, schema: int, payload: bytes | bytearray | memoryview) -> int:
        offset = self._log.offset
        seq = self._log.append(payload, schema=schema)
        self._block.add(Record(seq, schema, memoryview(payload), self._log.segment, offset))
        return seq

    def delete(self, stream: str, episode: int) -> None:
        """Count an episode as not there any more; compaction gives its space back.

        Raises ConfigError if there is none.
        """
        if not self._journal.has(stream, episode):
            raise ConfigError(f"no episode {episode} of stream '{stream}' in {self._path}")
        self.append_control(Control(deleted=((stream, episode),)))
        self._journal.delete(stream, episode)
        self.flush()

    def append_control(self, control: Control) -> None:
        """Append a control record; the journal of what is there does not change by it."""
        payload = encode_control(control)
        self._ensure_room(record_size(len(payload)))
        self._append(CONTROL_RECORD, payload)

    def _retain(self) -> None:
        """Delete what the retention policy does not keep."""
        if self._retention is None or self._retaining:
            return
        self._retaining = True  # recording it may need a new segment
        try:
            self._delete_expired(self._retention)
        finally:
            self._retaining = False

    def _delete_expired(self, retention: Retention) -> None:
        for number in self._expired(retention):
            if self._journal.grows(number, self._log.segment):
                return
            self.append_control(self._forget(number))
            self.flush()
            self._remove(number)

    def _expired(self, retention: Retention) -> Iterator[int]:
        held = load_acknowledged(self._path).segments if retention.acknowledged_only else ()
        return retention.expired(self._uses.values(), self._log.segment, frozenset(held))

    def _forget(self, number: int) -> Control:
        """Count the episodes of a segment as deleted; returns what to record."""
        kept = [n for n in (*self._uses, self._log.segment) if n != number]
        return self._journal.segment_removed(number, kept)

    def _remove(self, number: int) -> None:
        self._log.remove(number)
        del self._uses[number]
        with contextlib.suppress(FileNotFoundError):
            self._storage.unlink(block_path(self._path, number))
        with contextlib.suppress(*_PASSES):
            self._catalogue.remove(number)

    def _give_way(self) -> bool:
        """Delete acknowledged segments for a new one on a full disk; False if there are none.

        There is no room to record it before. What a crash would then leave unrecorded are episodes
        that were sent to their end; next_episode knows them by the acknowledgements.
        """
        if self._retention is None or not self._retention.acknowledged_only or self._retaining:
            return False
        everything = msgspec.structs.replace(self._retention, max_bytes=1)
        freed = 0
        for number in self._expired(everything):
            if freed >= self._segment_bytes or self._journal.grows(number, self._log.segment):
                break
            freed += self._uses[number].nbytes
            self._unrecorded = self._forget(number)
            self._remove(number)
        return freed > 0

    @property
    def catalogue(self) -> Catalogue:
        """What is in the sealed segments, and consumers' cursors."""
        return self._catalogue

    @property
    def next_seq(self) -> int:
        """Sequence number that the next record will get."""
        return self._log.next_seq

    def flush(self) -> int:
        """Make everything appended durable; return the last durable sequence number, or -1."""
        seq = self._log.flush()
        self._write_chunk()
        return seq

    def _write_chunk(self) -> None:
        """Write the columns of what is durable if they are due; without space they are left out."""
        if self._chunks.is_due(self._block):
            with contextlib.suppress(StorageFullError):
                self._chunks.write(self._block)

    def next_episode(self, stream: str) -> int:
        """Smallest number above all episodes that the stream has or had."""
        number = self._journal.next_episode(stream)
        if self._retention is not None and self._retention.acknowledged_only:
            number = max(number, load_acknowledged(self._path).episodes.get(stream, 0))
        return number

    def next_index(self, stream: str, episode: int) -> int | None:
        """First index of an episode that is not there; None if the episode was deleted."""
        return self._journal.next_index(stream, episode)

    def counts(self) -> Counts:
        """What has been appended so far."""
        found = self._journal.streams
        streams = {name: msgspec.structs.replace(c) for name, c in sorted(found.items())}
        return Counts(
            sum(stream.steps for stream in streams.values()),
            sum(stream.closed for stream in streams.values()),
            streams,
            self._damaged,
        )

    def close(self) -> None:
        """Seal what is there and give the directory up; safe to call twice."""
        try:
            self._log.close()
        finally:
            self._catalogue.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
