"""What the segments of a buffer folder hold, and its records one by one: for maintenance.

Reads without a lock beside a live writer; what is appended later is not seen. All that tools know
of files below the reader and the writer is in here.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from embodied.buffer.log.segments import (
    SegmentFile,
    Walk,
    list_segments,
    segment_path,
)
from embodied.buffer.steps.blocks import Block, block_path
from embodied.buffer.steps.records import (
    CONTROL_RECORD,
    SCHEMA_RECORD,
    Control,
    StepHeader,
    decode_header,
    decode_step,
)
from embodied.buffer.steps.schema import FLAGS, Schema
from embodied.core.episodes import Step
from embodied.core.errors import ConfigError, CorruptDataError

Key = tuple[str, int]


class Part(NamedTuple):
    """Steps of an episode in one segment: uint32 [n] indices, and where the records begin."""

    segment: int
    schema: int
    indices: np.ndarray
    offsets: np.ndarray


class StoredStep(NamedTuple):
    """A step's record: header, its schema, and the payload that holds both arrays and header."""

    header: StepHeader
    schema: Schema
    payload: memoryview

    def step(self) -> Step:
        """The step itself. Raises CorruptDataError."""
        return decode_step(self.payload, self.schema)


@dataclass(slots=True)
class Episode:
    """An episode by its steps' headers. versions: policy version → steps that it acted in."""

    key: Key
    task: str
    seed: int
    parts: list[Part] = field(default_factory=list)
    steps: int = 0
    final: bool = False
    success: bool = False
    interventions: int = 0
    versions: dict[int, int] = field(default_factory=dict)

    @property
    def index(self) -> np.ndarray:
        """Indices of what is there, rising, the final observation's included."""
        return np.unique(np.concatenate([part.indices for part in self.parts]))

    @property
    def missing(self) -> list[int]:
        """Indices of steps that were lost: others stand behind them."""
        there = self.index
        return np.setdiff1d(np.arange(int(there[-1]) + 1), there).tolist()

    @property
    def whole(self) -> bool:
        """Whether no step of it was lost; it may go on."""
        there = self.index
        return int(there[-1]) + 1 == len(there)

    @property
    def closed(self) -> bool:
        """Whether it is complete."""
        return self.final and self.whole

    def __str__(self) -> str:
        return f"stream '{self.key[0]}', episode {self.key[1]}"


class Segment(NamedTuple):
    """A segment file. nbytes: its size. used: up to the end of its last record."""

    number: int
    path: Path
    sealed: bool
    nbytes: int


class Contents:
    """Everything in a buffer folder, as it is now.

    episodes: by stream and number, in order of their first step; gone: those of them that were
    deleted. deleted, retired: see records.Control. schemas: by id. damaged: segment and offset of
    what cannot be read. thorough: read every record and check it, instead of trusting the
    segments' column files.
    """

    def __init__(
        self,
        path: Path,
        *,
        thorough: bool = False,
        on_bytes: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise ConfigError(f"there is no buffer folder {self.path}")
        self.episodes: dict[Key, Episode] = {}
        self.gone: dict[Key, Episode] = {}
        self.deleted: set[Key] = set()
        self.retired: dict[str, int] = {}
        self.schemas: dict[int, Schema] = {}
        self.segments: list[Segment] = []
        self.damaged: list[tuple[int, int]] = []
        for number in list_segments(self.path):
            segment = self._find(number)
            if segment is None:  # deleted in this moment
                continue
            block = None if thorough else load_columns(segment)
            if block is None:
                block = Block.read(segment.path, number)
            self._take(block)
            self.segments.append(segment)
            on_bytes(segment.nbytes)
        for key in self.deleted & self.episodes.keys():
            self.gone[key] = self.episodes.pop(key)

    def _find(self, number: int) -> Segment | None:
        for sealed in (False, True):  # an open one may be sealed in this moment
            path = segment_path(self.path, number, sealed=sealed)
            try:
                return Segment(number, path, sealed, path.stat().st_size)
            except FileNotFoundError:
                continue
        return None

    @property
    def nbytes(self) -> int:
        """Bytes of all segments."""
        return sum(segment.nbytes for segment in self.segments)

    @property
    def num_steps(self) -> int:
        """Actions of all episodes."""
        return sum(episode.steps for episode in self.episodes.values())

    def was_deleted(self, key: Key) -> bool:
        """Whether the episode was here and is no more."""
        stream, number = key
        retired = key not in self.episodes and number < self.retired.get(stream, 0)
        return key in self.deleted or retired

    def _take(self, block: Block) -> None:
        self.damaged += [(block.segment, offset) for offset in block.damaged]
        for control in block.controls:
            self.deleted.update((stream, number) for stream, number in control.deleted)
            for stream, number in control.retired.items():
                self.retired[stream] = max(self.retired.get(stream, 0), number)
        for number, rows in block.rows.items():
            self.schemas[number] = rows.schema
            view = rows.view
            order = np.argsort(view[".episode"], kind="stable")
            ordinals = view[".episode"][order]
            cuts = (np.flatnonzero(np.diff(ordinals)) + 1).tolist()
            for first, last in zip([0, *cuts], [*cuts, len(view)], strict=True):
                if first < last:
                    key = block.episodes[int(ordinals[first])]
                    episode = self.episodes.get((key.stream, key.number))
                    if episode is None:
                        episode = Episode((key.stream, key.number), key.task, key.seed)
                        self.episodes[episode.key] = episode
                    _add(episode, block.segment, number, view[order[first:last]])

    def stream_schemas(self) -> dict[str, list[Schema]]:
        """The schemas of each stream; more than one if its codecs changed."""
        found: dict[str, dict[int, Schema]] = {}
        for (stream, _), episode in self.episodes.items():
            for part in episode.parts:
                found.setdefault(stream, {})[part.schema] = self.schemas[part.schema]
        return {stream: list(schemas.values()) for stream, schemas in sorted(found.items())}

    def records(self, keys: Collection[Key]) -> Iterator[StoredStep]:
        """Records of these episodes' steps, in the order in which they were written."""
        wanted = {part.segment for key in keys for part in self.episodes[key].parts}
        for segment in self.segments:
            if segment.number in wanted:
                yield from self._stored(segment, keys)

    def _stored(self, segment: Segment, keys: Collection[Key]) -> Iterator[StoredStep]:
        with self._open(segment) as file:
            for record in Walk(file):
                if record.schema in (SCHEMA_RECORD, CONTROL_RECORD):
                    continue
                schema = self.schemas.get(record.schema)
                try:
                    header, _ = decode_header(record.payload)
                except CorruptDataError:
                    continue
                if schema is not None and (header.stream, header.episode) in keys:
                    yield StoredStep(header, schema, record.payload)

    def of_episode(self, episode: Episode) -> Iterator[StoredStep]:
        """Records of an episode's steps, in order of index. Raises CorruptDataError."""
        places = [
            (index, part.segment, part.schema, offset)
            for part in episode.parts
            for index, offset in zip(part.indices.tolist(), part.offsets.tolist(), strict=True)
        ]
        numbers = {segment.number: segment for segment in self.segments}
        files: dict[int, SegmentFile] = {}
        try:
            for index, number, schema, offset in sorted(places):
                if number not in files:
                    files[number] = self._open(numbers[number])
                record = files[number].record_at(offset)
                if record is None:
                    raise CorruptDataError(
                        f"{episode}, step {index} cannot be read: {numbers[number].path.name} is "
                        f"damaged at byte {offset}. `embodied buffer verify` names all damage"
                    )
                header, _ = decode_header(record.payload)
                yield StoredStep(header, self.schemas[schema], record.payload)
        finally:
            for file in files.values():
                file.close()

    def _open(self, segment: Segment) -> SegmentFile:
        try:
            return SegmentFile(segment.path, segment.number)
        except FileNotFoundError:  # it was sealed meanwhile
            return SegmentFile(segment_path(self.path, segment.number, sealed=True), segment.number)


def _add(episode: Episode, segment: int, schema: int, view: np.ndarray) -> None:
    flags = view[".flags"]
    final, success, intervention = (
        (flags >> FLAGS.index(name) & 1).astype(bool)
        for name in ("final", "success", "intervention")
    )
    acted = ~final
    index, record = view[".index"].copy(), view[".record"].copy()
    episode.parts.append(Part(segment, schema, index, record))
    episode.steps += int(acted.sum())
    episode.final |= bool(final.any())
    episode.success |= bool((success & acted).any())
    episode.interventions += int((intervention & acted).sum())
    versions, counts = np.unique(view["policy_version"][acted], return_counts=True)
    for version, count in zip(versions.tolist(), counts.tolist(), strict=True):
        episode.versions[version] = episode.versions.get(version, 0) + count


def load_columns(segment: Segment) -> Block | None:
    """A segment's column file; None if there is none that fits it."""
    if not segment.sealed:
        return None
    try:
        path = block_path(segment.path.parent, segment.number)
        return Block.load(path, segment.number, segment.nbytes)
    except (CorruptDataError, OSError):
        return None


def merged_controls(contents: Iterable[Contents], there: Collection[Key]) -> Control:
    """Which episodes were deleted, for a new folder that holds `there`."""
    deleted: set[Key] = set()
    retired: dict[str, int] = {}
    for source in contents:
        deleted |= source.deleted
        for stream, number in source.retired.items():
            retired[stream] = max(retired.get(stream, 0), number)
    return Control(deleted=tuple(sorted(deleted - set(there))), retired=retired)
