"""What a writer knows of each episode: enough to put its steps in order and to drop duplicates."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec
import numpy as np

from embodied.buffer.steps.blocks import Block
from embodied.buffer.steps.records import Control, StepHeader
from embodied.buffer.steps.schema import FLAGS
from embodied.core.errors import ConfigError

_ABANDONED_SEGMENTS = 4
_FINAL = 1 << FLAGS.index("final")


class StepOrderError(ConfigError):
    """A step does not continue its episode: a gap, a closed episode, or time going backwards."""


class StreamCounts(msgspec.Struct, forbid_unknown_fields=True):
    """What one stream has stored. steps: actions, final observations not counted."""

    steps: int = 0
    episodes: int = 0
    closed: int = 0


@dataclass(slots=True)
class Progress:
    """Indices seen of an episode: all below next_index but `missing` (lost to damage).

    t_ns: time of its newest step. segments: first and last one that has steps of it.
    """

    next_index: int = 0
    missing: set[int] = field(default_factory=set)
    final_index: int | None = None
    t_ns: int | None = None
    steps: int = 0
    segments: tuple[int, int] = (0, 0)


class Journal:
    """Every episode's progress, by stream and number.

    deleted: episodes that count as not there → first and last segment that has steps of them.
    retired: stream → its episodes below this number that are not there were deleted.
    """

    def __init__(self) -> None:
        self._episodes: dict[str, dict[int, Progress]] = {}
        self.streams: dict[str, StreamCounts] = {}
        self.deleted: dict[tuple[str, int], tuple[int, int]] = {}
        self.retired: dict[str, int] = {}

    def is_duplicate(self, header: StepHeader) -> bool:
        """Whether the step is there, or was; StepOrderError if it does not continue its episode."""
        stream, number, index = header.stream, header.episode, header.index
        progress = self._episodes.get(stream, {}).get(number)
        if progress is None:
            if (stream, number) in self.deleted or number < self.retired.get(stream, 0):
                return True
            progress = Progress()
        elif (stream, number) in self.deleted or index < progress.next_index:
            return (stream, number) in self.deleted or index not in progress.missing
        where = f"stream '{stream}', episode {number}"
        if progress.final_index is not None:
            raise StepOrderError(
                f"{where} is closed by its final observation at index {progress.final_index}; a "
                f"step of index {index} belongs to a new episode"
            )
        if index > progress.next_index:
            raise StepOrderError(
                f"{where}: step of index {index} leaves a gap; index {progress.next_index} is next"
            )
        if progress.t_ns is not None and header.t_ns < progress.t_ns:
            raise StepOrderError(
                f"{where}: time goes backwards at index {index}: t_ns is {header.t_ns}, of the "
                f"step before it {progress.t_ns}; a stream has one monotonic clock"
            )
        return False

    def note(self, header: StepHeader, segment: int) -> None:
        """Note a step that was appended."""
        progress = self._progress(header.stream, header.episode, segment)
        counts = self.streams[header.stream]
        if header.index < progress.next_index:
            progress.missing.discard(header.index)
        else:
            progress.missing.update(range(progress.next_index, header.index))
            progress.next_index = header.index + 1
            progress.t_ns = header.t_ns
        if header.final:
            progress.final_index = header.index
            counts.closed += 1
        else:
            progress.steps += 1
            counts.steps += 1

    def _progress(self, stream: str, number: int, segment: int) -> Progress:
        episodes = self._episodes.setdefault(stream, {})
        counts = self.streams.setdefault(stream, StreamCounts())
        progress = episodes.get(number)
        if progress is None:
            progress = episodes[number] = Progress(segments=(segment, segment))
            counts.episodes += 1
        progress.segments = progress.segments[0], max(progress.segments[1], segment)
        return progress

    def note_block(self, block: Block) -> None:
        """Note all steps and control records of a segment."""
        for rows in block.rows.values():
            heads = rows.heads()
            ordinals, index, flags, times = (
                heads[name].astype(np.int64) for name in (".episode", ".index", ".flags", "t_ns")
            )
            key = ordinals << 32 | index
            if (key[1:] <= key[:-1]).any():
                order = np.argsort(key, kind="stable")
                ordinals, index, flags, times = (
                    column[order] for column in (ordinals, index, flags, times)
                )
            final = flags & _FINAL != 0
            cuts = (np.flatnonzero(np.diff(ordinals)) + 1).tolist()
            for first, last in zip([0, *cuts], [*cuts, len(index)], strict=True):
                if first < last:
                    key = block.episodes[int(ordinals[first])]
                    gone = self.deleted.get(key[:2])
                    if gone is not None:
                        self.deleted[key[:2]] = gone[0] or block.segment, block.segment
                        continue
                    progress = self._progress(key.stream, key.number, block.segment)
                    part = slice(first, last)
                    self._note_rows(key.stream, progress, index[part], final[part], times[part])
        for control in block.controls:
            self.obey(control)

    def _note_rows(
        self,
        stream: str,
        progress: Progress,
        index: np.ndarray,
        final: np.ndarray,
        times: np.ndarray,
    ) -> None:
        first, last, fresh = int(index[0]), int(index[-1]), len(index)
        if first < progress.next_index or last - first + 1 != len(index):
            seen = set(index.tolist())
            fresh = sum(i >= progress.next_index or i in progress.missing for i in seen)
            progress.missing -= seen
            progress.missing.update(set(range(progress.next_index, last + 1)) - seen)
        else:
            progress.missing.update(range(progress.next_index, first))
        if last >= progress.next_index:
            progress.next_index, progress.t_ns = last + 1, int(times[-1])
        counts, ended = self.streams[stream], progress.final_index is None and bool(final.any())
        if ended:
            progress.final_index = int(index[final][-1])
            counts.closed += 1
        progress.steps += fresh - ended
        counts.steps += fresh - ended

    def obey(self, control: Control) -> None:
        """Take over what a control record says."""
        for key in control.deleted:
            self.delete(*key)
        for stream, number in control.retired.items():
            self.retired[stream] = max(self.retired.get(stream, 0), number)

    def has(self, stream: str, number: int) -> bool:
        """Whether an episode is there."""
        return number in self._episodes.get(stream, {})

    def delete(self, stream: str, number: int) -> bool:
        """Count an episode as not there any more; False if it was not."""
        progress = self._episodes.get(stream, {}).pop(number, None)
        if progress is None:
            self.deleted.setdefault((stream, number), (0, 0))
            return False
        self.deleted[stream, number] = progress.segments
        counts = self.streams[stream]
        counts.steps -= progress.steps
        counts.episodes -= 1
        counts.closed -= progress.final_index is not None
        return True

    def segment_removed(self, removed: int, kept: Iterable[int]) -> Control:
        """Count episodes with steps in a removed segment as deleted; returns what to record."""
        for stream, episodes in self._episodes.items():
            for number in [n for n, p in episodes.items() if _within(removed, p.segments)]:
                self.delete(stream, number)
        for (stream, number), segments in self.deleted.items():
            if _within(removed, segments):
                self.retired[stream] = max(self.retired.get(stream, 0), number + 1)
        left = list(kept)
        self.deleted = {
            key: segments
            for key, segments in self.deleted.items()
            if any(_within(number, segments) for number in left)
            or key[1] >= self.retired.get(key[0], 0)
        }
        return Control(tuple(self.deleted), dict(self.retired))

    def grows(self, segment: int, newest: int) -> bool:
        """Whether a stream's newest episode has steps in a segment and seems to go on: it has some
        in one of the last few segments, too."""
        return any(
            progress.final_index is None
            and _within(segment, progress.segments)
            and progress.segments[1] > newest - _ABANDONED_SEGMENTS
            for episodes in filter(None, self._episodes.values())
            for progress in (episodes[max(episodes)],)
        )

    def next_index(self, stream: str, number: int) -> int | None:
        """First index of an episode that is not there; None if the episode was deleted."""
        progress = self._episodes.get(stream, {}).get(number)
        if progress is not None:
            return min(progress.missing, default=progress.next_index)
        gone = (stream, number) in self.deleted or number < self.retired.get(stream, 0)
        return None if gone else 0

    def next_episode(self, stream: str) -> int:
        """Smallest number above all episodes that the stream has or had."""
        numbers = [*self._episodes.get(stream, ()), self.retired.get(stream, 0) - 1]
        numbers += [number for name, number in self.deleted if name == stream]
        return max(numbers, default=-1) + 1


def _within(number: int, segments: tuple[int, int]) -> bool:
    return segments[0] <= number <= segments[1]
