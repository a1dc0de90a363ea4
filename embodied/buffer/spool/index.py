"""What of a spool's log is still to be sent: where each step lies, by episode; no payloads."""

import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from embodied.buffer.log.segments import (
    Record,
    SegmentFile,
    end_of,
    list_segments,
    segment_path,
)
from embodied.buffer.log.tail import LogReader
from embodied.buffer.spool.names import prefix_of
from embodied.buffer.steps.records import (
    CONTROL_RECORD,
    SCHEMA_RECORD,
    StepHeader,
    decode_control,
    decode_header,
)
from embodied.buffer.steps.schema import schema_id
from embodied.buffer.write.acknowledged import Acknowledged, AcknowledgedFile, load_acknowledged
from embodied.core.errors import CorruptDataError

_OPEN_FILES = 4
_ABANDONED_SEGMENTS = 4
_OFFSET_BITS = 32


@dataclass(slots=True, eq=False)
class SpooledEpisode:
    """An episode and how far it is sent; indices of steps, each behind the last one.

    first: the first that the spool still has. places: segment << 32 | offset of each from there,
    0 where one is missing. end: of those without a gap. acknowledged <= sent <= end. most_sent:
    ever. final: of the final observation. known: the other side was asked how far it is. begun: it
    was sent while it was its stream's newest. alone: it shares no batch since one was refused.
    set_aside: why it is not sent. queued: rank under which it stands in the backlog.
    """

    stream: str
    number: int
    order: int
    first: int
    places: "array[int]" = field(default_factory=lambda: array("Q"))
    sizes: "array[int]" = field(default_factory=lambda: array("I"))
    seen_s: "array[float]" = field(default_factory=lambda: array("d"))
    segments: set[int] = field(default_factory=set)
    end: int = 0
    sent: int = 0
    acknowledged: int = 0
    most_sent: int = 0
    final: int | None = None
    success: bool = False
    intervention: bool = False
    known: bool = False
    begun: bool = False
    alone: bool = False
    refusals: int = 0
    set_aside: str | None = None
    queued: int | None = None

    @property
    def key(self) -> tuple[str, int]:
        """Stream and number."""
        return self.stream, self.number

    @property
    def total(self) -> int:
        """Index behind the last step that is there, gap or not."""
        return self.first + len(self.places)

    @property
    def rank(self) -> int:
        """Its place in the backlog: interventions, failures, the rest."""
        if self.intervention:
            return 0
        return 1 if self.final is not None and not self.success else 2

    @property
    def ready(self) -> bool:
        """Whether it has steps that may be sent."""
        return self.known and self.set_aside is None and self.sent < self.end

    @property
    def unknown(self) -> bool:
        """Whether the other side has to be asked before more of it is sent."""
        return not self.known and self.set_aside is None and self.sent < self.end

    def add(self, index: int, record: Record, now_s: float) -> None:
        """Note where a step lies."""
        before = max(0, self.first - index)  # lost to damage and recorded again
        behind = max(0, index + 1 - self.total)
        if before:
            self.places[:0] = array("Q", [0] * before)
            self.sizes[:0] = array("I", [0] * before)
            self.seen_s[:0] = array("d", [0] * before)
        for values in (self.places, self.sizes, self.seen_s):
            values.extend([0] * behind)
        self.first -= before
        at = index - self.first
        self.places[at] = record.segment << _OFFSET_BITS | record.offset
        self.sizes[at] = record.payload.nbytes
        self.seen_s[at] = now_s
        self.segments.add(record.segment)
        while self.end < self.total and self.places[self.end - self.first]:
            self.end += 1

    def nbytes(self, start: int, stop: int) -> tuple[int, int]:
        """Steps and bytes that are there of a range of indices."""
        first, last = max(0, start - self.first), max(0, stop - self.first)
        sizes = self.sizes[first:last]
        return len(sizes) - sizes.count(0), sum(sizes)


class SpoolIndex:
    """Follows the log in `path`, which another process writes.

    on_step: called after each step that was noted, with its episode; on_drop: with each that has
    nothing left to send. depth_steps, depth_bytes: not acknowledged. next_episode: stream →
    smallest number above all of its episodes. Raises RunInUseError while another process sends it.
    """

    def __init__(
        self,
        path: Path,
        host: str,
        on_step: Callable[[SpooledEpisode], None],
        on_drop: Callable[[SpooledEpisode], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = Path(path)
        self._prefix = prefix_of(host)
        self._on_step = on_step
        self._on_drop = on_drop
        self._clock = clock
        self._file = AcknowledgedFile(self._path)
        stored = load_acknowledged(self._path)
        self._done = set(stored.segments)
        self._stored: set[int] | None = None
        self._log = LogReader(self._path, skip=self._done.__contains__)
        self._newest = 0
        self._left: dict[int, set[tuple[str, int]]] = {}
        self._damaged: set[int] = set()
        self._num_damaged = 0
        self._schemas: dict[int, bytes] = {}
        self._files: dict[int, SegmentFile] = {}
        self._indexed = (0, 0)
        self._synced = (0, 0)
        self.episodes: dict[tuple[str, int], SpooledEpisode] = {}
        self.next_episode = dict(stored.episodes)
        self.num_episodes = 0
        self.depth_steps = 0
        self.depth_bytes = 0

    def refresh(self, max_records: int) -> bool:
        """Note records that have come, at most so many; whether there may be more."""
        count = 0
        for record in islice(self._log.poll(), max_records):
            count += 1
            if record.segment != self._newest:
                self._newest = record.segment
                self._left.setdefault(record.segment, set())
                self._settle_abandoned()
            self._indexed = record.segment, end_of(record)
            try:
                self._take(record)
            except CorruptDataError:
                self._damaged.add(record.segment)
        if len(self._log.damaged) != self._num_damaged:
            self._damaged.update(segment for segment, _ in self._log.damaged)
            self._num_damaged = len(self._log.damaged)
        return count == max_records

    def _take(self, record: Record) -> None:
        if record.schema == SCHEMA_RECORD:
            self._schemas[schema_id(record.payload)] = bytes(record.payload)
        elif record.schema == CONTROL_RECORD:
            control = decode_control(record.payload)
            for stream, number in control.deleted:
                self._above(stream, number + 1)
                if (episode := self.episodes.get((stream, number))) is not None:
                    self._drop(episode)
            for stream, number in control.retired.items():
                self._above(stream, number)
        elif record.schema in self._schemas:
            self._note(decode_header(record.payload)[0], record)
        else:
            raise CorruptDataError(f"schema {record.schema} is lost")

    def _note(self, header: StepHeader, record: Record) -> None:
        key = header.stream, header.episode
        episode = self.episodes.get(key)
        if episode is None:
            episode = SpooledEpisode(*key, self.num_episodes, header.index)
            episode.end = episode.sent = episode.acknowledged = header.index
            self.episodes[key] = episode
            self.num_episodes += 1
            if not header.stream.startswith(self._prefix):
                episode.set_aside = (
                    f"stream '{header.stream}' does not begin with '{self._prefix}': name the "
                    "streams of this host so"
                )
        episode.add(header.index, record, self._clock())
        if header.final:
            episode.final = header.index
        else:
            episode.success |= header.flag("success")
            episode.intervention |= header.flag("intervention")
        if header.index >= episode.acknowledged:
            self.depth_steps += 1
            self.depth_bytes += record.payload.nbytes
        self._left[record.segment].add(key)
        self._above(header.stream, header.episode + 1)
        self._on_step(episode)

    def _above(self, stream: str, number: int) -> None:
        self.next_episode[stream] = max(self.next_episode.get(stream, 0), number)

    def acknowledge(self, episode: SpooledEpisode, index: int) -> None:
        """Note that an episode is durable at the other side up to an index, or only up to it."""
        low, high = sorted((episode.acknowledged, index))
        steps, nbytes = episode.nbytes(low, high)
        sign = -1 if index == high else 1
        if self.episodes.get(episode.key) is episode:
            self.depth_steps += sign * steps
            self.depth_bytes += sign * nbytes
        episode.acknowledged = index
        if episode.final is not None and index > episode.final:
            self._drop(episode)

    def _settle_abandoned(self) -> None:
        """Episodes that never closed and seem not to go on need no more than what is there."""
        for episode in list(self.episodes.values()):
            sent = episode.acknowledged == episode.total and episode.set_aside is None
            if sent and max(episode.segments) <= self._newest - _ABANDONED_SEGMENTS:
                self._drop(episode)

    def _drop(self, episode: SpooledEpisode) -> None:
        if self.episodes.get(episode.key) is not episode:
            return
        del self.episodes[episode.key]
        steps, nbytes = episode.nbytes(episode.acknowledged, episode.total)
        self.depth_steps -= steps
        self.depth_bytes -= nbytes
        for segment in episode.segments:
            self._left[segment].discard(episode.key)
        self._on_drop(episode)

    def read(self, episode: SpooledEpisode, index: int) -> tuple[int, memoryview]:
        """Schema id and payload of a step, durable in the spool from then on.

        Raises CorruptDataError if it cannot be read any more.
        """
        place = episode.places[index - episode.first]
        segment, offset = place >> _OFFSET_BITS, place & ((1 << _OFFSET_BITS) - 1)
        try:
            file = self._files.get(segment) or self._open(segment)
        except FileNotFoundError:
            raise CorruptDataError(f"segment {segment} of {self._path} is gone") from None
        record = file.record_at(offset)
        if record is None:
            self._damaged.add(segment)
            raise CorruptDataError(f"{file.path} is damaged at byte {offset}")
        # A segment before the newest is sealed, which made it durable.
        if segment == self._indexed[0] and (segment, offset) >= self._synced:
            indexed = self._indexed
            file.sync()
            self._synced = indexed
        return record.schema, record.payload

    def _open(self, segment: int) -> SegmentFile:
        while len(self._files) >= _OPEN_FILES:
            self._files.pop(next(iter(self._files))).close()
        path = segment_path(self._path, segment, sealed=False)
        try:
            file = SegmentFile(path, segment)
        except FileNotFoundError:
            file = SegmentFile(segment_path(self._path, segment, sealed=True), segment)
        self._files[segment] = file
        return file

    def schema(self, number: int) -> bytes:
        """The payload of a schema's own record."""
        return self._schemas[number]

    def store(self) -> None:
        """Make durable which segments have nothing left to send, if that has changed."""
        left = [number for number, keys in self._left.items() if not keys]
        for number in left:
            if number < self._newest:
                del self._left[number]
                if number not in self._damaged:
                    self._done.add(number)
        if self._done == self._stored:
            return
        self._done &= list_segments(self._path).keys()
        self._file.store(Acknowledged(tuple(sorted(self._done)), self._newest, self.next_episode))
        self._stored = set(self._done)

    def close(self) -> None:
        """Close all files; safe to call twice."""
        self._log.close()
        for file in self._files.values():
            file.close()
        self._files.clear()
        self._file.close()
