"""The one writer of a replay: checks order, drops duplicates, appends to the log."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import msgspec

from embodied.buffer.log import SEGMENT_BYTES, LogReader, LogWriter
from embodied.buffer.records import (
    Schema,
    StepHeader,
    decode_arrays,
    decode_header,
    decode_schema,
    encode_schema,
    encode_step,
    schema_id,
    schema_of,
)
from embodied.buffer.segments import Record, record_size
from embodied.core.episodes import Step
from embodied.core.errors import ConfigError, CorruptDataError


class StepOrderError(ConfigError):
    """A step does not continue its episode: its index leaves a gap, or the episode is closed."""


class StreamCounts(msgspec.Struct, forbid_unknown_fields=True):
    """What one stream has stored. steps: actions, final observations not counted."""

    steps: int = 0
    episodes: int = 0
    closed: int = 0


class Counts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a replay holds. episodes: closed ones. damaged: records that could not be read."""

    steps: int
    episodes: int
    streams: dict[str, StreamCounts]
    damaged: int = 0


@dataclass(slots=True)
class _Progress:
    """Indices seen of an episode: all below next_index but `missing` (lost to damage)."""

    next_index: int = 0
    missing: set[int] = field(default_factory=set)
    final_index: int | None = None


class ReplayWriter:
    """Appends steps, each at most once, also across restarts.

    A step must have the next index of its episode and the same arrays as all others. Opening
    reads the whole log once. Raises RunInUseError while another process writes here.
    """

    def __init__(self, path: Path, segment_bytes: int = SEGMENT_BYTES) -> None:
        self._log = LogWriter(path, segment_bytes)
        self._schema: Schema | None = None
        self._declared = (0, 0)
        self._episodes: dict[str, dict[int, _Progress]] = {}
        self._streams: dict[str, StreamCounts] = {}
        self._damaged = 0
        reader = LogReader(path)
        try:
            for record in reader.poll():
                self._restore(record)
        except BaseException:
            self._log.close()
            raise
        finally:
            reader.close()
        self._damaged += len(reader.damaged)

    def _restore(self, record: Record) -> None:
        try:
            if record.schema == 0:
                schema = decode_schema(record.payload)
                self._declared = (record.segment, schema_id(record.payload))
                self._schema = self._schema or schema
            else:
                self._note(decode_header(record.payload)[0])
        except CorruptDataError:
            self._damaged += 1

    def _note(self, header: StepHeader) -> None:
        stream = self._streams.setdefault(header.stream, StreamCounts())
        episodes = self._episodes.setdefault(header.stream, {})
        progress = episodes.get(header.episode)
        if progress is None:
            progress = episodes[header.episode] = _Progress()
            stream.episodes += 1
        if header.index < progress.next_index:
            progress.missing.discard(header.index)
        else:
            progress.missing.update(range(progress.next_index, header.index))
            progress.next_index = header.index + 1
        if header.final:
            progress.final_index = header.index
            stream.closed += 1
        else:
            stream.steps += 1

    def _is_duplicate(self, stream: str, episode: int, index: int) -> bool:
        progress = self._episodes.get(stream, {}).get(episode) or _Progress()
        if index < progress.next_index:
            return index not in progress.missing
        where = f"stream '{stream}', episode {episode}"
        if progress.final_index is not None:
            raise StepOrderError(
                f"{where} is closed by its final observation at index {progress.final_index}; a "
                f"step of index {index} belongs to a new episode"
            )
        if index > progress.next_index:
            raise StepOrderError(
                f"{where}: step of index {index} leaves a gap; index {progress.next_index} is next"
            )
        return False

    def append(self, step: Step) -> int | None:
        """Append a step; its sequence number, or None if the replay already has its key.

        Raises StepOrderError, SpecError if its arrays differ from earlier steps' or cannot be
        stored, and StorageFullError, after which the same step can be appended again.
        """
        schema = schema_of(step)
        if self._schema is not None and schema is not self._schema:
            self._schema.check_equal(schema, f"step {step.key}")
        payload = encode_step(step, schema)
        if self._is_duplicate(*step.key):
            return None
        return self._write(decode_header(payload)[0], schema, payload)

    def append_encoded(self, payload: memoryview, schema: Schema) -> int | None:
        """As append, for a payload of encode_step. Raises CorruptDataError if it is not one."""
        header, start = decode_header(payload)
        if self._schema is not None and schema is not self._schema:
            self._schema.check_equal(schema, f"step at {header.where}")
        if self._is_duplicate(header.stream, header.episode, header.index):
            return None
        decode_arrays(payload, start, schema)
        return self._write(header, schema, payload)

    def _write(self, header: StepHeader, schema: Schema, payload: bytearray | memoryview) -> int:
        if self._schema is None:
            self._schema = schema
        declaration = encode_schema(self._schema)
        number = schema_id(declaration)
        self._log.ensure_room(record_size(len(payload)) + record_size(len(declaration)))
        if self._declared != (self._log.segment, number):
            self._log.append(declaration)
            self._declared = (self._log.segment, number)
        seq = self._log.append(payload, schema=number)
        self._note(header)
        return seq

    @property
    def next_seq(self) -> int:
        """Sequence number that the next record will get."""
        return self._log.next_seq

    def flush(self) -> int:
        """Make everything appended durable; return the last durable sequence number, or -1."""
        return self._log.flush()

    def next_episode(self, stream: str) -> int:
        """Smallest number above all episodes of the stream."""
        return max(self._episodes.get(stream, ()), default=-1) + 1

    def counts(self) -> Counts:
        """What has been appended so far."""
        streams = {name: msgspec.structs.replace(c) for name, c in sorted(self._streams.items())}
        return Counts(
            sum(stream.steps for stream in streams.values()),
            sum(stream.closed for stream in streams.values()),
            streams,
            self._damaged,
        )

    def close(self) -> None:
        """Flush and give the directory up; safe to call twice."""
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
