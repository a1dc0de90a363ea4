"""Replay: the writer, and a reader that follows the log and keeps its steps in RAM."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np

from embodied.buffer.columns import Columns
from embodied.buffer.log import LogReader
from embodied.buffer.records import (
    Schema,
    StepHeader,
    decode_arrays,
    decode_header,
    decode_schema,
    schema_id,
)
from embodied.buffer.segments import Record
from embodied.buffer.writer import Counts, ReplayWriter, StepOrderError, StreamCounts
from embodied.core.errors import CorruptDataError, EmbodiedError

__all__ = [
    "Counts",
    "EpisodeInfo",
    "ReplayReader",
    "ReplayWriter",
    "StepOrderError",
    "StreamCounts",
]

RAM_BYTES = 2 << 30


@dataclass(frozen=True, slots=True)
class EpisodeInfo:
    """One episode. rows: row of each step in the reader's columns, in order of index (-1 where it
    is missing); the final observation's is final_row (-1 until it is there), not among them.
    closed: complete, final observation included. policy_versions: lowest and highest."""

    stream: str
    episode: int
    task: str
    seed: int
    rows: np.ndarray
    final_row: int
    closed: bool
    success: bool
    interventions: int
    policy_versions: tuple[int, int]


@dataclass(slots=True)
class _Episode:
    stream: str
    episode: int
    task: str
    seed: int
    rows: list[int] = field(default_factory=list)
    missing: int = 0
    final_row: int = -1
    success: bool = False
    interventions: int = 0
    versions: tuple[int, int] = (-1, -1)
    info: EpisodeInfo | None = None

    @property
    def closed(self) -> bool:
        return self.final_row >= 0 and self.missing == 0

    def add(self, header: StepHeader, row: int) -> bool:
        """Note a row; False if the episode already has its index."""
        extra = header.index - len(self.rows)
        if (header.final and self.final_row >= 0) or (
            extra < 0 and (header.final or self.rows[header.index] >= 0)
        ):
            return False
        if extra >= 0 and self.final_row >= 0:
            return False
        if extra > 0:
            self.rows += [-1] * extra
            self.missing += extra
        if header.final:
            self.final_row = row
            return True
        if extra < 0:
            self.rows[header.index] = row
            self.missing -= 1
        else:
            self.rows.append(row)
        low, high = self.versions
        version = header.policy_version
        first = len(self.rows) - self.missing == 1
        self.versions = (version, version) if first else (min(low, version), max(high, version))
        self.success |= header.flag("success")
        self.interventions += header.flag("intervention")
        return True

    def make_info(self) -> EpisodeInfo:
        if self.info is not None:
            return self.info
        rows = np.array(self.rows, np.int64)
        rows.flags.writeable = False
        info = EpisodeInfo(
            self.stream,
            self.episode,
            self.task,
            self.seed,
            rows,
            self.final_row,
            self.closed,
            self.success,
            self.interventions,
            self.versions,
        )
        if self.closed:
            self.info = info
        return info


class ReplayReader:
    """Follows the log in `path`, which another process may be writing, or not have begun yet.

    columns: all rows by arrival, None before the first. damaged: records that could not be used,
    as (segment, offset); episodes that lost a step to them never close. Raises SpecError for a
    step whose arrays differ from the first one's and ConfigError beyond ram_bytes, both for good.
    """

    def __init__(self, path: Path, ram_bytes: int = RAM_BYTES) -> None:
        self._log = LogReader(path)
        self._ram_bytes = ram_bytes
        self._schemas: dict[int, Schema] = {}
        self._episodes: dict[tuple[str, int], _Episode] = {}
        self._closed: list[EpisodeInfo] = []
        self._bad: list[tuple[int, int]] = []
        self._failure: EmbodiedError | None = None
        self.schema: Schema | None = None
        self.columns: Columns | None = None
        self.num_steps = 0

    def refresh(self) -> int:
        """Take over all records that have come; returns how many steps are new."""
        before = self.num_steps
        if self._failure is not None:
            raise self._failure
        try:
            for record in self._log.poll():
                try:
                    self._take(record)
                except CorruptDataError:
                    self._bad.append((record.segment, record.offset))
        except EmbodiedError as error:
            self._failure = error
            raise
        return self.num_steps - before

    def _take(self, record: Record) -> None:
        if record.schema == 0:
            schema = decode_schema(record.payload)
            self._schemas[schema_id(record.payload)] = schema
            if self.schema is None:
                self.schema = schema
            else:
                self.schema.check_equal(schema, f"segment {record.segment}")
            return
        schema = self._schemas.get(record.schema)
        if schema is None:
            raise CorruptDataError(f"schema {record.schema} is lost")
        header, start = decode_header(record.payload)
        observation, action = decode_arrays(record.payload, start, schema)
        if self.columns is None:
            self.columns = Columns(schema, self._ram_bytes)
        key = header.stream, header.episode
        episode = self._episodes.get(key)
        if episode is None:
            episode = _Episode(header.stream, header.episode, header.task, header.seed)
        if not episode.add(header, self.columns.num_rows):
            raise CorruptDataError(f"{header.where} is there twice or beyond the episode's end")
        self._episodes[key] = episode
        self.columns.append(header, observation, action, (record.segment, record.offset))
        self.num_steps += not header.final
        if episode.closed:
            self._closed.append(episode.make_info())

    @property
    def damaged(self) -> list[tuple[int, int]]:
        """(segment, offset) of everything in the log that could not be used."""
        return sorted(self._log.damaged + self._bad)

    @property
    def num_episodes(self) -> int:
        """Episodes of which at least one step is there, open ones included."""
        return len(self._episodes)

    @property
    def num_closed(self) -> int:
        """Episodes that are complete."""
        return len(self._closed)

    @property
    def episodes(self) -> list[EpisodeInfo]:
        """All episodes in order of their first step's arrival."""
        return [episode.make_info() for episode in self._episodes.values()]

    def closed_episodes(self, since: int = 0) -> list[EpisodeInfo]:
        """Closed episodes in the order in which they closed, without the first `since`."""
        return self._closed[since:]

    def close(self) -> None:
        """Stop following the log; safe to call twice."""
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
